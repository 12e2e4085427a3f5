"""The solver's parts where an error would not show in a small plan: knapsack, bound, patterns at scale, hash seeds."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.plan.planner import Options, solve
from berth.plan.solver.knapsack import fill
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
