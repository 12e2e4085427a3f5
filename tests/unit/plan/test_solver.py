"""The solver's parts where an error would not show in a small plan: knapsack, bound, patterns at scale, hash seeds."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.plan.planner import Options, solve
from berth.plan.solver.bins import whole_packing
from berth.plan.solver.bound import prove
from berth.plan.solver.columns import Goal, by_volume, proven, worths
from berth.plan.solver.knapsack import fill
from berth.plan.solver.problem import MICRO, build_problem
from berth.plan.solver.search import heuristic
from berth.plan.solver.state import State
from berth.plan.types import Deployment, Slot
from tests.unit.plan.helpers import A100, L40S, T4, promised, slot

ROOT = Path(__file__).parents[3]
VRAM = {L40S: 44_976, T4: 14_500, A100: 80_642}
ITEMS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(0, 20)), min_size=1, max_size=4)


def fleet(gpus: int, seed: int) -> tuple[tuple[Slot, ...], tuple[Deployment, ...]]:
    """Hosts of eight equal GPUs, some partly used, and about two and a half replicas per GPU."""
    rng = random.Random(seed)
    slots: list[Slot] = []
    for host in range(gpus // 8):
        product = rng.choice([L40S, L40S, A100])
        for number in range(8):
            foreign = 256 * rng.randint(4, 60) if rng.random() < 0.05 else 0
            slots.append(slot(f"n{host:03}-{number}", VRAM[product], product=product, foreign=foreign))
    sizes = [2_500, 3_300, 5_100, 7_700, 12_300, 15_900, 19_700, 23_900, 31_100, 41_300, 52_000]
    deployments = []
    for number in range(gpus // 8):
        size = rng.choice(sizes) + rng.randint(-900, 900)
        products = (A100,) if rng.random() < 0.1 else ()
        deployments.append(Deployment(f"m{number:03}", rng.randint(5, 30), {"default": size}, products=products))
    deployments += [Deployment(f"tp{width}", 2, {"default": 40_000}, width) for width in (2, 4, 8)]
    return tuple(slots), tuple(deployments)


@settings(max_examples=200, deadline=None)
@given(ITEMS, st.integers(1, 25))
def test_a_knapsack_is_worth_what_the_best_load_is(items, units):
    sizes, copies, prices = (list(row) for row in zip(*items, strict=True))
    sack = fill(sizes, copies, prices, units, trace=True)
    for room in range(units + 1):
        best = 0
        # Items of size 0 may not be there.
        ranges = [range(count + 1) if size else range(1) for size, count in zip(sizes, copies, strict=True)]
        for counts in itertools.product(*ranges):
            if sum(size * count for size, count in zip(sizes, counts, strict=True)) <= room:
                best = max(best, sum(price * count for price, count in zip(prices, counts, strict=True)))
        assert sack.worth[room] == best
        load = sack.load(room)
        assert sum(prices[item] * count for item, count in load) == best
        assert sum(sizes[item] * count for item, count in load) <= room
        assert all(count <= copies[item] for item, count in load)


def test_a_fleet_is_packed_near_its_proven_bound_and_better_than_by_best_fit():
    slots, deployments = fleet(640, 1)
    solution = solve(slots, deployments, "pack", options=Options(regroup=True))
    assert not solution.plan.unplaced
    assert solution.summary.method == "column generation"
    assert 0 <= solution.summary.gap <= 0.02
    assert solution.summary.lower_bound_gpus >= bound_by_volume(slots, deployments)
    free = {item.name: item.free_mib for item in solution.plan.slots}
    assert all(promised(solution.plan, name) <= free[name] for name in free)


def bound_by_volume(slots: tuple[Slot, ...], deployments: tuple[Deployment, ...]) -> int:
    """The plainest bound: the largest GPUs first until all MiB are in, teams as many GPUs as they have."""
    left = sum(item.replicas * item.vram_mib["default"] for item in deployments if item.gpus_per_replica == 1)
    gpus = sum(item.replicas * item.gpus_per_replica for item in deployments if item.gpus_per_replica > 1)
    for free in sorted((item.free_mib for item in slots), reverse=True):
        if left <= 0:
            return gpus
        left, gpus = left - free, gpus + 1
    return gpus


def test_a_lost_host_of_many_moves_only_its_replicas():
    slots, deployments = fleet(640, 2)
    before = solve(slots, deployments, "pack", options=Options(regroup=True)).plan
    busy = sorted({item.host for item in before.slots if promised(before, item.name)})
    rest = tuple(item for item in slots if item.host != busy[3])
    after = solve(rest, deployments, "pack", before, options=Options(regroup=True))
    lost = sum(
        berth.replicas
        for berth in before.berths
        if next(item for item in before.slots if item.name == berth.slot).host == busy[3]
    )
    assert (after.summary.moves, after.summary.replaced) == (0, lost)
    assert not after.plan.unplaced
    stays = {(berth.deployment, berth.slot): berth.replicas for berth in after.plan.berths}
    for berth in before.berths:
        if not berth.slot.startswith(busy[3]):
            assert stays[berth.deployment, berth.slot] >= berth.replicas


def test_an_overfull_fleet_leaves_out_the_lowest_priority_and_is_proven():
    slots = tuple(slot(f"h{n}-0", 20_000) for n in range(6))
    deployments = [
        replace(Deployment("low", 9, {"default": 9_000}), priority=-1),
        Deployment("mid", 5, {"default": 11_000}),
        replace(Deployment("high", 3, {"default": 15_000}), priority=5),
    ]
    solution = solve(slots, deployments, "pack")
    left = {item.deployment: item.replicas for item in solution.plan.unplaced}
    assert left == {"mid": 2, "low": 6}
    assert solution.summary.optimal


PROGRAM = """
from berth.plan.planner import Options, solve
from tests.unit.plan.test_solver import fleet
from berth.codec import dump
import hashlib, json
for gpus, seed in ((48, 3), (600, 4)):
    for strategy in ("pack", "spread"):
        solution = solve(*fleet(gpus, seed), strategy, options=Options(regroup=True, effort=0.5))
        print(hashlib.sha256(json.dumps(dump(solution), sort_keys=True).encode()).hexdigest())
