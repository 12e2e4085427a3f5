"""Hosts that could not be reached are part of the answer."""

from __future__ import annotations

from berth.ray.types import RayState
from berth.verify.compare import verify
from berth.verify.witnesses import VARIABLE, witnesses
from tests.unit.ray.builders import plan, slot


def test_a_host_that_fell_out_of_the_play_is_a_finding() -> None:
    variables = {
        "gpu01": {VARIABLE: {"msg": "driver away"}, "placement_host_name": "first"},
        "gpu02": {"ansible_host": "192.0.2.1"},
    }
    said = witnesses(["gpu01", "gpu02"], variables)
    assert said == {"first": "driver away", "gpu02": "the host did not answer"}
    report = verify(plan([slot("gpu02-0")], []), RayState(), said, "cluster")
    assert ("host_unreachable", "gpu02") in {(item.kind, item.object) for item in report.findings}
    assert report.exit_code != 0
