"""After the flip: spread over racks, GPUs and nothing lost on the way."""

from __future__ import annotations

from collections import Counter

from testinfra.host import Host

from tests.lab import Lab, gpus_of, name_of

testinfra_hosts = ["ssh://head01", "ssh://gpu01", "ssh://gpu02"]


def test_a_model_stands_in_both_racks(lab: Lab) -> None:
    plan = lab.plan
    assert plan["strategy"] == "spread"
    racks = {slot["name"]: slot["rack"] for slot in plan["slots"]}
    for model in ("chat", "embedding"):
        berths = [berth for berth in plan["berths"] if berth["deployment"] == model]
        assert {racks[berth["slot"]] for berth in berths} == {"rack-a", "rack-b"}


def test_the_driver_shows_the_new_places(host: Host, lab: Lab) -> None:
    slots = lab.slots_of(name_of(host))
    gpus = {gpu["uuid"]: gpu for gpu in gpus_of(host)} if slots else {}
    for slot in slots:
        replicas = sum(berth["replicas"] for berth in lab.berths_on(slot["name"]))
        assert [len(gpus[uuid]["processes"]) for uuid in slot["gpu_uuids"]] == [replicas] * len(slot["gpu_uuids"])


def test_no_request_was_lost(host: Host) -> None:
    if name_of(host) != "head01":
        return
    answers = Counter(host.check_output("cat /run/lab-asked").split())
    assert answers["200"] > 20
    assert set(answers) == {"200"}
