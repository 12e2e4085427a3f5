"""Draining: the slot is empty afterwards, the others stand still, and it is undone when asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.plan.drain import drained_slots, plan_drained
from berth.plan.planner import make_plan
from berth.plan.types import Deployment, Plan
from tests.unit.plan.helpers import grid, model, used_slots, where

SLOTS = grid(2, 2)


def plan_of(deployments: Sequence[Deployment], before: Plan | None, drained: set[str], partly: bool = False) -> Plan:
    return plan_drained(
        SLOTS, before, drained, partly, lambda slots, stands: make_plan(slots, deployments, "pack", stands)
    )


def test_a_drained_slot_is_empty_and_the_rest_stands() -> None:
    deployments = [model("chat", 1, 40_000), model("embed", 1, 40_000)]
    before = plan_of(deployments, None, set())
    (victim,) = where(before, "chat")
    after = plan_of(deployments, before, {victim})
    assert victim not in used_slots(after)
    assert where(after, "embed") == where(before, "embed")
    assert sum(where(after, "chat").values()) == 1
    assert after.drained == (victim,)


def test_no_room_elsewhere_is_unplaced_or_stays_when_it_may() -> None:
    deployments = [model("wide", 4, 40_000)]
    before = plan_of(deployments, None, set())
    refused = plan_of(deployments, before, {"gpu00-0"})
    assert [(item.deployment, item.replicas) for item in refused.unplaced] == [("wide", 1)]
    partly = plan_of(deployments, before, {"gpu00-0"}, partly=True)
    assert not partly.unplaced
    assert where(partly, "wide") == where(before, "wide")


def test_partly_moves_what_can_move() -> None:
    deployments = [model("wide", 4, 30_000), model("small", 1, 4_000)]
    before = plan_of(deployments, None, set())
    (home,) = where(before, "small")
    after = plan_of(deployments, before, {home}, partly=True)
    assert where(after, "wide") == where(before, "wide")
    assert home not in where(after, "small")


def test_draining_is_kept_until_it_is_undone() -> None:
    before = Plan("pack", SLOTS, (), drained=("gpu00-0",))
    assert drained_slots(SLOTS, before, [], []) == {"gpu00-0"}
    assert drained_slots(SLOTS, before, ["gpu01"], []) == {"gpu00-0", "gpu01-0", "gpu01-1"}
    assert drained_slots(SLOTS, before, [], ["gpu00"]) == set()
    assert drained_slots(SLOTS, before, ["gpu01-1"], ["all"]) == {"gpu01-1"}


def test_a_slot_that_is_gone_is_not_drained_any_more() -> None:
    before = Plan("pack", SLOTS, (), drained=("gpu00-0", "gone-7"))
    assert drained_slots(SLOTS, before, [], []) == {"gpu00-0"}


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_an_unknown_name_is_refused(verb: str) -> None:
    asked = {"drain": [], "undrain": [], verb: ["gpu07"]}
    with pytest.raises(BerthError, match=f"no host or slot to {verb}.*gpu07.*gpu00, gpu00-0"):
        drained_slots(SLOTS, None, asked["drain"], asked["undrain"])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(2_000, 40_000)), min_size=1, max_size=4),
    drained=st.sets(st.sampled_from([slot.name for slot in SLOTS]), max_size=4),
)
def test_draining_never_moves_what_stands_elsewhere(sizes: list[tuple[int, int]], drained: set[str]) -> None:
    deployments = [model(f"m{n}", replicas, size) for n, (replicas, size) in enumerate(sizes)]
    before = plan_of(deployments, None, set())
    after = plan_of(deployments, before, drained)
    assert not used_slots(after) & drained
    for berth in before.berths:
        if berth.slot not in drained:
            assert where(after, berth.deployment).get(berth.slot, 0) >= berth.replicas
    again = plan_of(deployments, after, drained)
    assert again.berths == after.berths
    partly = plan_of(deployments, before, drained, partly=True)
    lost = sum(item.replicas for item in partly.unplaced)
    assert lost <= sum(item.replicas for item in before.unplaced)