"""


def test_the_plan_is_the_same_in_every_process():
    told = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert len(told[0].splitlines()) == 4


# --- The bound --------------------------------------------------------------------------------------------------------


@st.composite
def packings(draw: st.DrawFn) -> tuple[tuple[Slot, ...], tuple[Deployment, ...]]:
    """Up to five GPUs of unequal products, size and cost, with singles and a pair on them."""
    slots = tuple(
        replace(
            slot(f"h{n // 3}-{n % 3}", draw(st.sampled_from([10_000, 14_000, 20_000])), product=product),
            cost=draw(st.sampled_from([1.0, 1.0, 0.5, 2.5])),
        )
        for n, product in enumerate(draw(st.lists(st.sampled_from([L40S, A100]), min_size=1, max_size=5)))
    )
    # Those that fill a GPU to the last MiB leave a bound no room for error.
    size = st.sampled_from([2_500, 5_000, 5_000, 7_000, 10_000, 10_000, 20_000]) | st.integers(1_000, 19_999)
    deployments = [
        Deployment(
            f"m{n}", draw(st.integers(1, 4 - n)), {L40S: draw(size), A100: draw(size)}, priority=draw(st.integers(0, 1))
        )
        for n in range(draw(st.integers(1, 2)))
    ]
    if draw(st.booleans()):
        deployments.append(Deployment("pair", 1, {"default": draw(size)}, 2))
    return slots, tuple(deployments)


def every_load(slots: tuple[Slot, ...], deployments: tuple[Deployment, ...]) -> Iterator[tuple[set[int], Counter[str]]]:
    """Slots in use and replicas placed, for every way to place each replica or leave it out."""
    units = [item for item in deployments for _ in range(item.replicas)]

    def fits(item: Deployment, number: int) -> bool:
        return (item.footprint_mib(slots[number].product) or 0) <= slots[number].free_mib

    choices: list[list[tuple[int, ...]]] = []
    for unit in units:
        homes = [
            team
            for team in itertools.combinations(range(len(slots)), unit.gpus_per_replica)
            if all(fits(unit, number) for number in team)
            and len({(slots[number].host, slots[number].product) for number in team}) == 1
        ]
        choices.append([(), *homes])
    for way in itertools.product(*choices):
        held, alone = Counter[int](), Counter[int]()
        for unit, team in zip(units, way, strict=True):
            for number in team:
                held[number] += unit.footprint_mib(slots[number].product) or 0
                alone[number] += 100 if len(team) > 1 else 1
        if all(held[n] <= slots[n].free_mib and alone[n] <= 100 for n in held):
            yield set(held), Counter(unit.name for unit, team in zip(units, way, strict=True) if team)


@settings(max_examples=60, deadline=None)
@given(packings(), st.sampled_from([1, 4, 16]), st.data())
def test_no_plan_that_places_as_many_is_below_the_bound(case, unit, data):
    slots, deployments = case
    problem = build_problem(slots, deployments, "pack", None, True)
    state = heuristic(State(problem))
    levels = sorted({item.priority for item in deployments}, reverse=True)

    def by_level(placed: Counter[str]) -> list[int]:
        return [sum(placed[item.name] for item in deployments if item.priority == level) for level in levels]

    mine = Counter({job.name: state.placed[job.index] for job in problem.jobs})
    ways = [
        used
        for used, placed in every_load(slots, deployments)
        if all(theirs >= ours for theirs, ours in zip(by_level(placed), by_level(mine), strict=True))
    ]
    gpus, cost = min(len(used) for used in ways), min(sum(problem.costs[n] for n in used) for used in ways)
    bounds = prove(state, (), unit, quick=data.draw(st.booleans()))
    assert bounds.gpus <= gpus
    assert bounds.cost <= cost
    # Whatever the prices are, what they prove holds.
    packing = whole_packing(state)
    prices = tuple(data.draw(st.integers(0, 3_000_000)) for _ in packing.items)
    floors = tuple(
        sum(min(item.demand, state.placed[item.job.index]) for item in packing.items if item.level == level)
        for level in range(1 + max(item.level for item in packing.items))
    )
    for goal, least in (
        (Goal(tuple(bins.cost for bins in packing.bins), floors), cost),
        (Goal(tuple(bins.gpus * MICRO for bins in packing.bins), floors), gpus * MICRO),
    ):
        for row in (prices, by_volume(packing, goal)):
            assert proven(packing, goal, row, worths(packing, row, unit)) <= least


def test_the_bound_counts_each_products_gpus():
    # By size a replica is worth its part of the largest card; but there are few of those.
    slots = [slot(f"big-{n}", 80_000, product=A100) for n in range(2)] + [slot(f"s-{n}", 20_000) for n in range(200)]
    asked = [Deployment(f"m{n:02}", 10, {"default": 4_700 + 17 * n}) for n in range(30)]
    solution = solve(slots, asked, "pack", options=Options(exact_gpus=0))
    volume = sum(item.replicas * item.vram_mib["default"] for item in asked)
    assert solution.summary.lower_bound_gpus >= 2 + -(-(volume - 160_000) // 20_000)
    assert solution.summary.lower_bound_gpus <= solution.summary.gpus_used
