"""The words of the contract one by one: moves, priorities, teams, costs, cordons, loads, room, pools."""

from __future__ import annotations

import importlib.util

from berth.codec import replace
from berth.plan.planner import Options, make_plan, solve
from berth.plan.types import Deployment
from tests.unit.plan.helpers import A100, grid, model, slot, used_slots, where


def test_standing_replicas_move_only_so_that_more_fit_and_the_bound_on_moves_is_kept():
    slots = grid(1, 2, 10_000)
    asked = [model("a", 2, 4_000), model("b", 1, 8_000)]
    before = make_plan(slots, asked[:1], "spread")
    moved = solve(slots, asked, "spread", before)
    assert not moved.plan.unplaced
    assert moved.summary.moves == 1
    reason = next(berth.reason for berth in moved.plan.berths if berth.deployment == "a")
    assert set(where(moved.plan, "a").values()) == {2}
    assert reason.startswith("spread: 2 on L40S")
    still = solve(slots, asked, "spread", before, options=Options(max_moves=0))
    assert where(still.plan, "a") == where(before, "a")
    assert still.summary.moves == 0
    assert "enough in sum, but in pieces too small" in still.plan.unplaced[0].reason
    assert still.plan.unplaced[0].shortage_mib == 2_000
    assert "free 2.0 GiB (2000 MiB) on any of gpu00-0, gpu00-1 for one more" in still.plan.unplaced[0].reason
    assert "one more L40S would hold it" in still.plan.unplaced[0].reason


def test_a_higher_priority_takes_the_place_of_a_lower_one_and_an_equal_does_not():
    slots = grid(1, 1, 10_000)
    before = make_plan(slots, [model("a", 1, 8_000)], "pack")
    equal = make_plan(slots, [model("a", 1, 8_000), model("b", 1, 8_000)], "pack", before)
    assert where(equal, "a") == {"gpu00-0": 1}
    small = make_plan(slots, [model("a", 1, 8_000), model("b", 2, 4_000)], "pack", before)
    assert where(small, "a") == {"gpu00-0": 1}
    urgent = make_plan(slots, [model("a", 1, 8_000), replace(model("b", 1, 8_000), priority=1)], "pack", before)
    assert where(urgent, "b") == {"gpu00-0": 1}
    assert [item.deployment for item in urgent.unplaced] == ["a"]


def test_repack_moves_as_far_as_it_may():
    slots = grid(1, 4, 10_000)
    asked = [model("a", 4, 2_000)]
    spread = make_plan(slots, asked, "spread")
    before = replace(spread, strategy="pack", strategies={"a": "pack"})
    assert make_plan(slots, asked, "pack", before).berths != ()
    assert len(used_slots(make_plan(slots, asked, "pack", before))) == 4
    anew = solve(slots, asked, "pack", before, options=Options(repack=True))
    assert (anew.summary.gpus_used, anew.summary.moves) == (1, 3)
    some = solve(slots, asked, "pack", before, options=Options(repack=True, max_moves=2))
    assert (some.summary.gpus_used, some.summary.moves) == (2, 2)
    flip = solve(slots, asked, "pack", spread, options=Options(max_moves=1))
    assert (flip.summary.gpus_used, flip.summary.moves) == (3, 1)


def test_gpus_are_joined_on_one_host_and_in_one_nvlink_group():
    linked = [replace(item, nvlink_group=f"nvlink{number // 2}") for number, item in enumerate(grid(1, 4))]
    asked = [model("chat", 1, 30_000), model("big", 1, 40_000, gpus=2)]
    solution = solve([*linked, *grid(2, 1)[1:]], asked, "pack", options=Options(regroup=True))
    (berth,) = [item for item in solution.plan.berths if item.deployment == "big"]
    home = next(item for item in solution.plan.slots if item.name == berth.slot)
    assert berth.slot in ("gpu00-0+1", "gpu00-2+3")
    assert (len(home.gpu_uuids), home.host) == (2, "gpu00")
    assert "has all 2 GPUs of L40S" in berth.reason
    assert home.nvlink_group in ("nvlink0", "nvlink1")
    assert len(solution.plan.slots) == 4
    again = solve([*linked, *grid(2, 1)[1:]], asked, "pack", solution.plan, options=Options(regroup=True))
    assert again.plan == solution.plan
    crossed = [replace(item, nvlink_group="") for item in linked]
    need = [replace(asked[1], require_nvlink=True)]
    assert solve(crossed, need, "pack", options=Options(regroup=True)).plan.unplaced
    assert "NVLink" in solve(crossed, need, "pack", options=Options(regroup=True)).plan.unplaced[0].reason


