"""Room for who is left out: by how many moves, whose, and what is said where none are allowed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.plan.diff import cost_of
from berth.plan.planner import Options, make_plan, solve
from berth.plan.simulate import load_fleet
from berth.plan.types import Deployment, Plan, Slot, Solution
from tests.unit.plan.helpers import A100, grid, model, slot, where

EXAMPLE = Path(__file__).parents[3] / "examples" / "fleet.yml"
EXACT = pytest.mark.parametrize("exact_gpus", [0, 64])
SOME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def again(
    slots: Sequence[Slot],
    asked: Sequence[Deployment],
    before: Plan,
    max_moves: int | None,
    exact_gpus: int = 0,
    strategy: str = "pack",
) -> Solution:
    options = Options(max_moves=max_moves, regroup=True, exact_gpus=exact_gpus, effort=1.0)
    return solve(slots, asked, strategy, before, options=options)


def away(before: Plan, after: Plan) -> int:
    """Replicas that stood on a GPU which is still there and stand there no more."""
    slots = {item.name: item.gpu_uuids for item in after.slots}
    here = {uuid for uuids in slots.values() for uuid in uuids}
    now = Counter({(item.deployment, slots[item.slot]): item.replicas for item in after.berths})
    old = {item.name: item.gpu_uuids for item in before.slots}
    return sum(
        max(0, item.replicas - now[item.deployment, old[item.slot]])
        for item in before.berths
        if here.issuperset(old[item.slot])
    )


# --- A lost host ------------------------------------------------------------------------------------------------------


@EXACT
def test_after_a_lost_host_small_ones_move_for_one_of_high_priority(exact_gpus: int):
    fleet = load_fleet(yaml.safe_load(EXAMPLE.read_text()), EXAMPLE.parent)
    before = solve(fleet.slots, fleet.deployments, "pack", options=Options(regroup=True)).plan
    left = [item for item in fleet.slots if item.host != "h100-01"]
    for max_moves in (0, 1):
        still = again(left, fleet.deployments, before, max_moves, exact_gpus)
        (refused,) = still.plan.unplaced
        assert refused.deployment == "chat-70b"
        assert "way out: moving batch@h100-02-2, chat-8b@h100-02-2 (max_moves 2) would let it in; or" in refused.reason
        assert "more is asked than there is" not in refused.reason
        assert (still.summary.moves, away(before, still.plan)) == (0, 0)
    for max_moves in (2, 5, None):
        found = again(left, fleet.deployments, before, max_moves, exact_gpus)
        assert not found.plan.unplaced
        assert (found.summary.moves, found.summary.replaced, away(before, found.plan)) == (2, 1, 2)
        reason = next(item.reason for item in found.plan.berths if item.deployment == "chat-70b")
        assert "takes the place of h100-01-0+1+2+3, which is gone" in reason


# --- Who moves, and where to ------------------------------------------------------------------------------------------


def standing(slots: Sequence[Slot], **homes: tuple[int, str]) -> tuple[list[Deployment], Plan]:
    """Deployments of (MiB, slot), each with one replica that stands there."""
    asked = [model(name, 1, mib) for name, (mib, _) in homes.items()]
    pinned = [replace(item, pins=next(s.gpu_uuids for s in slots if s.name == homes[item.name][1])) for item in asked]
    return asked, make_plan(slots, pinned, "pack")


@EXACT
def test_the_fewest_moves_open_a_host_for_a_team(exact_gpus: int):
    slots = [*grid(2, 4, 20_000), *(slot(f"old-{n}", 9_000, product=A100) for n in range(3))]
    small, before = standing(
        slots,
        a=(4_000, "gpu00-0"),
        b=(4_000, "gpu00-1"),
        c=(4_000, "gpu00-2"),
        d=(4_000, "gpu01-3"),
        e=(4_000, "gpu01-1"),
    )
    team = model("big", 1, 18_000, gpus=4)
    assert (
        "moving e@gpu01-1, d@gpu01-3 (max_moves 2)" in again(slots, [*small, team], before, 1).plan.unplaced[0].reason
    )
    found = again(slots, [*small, team], before, 2, exact_gpus)
    assert not found.plan.unplaced
    assert found.summary.moves == 2
    assert where(found.plan, "big") == {"gpu01-0+1+2+3": 1}


@EXACT
def test_a_small_team_makes_way_for_a_large_one(exact_gpus: int):
    slots = [*grid(1, 4, 20_000), slot("gpu01-0", 20_000), slot("gpu01-1", 20_000)]
    pair = replace(model("pair", 1, 10_000, gpus=2), pins=("GPU-gpu00-1-0", "GPU-gpu00-2-0"))
    before = solve(slots, [pair], "pack", options=Options(regroup=True)).plan
    asked = [replace(pair, pins=()), model("big", 1, 18_000, gpus=4)]
    assert "moving pair@gpu00-1+2 (max_moves 1)" in again(slots, asked, before, 0).plan.unplaced[0].reason
    found = again(slots, asked, before, 1, exact_gpus)
    assert where(found.plan, "pair") == {"gpu01-0+1": 1}
    assert where(found.plan, "big") == {"gpu00-0+1+2+3": 1}


def test_a_team_that_needs_nvlink_gets_linked_gpus_even_by_moves():
    slots = [replace(item, nvlink_group=f"nvlink{number // 2}") for number, item in enumerate(grid(1, 4, 20_000))]
    small, before = standing(slots, a=(4_000, "gpu00-1"), b=(4_000, "gpu00-2"))
    team = replace(model("big", 1, 18_000, gpus=2), require_nvlink=True)
    found = again(slots, [*small, team], before, 1)
    assert not found.plan.unplaced
    assert found.summary.moves == 1
    (home,) = [item for item in found.plan.slots if len(item.gpu_uuids) == 2]
    assert home.nvlink_group


def test_a_replica_of_a_slot_with_several_gpus_is_moved_too():
    slots = [slot("a-0", 20_000, gpus=2), slot("b-0", 40_000, gpus=2)]
    before = make_plan(slots[1:], [model("small", 1, 10_000, gpus=2)], "pack")
    asked = [model("small", 1, 10_000, gpus=2), model("large", 1, 30_000, gpus=2)]
    assert "moving small@b-0 (max_moves 1)" in again(slots, asked, before, 0).plan.unplaced[0].reason
    assert where(again(slots, asked, before, 1).plan, "large") == {"b-0": 1}


# --- Who leaves -------------------------------------------------------------------------------------------------------


@EXACT
def test_leaving_for_a_higher_priority_counts_as_a_move(exact_gpus: int):
    slots = grid(1, 2, 10_000)
    before = make_plan(slots, [model("a", 1, 8_000), model("b", 1, 8_000)], "pack")
    asked = [
        model("a", 1, 8_000),
        replace(model("b", 1, 8_000), priority=-1),
        replace(model("c", 1, 9_000), priority=1),
    ]
    still = again(slots, asked, before, 0, exact_gpus)
    assert [item.deployment for item in still.plan.unplaced] == ["c"]
    assert away(before, still.plan) == 0
    assert "leaving out b@gpu00-1 (priority -1) (max_moves 1) would let it in" in still.plan.unplaced[0].reason
    for max_moves in (1, None):
        found = again(slots, asked, before, max_moves, exact_gpus)
        assert [item.deployment for item in found.plan.unplaced] == ["b"]
        assert where(found.plan, "a") == where(before, "a")


def test_a_team_takes_the_place_of_lower_priorities_and_moves_who_can():
    slots = [*grid(1, 2, 20_000), slot("old-0", 5_000, product=A100)]
    small, before = standing(slots, a=(4_000, "gpu00-0"), b=(12_000, "gpu00-1"))
    team = replace(model("big", 1, 18_000, gpus=2), priority=1)
    told = again(slots, [*small, team], before, 1).plan.unplaced[0].reason
    assert "moving a@gpu00-0 and leaving out b@gpu00-1 (priority 0) (max_moves 2) would let it in" in told
    found = again(slots, [*small, team], before, 2)
    assert where(found.plan, "a") == {"old-0": 1}
    assert [item.deployment for item in found.plan.unplaced] == ["b"]


def test_room_for_growth_is_given_up_before_anybody_moves():
    slots = grid(1, 2, 10_000)
    growing = replace(model("a", 1, 8_000), max_replicas=2)
    before = make_plan(slots, [growing], "pack")
    found = again(slots, [growing, model("b", 1, 8_000)], before, 0)
    assert where(found.plan, "b") == {"gpu00-1": 1}
    assert [(item.deployment, item.replicas, item.room) for item in found.plan.unplaced] == [("a", 0, 1)]


# --- For any input ----------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([3_000, 7_000, 11_000, 16_000, 21_000])


@st.composite
def losses(draw: st.DrawFn) -> tuple[list[Slot], list[Deployment], Plan]:
    """What is left after a host of a full fleet is lost, what is asked for, and the plan before."""
    slots = [*grid(draw(st.integers(2, 3)), draw(st.integers(2, 4)), 22_000)]
    asked = [
        replace(model(f"m{n}", draw(st.integers(1, 3)), draw(SIZES)), priority=draw(st.integers(-1, 1)))
        for n in range(draw(st.integers(2, 5)))
    ]
    asked.append(replace(model("team", 1, 20_000, gpus=2), priority=draw(st.integers(-1, 2))))
    before = solve(slots, asked, "pack", options=Options(regroup=True, exact_gpus=0)).plan
    lost = draw(st.sampled_from(sorted({item.host for item in slots})))
    return [item for item in slots if item.host != lost], asked, before


def left_out(plan: Plan, asked: Sequence[Deployment]) -> tuple[int, ...]:
    """Replicas without a place, the highest priority first."""
    missing = {item.deployment: item.replicas for item in plan.unplaced}
    levels = sorted({item.priority for item in asked}, reverse=True)
    return tuple(sum(missing.get(item.name, 0) for item in asked if item.priority == level) for level in levels)


@SOME
@given(losses(), st.integers(0, 4), st.sampled_from([0, 64]))
def test_no_more_stand_elsewhere_than_max_moves_allows(case, max_moves, exact_gpus):
    slots, asked, before = case
    found = again(slots, asked, before, max_moves, exact_gpus)
    assert away(before, found.plan) <= max_moves
    assert found.summary.moves <= max_moves
    cost = cost_of(before, found.plan)
    assert (cost.moved, cost.replaced) == (found.summary.moves, found.summary.replaced)
    free = {uuid: item.free_mib for item in slots for uuid in item.gpu_uuids}
    for home in found.plan.slots:
        held = sum(item.vram_mib * item.replicas for item in found.plan.berths if item.slot == home.name)
        assert all(held <= free[uuid] for uuid in home.gpu_uuids)
    if max_moves == 0:
        assert again(slots, asked, found.plan, 0, exact_gpus).plan == found.plan


@SOME
@given(losses(), st.sampled_from([0, 64]))
def test_more_moves_never_leave_out_more(case, exact_gpus):
    slots, asked, before = case
    gone = [left_out(again(slots, asked, before, moves, exact_gpus).plan, asked) for moves in (0, 2, None)]
    assert gone == sorted(gone, reverse=True)


@SOME
@given(losses(), st.sampled_from([0, 64]))
def test_what_a_refusal_says_would_help_does(case, exact_gpus):
    slots, asked, before = case
    still = again(slots, asked, before, 0, exact_gpus).plan
    told = [match for item in still.unplaced if (match := re.search(r"\(max_moves (\d+)\) would let", item.reason))]
    assume(told)
    for match in told:
        helped = again(slots, asked, still, int(match[1]), exact_gpus).plan
        assert left_out(helped, asked) < left_out(still, asked)
