"""Packed jobs without rules: patterns as often as the linear program says, and a dive for the fractions.

The dive takes what the program uses whole, and of the rest the patterns it likes best; what is left over is a smaller
packing, for which new patterns are made, until everything has its bin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from berth.codec import replace
from berth.plan.solver.bins import Packing, coarse, open_packing, without
from berth.plan.solver.columns import Column, Generated, Goal, generate
from berth.plan.solver.greedy import Quota, Way, order_of, place_all, place_teams
from berth.plan.solver.improve import close_hosts, close_slots
from berth.plan.solver.problem import HOST_LEVEL, Job
from berth.plan.solver.state import State, open_slots

TINY = 1e-6


@dataclass(frozen=True)
class Care:
    """How carefully: classes per kind that partly used slots are merged to (None: none is merged), the units in MiB
    to which sizes are rounded up in turn, rounds and relative tolerance of the linear program; the same for the dive,
    and the part of what is left that each step of the dive may fix."""

    classes: int | None
    units: tuple[int, ...]
    rounds: int
    tolerance: float
    dive_unit: int
    dive_rounds: int
    dive_tolerance: float
    step: float


LARGE = Care(4, (16,), 100, 0.004, 16, 8, 0.002, 0.3)
SMALL = Care(None, (64, 8, 1), 60, 1e-6, 4, 40, 1e-4, 0.0)


@dataclass(frozen=True)
class Packed:
    """A state by patterns; the packing, the linear program's patterns and prices it comes from."""

    state: State
    packing: Packing
    found: Generated
    goal: Goal


def packed_jobs(state: State) -> list[Job]:
    """Jobs that patterns may place: packed, and without rules."""
    return [job for job in state.problem.jobs if job.simple and job.strategy == "pack"]


def pack(base: State, start: State, care: Care) -> Packed:
    """``base`` with everything added that ``start`` placed beyond it, in cheaper bins where patterns are better."""
    jobs = packed_jobs(base)
    packing = _packing(base, jobs, care)
    goal = goal_of(packing, base, start)
    found = generate(packing, goal, columns_of(packing, base, start), care.units, care.rounds, care.tolerance)
    state = base.copy()
    _teams_first(state, packing, found)
    rest, columns, use = packing, found.columns, found.use
    if packing.teams:
        rest = _packing(state, [job for job in jobs if not job.team], care)
        columns, use = translate(packing, rest, columns, use)
    _dive(state, rest, columns, use, base, start, care)
    place_all(state, [job for job in order_of(base.problem, Way()) if job in jobs], Way())
    fixed = frozenset(open_slots(base))
    close_slots(state, fixed)
    close_hosts(state, fixed)
    return Packed(state, packing, found, goal)


def _packing(state: State, jobs: list[Job], care: Care) -> Packing:
    packing = open_packing(state, jobs)
    return packing if care.classes is None else coarse(packing, care.classes)


def goal_of(packing: Packing, base: State, start: State) -> Goal:
    """The least cost for as many places of each level as ``start`` has."""
    floors = [0] * (1 + max((item.level for item in packing.items), default=-1))
    for item in packing.items:
        floors[item.level] += start.placed[item.job.index] - base.placed[item.job.index]
    floors = [max(0, floor) for floor in floors]
    return Goal(tuple(bins.cost for bins in packing.bins), tuple(floors))


def translate(
    old: Packing, new: Packing, columns: Sequence[Column], use: Sequence[float]
) -> tuple[list[Column], list[float]]:
    """The columns of ``old`` that ``new`` has bins and items for, under its numbers."""
    items = {item.job.index: number for number, item in enumerate(new.items)}
    bins = {slot: number for number, item in enumerate(new.bins) for slot in item.slots}
    found: dict[Column, float] = {}
    for column, count in zip(columns, use, strict=True):
        slot = next((slot for slot in old.bins[column.bins].slots if slot in bins), None)
        jobs = [(old.items[index].job.index, places) for index, places in column.load]
        if slot is None or any(job not in items for job, _ in jobs):
            continue
        moved = Column(bins[slot], tuple(sorted((items[job], places) for job, places in jobs)))
        if fits(new, moved):
            found[moved] = found.get(moved, 0.0) + count
    return list(found), list(found.values())


def fits(packing: Packing, column: Column) -> bool:
    """Whether a bin of the class is left that holds the column, and its places are all wanted."""
    bins = packing.bins[column.bins]
    return (
        bins.count > 0
        and all(bins.sizes[index] and count <= packing.items[index].demand for index, count in column.load)
        and sum(bins.sizes[index] * count for index, count in column.load) <= bins.capacity
    )


