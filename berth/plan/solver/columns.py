"""Patterns by column generation (Gilmore and Gomory 1961), and what every set of prices proves.

A pattern is a load of one bin of a class. The linear program over patterns chooses how often each is used; its prices
of places tell, through a knapsack per class, which pattern is missing. Any prices at all prove a bound: a bin of class
c holds places worth at most ``z(c)``, so what is asked cannot cost less than its worth minus what cheap bins give away
(Farley 1990). Prices are whole millionths and bounds are computed in whole numbers: no rounding is on the wrong side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import ortools.linear_solver.pywraplp as pywraplp  # type: ignore[import-untyped]

from berth.plan.solver.bins import Bins, Packing
from berth.plan.solver.knapsack import Pattern, fill
from berth.plan.solver.problem import MICRO

Prices = tuple[int, ...]
"""Millionths per place, by item."""


@dataclass(frozen=True)
class Column:
    """One bin of class ``bins`` with load ``load``; a team's column is one of its bins, ``load`` is ((item, 1),)."""

    bins: int
    load: Pattern


@dataclass(frozen=True)
class Goal:
    """What a bin costs, by class, in millionths; and how many places of each level must be placed at least.

    ``reward`` is the level whose places are to be as many as possible instead (then bins cost nothing).
    """

    costs: tuple[int, ...]
    floors: tuple[int, ...]
    reward: int | None = None


@dataclass
class Generated:
    """Columns found, how often the linear program uses each, the prices that proved most on the way."""

    columns: list[Column]
    use: list[float]
    prices: list[Prices] = field(default_factory=list)
    value: float = 0.0


# --- What prices prove ------------------------------------------------------------------------------------------------


