"""Items and bins: the plan without its rules. What is proven here holds for every plan, because rules only forbid.

A bin is what one slot can promise; equal bins form a class. An item is a job with its demand. A team's item takes one
GPU of each of its slots as a whole; as ``1 / width`` of a replica per bin it is a relaxation (its GPUs need not share
a host), which is what a bound may do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from berth.codec import replace
from berth.plan.solver.knapsack import Pattern
from berth.plan.solver.problem import Job, Problem
from berth.plan.solver.state import State


@dataclass(frozen=True)
class Item:
    """``demand`` places of a job; ``level`` orders who is left out first (0: last of all)."""

    job: Job
    demand: int
    level: int

    @property
    def width(self) -> int:
        """Bins that one place takes as a whole: more than 1 for teams."""
        return self.job.width if self.job.team else 1


@dataclass(frozen=True)
class Bins:
    """Equal slots: ``sizes`` by item (0: may not be here), ``cost`` of opening one in millionths, 0 when it is open."""

    capacity: int
    sizes: tuple[int, ...]
    cost: int
    gpus: int
    product: str
    slots: tuple[int, ...]
    places: int

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.slots)


@dataclass(frozen=True)
class Packing:
    """What is to be packed into what.

    A family of classes is served by one knapsack: equal sizes, of which smaller bins merely hold less. Its first is the
    largest. ``teams`` are the items that take several bins.
    """

    items: tuple[Item, ...]
    bins: tuple[Bins, ...]
    families: tuple[tuple[int, ...], ...] = ()
    teams: tuple[int, ...] = ()


def _packing(items: tuple[Item, ...], bins: tuple[Bins, ...]) -> Packing:
    teams = tuple(index for index, item in enumerate(items) if item.width > 1)
    single = [index for index, item in enumerate(items) if item.width == 1]
    families: list[list[int]] = []
    for number in sorted(range(len(bins)), key=lambda number: (-bins[number].capacity, number)):
        mine = bins[number]
        for family in families:
            first = bins[family[0]].sizes
            if all(mine.sizes[i] == (first[i] if first[i] <= mine.capacity else 0) for i in single):
                family.append(number)
                break
        else:
            families.append([number])
    return Packing(items, bins, tuple(tuple(family) for family in families), teams)


def without(packing: Packing, used: Sequence[tuple[int, Pattern, int]]) -> Packing:
    """What is left when bins of a class have been filled with a load some times over: (class, load, times)."""
    gone = [0] * len(packing.bins)
    placed = [0] * len(packing.items)
    for number, load, times in used:
        gone[number] += times
        for index, count in load:
            placed[index] += count * times
    items = tuple(
        replace(item, demand=max(0, item.demand - count)) for item, count in zip(packing.items, placed, strict=True)
    )
    bins = tuple(replace(bins, slots=bins.slots[count:]) for bins, count in zip(packing.bins, gone, strict=True))
    return replace(packing, items=items, bins=bins)


def coarse(packing: Packing, classes: int) -> Packing:
    """``packing`` with at most about ``classes`` classes per kind: unequal bins count as the smallest of their group.

    What fits the coarse packing fits the fine one.
    """
    groups: dict[tuple[object, ...], list[Bins]] = defaultdict(list)
    for bins in packing.bins:
        groups[bins.product, bins.cost, bins.gpus, bins.places, _family(packing, bins)].append(bins)
    found: list[Bins] = []
    for members in groups.values():
        members.sort(key=lambda bins: bins.capacity)
        large = [bins for bins in members if bins.count * 4 * classes > sum(item.count for item in members)]
        rest = [bins for bins in members if bins not in large]
        found += large
        step = -(-len(rest) // classes) if rest else 1
        for start in range(0, len(rest), step):
            part = rest[start : start + step]
            slots = tuple(slot for bins in part for slot in bins.slots)
            found.append(replace(part[0], slots=tuple(sorted(slots))))
    return _packing(packing.items, tuple(sorted(found, key=lambda item: item.slots)))


def _family(packing: Packing, bins: Bins) -> int:
    number = packing.bins.index(bins)
    return next(index for index, family in enumerate(packing.families) if number in family)


def whole_packing(state: State) -> Packing:
    """The fleet as if empty, and everything that is asked: what bounds are proven on."""
    problem = state.problem
    items = _items([(job, _wanted(job)) for job in problem.jobs])
    rooms = []
    for slot, known in enumerate(problem.slots):
        used = known.free_mib - state.free[slot]
        if known.cordoned and not state.heads[slot]:
            continue
        # What stands may hold more than is promised to anybody new.
        rooms.append((slot, max(known.free_mib, used), False))
    return _packing(items, _classes(problem, items, rooms, state))


def _wanted(job: Job) -> int:
    return max(job.wanted, job.deployment.max_replicas or 0) if job.pool else job.wanted


def open_packing(state: State, jobs: list[Job]) -> Packing:
    """What of ``jobs`` is still missing, and what is left on each slot of ``state``."""
    problem = state.problem
    items = _items([(job, state.missing(job)) for job in jobs if state.missing(job) > 0])
    rooms = [
        (slot, state.free[slot], state.heads[slot] > 0)
        for slot, known in enumerate(problem.slots)
        if not known.cordoned
        and not state.taken[slot]
        and not (state.heads[slot] and problem.gpus[slot] > 1)
        and state.free[slot] > 0
    ]
    return _packing(items, _classes(problem, items, rooms, state))


def _items(wanted: list[tuple[Job, int]]) -> tuple[Item, ...]:
    ranks = sorted({(job.shadow, -job.deployment.priority) for job, _ in wanted})
    return tuple(
        Item(job, count, ranks.index((job.shadow, -job.deployment.priority))) for job, count in wanted if count > 0
    )


def _classes(
    problem: Problem, items: tuple[Item, ...], rooms: list[tuple[int, int, bool]], state: State
) -> tuple[Bins, ...]:
    pinned = [number for number, item in enumerate(items) if item.job.pins is not None]
    by_kind = [[item.job.sizes[kind] or 0 for item in items] for kind in range(len(problem.kinds))]
    found: dict[tuple[int, int, int, tuple[int, ...], bool, int], list[int]] = defaultdict(list)
    for slot, capacity, is_open in rooms:
        pins = tuple(number for number in pinned if slot in (items[number].job.pins or ()))
        cost = 0 if is_open else problem.costs[slot]
        # Only what is open has heads: everybody else may hold as many as anybody.
        heads = state.heads[slot] if is_open else 0
        found[problem.kind[slot], capacity, cost, pins, is_open, heads].append(slot)
    classes = []
    for (kind, capacity, cost, pins, is_open, heads), slots in found.items():
        sizes = list(by_kind[kind])
        for number in pinned:
            if number not in pins:
                sizes[number] = 0
        for number, item in enumerate(items):
            if sizes[number] > capacity or (is_open and item.width > 1):
                sizes[number] = 0
        if any(sizes):
            gpus = 0 if is_open else problem.gpus[slots[0]]
            places = (100 if problem.gpus[slots[0]] == 1 else 1) - heads
            product = problem.kinds[kind].product
            classes.append(Bins(capacity, tuple(sizes), cost, gpus, product, tuple(slots), places))
    return tuple(sorted(classes, key=lambda item: item.slots))
