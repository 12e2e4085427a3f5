"""Pools: planned with their bounds and reasons, of one product, drained and turned into berths and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from berth.errors import BerthError
from berth.plan.diff import describe, diff_plans, plan_text
from berth.plan.drain import plan_drained
from berth.plan.planner import make_plan
from berth.plan.pools import check_pools, pools_of
from berth.plan.types import Deployment, Plan, Slot
from berth.report.map import plan_map
from tests.unit.plan.helpers import A100, L40S, T4, grid, model, slot, used_slots, where

SLOTS = grid(2, 2, 20_000)


def pool(replicas: int, most: int | None = None, vram: int = 9_000, **changes: object) -> Deployment:
    return replace(model("chat", replicas, vram), placement="pool", max_replicas=most, **changes)  # type: ignore[arg-type]


def spread(*deployments: Deployment, slots: tuple[Slot, ...] = SLOTS, before: Plan | None = None) -> Plan:
    return make_plan(slots, deployments, "spread", before)


def test_a_pool_is_reserved_at_its_maximum_on_each_slot_and_says_so() -> None:
    plan = spread(pool(2, 4))
    (found,) = pools_of(plan).values()
    assert (found.app, found.slots) == ("chat@pool", ("gpu00-0", "gpu00-1", "gpu01-0", "gpu01-1"))
    assert (found.fewest, found.most, found.each, found.count) == (2, 4, 1, "2 to 4")
    assert {berth.app for berth in plan.berths} == {"chat@pool"}
    assert plan.berths[0].name == "chat@gpu00-0"
    assert plan.berths[3].reason.startswith(
        "spread: up to 1 on L40S gpu01-1 of a pool of 2 to 4 over 4 slots, among which Serve chooses; 8.8 of 19.5 GiB"
    )
    assert "gpu01-1 NVIDIA L40S GPU-gpu01-1-0: 9000 of 20000 MiB promised" in plan_text(plan)
    assert "chat@gpu01-1: up to 1 replica of 9000 MiB, of a pool of 4 at most" in plan_text(plan)
    assert plan_map(plan).count("chat (pool, up to 1)") == 4


def test_nobody_else_gets_what_a_pool_may_need() -> None:
    plan = spread(pool(8, priority=1), model("embed", 5, 3_000))
    (found,) = pools_of(plan).values()
    assert (found.fewest, found.most, found.each) == (8, 8, 2)
    assert [item.deployment for item in plan.unplaced] == ["embed"]
    assert "embed" not in {berth.deployment for berth in plan.berths}


def test_a_pool_of_five_on_three_slots_has_five_at_most() -> None:
    plan = spread(pool(5), slots=SLOTS[:3])
    (found,) = pools_of(plan).values()
    assert (found.fewest, found.most, found.each, found.count) == (5, 5, 2, "5")
    assert sum(berth.replicas + berth.reserved for berth in plan.berths) == 6


def test_a_pool_that_finds_too_few_places_has_no_more() -> None:
    plan = spread(pool(2, 12))
    (found,) = pools_of(plan).values()
    assert (found.fewest, found.most, found.each) == (2, 8, 2)
    assert plan.unplaced[0].room == 4


def test_planning_again_changes_nothing() -> None:
    plan = spread(pool(2, 4), model("embed", 3, 3_000))
    assert spread(pool(2, 4), model("embed", 3, 3_000), before=plan) == plan


def test_a_pool_becomes_berths_on_its_slots_and_a_pool_again() -> None:
    pooled = spread(pool(4))
    berths = spread(model("chat", 4, 9_000), before=pooled)
    assert where(berths, "chat") == where(pooled, "chat")
    assert {berth.pool for berth in berths.berths} == {0}
    assert "pool" not in berths.berths[0].reason
    again = spread(pool(4), before=berths)
    assert again == pooled
    assert describe(diff_plans(pooled, berths))[0] == "regroup chat@gpu00-0: now a berth of its own (which restarts)"
    assert describe(diff_plans(berths, pooled))[0] == (
        "regroup chat@gpu00-0: now one of the pool over 4 slots (all replicas of which restart)"
    )


def test_what_changes_a_pools_slots_says_that_all_of_it_restarts() -> None:
    before = spread(pool(3), slots=SLOTS[:3])
    told = describe(diff_plans(before, spread(pool(4), before=before)))
    restart = "now one of the pool over 4 slots (all replicas of which restart)"
    assert told == [
        "start chat@gpu01-1: now one of the pool over 4 slots, 9000 MiB for each replica",
        *(f"regroup chat@{name}: {restart}" for name in ("gpu00-0", "gpu00-1", "gpu01-0")),
    ]


def test_a_pools_number_alone_restarts_nobody() -> None:
    before = spread(pool(2, 4))
    after = spread(pool(3, 4), before=before)
    (line,) = describe(diff_plans(before, after))
    assert line == "scale chat@gpu01-0: 0 -> 1 of the replicas that its pool has at least"


def test_a_pools_footprint_restarts_all_of_it() -> None:
    before = spread(pool(2, 4))
    told = describe(diff_plans(before, spread(pool(2, 4, 9_500), before=before)))
    assert len(told) == 4
    assert "9000 -> 9500 MiB for each replica of the pool over 4 slots (all of which restart)" in told[0]


def test_a_drained_slot_leaves_the_pool() -> None:
    deployments = [pool(2, 3, 12_000)]

    def plan(slots: object, before: Plan | None) -> Plan:
        return make_plan(slots, deployments, "spread", before)  # type: ignore[arg-type]

    before = plan(SLOTS, None)
    (victim, *rest) = pools_of(before)["chat@pool"].slots
    after = plan_drained(SLOTS, before, {victim}, False, plan)
    found = pools_of(after)["chat@pool"]
    assert victim not in found.slots
    assert set(rest) < set(found.slots)
    assert (found.fewest, found.most, after.unplaced) == (2, 3, ())
    assert plan_drained(SLOTS, after, {victim}, False, plan) == after
    back = plan_drained(SLOTS, after, set(), False, plan)
    assert used_slots(back) == used_slots(after), "what is undrained draws nobody back"


def test_a_drain_without_room_for_the_pools_maximum_is_told_or_leaves_it_where_it_may() -> None:
    deployments = [pool(2, 4, 12_000)]

    def plan(slots: object, before: Plan | None) -> Plan:
        return make_plan(slots, deployments, "spread", before)  # type: ignore[arg-type]

    before = plan(SLOTS, None)
    short = plan_drained(SLOTS, before, {"gpu00-0"}, False, plan)
    assert short.unplaced[0].room == 1
    partly = plan_drained(SLOTS, before, {"gpu00-0"}, True, plan)
    assert pools_of(partly) == pools_of(before)


MIXED = (slot("a-0", 20_000), slot("b-0", 20_000, product=A100), slot("c-0", 8_000, product=T4))


def test_a_pool_is_of_one_product() -> None:
    with pytest.raises(BerthError) as caught:
        check_pools([pool(2)], MIXED)
    assert "app chat: a pool is of one GPU product" in str(caught.value)
    assert f"found: {A100} with 9000 MiB; {L40S} with 9000 MiB" in str(caught.value), "a T4 could hold none"
    assert f"mend: set products: [{A100}]" in str(caught.value)


@pytest.mark.parametrize(
    "fine",
    [
        model("chat", 2, 9_000),
        pool(2, products=(L40S,)),
        pool(2, pins=("GPU-b-0-0",)),
        replace(pool(2), vram_mib={A100: 9_000}),
        pool(2, vram=30_000),
    ],
    ids=["berths", "products", "pins", "a footprint for one", "larger than any"],
)
def test_a_pool_that_can_be_on_one_product_alone_is_fine(fine: Deployment) -> None:
    check_pools([fine], MIXED)
