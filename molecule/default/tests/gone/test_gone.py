"""After teardown nothing of Berth runs, listens or starts at the next boot; environments and logs stay."""

from __future__ import annotations

from testinfra.host import Host

testinfra_hosts = ["ssh://head01", "ssh://gpu01", "ssh://gpu02"]


def test_no_unit_is_left(host: Host) -> None:
    assert host.check_output("systemctl list-units --all --plain --no-legend 'berth-*'") == ""
    assert host.check_output("find /etc/systemd /run/systemd/system -name 'berth-*'") == ""


def test_no_process_is_left(host: Host) -> None:
    assert host.run("pgrep -u berth -a").stdout == ""


def test_no_port_is_held(host: Host) -> None:
    listening = host.check_output("ss -Htln")
    ports = {int(line.split()[3].rpartition(":")[2]) for line in listening.splitlines()}
    assert not ports & {6390, 8275, 8000, 8490, 52690, 52700, 52701}


def test_what_was_made_for_the_run_is_gone(host: Host) -> None:
    for path in ("/etc/berth", "/run/berth", "/etc/tmpfiles.d/berth.conf", "/var/lib/berth/gpu-sim"):
        assert not host.file(path).exists
    assert host.file("/var/lib/berth/agent").is_directory