def worths(packing: Packing, prices: Prices, unit: int) -> list[int]:
    """z(c) by class: no load of one of its bins is worth more. Sizes are rounded down to ``unit`` MiB; nothing is worth
    more than its bin full of what is worth most per MiB, which needs no rounding."""
    found = [0] * len(packing.bins)
    for members in packing.families:
        largest = packing.bins[members[0]]
        singles = [size if item.width == 1 else 0 for size, item in zip(largest.sizes, packing.items, strict=True)]
        step = max(1, min(unit, min((size for size in singles if size), default=1)))
        demands = [item.demand for item in packing.items]
        sack = fill([size // step for size in singles], demands, prices, largest.capacity // step, trace=False)
        dense = max((Fraction(price, size) for price, size in zip(prices, singles, strict=True) if size), default=None)
        for number in members:
            bins = packing.bins[number]
            single = int(sack.worth[bins.capacity // step])
            if dense is not None:
                single = min(single, int(dense * bins.capacity))
            if bins.places == 1:
                single = max((prices[index] for index, size in enumerate(bins.sizes) if size), default=0)
            teams = [-(-prices[index] // packing.items[index].width) for index in packing.teams if bins.sizes[index]]
            found[number] = max([single, *teams])
    return found


def proven(packing: Packing, goal: Goal, prices: Prices, worth: Sequence[int]) -> int:
    """The least cost in millionths that ``prices`` prove for ``goal`` (which must not be a reward)."""
    asked = 0
    for level, floor in enumerate(goal.floors):
        left = floor
        # Whoever is cheapest at these prices is placed first: nothing dearer need be.
        rows = sorted((prices[i], item.demand) for i, item in enumerate(packing.items) if item.level == level)
        for price, demand in rows:
            asked += price * min(left, demand)
            left -= min(left, demand)
    given = sum(
        bins.count * max(0, value - cost) for bins, value, cost in zip(packing.bins, worth, goal.costs, strict=True)
    )
    return max(0, asked - given)


def by_size(packing: Packing) -> Prices:
    """The prices of a bound by volume: a place is worth its part of the largest bin of its best class, by cost."""
    found = []
    for index, item in enumerate(packing.items):
        parts = [
            (item.width if item.width > 1 else bins.sizes[index] / max(1, bins.capacity)) * max(bins.cost, 1)
            for bins in packing.bins
            if bins.sizes[index]
        ]
        found.append(int(min(parts, default=0)))
    return tuple(found)


def by_volume(packing: Packing, goal: Goal) -> Prices:
    """The prices of the linear program over volumes: what is placed in a family of classes fits its opened bins in sum.

    Better than ``by_size`` where products differ, because each has its own number of bins: a product that is used up
    makes what could be there dearer elsewhere. A team, and a place that has its bin alone, takes bins as a whole.
    """
    solver = pywraplp.Solver.CreateSolver("GLOP")
    infinity, objective = solver.infinity(), solver.Objective()
    objective.SetMinimization()
    room = [solver.Constraint(-infinity, 0) for _ in packing.families]
    for row, members in zip(room, packing.families, strict=True):
        for number in members:
            opened = solver.NumVar(0, packing.bins[number].count, "")
            objective.SetCoefficient(opened, goal.costs[number] / MICRO)
            row.SetCoefficient(opened, -packing.bins[number].capacity)
    cover = [solver.Constraint(0, infinity) for _ in packing.items]
    levels = [solver.Constraint(floor, infinity) for floor in goal.floors]
    for index, item in enumerate(packing.items):
        placed = solver.NumVar(0, item.demand, "")
        cover[index].SetCoefficient(placed, -1)
        levels[item.level].SetCoefficient(placed, 1)
        for row, members in zip(room, packing.families, strict=True):
            largest = packing.bins[members[0]]
            if any(packing.bins[number].sizes[index] for number in members):
                whole = item.width > 1 or largest.places == 1
                inside = solver.NumVar(0, infinity, "")
                cover[index].SetCoefficient(inside, 1)
                row.SetCoefficient(inside, largest.capacity * item.width if whole else largest.sizes[index])
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return by_size(packing)
    return tuple(max(0, int(row.dual_value() * MICRO)) for row in cover)


# --- Columns ----------------------------------------------------------------------------------------------------------


def generate(
    packing: Packing, goal: Goal, start: Iterable[Column], units: Sequence[int], rounds: int, tolerance: float
) -> Generated:
    """Add patterns until the linear program is within ``tolerance`` (relative) of what is proven, at most ``rounds``.

    Sizes are rounded up to each of ``units`` (MiB) in turn: coarse ones find the first patterns fast.
    """
    master = _Master(packing, goal)
    teams = [
        Column(number, ((index, 1),))
        for number, bins in enumerate(packing.bins)
        for index in packing.teams
        if bins.sizes[index]
    ]
    for column in sorted({*start, *teams}, key=lambda column: (column.bins, column.load)):
        master.add(column)
    found = Generated([], [])
    for step, unit in enumerate(units):
        last = step == len(units) - 1
        _approach(packing, goal, master, found, unit, rounds, tolerance if last else 10 * tolerance)
    found.value, _ = master.solve()
    found.columns, found.use = master.columns, master.use()
    return found


def _approach(
    packing: Packing, goal: Goal, master: _Master, found: Generated, unit: int, rounds: int, tolerance: float
) -> None:
    """Rounds of pricing with sizes rounded up to ``unit``. The bounds on the way are about; ``proven`` is exact."""
    centre, about = None, 0
    if goal.reward is None:
        master.solve()
        first = by_size(packing)
        about, columns = _price(packing, goal, first, master, unit)
        found.prices.append(first)
        centre = [price / MICRO for price in first]
        for column in columns:
            master.add(column)
    for _ in range(rounds):
        value, raw = master.solve()
        # Prices half way to the best known ones mislead less; the raw ones are asked when these find nothing.
        smooth = [(a + b) / 2 for a, b in zip(raw, centre, strict=True)] if centre is not None else raw
        new = 0
        for tried in (smooth, raw) if centre is not None else (raw,):
            prices = tuple(max(0, int(price * MICRO)) for price in tried)
            bound, columns = _price(packing, goal, prices, master, unit)
            if bound > about or centre is None or goal.reward is not None:
                about, centre = max(bound, about), list(tried) if goal.reward is None else None
                found.prices.append(prices)
            new = sum(master.add(column) for column in columns)
            if new:
                break
        near = value * MICRO - about <= tolerance * max(1.0, value * MICRO)
        if not new or (near and goal.reward is None):
            break


def near_best(packing: Packing, goal: Goal, every: Sequence[Prices], unit: int) -> set[Column]:
    """For each class and item, the best pattern that has the item in it, at each of some prices."""
    found: set[Column] = set()
    demands = [item.demand for item in packing.items]
    for prices in every:
        for members in packing.families:
            largest = packing.bins[members[0]]
            singles = [
                -(-size // unit) if item.width == 1 else 0
                for size, item in zip(largest.sizes, packing.items, strict=True)
            ]
            sack = fill(singles, demands, prices, largest.capacity // unit, trace=True)
            for number in members:
                bins = packing.bins[number]
                for index, size in enumerate(singles):
                    if not size or not bins.sizes[index]:
                        continue
                    load = dict(sack.load(bins.capacity // unit - size))
                    load[index] = load.get(index, 0) + 1
                    if load[index] <= demands[index] and sum(load.values()) <= bins.places:
                        found.add(Column(number, tuple(sorted(load.items()))))
    return found


def _price(packing: Packing, goal: Goal, prices: Prices, master: _Master, unit: int) -> tuple[int, list[Column]]:
    """The best pattern of each class at ``prices``, with sizes rounded up, and about what that proves."""
    columns: list[Column] = []
    worth = [0] * len(packing.bins)
    demands = [item.demand for item in packing.items]
    for members in packing.families:
        largest = packing.bins[members[0]]
        singles = [
            -(-size // unit) if item.width == 1 else 0 for size, item in zip(largest.sizes, packing.items, strict=True)
        ]
        sack = fill(singles, demands, prices, largest.capacity // unit, trace=True)
        for number in members:
            bins = packing.bins[number]
            load: Pattern = sack.load(bins.capacity // unit)
            worth[number] = int(sack.worth[bins.capacity // unit])
            if bins.places < sum(count for _, count in load):
                load = _few(bins, prices, packing)
                worth[number] = sum(prices[item] * count for item, count in load)
            if load and worth[number] - goal.costs[number] - master.rent(number) > 1:
                columns.append(Column(number, load))
            teams = [prices[index] // packing.items[index].width for index in packing.teams if bins.sizes[index]]
            worth[number] = max([worth[number], *teams])
    if goal.reward is not None:
        return 0, columns
    return proven(packing, goal, prices, worth), columns


def _few(bins: Bins, prices: Prices, packing: Packing) -> Pattern:
    """A load by count where places, not MiB, are short: the dearest that fit."""
    left, places, load = bins.capacity, bins.places, {}
    order = sorted(range(len(prices)), key=lambda index: (-prices[index], index))
    for index in order:
        size, item = bins.sizes[index], packing.items[index]
        if size and item.width == 1 and prices[index] > 0:
            count = min(places, left // size, item.demand)
            if count > 0:
                load[index] = count
                left, places = left - count * size, places - count
    return tuple(sorted(load.items()))


class _Master:
    """The linear program over columns."""

    def __init__(self, packing: Packing, goal: Goal) -> None:
        solver = pywraplp.Solver.CreateSolver("GLOP")
        self.packing, self.goal, self.solver = packing, goal, solver
        self.columns: list[Column] = []
        self.seen: set[Column] = set()
        infinity = solver.infinity()
        self.objective = solver.Objective()
        self.objective.SetMinimization()
        self.variables: list[pywraplp.Variable] = []
        self.rents: list[int] = []
        self.bins = [solver.Constraint(-infinity, bins.count) for bins in packing.bins]
        self.cover = [solver.Constraint(0, infinity) for _ in packing.items]
        self.levels = [solver.Constraint(floor, infinity) for floor in goal.floors]
        for index, item in enumerate(packing.items):
            placed = solver.NumVar(0, item.demand, "")
            self.cover[index].SetCoefficient(placed, -1)
            self.levels[item.level].SetCoefficient(placed, 1)
            reward = goal.reward == item.level
            self.objective.SetCoefficient(placed, -1 if reward else 0)
            # A place that nobody can give yet is bought dearly, so that there are prices from the start.
            bought = solver.NumVar(0, infinity, "")
            self.cover[index].SetCoefficient(bought, 1)
            self.objective.SetCoefficient(bought, 2 if goal.reward is not None else 20.0 * item.width)

    def add(self, column: Column) -> bool:
        """Add ``column`` unless it is there."""
        if column in self.seen:
            return False
        self.seen.add(column)
        self.columns.append(column)
        variable = self.solver.NumVar(0, self.solver.infinity(), "")
        self.variables.append(variable)
        self.objective.SetCoefficient(variable, self.goal.costs[column.bins] / MICRO)
        self.bins[column.bins].SetCoefficient(variable, 1)
        for item, count in column.load:
            self.cover[item].SetCoefficient(variable, count / self.packing.items[item].width)
        return True

    def solve(self) -> tuple[float, list[float]]:
        """The value and the prices of places."""
        self.solver.Solve()
        self.rents = [max(0, int(-row.dual_value() * MICRO)) for row in self.bins]
        return self.objective.Value(), [row.dual_value() for row in self.cover]

    def rent(self, bins: int) -> int:
        """What one more bin of a class would save, in millionths."""
        return self.rents[bins]

    def use(self) -> list[float]:
        """How often each column is used."""
        return [variable.solution_value() for variable in self.variables]
