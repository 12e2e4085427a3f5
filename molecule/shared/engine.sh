#!/usr/bin/env bash
# A Docker engine for the lab where none answers: installed from Debian's packages and started, as root.
set -euo pipefail
state=$(cd "$(dirname "$0")/../.." && pwd)/.berth/lab

docker info >/dev/null 2>&1 && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no Docker engine answers, and only root on Debian or Ubuntu gets one installed here; mend: install and start Docker" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
command -v dockerd >/dev/null && command -v mmdebstrap >/dev/null || {
    apt-get update -qq
    # With what they recommend: cgroupfs-mount among them, where no init has mounted the control groups.
    apt-get install -qq -y docker.io iptables mmdebstrap openssh-client >/dev/null
}
mkdir -p "$state"
if [ -d /run/systemd/system ]; then
    systemctl start docker
else
    setsid nohup dockerd --pidfile "$state/dockerd.pid" >"$state/dockerd.log" 2>&1 </dev/null &
fi
for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && exit 0
    sleep 1
done
echo "the Docker engine does not come up; its log: $state/dockerd.log" >&2
tail -20 "$state/dockerd.log" >&2 || true
exit 1
