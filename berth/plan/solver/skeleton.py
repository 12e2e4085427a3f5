"""How many bins of which class to open on which host: the small integer program behind small plans.

With patterns it is a plan (what the patterns hold is placed); with prices it is a bound (every plan opens bins enough
to be worth what is placed, at any prices). Where both give one value, that value is proven without searching the plans
themselves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.linear_solver.python import model_builder as mb

from berth.plan.solver.bins import Packing
from berth.plan.solver.columns import Column, Prices, worths
from berth.plan.solver.problem import HOST_LEVEL
from berth.plan.solver.state import State

Objective = mb.LinearExpr | int
TINY = 1e-4
"""Objectives are whole numbers; the solver's bounds are not quite."""
SCALE = 10
"""Prices are cut to hundredths of a bin's thousandth: smaller numbers are easier to reason with, and prove as much."""


@dataclass(frozen=True)
class Chosen:
    """Values of the program: objectives reached, bins by (host, class), teams by (item, group) with their bins by
    class, and how often each column is used (none with prices)."""

    reached: tuple[int, ...]
    bins: dict[tuple[int, int], int]
    teams: dict[tuple[int, int, str, str], int]
    members: dict[tuple[int, int, int, str], int]
    use: tuple[int, ...]


class Skeleton:
    """One integer program; ``minimise`` may be called for one objective after the other."""

    def __init__(self, state: State, packing: Packing, nodes: int) -> None:
        """Bins per host and class, and whole teams on hosts; what they hold is said by ``patterns`` or ``prices``.

        Each search visits at most ``nodes`` nodes: a limit that is the same on every machine.
        """
        self.state, self.packing, self.nodes = state, packing, nodes
        self.unit = math.gcd(*(bins.cost for bins in packing.bins)) or 1
        self.model = mb.Model()  # type: ignore[no-untyped-call]
        model, problem = self.model, state.problem
        self.slots: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, bins in enumerate(packing.bins):
            for slot in bins.slots:
                self.slots[problem.domains[HOST_LEVEL][slot], number].append(slot)
        self.singles = {key: model.new_int_var(0, len(slots), "") for key, slots in self.slots.items()}
        self.placed = [model.new_int_var(0, item.demand, "") for item in packing.items]
        self.members: dict[tuple[int, int, int, str], mb.Variable] = {}
        self.teams: dict[tuple[int, int, str, str], mb.Variable] = {}
        self._team_rules()
        self.opened = {
            key: single + sum(var for (_, *where, _), var in self.members.items() if tuple(where) == key)
            for key, single in self.singles.items()
        }
        for key, slots in self.slots.items():
            model.add(self.opened[key] <= len(slots))
        self.hosts = self._hosts()
        self.columns: list[mb.Variable] = []

    def _team_rules(self) -> None:
        problem, model = self.state.problem, self.model
        for index in self.packing.teams:
            item = self.packing.items[index]
            groups: dict[tuple[int, str, str], list[mb.Variable]] = defaultdict(list)
            for (host, number), slots in self.slots.items():
                if not self.packing.bins[number].sizes[index]:
                    continue
                links: dict[str, int] = defaultdict(int)
                for slot in slots:
                    links[problem.slots[slot].nvlink_group if item.job.deployment.require_nvlink else ""] += 1
                for link, count in sorted(links.items()):
                    part = model.new_int_var(0, count, "")
                    groups[host, self.packing.bins[number].product, link].append(part)
                    self.members[index, host, number, link] = part
            for (host, product, link), row in groups.items():
                team = model.new_int_var(0, item.demand, "")
                model.add(sum(row) == item.width * team)
                self.teams[index, host, product, link] = team
            mine = [team for (other, *_), team in self.teams.items() if other == index]
            model.add(sum(mine) == self.placed[index])

    def _hosts(self) -> list[mb.Variable]:
        """One for each host not in use yet: whether it is now."""
        found = []
        for host in sorted({host for host, _ in self.slots}):
            if host in self.state.opened:
                continue
            rows = [self.opened[key] for key in self.slots if key[0] == host]
            used = self.model.new_bool_var("")
            most = sum(len(slots) for key, slots in self.slots.items() if key[0] == host)
            self.model.add(sum(rows) <= most * used)
            found.append(used)
        return found

    def patterns(self, columns: Sequence[Column]) -> None:
        """Bins hold these patterns."""
        columns = [column for column in columns if self.packing.items[column.load[0][0]].width == 1]
        self.loads = columns
        self.columns = [self.model.new_int_var(0, self.packing.bins[column.bins].count, "") for column in columns]
        by_class: dict[int, list[mb.Variable]] = defaultdict(list)
        cover: dict[int, list[mb.LinearExpr]] = defaultdict(list)
        for column, used in zip(columns, self.columns, strict=True):
            by_class[column.bins].append(used)
            for index, count in column.load:
                cover[index].append(used * count)
        for number in range(len(self.packing.bins)):
            here = [single for (_, other), single in self.singles.items() if other == number]
            self.model.add(sum(by_class[number]) == sum(here))
        for index, item in enumerate(self.packing.items):
            if item.width == 1:
                self.model.add(sum(cover[index]) >= self.placed[index])

    def prices(self, every: Sequence[Prices]) -> None:
        """Bins are worth no more, at each of these prices, than their best load."""
        for raw in dict.fromkeys(every):
            prices = tuple(
                0 if item.width > 1 else price // SCALE for price, item in zip(raw, self.packing.items, strict=True)
            )
            worth = worths(self.packing, prices, 1)
            held = sum(worth[number] * single for (_, number), single in self.singles.items())
            self.model.add(held >= sum(price * var for price, var in zip(prices, self.placed, strict=True)))

    # --- Objectives, each to be minimised -----------------------------------------------------------------------------

    def objectives(self) -> list[Objective]:
        """Left out by level, cost, GPUs, hosts; then MiB opened, and slots without history."""
        bins, problem = self.packing.bins, self.state.problem
        levels = 1 + max((item.level for item in self.packing.items), default=-1)
        left = [
            sum(item.demand - var for item, var in zip(self.packing.items, self.placed, strict=True) if item.level == n)
            for n in range(levels)
        ]
        cost = sum(bins[number].cost // self.unit * var for (_, number), var in self.opened.items())
        gpus = sum(bins[number].gpus * var for (_, number), var in self.opened.items())
        mib = sum(
            problem.slots[bins[number].slots[0]].total_mib * var
            for (_, number), var in self.opened.items()
            if bins[number].gpus
        )
        return [*left, cost, gpus, sum(self.hosts), mib]

    def minimise(self, objective: Objective, least: int = 0, known: int | None = None) -> tuple[int | None, int]:
        """The least value found, at most ``known`` (None: none in the nodes given), and the value proven.

        ``least`` is proven already.
        """
        if isinstance(objective, int):
            return objective, objective
        self.model.add(objective >= least)
        if known is not None:
            self.model.add(objective <= known)
        self.model.minimize(objective)
        self.solver = mb.Solver("scip")
        self.solver.set_solver_specific_parameters(f"limits/nodes = {self.nodes}\n")
        status = self.solver.solve(self.model)
        if status == mb.SolveStatus.INFEASIBLE:
            return None, least if known is None else known + 1
        if status not in (mb.SolveStatus.OPTIMAL, mb.SolveStatus.FEASIBLE):
            return None, least
        bound = math.ceil(self.solver.best_objective_bound - TINY)
        return round(self.solver.objective_value), max(least, bound)

    def fix(self, objective: Objective, value: int) -> None:
        """From now on the objective is ``value``."""
        if not isinstance(objective, int):
            self.model.add(objective == value)

    def hint(self) -> None:
        """Start the next search from the last solution."""
        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for var in [*self.singles.values(), *self.placed, *self.members.values(), *self.teams.values(), *self.columns]:
            self.model.add_hint(var, round(self.solver.value(var)))

    def chosen(self) -> Chosen:
        """The values of the last solution."""

        def value(var: mb.Variable) -> int:
            return round(self.solver.value(var))

        return Chosen(
            reached=tuple(
                item if isinstance(item, int) else round(self.solver.value(item)) for item in self.objectives()
            ),
            bins={key: value(var) for key, var in self.singles.items()},
            teams={key: value(var) for key, var in self.teams.items()},
            members={key: value(var) for key, var in self.members.items()},
            use=tuple(value(var) for var in self.columns),
        )
