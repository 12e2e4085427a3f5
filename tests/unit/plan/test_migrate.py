"""A migration's steps, replayed by a checker that knows nothing of how they were found."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.plan.diff import Rates, cost_of
from berth.plan.migrate import Migration, migrate
from berth.plan.types import Berth, Deployment, Plan, Slot
from tests.unit.plan.helpers import model, slot

FULL = 44_000


def plan(slots: list[Slot], deployments: list[Deployment], *places: tuple[str, str, int, int]) -> Plan:
    """A plan with exactly these berths: (deployment, slot, replicas, MiB)."""
    berths = tuple(Berth(name, where, count, mib, "") for name, where, count, mib in sorted(places) if count)
    asked = {item.name: item.replicas for item in deployments}
    return Plan("pack", tuple(slots), berths, deployments=asked, strategies=dict.fromkeys(asked, "pack"))


def replay(old: Plan, new: Plan, deployments: list[Deployment], found: Migration) -> Counter[tuple[str, str, int]]:
    """Take every step; fail where a GPU would be oversold or a deployment fall below what it was promised."""
    room = {uuid: item.free_mib for item in new.slots for uuid in item.gpu_uuids}
    gpus = {item.name: item.gpu_uuids for item in (*old.slots, *new.slots)}
    stands: Counter[tuple[str, str, int]] = Counter()
    held: Counter[str] = Counter()
    up: Counter[str] = Counter()
    for berth in old.berths:
        if set(gpus[berth.slot]) <= set(room):
            stands[berth.deployment, berth.slot, berth.vram_mib] += berth.replicas
            up[berth.deployment] += berth.replicas
            for uuid in gpus[berth.slot]:
                held[uuid] += berth.replicas * berth.vram_mib
    ends = Counter[str]()
    for berth in new.berths:
        ends[berth.deployment] += berth.replicas
    least = {}
    for item in deployments:
        default = max(0, min(item.replicas, old.deployments.get(item.name, 0)) - 1)
        promised = default if item.min_available is None else item.min_available
        # Nobody can keep up what was down already.
        least[item.name] = min(promised, ends[item.name], up[item.name])
    for step in found.steps:
        count = 1 if step.kind == "make" else -1
        key = (step.deployment, step.slot, step.vram_mib)
        assert stands[key] + count >= 0, step
        if count < 0:
            assert up[step.deployment] > least.get(step.deployment, 0), step
        stands[key] += count
        up[step.deployment] += count
        for uuid in gpus[step.slot]:
            held[uuid] += count * step.vram_mib
            assert count < 0 or held[uuid] <= room[uuid], step
        sizes = {size for (name, where, size), n in stands.items() if n and (name, where) == key[:2]}
        assert len(sizes) <= 1, f"a berth runs in two sizes: {step}"
    return +stands


def arrived(new: Plan) -> Counter[tuple[str, str, int]]:
    return +Counter({(item.deployment, item.slot, item.vram_mib): item.replicas for item in new.berths})


def test_made_before_broken_where_there_is_room():
    slots, apps = [slot("a-0"), slot("a-1")], [model("chat", 1, 20_000)]
    old, new = plan(slots, apps, ("chat", "a-0", 1, 20_000)), plan(slots, apps, ("chat", "a-1", 1, 20_000))
    found = migrate(old, new, apps, Rates(1000, 50))
    assert [(step.kind, step.slot) for step in found.steps] == [("make", "a-1"), ("break", "a-0")]
    assert [(step.begin_s, step.end_s) for step in found.steps] == [(0.0, 70.0), (70.0, 70.0)]
    assert (found.elapsed_s, found.cost.moved, found.cost.reload_mib, found.cost.cold_start_s) == (
        70.0,
        1,
        20_000,
        70.0,
    )
    assert found.ok


def swap(min_available: int, spare: bool) -> tuple[Plan, Plan, list[Deployment]]:
    slots = [slot("a-0"), slot("a-1"), *([slot("b-0")] if spare else [])]
    apps = [replace(model(name, 1, 30_000), min_available=min_available) for name in ("chat", "rag")]
    old = plan(slots, apps, ("chat", "a-0", 1, 30_000), ("rag", "a-1", 1, 30_000))
    return old, plan(slots, apps, ("chat", "a-1", 1, 30_000), ("rag", "a-0", 1, 30_000)), apps


def test_a_swap_waits_on_a_spare_gpu():
    old, new, apps = swap(1, spare=True)
    found = migrate(old, new, apps)
    assert found.ok
    assert [(step.slot, step.kind) for step in found.steps if step.temporary] == [
        ("b-0", "make"),
        ("b-0", "break"),
    ] or [step.slot for step in found.steps if step.temporary] == ["b-0"]
    assert replay(old, new, apps, found) == arrived(new)


def test_a_swap_without_a_spare_stops_one():
    old, new, apps = swap(0, spare=False)
    found = migrate(old, new, apps)
    assert [step.kind for step in found.steps] == ["break", "make", "break", "make"]
    assert replay(old, new, apps, found) == arrived(new)


def test_a_swap_that_may_stop_nobody_is_refused_with_the_reason():
    old, new, apps = swap(1, spare=False)
    found = migrate(old, new, apps)
    assert found.steps == ()
    assert len(found.refused) == 2
    assert "chat cannot start on a-1" in found.refused[0]
    assert "rag (30000 MiB; 1 up, min_available 1)" in found.refused[0]
    assert "lower min_available of rag" in found.refused[0]


def test_a_new_footprint_restarts_in_place_one_by_one():
    slots, apps = [slot("a-0"), slot("a-1")], [model("chat", 2, 40_000)]
    old = plan(slots, apps, ("chat", "a-0", 1, 30_000), ("chat", "a-1", 1, 30_000))
    new = plan(slots, apps, ("chat", "a-0", 1, 40_000), ("chat", "a-1", 1, 40_000))
    found = migrate(old, new, apps)
    assert [step.kind for step in found.steps] == ["break", "make", "break", "make"]
    assert (found.cost.restarted, found.cost.moved, found.cost.reload_mib) == (2, 0, 80_000)
    assert replay(old, new, apps, found) == arrived(new)


def test_what_stood_on_a_lost_host_is_replaced_not_stopped():
    apps = [model("chat", 2, 30_000)]
    old = plan([slot("a-0"), slot("b-0")], apps, ("chat", "a-0", 1, 30_000), ("chat", "b-0", 1, 30_000))
    new = plan([slot("b-0"), slot("c-0")], apps, ("chat", "b-0", 1, 30_000), ("chat", "c-0", 1, 30_000))
    found = migrate(old, new, apps)
    assert [(step.kind, step.slot) for step in found.steps] == [("make", "c-0")]
    assert (found.cost.replaced, found.cost.lost, found.cost.moved) == (1, 0, 0)
    nowhere = plan([slot("b-0")], apps, ("chat", "b-0", 1, 30_000))
    assert (cost_of(old, nowhere).replaced, cost_of(old, nowhere).lost) == (0, 1)


def test_a_replica_of_two_gpus_waits_until_both_are_empty():
    fused = replace(
        slot("a-0+1".replace("+1", "")), name="a-0+1", gpu_uuids=("GPU-a-0-0", "GPU-a-1-0"), gpu_indices=(0, 1)
    )
    apps = [model("small", 2, 4_000), model("wide", 1, 20_000, gpus=2)]
    old = plan(
        [slot("a-0"), slot("a-1"), slot("b-0")], apps[:1], ("small", "a-0", 1, 4_000), ("small", "a-1", 1, 4_000)
    )
    new = plan([fused, slot("b-0")], apps, ("small", "b-0", 2, 4_000), ("wide", "a-0+1", 1, 20_000))
    found = migrate(old, new, apps)
    assert found.steps[-1].deployment == "wide"
    assert found.ok
    assert replay(old, new, apps, found) == arrived(new)


def test_a_spare_keeps_the_rules_of_the_model():
    old, new, apps = swap(1, spare=True)
    pinned = [replace(item, pins=("GPU-a-0-0", "GPU-a-1-0")) for item in apps]
    assert not migrate(old, new, pinned).ok
    other = [replace(item, products=("NVIDIA H200",)) for item in apps]
    assert not migrate(old, new, other).ok


def test_room_that_stays_reserved_is_nobodys_on_the_way():
    slots, apps = [slot("a-0"), slot("b-0")], [model("auto", 1, 20_000), model("chat", 1, 30_000)]
    held = Berth("auto", "a-0", 1, 20_000, "", 1)
    old = replace(plan(slots, apps, ("chat", "b-0", 1, 30_000)), berths=(held, Berth("chat", "b-0", 1, 30_000, "")))
    new = replace(old, berths=(held, Berth("chat", "b-0", 1, 32_000, "")))
    found = migrate(old, new, apps)
    assert [(step.kind, step.slot) for step in found.steps] == [("break", "b-0"), ("make", "b-0")]


@st.composite
def two_plans(draw: st.DrawFn) -> tuple[Plan, Plan, list[Deployment]]:
    """Any two full plans of a few GPUs; nothing says that one was made from the other."""
    sizes = draw(st.lists(st.sampled_from([10, 14, 20, 30, 44]), min_size=1, max_size=5))
    least = draw(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=len(sizes), max_size=len(sizes)))
    count = draw(st.integers(1, 5))
    slots = [slot(f"h{number}-0") for number in range(count)]
    names = [f"m{number}" for number in range(len(sizes))]
    new_sizes = [size if draw(st.booleans()) else draw(st.sampled_from([10, 20])) for size in sizes]

    def fill(mib: list[int]) -> list[tuple[str, str, int, int]]:
        places = []
        for item in slots:
            left = 44
            for number in draw(st.lists(st.sampled_from(range(len(sizes))), max_size=5)):
                if mib[number] <= left:
                    left -= mib[number]
                    places.append((names[number], item.name, mib[number] * 1000))
        return [(name, where, n, size) for (name, where, size), n in sorted(Counter(places).items())]

    before, after = fill(sizes), fill(new_sizes)
    asked = Counter[str]()
    for name, _, n, _ in after:
        asked[name] += n
    apps = [
        replace(model(name, asked[name], mib * 1000), min_available=low)
        for name, mib, low in zip(names, new_sizes, least, strict=True)
    ]
    was = [replace(item, replicas=sum(n for name, _, n, _ in before if name == item.name)) for item in apps]
    return plan(slots, was, *before), plan(slots, apps, *after), apps


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(two_plans())
def test_every_step_is_safe_and_the_end_is_the_plan_or_a_refusal(plans: tuple[Plan, Plan, list[Deployment]]):
    old, new, apps = plans
    found = migrate(old, new, apps)
    stands = replay(old, new, apps, found)
    if found.ok:
        assert stands == arrived(new)
    else:
        assert stands != arrived(new)
    assert migrate(old, new, apps) == found


@settings(max_examples=150, deadline=None)
@given(two_plans())
def test_nothing_is_refused_when_everything_may_stop(plans: tuple[Plan, Plan, list[Deployment]]):
    old, new, apps = plans
    apps = [replace(item, min_available=0) for item in apps]
    found = migrate(old, new, apps)
    assert found.ok
    assert replay(old, new, apps, found) == arrived(new)


@settings(max_examples=100, deadline=None)
@given(two_plans())
def test_with_an_empty_gpu_per_replica_nobody_ever_misses_one(plans: tuple[Plan, Plan, list[Deployment]]):
    old, new, apps = plans
    spare = [slot(f"z{number}-0") for number in range(sum(item.replicas for item in new.berths) + 1)]
    old, new = (replace(item, slots=(*item.slots, *spare)) for item in (old, new))
    assume(all(count >= 1 for count in old.deployments.values()))
    apps = [replace(item, min_available=10) for item in apps]
    found = migrate(old, new, apps)
    assert found.ok
    assert replay(old, new, apps, found) == arrived(new)


def test_the_same_plan_costs_nothing():
    apps = [model("chat", 2, 20_000)]
    same = plan([slot("a-0")], apps, ("chat", "a-0", 2, 20_000))
    assert migrate(same, same, apps).steps == ()
    assert cost_of(same, same).reload_mib == 0


@pytest.mark.parametrize(("before", "after", "kinds"), [(3, 1, ["break"] * 2), (1, 3, ["make"] * 2)])
def test_growing_and_shrinking_touch_nobody_else(before: int, after: int, kinds: list[str]):
    slots = [slot("a-0")]
    old = plan(slots, [model("chat", before, 10_000)], ("chat", "a-0", before, 10_000))
    apps = [model("chat", after, 10_000)]
    found = migrate(old, plan(slots, apps, ("chat", "a-0", after, 10_000)), apps)
    assert [step.kind for step in found.steps] == kinds
    assert found.cost.moved == 0
