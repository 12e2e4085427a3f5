"""One run of site.yml put everything right, and left alone what stood."""

from __future__ import annotations

from testinfra.host import Host

from tests.lab import Lab, unit

testinfra_hosts = ["ssh://gpu02"]


def test_the_witnesses_agree_again(lab: Lab) -> None:
    report = lab.verify()
    assert (report["rc"], report["failures"]) == (0, [])
    assert lab.plan["strategy"] == "spread"


def test_only_the_stopped_slot_was_started(host: Host) -> None:
    stopped, other = (unit(host, f"berth-ray-slot@{name}.service") for name in ("gpu02-1", "gpu02-0"))
    assert int(stopped["ActiveEnterTimestampMonotonic"]) > int(other["ActiveEnterTimestampMonotonic"])
