#!/bin/sh
# Inside the new root: what makes a Debian tree a host of the lab. $1 is the root.
set -eu
root=$1
# Every host makes its own keys at its first boot.
rm -f "$root"/etc/ssh/ssh_host_*
cat >"$root/etc/systemd/system/ssh-host-keys.service" <<'UNIT'
[Unit]
Description=Make this host's SSH keys, once
Before=ssh.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A
[Install]
RequiredBy=ssh.service
UNIT
chroot "$root" systemctl enable ssh ssh-host-keys
# What needs the kernel's or the console's own, which a container has not.
chroot "$root" systemctl mask systemd-udevd systemd-udevd-kernel.socket systemd-udevd-control.socket \
    systemd-modules-load systemd-resolved getty@tty1 console-getty apt-daily.timer apt-daily-upgrade.timer
chroot "$root" useradd --create-home --shell /bin/bash --groups sudo ops
mkdir -p "$root/etc/ssh/sshd_config.d"
echo "AuthorizedKeysFile /etc/ssh/ops_keys" >"$root/etc/ssh/sshd_config.d/ops.conf"
echo 'ops ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/ops"
chmod 0440 "$root/etc/sudoers.d/ops"
# The address of a container is its own; the name comes from docker.
: >"$root/etc/machine-id"
# nginx and what it needs, not installed: a repository for the scenario whose role installs it. By the apt that makes
# the root, which knows of packages; a host of the lab does not.
[ -z "${MMDEBSTRAP_APT_CONFIG:-}" ] || export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
mkdir -p "$root/opt/packages"
cd "$root/opt/packages"
wanted=$(apt-get install --simulate --no-install-recommends nginx | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
apt-get -o APT::Sandbox::User=root download $wanted
for deb in *.deb; do
    dpkg-deb --field "$deb"
    printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$deb" "$(stat -c %s "$deb")" "$(sha256sum "$deb" | cut -d' ' -f1)"
done >Packages
