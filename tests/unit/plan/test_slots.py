"""Slot names stay with their GPUs; strangers' memory is counted, and counted steadily."""

from __future__ import annotations

import pytest

from berth.codec import dump, replace
from berth.errors import BerthError
from berth.gpu.types import GpuProcess
from berth.plan.planner import make_plan
from berth.plan.slots import HostInput, build_slots, foreign_mib, load_hosts, natural
from berth.plan.types import Plan
from tests.unit.plan.helpers import L40S, T4, gpu, host, model


def plan_of(hosts: list[HostInput], previous: Plan | None = None, models=()) -> Plan:
    slots, retired, _ = build_slots(hosts, previous, 512, "lab")
    return make_plan(slots, models, "pack", previous, retired)


def names(plan: Plan) -> dict[str, str]:
    return {slot.gpu_uuids[0]: slot.name for slot in plan.slots}


def one(*gpus, shapes=(), rack="", zone="") -> list[HostInput]:
    return [HostInput(host("gpu01", *gpus), rack, zone, shapes)]


def test_names_follow_driver_order_at_first_sight():
    plan = plan_of(one(gpu("GPU-a", 0), gpu("GPU-b", 1), rack="r1", zone="z1"))
    assert names(plan) == {"GPU-a": "gpu01-0", "GPU-b": "gpu01-1"}
    assert (plan.slots[0].rack, plan.slots[0].zone) == ("r1", "z1")
    assert plan.slots[0].vram_mib == 46_068 - 600 - 512
    assert plan.slots[0].total_mib == 46_068


def test_renumbered_cards_keep_their_names():
    before = plan_of(one(gpu("GPU-a", 0), gpu("GPU-b", 1)))
    after = plan_of(one(gpu("GPU-b", 0), gpu("GPU-a", 1)), before)
    assert names(after) == names(before)
    assert {slot.name: slot.gpu_indices for slot in after.slots} == {"gpu01-0": (1,), "gpu01-1": (0,)}


def test_a_vanished_gpu_retires_its_name_and_takes_it_up_again():
    before = plan_of(one(gpu("GPU-a", 0), gpu("GPU-b", 1)))
    swapped = plan_of(one(gpu("GPU-new", 0), gpu("GPU-b", 1)), before)
    assert names(swapped) == {"GPU-new": "gpu01-2", "GPU-b": "gpu01-1"}
    assert swapped.retired == {"GPU-a": "gpu01-0"}
    gone = plan_of([], swapped)
    assert gone.retired == {"GPU-a": "gpu01-0", "GPU-b": "gpu01-1", "GPU-new": "gpu01-2"}
    back = plan_of(one(gpu("GPU-a", 0), gpu("GPU-x", 1)), gone)
    assert names(back) == {"GPU-a": "gpu01-0", "GPU-x": "gpu01-3"}


def test_the_slot_carries_what_the_planner_asks_of_its_gpus():
    linked = [("a", "b"), ("b", "ac"), ("c", "b"), ("d", "")]
    cards = [
        replace(gpu(f"GPU-{name}", at), nvlink_peers=tuple(f"GPU-{peer}" for peer in peers), compute_capability="9.0")
        for at, (name, peers) in enumerate(linked)
    ]
    where = HostInput(host("gpu01", *cards), shapes=((0, 2),), cordoned=("GPU-b", 3), costs={L40S: 2.5, T4: 9.0})
    slots, _, _ = build_slots([where])
    seen = [(slot.name, slot.nvlink_group, slot.cordoned, slot.cost, slot.compute_capability) for slot in slots]
    assert seen == [
        ("gpu01-0", "nvlink0", False, 2.5, "9.0"),
        ("gpu01-1", "nvlink0", True, 2.5, "9.0"),
        ("gpu01-2", "", True, 2.5, "9.0"),
    ]


@pytest.mark.parametrize(
    ("marks", "words"),
    [({"cordoned": (7,)}, "names a GPU that is not there"), ({"costs": {L40S: 0.0}}, "is not a price")],
)
def test_a_wrong_mark_is_refused(marks, words):
    with pytest.raises(BerthError, match=words):
        build_slots([HostInput(host("gpu01", gpu("GPU-a", 0)), **marks)])


