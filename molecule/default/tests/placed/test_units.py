"""What systemd really loaded and runs."""

from __future__ import annotations

from typing import Any

from testinfra.host import Host

from tests.lab import Lab, name_of, unit

testinfra_hosts = ["ssh://head01", "ssh://gpu01", "ssh://gpu02"]


def units_of(lab: Lab, host: Host) -> list[str]:
    slots = [f"berth-ray-slot@{slot['name']}.service" for slot in lab.slots_of(name_of(host))]
    return slots or ["berth-ray-head.service"]


def test_every_slot_has_its_unit(host: Host, lab: Lab) -> None:
    listed = host.check_output("systemctl list-units --all --plain --no-legend 'berth-ray-*'")
    assert sorted(line.split()[0] for line in listed.splitlines()) == units_of(lab, host)


def test_units_run_and_come_back_after_a_boot(host: Host, lab: Lab) -> None:
    for name in units_of(lab, host):
        found = unit(host, name)
        assert (found["ActiveState"], found["SubState"], found["UnitFileState"]) == ("active", "running", "enabled")
        assert int(found["NRestarts"]) <= 3, "on a busy machine it may have waited for the head, it does not flap"
        assert found["NeedDaemonReload"] == "no"


def test_units_are_kept_within_bounds(host: Host, lab: Lab) -> None:
    wanted = {
        "User": "berth",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "PrivateTmp": "yes",
        "RestrictSUIDSGID": "yes",
        "CapabilityBoundingSet": "",
        "LimitNOFILE": "65536",
        "Restart": "always",
        "OOMPolicy": "continue",
    }
    for name in units_of(lab, host):
        found = unit(host, name)
        assert {key: found.get(key, "") for key in wanted} == wanted


def test_nothing_of_ray_runs_as_root(host: Host) -> None:
    owners = host.check_output("ps -eo user:20,args | grep -E 'raylet|gcs_server|ray::|ray start' | grep -v grep")
    assert owners
    assert {line.split()[0] for line in owners.splitlines()} == {"berth"}


def test_a_unit_cannot_write_beyond_its_directories(host: Host, lab: Lab) -> None:
    pid = unit(host, units_of(lab, host)[0])["MainPID"]
    mounts = host.check_output("cat /proc/%s/mounts", pid)
    options: dict[str, Any] = {line.split()[1]: line.split()[3].split(",") for line in mounts.splitlines()}
    assert "ro" in options["/"]
    assert "rw" in options["/var/lib/berth"]
    assert "rw" in options["/run/berth"]


def test_secrets_are_for_the_units_alone(host: Host) -> None:
    token = host.file("/etc/berth/ray-token")
    assert (token.user, token.mode) == ("berth", 0o600)
    assert token.content_string.strip() not in host.check_output("ps -eo args")


def test_debians_own_units_did_not_fail(host: Host) -> None:
    assert host.check_output("systemctl --failed --plain --no-legend") == ""
