"""What the planner promises, for any input and for the cases that other systems got wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.errors import BerthError
from berth.plan.planner import Options, make_plan, solve
from berth.plan.types import STRATEGIES, Deployment, Plan, Slot
from tests.unit.plan.helpers import A100, L40S, T4, grid, model, promised, slot, used_slots, where

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Slot, ...]:
    slots = []
    for host in range(draw(st.integers(1, 4))):
        product, vram = draw(st.sampled_from([(L40S, 44_000), (T4, 14_500), (A100, 80_000)]))
        zone, rack = draw(st.sampled_from(["", "a", "b"])), draw(st.sampled_from(["", "r1", "r2"]))
        for number in range(draw(st.integers(1, 4))):
            foreign = draw(st.sampled_from([0, 0, 0, 256, 5_120, 20_480]))
            gpus = draw(st.sampled_from([1, 1, 1, 1, 2]))
            slots.append(
                slot(f"h{host}-{number}", vram, product=product, gpus=gpus, foreign=foreign, zone=zone, rack=rack)
            )
    return tuple(slots)


@st.composite
def models(draw: st.DrawFn) -> tuple[Deployment, ...]:
    size = st.sampled_from([500, 2_000, 4_000, 9_828, 14_000, 21_000, 40_000])
    return tuple(
        model(
            f"m{number}",
            draw(st.integers(0, 5)),
            draw(
                st.one_of(size, st.fixed_dictionaries({L40S: size, "default": size}), st.fixed_dictionaries({T4: size}))
            ),
            gpus=draw(st.sampled_from([1, 1, 1, 2])),
            strategy=draw(st.sampled_from([None, None, None, *STRATEGIES])),
            products=draw(st.sampled_from([(), (), (L40S,), (T4, A100)])),
        )
        for number in range(draw(st.integers(0, 5)))
    )


STRATEGY = st.sampled_from(STRATEGIES)


def check_sound(plan: Plan, deployments: tuple[Deployment, ...]) -> None:
    """Never oversold, right footprints, nobody lost between placed and unplaced."""
    by_slot = {item.name: item for item in plan.slots}
    by_name = {item.name: item for item in deployments}
    for item in plan.slots:
        assert promised(plan, item.name) <= item.free_mib
        if len(item.gpu_uuids) > 1:
            assert sum(berth.replicas for berth in plan.berths if berth.slot == item.name) <= 1
    for berth in plan.berths:
        deployment = by_name[berth.deployment]
        assert berth.replicas > 0
        assert berth.vram_mib == deployment.footprint_mib(by_slot[berth.slot].product)
        assert len(by_slot[berth.slot].gpu_uuids) == deployment.gpus_per_replica
        assert berth.reason.startswith(plan.strategies[berth.deployment])
    refused = {item.deployment: item.replicas for item in plan.unplaced}
    for deployment in deployments:
        homes = where(plan, deployment.name)
        assert sum(homes.values()) + refused.get(deployment.name, 0) == deployment.replicas
        if plan.strategies[deployment.name] == "strict_pack":
            assert len({by_slot[name].host for name in homes}) <= 1
        if plan.strategies[deployment.name] == "strict_spread":
            assert set(homes.values()) <= {1}


@QUICK
@given(fleets(), models(), STRATEGY)
def test_sound_deterministic_and_idempotent(
    slots: tuple[Slot, ...], deployments: tuple[Deployment, ...], strategy: str
):
    plan = make_plan(slots, deployments, strategy)
    check_sound(plan, deployments)
    assert make_plan(slots, deployments, strategy) == plan
    shuffled = random.Random(7)
    assert (
        make_plan(shuffled.sample(slots, len(slots)), shuffled.sample(deployments, len(deployments)), strategy) == plan
    )
    assert make_plan(slots, deployments, strategy, plan) == plan


@QUICK
@given(fleets(), models(), STRATEGY, STRATEGY)
def test_a_flip_is_sound_and_idempotent(slots, deployments, first, second):
    plan = make_plan(slots, deployments, second, make_plan(slots, deployments, first))
    check_sound(plan, deployments)
    assert make_plan(slots, deployments, second, plan) == plan


@QUICK
@given(fleets(), models(), STRATEGY, st.data())
def test_a_small_change_moves_nobody_else(slots, deployments, strategy, data):
    before = make_plan(slots, deployments, strategy)
    if not deployments:
        return
    changed = data.draw(st.sampled_from(deployments))
    wanted = data.draw(st.integers(0, 6))
    after_list = tuple(replace(item, replicas=wanted) if item == changed else item for item in deployments)
    # Where nobody may move to make room for others; where they may, see test_properties.py.
    after = solve(slots, after_list, strategy, before, options=Options(max_moves=0)).plan
    check_sound(after, after_list)
    refused = {item.deployment for item in before.unplaced}
    for deployment in deployments:
        old, new = where(before, deployment.name), where(after, deployment.name)
        if deployment != changed and deployment.name not in refused:
            assert new == old
    if after.strategies[changed.name] != "strict_pack" and changed.name not in refused:
        old, new = where(before, changed.name), where(after, changed.name)
        grew = wanted >= changed.replicas
        assert all(new.get(name, 0) >= count if grew else True for name, count in old.items())
        assert grew or all(count <= old.get(name, 0) for name, count in new.items())


@QUICK
@given(
    fleets(), st.integers(1, 12), st.sampled_from([2_000, 9_828, 21_000]), st.sampled_from(["spread", "strict_spread"])
)
def test_spread_takes_as_many_gpus_hosts_and_zones_as_there_are(slots, replicas, size, strategy):
    plan = make_plan(slots, [model("chat", replicas, size)], strategy)
    able = [item for item in slots if len(item.gpu_uuids) == 1 and item.free_mib >= size]
    homes = [item for item in plan.slots if item.name in where(plan, "chat")]
    for domain in (lambda s: s.name, lambda s: s.host, lambda s: (s.zone, s.rack), lambda s: s.zone):
        assert len({domain(item) for item in homes}) == min(replicas, len({domain(item) for item in able}))


@QUICK
@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=7), st.sampled_from(["pack", "spread"]))
def test_finds_a_placement_when_one_exists(gpus, tenths, strategy):
    """Against brute force on small cases: nothing feasible is refused."""
    slots = [slot(f"h-{number}", 10_000) for number in range(min(gpus, 3))]
    deployments = [model(f"m{number}", 1, part * 1_000) for number, part in enumerate(tenths)]
    plan = make_plan(slots, deployments, strategy)
    assert bool(plan.unplaced) == (not _feasible(sorted(tenths, reverse=True), [10] * len(slots)))


def _feasible(items: list[int], bins: list[int]) -> bool:
    if not items:
        return True
    for index, room in enumerate(bins):
        if room >= items[0] and room not in bins[:index]:
            bins[index] -= items[0]
            if _feasible(items[1:], bins):
                bins[index] = room
                return True
            bins[index] = room
    return False


@QUICK
@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 8))
def test_flip_there_and_back(hosts, gpus, replicas):
    slots = grid(hosts, gpus)
    deployments = [model("chat", replicas, 9_828), model("embed", 2, 4_000)]
    packed = make_plan(slots, deployments, "pack")
    spread = make_plan(slots, deployments, "spread", packed)
    again = make_plan(slots, deployments, "pack", spread)
    assert len(where(spread, "chat")) == min(replicas, hosts * gpus)
    assert len(used_slots(again)) == len(used_slots(packed))
    assert used_slots(again) <= used_slots(spread)


# --- One case for each thing that must hold ---------------------------------------------------------------------------


def test_pack_shares_one_gpu_and_says_so():
    plan = make_plan(grid(2, 4), [model("chat", 1, 9_828), model("embed", 2, 1_965)], "pack")
    assert used_slots(plan) == {"gpu00-0"}
    reason = next(berth.reason for berth in plan.berths if berth.deployment == "embed")
    assert reason == (
        "pack: 2 of 2 replicas share L40S gpu00-0 with chat; opening another GPU was not needed; "
        "13.4 of 43.0 GiB promised"
    )


def test_pack_prefers_one_host_when_the_gpus_are_equal():
    plan = make_plan(grid(3, 2), [model("chat", 2, 40_000)], "pack")
    assert where(plan, "chat") == {"gpu00-0": 1, "gpu00-1": 1}


def test_spread_goes_over_zones_then_racks_then_hosts():
    slots = [
        slot("a-0", zone="z1", rack="r1"),
        slot("a-1", zone="z1", rack="r1"),
        slot("b-0", zone="z1", rack="r2"),
        slot("c-0", zone="z2", rack="r1"),
    ]
    homes = {n: set(where(make_plan(slots, [model("chat", n, 4_000)], "spread"), "chat")) for n in (1, 2, 3, 4)}
    assert homes[2] == {"a-0", "c-0"}
    assert homes[3] == {"a-0", "b-0", "c-0"}
    assert homes[4] == {"a-0", "a-1", "b-0", "c-0"}


@pytest.mark.parametrize("strategy", ["spread", "pack"])
def test_one_impossible_model_does_not_change_how_the_others_are_placed(strategy):
    slots = grid(2, 2)
    good = [model("chat", 3, 9_828), model("embed", 4, 1_965)]
    alone = make_plan(slots, good, strategy)
    beside = make_plan(slots, [*good, model("moe", 1, 60_000)], strategy)
    assert beside.berths == alone.berths
    assert [item.deployment for item in beside.unplaced] == ["moe"]


def test_spread_levels_by_share_of_the_card_not_by_count():
    slots = [slot("a-0", 80_000, product=A100), slot("b-0", 14_500, product=T4)]
    plan = make_plan(slots, [model(f"m{n}", 1, 4_000) for n in range(6)], "spread")
    assert promised(plan, "a-0") == 20_000
    assert promised(plan, "b-0") == 4_000


def test_pack_opens_the_gpu_that_holds_most_even_on_another_host():
    slots = [slot("h-0", 24_000), slot("h-1", 24_000), slot("z-0", 80_000, product=A100)]
    plan = make_plan(slots, [model("first", 1, 23_000, products=(L40S,)), model("chat", 3, 20_000)], "pack")
    assert where(plan, "chat") == {"z-0": 3}


@pytest.mark.parametrize("strategy", ["pack", "spread"])
def test_a_perfect_fit_that_no_greedy_order_finds(strategy):
    sizes = [9, 7, 4, 9, 6, 5, 7, 9, 4]
    slots = grid(1, 3, 20_000)
    plan = make_plan(slots, [model(f"m{n}", 1, size * 1_000) for n, size in enumerate(sizes)], strategy)
    assert not plan.unplaced
    assert [promised(plan, item.name) for item in slots] == [20_000] * 3


def test_tensor_parallel_takes_a_whole_slot_of_its_size():
    slots = [slot("a-0", gpus=2), slot("a-1", gpus=2), slot("b-0"), slot("b-1")]
    plan = make_plan(slots, [model("big", 2, 10_000, gpus=2), model("chat", 1, 10_000)], "pack")
    assert where(plan, "big") == {"a-0": 1, "a-1": 1}
    assert where(plan, "chat") == {"b-0": 1}
    short = make_plan(slots, [model("big", 3, 10_000, gpus=2)], "pack")
    assert short.unplaced[0].replicas == 1
    none = make_plan(slots, [model("huge", 1, 10_000, gpus=4)], "pack")
    assert "needs a slot of 4 GPUs, slots here have 1, 2" in none.unplaced[0].reason


def test_strict_pack_takes_one_host_with_fewest_gpus():
    slots = [*grid(1, 4, 22_000), slot("z-0", 80_000, product=A100), slot("z-1", 80_000, product=A100)]
    plan = make_plan(slots, [model("chat", 4, 20_000)], "strict_pack")
    assert where(plan, "chat") == {"z-0": 4}


def test_strict_pack_names_what_is_short():
    plan = make_plan(grid(2, 2, 22_000), [model("chat", 3, 20_000)], "strict_pack")
    assert where(plan, "chat") == {}
    reason = plan.unplaced[0].reason
    assert "strict_pack needs room for all 3 on one host: gpu00 has room for 2, gpu01 has room for 2" in reason


def test_strict_pack_moves_whole_when_its_host_cannot_take_one_more():
    slots = [slot("a-0", 22_000), slot("b-0", 22_000), slot("b-1", 22_000)]
    one = make_plan(slots, [model("chat", 1, 20_000)], "strict_pack")
    two = make_plan(
        slots, [model("chat", 2, 20_000)], "strict_pack", replace(one, berths=(replace(one.berths[0], slot="a-0"),))
    )
    assert where(two, "chat") == {"b-0": 1, "b-1": 1}


def test_strict_spread_names_what_is_short():
    plan = make_plan(grid(1, 3), [model("chat", 5, 4_000)], "strict_spread")
    assert where(plan, "chat") == {"gpu00-0": 1, "gpu00-1": 1, "gpu00-2": 1}
    assert plan.unplaced[0].replicas == 2
    assert "strict_spread needs 5 GPUs with one replica each, 3 have room" in plan.unplaced[0].reason


def test_override_stands_when_the_cluster_flips():
    slots = grid(2, 2)
    deployments = [model("chat", 2, 4_000), model("pinned", 2, 4_000, strategy="pack")]
    packed = make_plan(slots, deployments, "pack")
    spread = make_plan(slots, deployments, "spread", packed)
    assert where(spread, "pinned") == where(packed, "pinned")
    assert len(where(spread, "chat")) == 2
    assert "the strategy was pack" in next(
        b.reason for b in spread.berths if b.deployment == "chat" and b.slot != "gpu00-0"
    )


def test_too_large_a_model_is_named_with_the_largest_gpu():
    plan = make_plan(grid(1, 2), [model("moe", 1, 58_235)], "pack")
    assert plan.unplaced[0].reason == (
        "1 of 1 replicas fit nowhere: moe is larger than any GPU here: it takes 56.9 GiB (58235 MiB) on each GPU; "
        "the largest, NVIDIA L40S, can promise 43.0 GiB (44000 MiB)"
    )


def test_demand_above_supply_shows_the_sum():
    reason = make_plan(grid(1, 2), [model("chat", 10, 20_000)], "pack").unplaced[0].reason
    assert "6 of 10 replicas fit nowhere" in reason
    assert "largest free is 3.9 GiB (4000 MiB, L40S gpu00-0)" in reason
    assert "free in all 7.8 GiB, wanted 117.2 GiB; more is asked than there is" in reason
    assert "free by slot: gpu00-0 3.9, gpu00-1 3.9" in reason


def test_pieces_too_small_are_told_apart_from_too_little():
    slots = grid(1, 2, 10_000)
    before = make_plan(slots, [model("a", 2, 4_000)], "spread")
    wanted = [model("a", 2, 4_000), model("b", 1, 8_000)]
    still = solve(slots, wanted, "spread", before, options=Options(max_moves=0)).plan
    assert "enough in sum, but in pieces too small" in still.unplaced[0].reason
    assert still.unplaced[0].shortage_mib == 2_000
    moved = solve(slots, wanted, "spread", before, options=Options(max_moves=1))
    assert (moved.plan.unplaced, moved.summary.moves) == ((), 1)


def test_no_such_product_and_no_slots():
    assert "may run on NVIDIA H100 only, here are NVIDIA L40S" in (
        make_plan(grid(1, 1), [model("m", 1, 10, products=("NVIDIA H100",))], "pack").unplaced[0].reason
    )
    assert "no GPU slot at all" in make_plan([], [model("m", 1, 10)], "pack").unplaced[0].reason


def test_a_stranger_moves_only_what_no_longer_fits():
    before = make_plan([slot("a-0"), slot("a-1")], [model("chat", 4, 10_000)], "pack")
    assert where(before, "chat") == {"a-0": 4}
    little = make_plan([slot("a-0", foreign=4_864), slot("a-1")], [model("chat", 4, 10_000)], "pack", before)
    assert where(little, "chat") == {"a-0": 4}
    much = make_plan([slot("a-0", foreign=20_480), slot("a-1")], [model("chat", 4, 10_000)], "pack", before)
    assert where(much, "chat") == {"a-0": 2, "a-1": 2}
    moved = next(berth for berth in much.berths if berth.slot == "a-1")
    assert "2 moved off a-0, which can promise 43.0 GiB and strangers hold 20.0 GiB there" in moved.reason


def test_who_grows_yields_to_who_does_not():
    slots = grid(1, 2, 20_000)
    before = make_plan(slots, [model("a", 1, 9_000), model("b", 1, 9_000)], "pack")
    assert used_slots(before) == {"gpu00-0"}
    after = make_plan(slots, [model("a", 1, 14_000), model("b", 1, 9_000)], "pack", before)
    assert where(after, "b") == {"gpu00-0": 1}
    assert where(after, "a") == {"gpu00-1": 1}


def test_surplus_leaves_from_where_it_serves_the_strategy():
    slots = grid(1, 3, 20_000)
    packed = make_plan(slots, [model("chat", 3, 9_000)], "pack")
    assert where(make_plan(slots, [model("chat", 2, 9_000)], "pack", packed), "chat") == {"gpu00-0": 2}
    spread = make_plan(slots, [model("chat", 4, 9_000)], "spread")
    assert where(make_plan(slots, [model("chat", 3, 9_000)], "spread", spread), "chat") == dict.fromkeys(
        ("gpu00-0", "gpu00-1", "gpu00-2"), 1
    )


def test_a_gone_slot_is_refilled_elsewhere_and_the_reason_says_so():
    slots = grid(2, 1)
    before = make_plan(slots, [model("chat", 2, 9_000)], "spread")
    after = make_plan(slots[:1], [model("chat", 2, 9_000)], "spread", before)
    assert where(after, "chat") == {"gpu00-0": 2}
    new = make_plan([slots[0], slot("new-0")], [model("chat", 2, 9_000)], "spread", before)
    assert "takes the place of gpu01-0, which is gone" in next(b.reason for b in new.berths if b.slot == "new-0")


def test_a_hundred_replicas_are_the_most_that_ray_admits_on_a_slot():
    plan = make_plan([slot("a-0")], [model("tiny", 120, 1)], "pack")
    assert where(plan, "tiny") == {"a-0": 100}


@pytest.mark.parametrize("bad", ["Pack", "binpack", ""])
def test_unknown_strategy(bad):
    with pytest.raises(BerthError, match="allowed: pack, spread, strict_pack, strict_spread"):
        make_plan([], [], bad)


def test_duplicates_are_refused():
    with pytest.raises(BerthError, match=r"deployments: a name is used twice; found: m"):
        make_plan([], [model("m", 1, 1), model("m", 1, 1)], "pack")
    with pytest.raises(BerthError, match=r"slots: a name is used twice; found: a-0"):
        make_plan([slot("a-0"), slot("a-0")], [], "pack")