def test_the_cheapest_set_is_not_the_fewest_gpus():
    dear = replace(slot("z-0", 80_000, product=A100), cost=5.0)
    cheap = [replace(item, cost=1.0) for item in grid(1, 3, 22_000)]
    solution = solve([dear, *cheap], [model("chat", 3, 20_000)], "pack")
    assert (solution.summary.cost, solution.summary.gpus_used, solution.summary.optimal) == (3.0, 3, True)
    even = solve([replace(dear, cost=1.0), *cheap], [model("chat", 3, 20_000)], "pack")
    assert (even.summary.cost, even.summary.gpus_used, even.summary.lower_bound_gpus) == (1.0, 1, 1)


def test_a_cordoned_slot_takes_nothing_new_and_keeps_what_stands():
    slots = grid(1, 2, 10_000)
    before = make_plan(slots, [model("a", 1, 4_000)], "pack")
    cordoned = [replace(item, cordoned=item.name in used_slots(before)) for item in slots]
    after = make_plan(cordoned, [model("a", 1, 4_000), model("b", 1, 4_000)], "pack", before)
    assert where(after, "a") == where(before, "a")
    assert where(after, "b") == {"gpu00-1": 1}
    none = make_plan([replace(item, cordoned=True) for item in slots], [model("a", 1, 4_000)], "pack")
    assert "uncordon gpu00-0 or gpu00-1" in none.unplaced[0].reason
    short = make_plan([replace(slots[0], cordoned=True), slots[1]], [model("c", 2, 9_000)], "pack").unplaced[0].reason
    assert "largest free is 1.0 GiB (1000 MiB, L40S gpu00-1); free in all 1.0 GiB" in short
    assert "free by slot: gpu00-0 9.8 (cordoned), gpu00-1 1.0" in short


def test_balanced_levels_load_not_memory():
    asked = [replace(model("hot", 2, 1_000), load=3.0), replace(model("cold", 6, 9_000), load=1.0)]
    solution = solve(grid(1, 3), asked, "balanced")
    load = dict.fromkeys(used_slots(solution.plan), 0.0)
    for berth in solution.plan.berths:
        load[berth.slot] += berth.replicas * (3.0 if berth.deployment == "hot" else 1.0)
    assert sorted(load.values()) == [4.0, 4.0, 4.0]
    assert solution.summary.gap == 0
    assert solution.summary.optimal


def test_promised_room_is_reserved_shared_room_once_and_best_effort_none():
    def asked(kind: str) -> list[Deployment]:
        return [replace(model(name, 1, 4_000), max_replicas=3, headroom=kind) for name in ("a", "b")]

    for kind, reserved in (("promised", 4), ("shared", 2), ("best_effort", 0)):
        plan = make_plan(grid(1, 2, 16_000), asked(kind), "pack")
        assert sum(berth.reserved for berth in plan.berths) == reserved
        assert not plan.unplaced
    short = make_plan(grid(1, 1, 16_000), asked("promised"), "pack")
    assert sum(berth.replicas for berth in short.berths) == 2
    assert sum(item.room for item in short.unplaced) == 2
    assert "more replicas is promised and there is none" in short.unplaced[0].reason
    before = make_plan(grid(1, 2, 16_000), asked("promised"), "pack")
    grown = make_plan(grid(1, 2, 16_000), [replace(item, replicas=3) for item in asked("promised")], "pack", before)
    places = [{(b.deployment, b.slot): b.replicas + b.reserved for b in plan.berths} for plan in (before, grown)]
    assert places[0] == places[1]


def test_a_pool_reserves_every_slot_in_full_and_strands_nobody():
    slots = [slot("a-0", 20_000), slot("b-0", 20_000, product=A100)]
    pool = replace(model("pool", 3, 5_000), placement="pool", max_replicas=4)
    only = model("only", 1, 20_000, products=(A100,))
    plan = make_plan(slots, [pool, only], "pack")
    assert not plan.unplaced
    assert where(plan, "only") == {"b-0": 1}
    (berth,) = [item for item in plan.berths if item.deployment == "pool"]
    assert (berth.slot, berth.replicas, berth.reserved) == ("a-0", 3, 1)
    assert make_plan(slots, [pool, only], "pack", plan) == plan


def test_without_the_solver_the_greedy_plan_is_all_there_is(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ortools" else real(name))
    solution = solve(grid(1, 4), [model("chat", 9, 9_828)], "pack")
    assert (solution.summary.method, solution.summary.optimal, solution.summary.gpus_used) == ("greedy", False, 3)