def _dive(
    state: State,
    packing: Packing,
    columns: Sequence[Column],
    use: Sequence[float],
    base: State,
    start: State,
    care: Care,
) -> None:
    """Put patterns on slots, the surest first, until everything is placed or nothing is sure."""
    free = [_in_order(state, bins.slots) for bins in packing.bins]
    while True:
        before = sum(state.placed)
        for count, column in _sure(packing, columns, use, care):
            for _ in range(count):
                _put(state, packing, column, free[column.bins])
        if sum(state.placed) == before:
            return
        packing = replace(
            packing,
            items=tuple(replace(item, demand=max(0, state.missing(item.job))) for item in packing.items),
            bins=tuple(replace(bins, slots=tuple(slots)) for bins, slots in zip(packing.bins, free, strict=True)),
        )
        goal = goal_of(packing, state, start)
        if not any(goal.floors):
            return
        usable = {column for column in columns if fits(packing, column)}
        again = generate(packing, goal, usable, (care.dive_unit,), care.dive_rounds, care.dive_tolerance)
        columns, use = again.columns, again.use


def _sure(packing: Packing, columns: Sequence[Column], use: Sequence[float], care: Care) -> list[tuple[int, Column]]:
    """What the linear program uses whole; else the fullest of what it uses most, up to a part of all it uses."""
    rows = [(count, column) for count, column in zip(use, columns, strict=True) if count > TINY]
    whole = [(int(count + TINY), column) for count, column in rows if count >= 1 - TINY]
    if whole:
        return whole
    rows.sort(key=lambda row: (-row[0] * _filled(packing, row[1]), row[1].bins, row[1].load))
    most = max(1, int(care.step * sum(count for count, _ in rows)))
    return _compatible(packing, [column for _, column in rows[:most]])


def _compatible(packing: Packing, columns: Iterable[Column]) -> list[tuple[int, Column]]:
    """Those of ``columns``, one after the other, that are still wanted whole; the first in any case."""
    found: list[tuple[int, Column]] = []
    left = packing
    for column in columns:
        if not found or fits(left, column):
            found.append((1, column))
            left = without(left, [(column.bins, column.load, 1)])
    return found


def _filled(packing: Packing, column: Column) -> float:
    bins = packing.bins[column.bins]
    return sum(bins.sizes[index] * count for index, count in column.load) / bins.capacity


def columns_of(packing: Packing, base: State, start: State) -> set[Column]:
    """The patterns that ``start`` uses beyond ``base``."""
    bins = {slot: number for number, item in enumerate(packing.bins) for slot in item.slots}
    items = {item.job.index: number for number, item in enumerate(packing.items)}
    found: set[Column] = set()
    for slot, number in bins.items():
        if start.taken[slot]:
            continue
        load = sorted(
            (items[job], places - base.here[slot].get(job, 0))
            for job, places in start.here[slot].items()
            if job in items
        )
        # A coarse bin may be smaller than the slot: then the pattern does not count.
        sizes = packing.bins[number].sizes
        need = sum(sizes[item] * count for item, count in load)
        if load and all(sizes[item] and count > 0 for item, count in load) and need <= packing.bins[number].capacity:
            found.add(Column(number, tuple(load)))
    return found


def _teams_first(state: State, packing: Packing, found: Generated) -> None:
    """Teams take whole GPUs of the products that the linear program gives them."""
    shares: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for count, column in zip(found.use, found.columns, strict=True):
        index = column.load[0][0]
        if packing.items[index].width > 1:
            shares[index][packing.bins[column.bins].product] += count / packing.items[index].width
    for index in sorted(packing.teams, key=lambda index: (-packing.items[index].width, index)):
        job = packing.items[index].job
        rows = sorted(shares[index].items())
        quotas: list[Quota] = [(product, int(count + TINY)) for product, count in rows]
        quotas += [(product, 1) for product, _ in sorted(rows, key=lambda row: (int(row[1] + TINY) - row[1], row[0]))]
        place_teams(state, job, quotas=[*quotas, (None, None)])


def _in_order(state: State, slots: Sequence[int]) -> list[int]:
    """Slots to take from the end: hosts in use first, then those with most slots of the class."""
    hosts = state.problem.domains[HOST_LEVEL]
    sizes: dict[int, int] = defaultdict(int)
    for slot in slots:
        sizes[hosts[slot]] += 1
    able = [slot for slot in slots if not state.taken[slot]]
    return sorted(
        able, key=lambda slot: (hosts[slot] not in state.opened, -sizes[hosts[slot]], hosts[slot], slot), reverse=True
    )


def _put(state: State, packing: Packing, column: Column, free: list[int]) -> None:
    """Give the next bin the part of the pattern that is still wanted."""
    load = [(packing.items[index].job, count) for index, count in column.load]
    wanted = [(job, min(count, state.missing(job))) for job, count in load if state.missing(job) > 0]
    if free and wanted:
        slot = free.pop()
        for job, count in wanted:
            state.add(job, slot, count)
