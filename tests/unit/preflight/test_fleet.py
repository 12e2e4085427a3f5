"""Hosts held against each other: what only two of them together show."""

from __future__ import annotations

from typing import Any

from berth.plan.types import Berth, Plan, Slot
from berth.preflight.facts import Address, Answer, Interpreter, Nvidia, NvidiaGpu
from berth.preflight.fleet import check_hosts
from berth.preflight.problem import Problem
from tests.unit.preflight.builders import answer, only, probe, wanted


def fleet(second: dict[str, Any], plan: Plan | None = None, **first: Any) -> list[Problem]:
    answers = {"gpu1": answer("gpu1", **first), "gpu2": answer("gpu2", **second)}
    return check_hosts(answers, {name: wanted(name) for name in answers}, plan)


def test_two_good_hosts() -> None:
    assert fleet({}) == []


def test_a_mixed_python_is_refused_with_the_list() -> None:
    problem = only(fleet({"interpreters": {"python3.12": Interpreter("3.13.1", True)}}))
    assert (problem.kind, problem.severity) == ("python", "error")
    assert problem.found == "3.12: gpu1; 3.13: gpu2"
    assert fleet({"interpreters": {"python3.12": Interpreter("3.12.9", True)}}) == [], "the patch level may differ"


def test_another_driver_version_is_told() -> None:
    gpus = (NvidiaGpu("GPU-x", "NVIDIA L40S"),)
    problem = only(fleet({"nvidia": Nvidia("570.10", gpus, 1)}))
    assert (problem.kind, problem.severity) == ("driver", "warning")
    assert problem.found == "570.10: gpu2; 580.95.05: gpu1"


def test_a_gpu_that_two_hosts_show() -> None:
    twin = Nvidia("580.95.05", (NvidiaGpu("GPU-gpu1-0", "NVIDIA L40S"),), 1)
    problem = only(fleet({"nvidia": twin}))
    assert (problem.kind, problem.severity, problem.objects) == ("gpu", "error", ("gpu1", "gpu2"))
    assert "GPU-gpu1-0" in problem.what


def test_one_machine_under_two_names_and_two_of_one_name() -> None:
    assert only(fleet({"hostname": "gpu1", "machine_id": "id-gpu1"})).what == "two inventory names for one machine"
    assert "call themselves by the same name" in only(fleet({"hostname": "gpu1"})).what


def test_mtus_that_differ_and_a_path_that_carries_less() -> None:
    small = {"10.0.0.2": Address("10.0.0.2", True, "eth0", 1500)}
    problem = only(fleet({"addresses": small}))
    assert (problem.kind, problem.severity, problem.found) == ("mtu", "warning", "1500: gpu2; 9000: gpu1")
    problem = only(fleet({}, peers=(probe("gpu2", mtu=1450),)))
    assert (problem.what, problem.found) == ("the path to gpu2 carries less than its interface", "1450 bytes")


def plan(*uuids: str) -> Plan:
    slots = tuple(
        Slot(f"gpu1-{i}", "gpu1", (uuid,), (i,), "NVIDIA L40S", 40_000, 46_068) for i, uuid in enumerate(uuids)
    )
    return Plan("pack", slots, (Berth("chat", "gpu1-0", 1, 100, "because"),))


def test_a_gpu_that_vanished_since_the_plan() -> None:
    assert fleet({}, plan("GPU-gpu1-0", "GPU-gpu1-1")) == []
    problem = only(fleet({}, plan("GPU-gone", "GPU-gpu1-1")))
    assert (problem.kind, problem.severity, problem.objects) == ("gpu", "warning", ("gpu1",))
    assert problem.what == "GPU GPU-gone of slot gpu1-0 has vanished since the last plan, with replicas on it"
    moved = only(fleet({}, plan("GPU-gpu1-0", "GPU-gpu2-3")))
    assert moved.found == "it is in gpu2 now"


def test_a_host_that_does_not_answer_hides_no_fault_of_the_others() -> None:
    answers = {"gpu1": Answer(failed="Connection timed out"), "gpu2": answer("gpu2", euid=1000)}
    told = check_hosts(answers, {name: wanted(name) for name in answers})
    assert [(item.kind, item.objects) for item in told] == [("unreachable", ("gpu1",)), ("root", ("gpu2",))]
