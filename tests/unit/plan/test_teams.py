"""Replicas over several slots: whole teams of near slots, stable, and never two teams on one slot."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.plan.diff import describe, diff_plans
from berth.plan.planner import make_plan
from berth.plan.types import Deployment, Plan, Slot
from tests.unit.plan.helpers import A100, L40S, grid, model, promised, slot


def wide(name: str = "big", replicas: int = 1, mib: int = 40_000, slots: int = 2, gpus: int = 1) -> Deployment:
    return replace(model(name, replicas, mib, gpus=gpus), slots_per_replica=slots, strategy="pack")


def teams(plan: Plan, name: str = "big") -> list[tuple[str, ...]]:
    return sorted(berth.team for berth in plan.berths if berth.deployment == name and berth.leads)


def check_teams(plan: Plan, deployments: tuple[Deployment, ...]) -> None:
    slots = {item.name: item for item in plan.slots}
    for item in plan.slots:
        assert promised(plan, item.name) <= item.free_mib
    taken = Counter(berth.slot for berth in plan.berths if berth.team)
    assert set(taken.values()) <= {1}, "two teams on one slot could wait for each other"
    unplaced = Counter({item.deployment: item.replicas for item in plan.unplaced})
    for item in (item for item in deployments if item.slots_per_replica > 1):
        mine = [berth for berth in plan.berths if berth.deployment == item.name]
        whole = teams(plan, item.name)
        assert sorted(berth.slot for berth in mine) == sorted(name for team in whole for name in team)
        assert len(whole) + unplaced[item.name] == item.replicas == plan.deployments[item.name]
        for team in whole:
            assert len(team) == item.slots_per_replica
            assert len({slots[name].product for name in team}) == 1
        assert all(berth.slot in berth.team and berth.replicas == 1 for berth in mine)


def test_a_team_takes_near_slots() -> None:
    slots = (
        slot("a-0", 44_000, rack="r1"),
        slot("b-0", 44_000, rack="r2"),
        slot("c-0", 44_000, rack="r1"),
        slot("d-0", 44_000, rack="r2"),
    )
    plan = make_plan(slots, [wide(replicas=2)], "spread")
    assert teams(plan) == [("a-0", "c-0"), ("b-0", "d-0")]
    assert plan.deployments == {"big": 2}
    assert {berth.app for berth in plan.berths} == {"big@a-0", "big@b-0"}
    assert "part of one replica over a-0, c-0" in plan.berths[0].reason


def test_one_host_before_two() -> None:
    plan = make_plan(grid(3, 2, 44_000), [wide()], "pack")
    (team,) = teams(plan)
    assert len({name.rpartition("-")[0] for name in team}) == 1


def test_what_makes_no_whole_team_takes_no_room_from_others() -> None:
    small = model("small", 1, 40_000)
    plan = make_plan(grid(3, 1, 44_000), [wide(replicas=2), replace(small, priority=-1)], "pack")
    assert len(teams(plan)) == 1
    assert [berth.deployment for berth in plan.berths if not berth.team] == ["small"]
    (left,) = plan.unplaced
    assert (left.deployment, left.replicas) == ("big", 1)
    assert left.reason == (
        "1 of 2 replicas fit: each needs 2 slots of one product at once, 1 GPU each, 39.1 GiB on each GPU, and none "
        "with a part of another; slots with room left: none; gpu02-0 lacks 35.2 GiB; way out: 2 more such slots"
    )


def test_cards_of_two_products_are_no_team() -> None:
    plan = make_plan((slot("a-0", 44_000), slot("b-0", 80_000, product=A100)), [wide()], "pack")
    assert not plan.berths
    assert plan.unplaced[0].replicas == 1


def test_a_lone_better_card_does_not_keep_a_team_apart() -> None:
    slots = (slot("a-0", 80_000, product=A100), slot("b-0", 44_000), slot("c-0", 44_000))
    assert teams(make_plan(slots, [wide()], "pack")) == [("b-0", "c-0")]


def test_teams_stand_while_their_slots_do() -> None:
    slots = grid(6, 1, 44_000)
    one = make_plan(slots, [wide(replicas=3)], "pack")
    assert make_plan(slots, [wide(replicas=3)], "pack", one) == one
    fewer = make_plan(slots, [wide(replicas=2)], "pack", one)
    assert set(teams(fewer)) < set(teams(one))
    again = make_plan(slots, [wide(replicas=2)], "pack", fewer)
    assert again == fewer


def test_a_lost_slot_regroups_its_own_team_alone() -> None:
    slots = grid(5, 1, 44_000)
    before = make_plan(slots, [wide(replicas=2)], "pack")
    gone = teams(before)[0][1]
    after = make_plan([item for item in slots if item.name != gone], [wide(replicas=2)], "pack", before)
    assert teams(before)[1] in teams(after)
    assert len(teams(after)) == 2
    told = "\n".join(describe(diff_plans(before, after)))
    assert f"regroup big@{teams(before)[0][0]}: now part of a replica over" in told


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Slot, ...]:
    return tuple(
        slot(f"h{host}-{number}", vram, product=product, gpus=gpus, rack=draw(st.sampled_from(["", "r1", "r2"])))
        for host in range(draw(st.integers(1, 4)))
        for product, vram in [draw(st.sampled_from([(L40S, 44_000), (A100, 80_000)]))]
        for number in range(draw(st.integers(1, 3)))
        for gpus in [draw(st.sampled_from([1, 1, 2]))]
    )


@st.composite
def wishes(draw: st.DrawFn) -> tuple[Deployment, ...]:
    large = [
        wide(f"w{number}", draw(st.integers(0, 3)), draw(st.sampled_from([9_000, 40_000])),
             draw(st.integers(2, 3)), draw(st.sampled_from([1, 1, 2])))
        for number in range(draw(st.integers(1, 2)))
    ]  # fmt: skip
    return (*large, *(model(f"m{i}", draw(st.integers(0, 3)), 14_000) for i in range(draw(st.integers(0, 2)))))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fleets(), wishes(), wishes())
def test_any_fleet(slots: tuple[Slot, ...], first: tuple[Deployment, ...], second: tuple[Deployment, ...]) -> None:
    before = make_plan(slots, first, "pack")
    check_teams(before, first)
    if not before.unplaced:
        assert make_plan(slots, first, "pack", before) == before
    check_teams(make_plan(slots, second, "spread", before), second)
    check_teams(make_plan(slots[1:], first, "pack", before), first)