def test_a_lost_gpu_gets_no_slot_and_its_number_is_left_free():
    slots, _, problems = build_slots(one(gpu("GPU-a", 0), gpu("lost-index-1", 1, lost="GPU is lost"), gpu("GPU-c", 2)))
    assert [slot.name for slot in slots] == ["gpu01-0", "gpu01-2"]
    assert problems == ("gpu01: GPU 1 (lost-index-1) gets no slot: GPU is lost",)


def test_mig_instances_are_gpus_and_their_parent_is_not():
    cards = [gpu("GPU-a", 0), gpu("MIG-1", 0, mig_parent="GPU-a"), gpu("MIG-2", 0, mig_parent="GPU-a"), gpu("GPU-b", 1)]
    assert names(plan_of(one(*cards))) == {"MIG-1": "gpu01-0", "MIG-2": "gpu01-1", "GPU-b": "gpu01-2"}


def test_shapes_by_index_and_uuid():
    cards = [gpu(f"GPU-{n}", n) for n in range(4)]
    plan = plan_of(one(*cards, shapes=((0, 1), ("GPU-3",))))
    assert [(slot.name, slot.gpu_uuids) for slot in plan.slots] == [
        ("gpu01-0", ("GPU-0", "GPU-1")),
        ("gpu01-1", ("GPU-2",)),
        ("gpu01-2", ("GPU-3",)),
    ]
    swapped = plan_of(one(gpu("GPU-1", 0), gpu("GPU-0", 1), *cards[2:], shapes=((0, 1), ("GPU-3",))), plan)
    assert swapped.slots[0].gpu_uuids == ("GPU-0", "GPU-1")
    assert swapped.slots[0].name == "gpu01-0"


def test_a_shape_with_a_lost_gpu_is_no_slot_and_is_not_regrouped():
    cards = [gpu("GPU-0", 0), gpu("GPU-1", 1), gpu("GPU-2", 2)]
    before = plan_of(one(*cards, shapes=(("GPU-0", "GPU-1"),)))
    lost = [cards[0], gpu("lost-index-1", 1, lost="GPU is lost"), cards[2]]
    slots, retired, problems = build_slots(one(*lost, shapes=(("GPU-0", "GPU-1"),)), before, 512, "lab")
    assert [slot.name for slot in slots] == ["gpu01-1"]
    assert retired == {"GPU-0": "gpu01-0"}
    assert any("cannot stand while one of them is gone or lost" in line for line in problems)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((0, 9),), "names a GPU that is not there; found: 9"),
        ((("GPU-typo",),), "names a GPU that is not there; found: GPU-typo"),
        (((0, 1), ("GPU-1",)), r"GPU 1 \(GPU-1\) is named twice"),
        (((0, 0),), r"GPU 0 \(GPU-0\) is named twice"),
        (((0, 2),), "groups unequal GPUs"),
    ],
)
def test_wrong_shapes(shapes, message):
    cards = [gpu("GPU-0", 0), gpu("GPU-1", 1), gpu("GPU-2", 2, product=T4)]
    with pytest.raises(BerthError, match=message):
        build_slots(one(*cards, shapes=shapes))


def test_the_same_host_or_gpu_twice():
    with pytest.raises(BerthError, match="same host is listed twice; found: gpu01"):
        build_slots(one(gpu("GPU-a", 0)) * 2)
    with pytest.raises(BerthError, match="GPU GPU-a is on two hosts, gpu01 and gpu02"):
        build_slots([*one(gpu("GPU-a", 0)), HostInput(host("gpu02", gpu("GPU-a", 0)))])
    lost = gpu("lost-index-0", 0, lost="GPU is lost")
    assert build_slots([*one(lost), HostInput(host("gpu02", lost))])[0] == ()


def test_foreign_memory_is_strangers_and_what_nobody_holds():
    ours = GpuProcess(10, 9_000, cluster="lab")
    stranger = GpuProcess(11, 1_000)
    assert foreign_mib(gpu("g", 0, used=10_000, processes=(ours, stranger)), "lab", True) == 1_000
    assert foreign_mib(gpu("g", 0, used=10_064, processes=(ours, stranger)), "lab", True) == 1_000
    assert foreign_mib(gpu("g", 0, used=10_500, processes=(ours, stranger)), "lab", True) == 1_500
    assert foreign_mib(gpu("g", 0, used=10_000, processes=(ours, stranger)), "other", True) == 10_000
    untold = replace(ours, vram_mib=None)
    assert foreign_mib(gpu("g", 0, used=10_000, processes=(untold, stranger)), "lab", True) == 1_000


