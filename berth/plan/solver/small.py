"""Small fleets of packed jobs without rules: patterns make the plan, prices prove it (see ``skeleton``)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from berth.plan.solver.bins import Packing, open_packing
from berth.plan.solver.columns import Column, Goal, Prices, generate, near_best, proven, worths
from berth.plan.solver.greedy import pick_team
from berth.plan.solver.measure import best
from berth.plan.solver.patterns import SMALL, columns_of, pack, packed_jobs
from berth.plan.solver.problem import HOST_LEVEL, MICRO
from berth.plan.solver.skeleton import Chosen, Skeleton
from berth.plan.solver.state import State

UNITS_MIB = (64, 8, 1)
ROUNDS = 60
CUTS = 10
MANY = 500
"""Patterns from which on a node takes so long that fewer are visited."""
ENRICHED = 2
"""Sets of prices at which the best pattern with each item in it is added: what is best alone is not best together."""
"""Sets of prices that the bound uses per goal: the last ones, which prove most."""


@dataclass(frozen=True)
class Proof:
    """The best state found; values ``reached`` and ``proven``: left out by level, cost in millionths, GPUs, hosts."""

    state: State
    reached: tuple[int, ...] = ()
    proven: tuple[int, ...] = ()

    @property
    def optimal(self) -> bool:
        """Whether nothing better exists."""
        return self.reached == self.proven


def solve_small(base: State, start: State, nodes: int) -> Proof:
    """The best way to add the packed jobs to ``base``; ``start`` is a state to be no worse than."""
    packing = open_packing(base, packed_jobs(base))
    if not packing.items:
        return Proof(start)
    start = best((start, pack(base, start, SMALL).state))
    columns, prices, floors = _generate(packing, base, start)
    bound, plan = Skeleton(base, packing, nodes), Skeleton(base, packing, nodes * MANY // max(MANY, len(columns)))
    bound.prices(prices)
    plan.patterns(sorted(columns, key=lambda column: (column.bins, column.load)))
    ours: Chosen | None = None
    values = _values(packing, base, start, plan.unit)
    proven: list[int] = []
    wants, leasts = plan.objectives(), bound.objectives()
    for number in range(len(values)):
        _, low = bound.minimise(leasts[number], floors.get(number - len(values), 0))
        if low < values[number]:
            found, _ = plan.minimise(wants[number], low, values[number])
            if found is not None and (found < values[number] or ours is not None):
                ours = plan.chosen()
                values = ours.reached[: len(values)]
                plan.hint()
        proven.append(min(low, values[number]))
        plan.fix(wants[number], values[number])
        bound.fix(leasts[number], values[number])
    levels = len(values) - 3
    scale = [1] * levels + [plan.unit, 1, 1]
    proven = [value * by for value, by in zip(proven, scale, strict=True)]
    values = tuple(value * by for value, by in zip(values, scale, strict=True))
    if ours is None:
        return Proof(start, values, tuple(proven))
    # Of equals, the one that opens the smaller cards.
    if plan.minimise(wants[-1])[0] is not None:
        ours = plan.chosen()
    return Proof(_to_state(base, packing, plan.loads, ours), values, tuple(proven))


def _generate(packing: Packing, base: State, start: State) -> tuple[set[Column], list[Prices], dict[int, int]]:
    """Patterns and prices for each thing to be minimised."""
    levels = 1 + max(item.level for item in packing.items)
    demand, placed = [0] * levels, [0] * levels
    for item in packing.items:
        demand[item.level] += item.demand
        placed[item.level] += start.placed[item.job.index] - base.placed[item.job.index]
    columns = columns_of(packing, base, start)
    prices: list[Prices] = []
    costs = tuple(bins.cost for bins in packing.bins)
    gpus = tuple(bins.gpus * MICRO for bins in packing.bins)
    goals = [
        Goal((0,) * len(costs), tuple(placed[:level] + [0] * (levels - level)), level)
        for level in range(levels)
        if placed[level] < demand[level]
    ]
    goals.append(Goal(costs, tuple(placed)))
    if gpus != costs:
        goals.append(Goal(gpus, tuple(placed)))
    floors: dict[int, int] = {}
    unit = math.gcd(*costs) or 1
    for goal in goals:
        found = generate(packing, goal, columns, UNITS_MIB, ROUNDS, 1e-6)
        columns |= set(found.columns) | near_best(packing, goal, found.prices[-ENRICHED:], UNITS_MIB[-1])
        prices += found.prices[-CUTS:]
        if goal.reward is None and all(a == b for a, b in zip(placed, demand, strict=True)):
            # The number of objectives from the end: -3 is cost, -2 GPUs.
            number, step = (-3, unit) if goal.costs == costs else (-2, MICRO)
            best = max((proven(packing, goal, row, worths(packing, row, 1)) for row in found.prices[-3:]), default=0)
            floors[number] = -(-best // step)
    return columns, prices, floors


def _values(packing: Packing, base: State, state: State, unit: int) -> tuple[int, ...]:
    """What ``state`` adds to ``base``: left out by level, cost, GPUs, hosts."""
    left = [0] * (1 + max(item.level for item in packing.items))
    for item in packing.items:
        left[item.level] += max(0, state.missing(item.job))
    bins = {slot: item for item in packing.bins for slot in item.slots}
    new = [slot for slot in bins if state.heads[slot] and not base.heads[slot]]
    hosts = set(state.opened) - set(base.opened)
    return (*left, sum(bins[slot].cost // unit for slot in new), sum(bins[slot].gpus for slot in new), len(hosts))


def _to_state(base: State, packing: Packing, loads: Sequence[Column], chosen: Chosen) -> State:
    """The plan that the program chose: teams first, then patterns on the bins that are left to them."""
    state = base.copy()
    problem = base.problem
    rest: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, bins in enumerate(packing.bins):
        for slot in bins.slots:
            rest[problem.domains[HOST_LEVEL][slot], number].append(slot)
    for row in rest.values():
        row.sort(key=lambda slot: (not _was_in_use(state, slot), slot))
    _teams(state, packing, chosen, rest)
    free: dict[int, list[int]] = defaultdict(list)
    for (host, number), count in sorted(chosen.bins.items()):
        free[number] += rest[host, number][:count]
    for column, count in zip(loads, chosen.use, strict=True):
        for _ in range(count):
            _put(state, packing, column, free[column.bins])
    return state


def _was_in_use(state: State, slot: int) -> bool:
    return any((job.family, slot) in state.problem.present for job in state.problem.jobs)


def _teams(state: State, packing: Packing, chosen: Chosen, rest: dict[tuple[int, int], list[int]]) -> None:
    """Give each team its slots; where they are all of one class, any of it will do and NVLink decides."""
    slots = state.problem.slots
    for (index, host, product, link), count in sorted(chosen.teams.items()):
        job = packing.items[index].job
        quotas = {
            number: quota
            for (other, where, number, group), quota in sorted(chosen.members.items())
            if (other, where, group) == (index, host, link) and packing.bins[number].product == product and quota
        }
        able = [
            slot
            for number, quota in quotas.items()
            for slot in [slot for slot in rest[host, number] if not link or slots[slot].nvlink_group == link][
                : quota if len(quotas) > 1 else None
            ]
        ]
        for _ in range(count):
            team = pick_team(state, job, [slot for slot in able if not state.taken[slot]])
            if team is not None:
                state.add_team(job, team)
        for number in quotas:
            rest[host, number] = [slot for slot in rest[host, number] if not state.taken[slot]]


def _put(state: State, packing: Packing, column: Column, free: list[int]) -> None:
    load = [(packing.items[index].job, count) for index, count in column.load]
    wanted = [(job, min(count, state.missing(job))) for job, count in load if state.missing(job) > 0]
    if wanted and free:
        # Where most of it stood before, of bins that are equal.
        present = state.problem.present
        slot = max(free, key=lambda slot: (sum((job.family, slot) in present for job, _ in wanted), -slot))
        free.remove(slot)
        for job, count in wanted:
            state.add(job, slot, count)
