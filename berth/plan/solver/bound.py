"""How good any plan could be: proven, whatever rules there are besides, because rules only forbid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from berth.plan.solver.bins import Packing, coarse, whole_packing
from berth.plan.solver.columns import Goal, Prices, by_size, by_volume, generate, proven, worths
from berth.plan.solver.patterns import columns_of
from berth.plan.solver.problem import MICRO
from berth.plan.solver.state import State

CLASSES = 4
ROUNDS = 60
TOLERANCE = 0.004
TRIED = 4
"""Prices evaluated exactly, the last ones found: they prove most."""


@dataclass(frozen=True)
class Bounds:
    """No plan that places as many opens fewer ``gpus`` or costs less than ``cost`` (millionths)."""

    gpus: int
    cost: int


@dataclass(frozen=True)
class Offer:
    """Prices per place by job index, found for another packing of the same fleet."""

    prices: dict[int, int]


def offers(packing: Packing, prices: Iterable[Prices]) -> tuple[Offer, ...]:
    """The last of ``prices``, by job."""
    return tuple(
        Offer({item.job.index: price for item, price in zip(packing.items, row, strict=True)})
        for row in list(prices)[-TRIED:]
    )


def prove(state: State, known: tuple[Offer, ...], unit: int, quick: bool) -> Bounds:
    """Bounds for the fleet of ``state`` and as many places of each level as it has.

    ``known`` prices are tried first; without any, new ones are made. Sizes are rounded down to ``unit`` MiB.
    """
    packing = whole_packing(state)
    costs = tuple(bins.cost for bins in packing.bins)
    gpus = tuple(bins.gpus * MICRO for bins in packing.bins)
    floors = _floors(packing, state)
    rows = [tuple(offer.prices.get(item.job.index, 0) for item in packing.items) for offer in known]
    priced = {job for offer in known for job in offer.prices}
    if not priced.issuperset(item.job.index for item in packing.items):
        rows += _prices(packing, state, costs, floors, quick)
    rows.append(by_volume(packing, Goal(costs, floors)))
    cost = _best(packing, Goal(costs, floors), rows, unit)
    if costs != gpus:
        rows = [*_prices(packing, state, gpus, floors, quick), by_volume(packing, Goal(gpus, floors))]
    count = -(-_best(packing, Goal(gpus, floors), rows, unit) // MICRO)
    if all(floor == wanted for floor, wanted in zip(floors, _floors(packing, None), strict=True)):
        count = max(count, *(_counted(packing, prices, unit) for prices in (*rows, by_size(packing))))
    return Bounds(count, max(cost, count * MICRO) if costs == gpus else cost)


def _counted(packing: Packing, prices: Prices, unit: int) -> int:
    """GPUs at least, in whole bins: those of the teams, and the most worthy ones until all else has its worth."""
    teams = sum(item.demand * item.width for item in packing.items if item.width > 1)
    singles = tuple(0 if item.width > 1 else price for item, price in zip(packing.items, prices, strict=True))
    left = sum(price * item.demand for item, price in zip(packing.items, singles, strict=True))
    if any(bins.gpus != 1 for bins in packing.bins):
        return 0
    count = 0
    ranked = sorted(zip(worths(packing, singles, unit), packing.bins, strict=True), key=lambda row: -row[0])
    for worth, bins in ranked:
        if left > 0 and worth > 0:
            needed = min(bins.count, -(-left // worth))
            left, count = left - needed * worth, count + needed
    return teams + count


def _floors(packing: Packing, state: State | None) -> tuple[int, ...]:
    """Places by level: as ``state`` has, or all."""
    floors = [0] * (1 + max((item.level for item in packing.items), default=-1))
    for item in packing.items:
        floors[item.level] += item.demand if state is None else min(item.demand, state.placed[item.job.index])
    return tuple(floors)


def _prices(
    packing: Packing, state: State, costs: tuple[int, ...], floors: tuple[int, ...], quick: bool
) -> list[Prices]:
    small = len(packing.bins) <= 64
    some = packing if small else coarse(packing, CLASSES)
    by_slot = {slot: cost for bins, cost in zip(packing.bins, costs, strict=True) for slot in bins.slots}
    goal = Goal(tuple(by_slot[bins.slots[0]] for bins in some.bins), floors)
    start = set() if quick else columns_of(some, State(state.problem), state)
    found = generate(some, goal, start, (64,) if quick else (16,), ROUNDS, 10 * TOLERANCE if quick else TOLERANCE)
    return found.prices[-TRIED:]


def _best(packing: Packing, goal: Goal, rows: list[Prices], unit: int) -> int:
    return max((proven(packing, goal, prices, worths(packing, prices, unit)) for prices in rows), default=0)