def test_hidden_processes_count_as_foreign_only_where_berth_has_nothing():
    hidden = one(gpu("GPU-a", 0, used=5_000, processes=None))
    slots, _, problems = build_slots(hidden, None, 512, "lab")
    assert slots[0].foreign_mib == 5_120
    assert "gpu01-0: the driver shows no processes on GPU 0; its memory in use counts as foreign" in problems[0]
    before = plan_of(one(gpu("GPU-a", 0)), models=[model("chat", 1, 4_000)])
    slots, _, problems = build_slots(hidden, before, 512, "lab")
    assert slots[0].foreign_mib == 0
    assert "counts as ours" in problems[0]


def test_foreign_memory_moves_in_steps_and_does_not_flap():
    def seen(mib: int, before: Plan | None) -> Plan:
        return plan_of(one(gpu("GPU-a", 0, used=mib, processes=(GpuProcess(1, mib),) if mib else ())), before)

    plan = seen(500, None)
    assert plan.slots[0].foreign_mib == 512
    for mib, wanted in ((512, 512), (300, 512), (520, 768), (505, 768), (400, 768), (250, 256), (0, 0)):
        plan = seen(mib, plan)
        assert plan.slots[0].foreign_mib == wanted, mib


def test_a_reserve_larger_than_the_gpu_is_a_problem_in_words():
    slots, _, problems = build_slots(one(gpu("GPU-a", 0, total=400, reserved=0)), None, 512, "lab")
    assert slots[0].vram_mib == 0
    assert "nothing can be promised" in problems[0]
    with pytest.raises(BerthError, match="reserve_mib is negative; found: -1"):
        build_slots([], None, -1)


def test_hosts_are_read_strictly():
    raw = {"host_gpus": dump(host("gpu01", gpu("GPU-a", 0))), "rack": 12, "slot_shapes": [["0"]]}
    assert load_hosts([raw])[0] == HostInput(host("gpu01", gpu("GPU-a", 0)), "12", "", (("0",),))
    assert build_slots(load_hosts([raw]))[0][0].product == L40S
    with pytest.raises(BerthError, match=r"hosts: 0\.racks: unknown key"):
        load_hosts([{**raw, "racks": "r"}])
    with pytest.raises(BerthError, match=r"0\.host_gpus"):
        load_hosts([{"host_gpus": None}])


def test_natural_order():
    assert sorted(["a-10", "a-9", "b-1", "a10-0", "a9-0"], key=natural) == ["a9-0", "a10-0", "a-9", "a-10", "b-1"]


def test_a_gpu_that_vanished_is_told_with_where_it_went():
    cards = (gpu("GPU-a", 0), gpu("GPU-b", 1))
    before = plan_of(one(*cards))
    slots, retired, problems = build_slots(one(gpu("GPU-a", 0)), before)
    assert [item.name for item in slots] == ["gpu01-0"]
    assert retired == {"GPU-b": "gpu01-1"}
    told = "GPU GPU-b of slot gpu01-1 has vanished since the last plan: "
    assert problems == (told + "gpu01's driver does not show it",)
    moved = [*one(gpu("GPU-a", 0)), HostInput(host("gpu02", gpu("GPU-b", 0)))]
    assert build_slots(moved, before)[2] == (told + "gpu02 has it now",)
    # It may be the lost card that has no UUID left to show.
    ghost = one(gpu("GPU-a", 0), gpu("lost-index-1", 1, lost="GPU is lost"))
    assert build_slots(ghost, before)[2] == ("gpu01: GPU 1 (lost-index-1) gets no slot: GPU is lost",)


def test_renumbered_cards_have_not_vanished():
    before = plan_of(one(gpu("GPU-a", 0), gpu("GPU-b", 1)))
    assert build_slots(one(gpu("GPU-b", 0), gpu("GPU-a", 1)), before)[2] == ()


def test_a_host_with_another_driver_is_told():
    other = replace(host("gpu02", gpu("GPU-b", 0)), driver_version="570.10")
    (problem,) = build_slots([*one(gpu("GPU-a", 0)), HostInput(other)])[2]
    assert problem.startswith("the hosts have different NVIDIA drivers (570.10: gpu02; ")
