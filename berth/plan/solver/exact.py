"""The whole plan as one constraint program, for small fleets: every rule, one objective after the other.

Places of a job on a slot are one whole number, not one truth value per replica. The search has one worker, one seed and
a limit in the solver's deterministic time, so the same input gives the same plan on every machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from berth.plan.solver.greedy import pick_team
from berth.plan.solver.measure import family_homes, load, spread_jobs
from berth.plan.solver.problem import GPU_LEVEL, HOST_LEVEL, MAX_REPLICAS_PER_SLOT, MICRO, NOBODY, Job
from berth.plan.solver.state import State, domains_of, open_slots

Expr = cp_model.LinearExprT


@dataclass(frozen=True)
class Aim:
    """One objective: what to minimise, what a given plan has of it, and what is proven to be the least."""

    expr: Expr
    value: Callable[[State], int]
    least: int = 0


@dataclass(frozen=True)
class Searched:
    """The best state found, and the values of each objective reached and proven."""

    state: State
    reached: tuple[int, ...]
    proven: tuple[int, ...]

    @property
    def optimal(self) -> bool:
        """Whether nothing better exists."""
        return self.reached == self.proven


@dataclass(frozen=True)
class Least:
    """What is proven already: of cost (millionths), GPUs and hosts in any case; and, of the first objectives in their
    order, ``proven`` as long as those before have the values ``reached``."""

    cost: int = 0
    gpus: int = 0
    hosts: int = 0
    reached: tuple[int, ...] = ()
    proven: tuple[int, ...] = ()

    def of(self, before: Sequence[int], least: int) -> int:
        """The least of the next objective when those before have these values."""
        number = len(before)
        if number < len(self.proven) and tuple(before) == self.reached[:number]:
            return max(least, self.proven[number])
        return least


def search(
    base: State, start: State, least: Least, effort: float, max_moves: int | None, stay: bool, repack: bool = False
) -> Searched:
    """The best plan from ``start`` on. What ``base`` holds stays (``stay``), or may move, at most ``max_moves`` of it.

    An objective that is not proven ends the search: what comes after it would not be the best of the best.
    """
    model = _Model(base, start, stay)
    if not stay and max_moves is not None:
        model.model.add(model.moved() <= max(max_moves, 0))
    state, reached, proven = start, list[int](), list[int]()
    for aim in model.aims(least, stay, repack):
        value = aim.value(state)
        low = least.of(reached, min(aim.least, value))
        if value > low and reached == proven:
            model.hint(state)
            found, low = model.minimise(aim.expr, value, low, effort)
            if found is not None:
                state, value = model.state(), found
        reached.append(value)
        proven.append(min(low, value))
        model.model.add(aim.expr <= value)
    return Searched(state, tuple(reached), tuple(proven))


class _Model:
    """Variables and rules."""

    def __init__(self, base: State, start: State, stay: bool) -> None:
        self.base, self.start, self.problem = base, start, base.problem
        self.model = cp_model.CpModel()
        self.jobs = [job for job in self.problem.jobs if not job.pool]
        self.on: dict[tuple[int, int], cp_model.IntVar] = {}
        self.joined: dict[tuple[int, int], cp_model.IntVar] = {}
        self.teams: dict[tuple[int, tuple[int, str, str]], cp_model.IntVar] = {}
        self.groups: dict[tuple[int, tuple[int, str, str]], list[int]] = {}
        self.kept: dict[tuple[int, int], cp_model.IntVar] = {}
        self.touched: dict[tuple[int, int, int], cp_model.IntVar] = {}
        for job in self.jobs:
            self._places(job, stay)
        self.opened = [self.model.new_bool_var("") for _ in self.problem.slots]
        self._memory()
        self.hosts = {host: self.model.new_bool_var("") for host in range(len(self.problem.hosts))}
        for slot, opened in enumerate(self.opened):
            self.model.add_implication(opened, self.hosts[self.problem.domains[HOST_LEVEL][slot]])
        self.placed = {job.index: self._sum(job) for job in self.jobs}
        for job in self.jobs:
            self.model.add(self.placed[job.index] <= job.wanted)
            if job.ruled:
                self._rules(job)
        self._no_loss(stay)

    # --- Variables ----------------------------------------------------------------------------------------------------

    def _places(self, job: Job, stay: bool) -> None:
        if job.team:
            self._team(job, stay)
            return
        for slot, known in enumerate(self.problem.slots):
            size = self.problem.size(job, slot)
            if size is None:
                continue
            stood = self.base.on[job.index].get(slot, 0)
            most = min(job.wanted, known.free_mib // size, MAX_REPLICAS_PER_SLOT)
            if self.problem.gpus[slot] > 1:
                most = min(most, 1)
            if known.cordoned or self._over(slot):
                most = stood
            most = max(most, stood)
            if most > 0:
                self.on[job.index, slot] = self.model.new_int_var(stood if stay else 0, most, "")
                if stood and not stay:
                    kept = self.model.new_int_var(0, stood, "")
                    self.model.add(kept <= self.on[job.index, slot])
                    self.kept[job.index, slot] = kept

    def _over(self, slot: int) -> bool:
        """Whether what stands holds more than may be promised anew: then nothing may come, and it may stay."""
        return self.base.free[slot] < 0

    def _team(self, job: Job, stay: bool) -> None:
        groups: dict[tuple[int, str, str], list[int]] = defaultdict(list)
        for slot, known in enumerate(self.problem.slots):
            size = self.problem.size(job, slot)
            stood = any(slot in team for team in self.base.teams[job.index])
            if size is None or (not stood and (known.cordoned or known.free_mib < size)):
                continue
            self.joined[job.index, slot] = self.model.new_bool_var("")
            link = known.nvlink_group if job.deployment.require_nvlink else ""
            groups[self.problem.domains[HOST_LEVEL][slot], known.product, link].append(slot)
        for key, slots in groups.items():
            team = self.model.new_int_var(0, min(job.wanted, len(slots) // job.width), "")
            self.model.add(sum(self.joined[job.index, slot] for slot in slots) == job.width * team)
            self.teams[job.index, key], self.groups[job.index, key] = team, slots
        for members in self.base.teams[job.index]:
            rows = [self.joined[job.index, slot] for slot in members]
            if stay:
                for row in rows:
                    self.model.add(row == 1)
            else:
                kept = self.model.new_bool_var("")
                self.kept[job.index, members[0]] = kept
                for row in rows:
                    self.model.add_implication(kept, row)

    def _memory(self) -> None:
        by_slot: dict[int, list[tuple[Job, cp_model.IntVar]]] = defaultdict(list)
        joins: dict[int, list[cp_model.IntVar]] = defaultdict(list)
        for job in self.jobs:
            for slot in range(len(self.problem.slots)):
                if (job.index, slot) in self.on:
                    by_slot[slot].append((job, self.on[job.index, slot]))
                if (job.index, slot) in self.joined:
                    joins[slot].append(self.joined[job.index, slot])
        pools: dict[int, int] = defaultdict(int)
        heads: dict[int, int] = defaultdict(int)
        for job in self.problem.jobs:
            for slot, places in self.start.on[job.index].items() if job.pool else ():
                pools[slot] += places * (self.problem.size(job, slot) or 0)
                heads[slot] += places
        for slot, known in enumerate(self.problem.slots):
            taken = cp_model.LinearExpr.sum(joins[slot])
            used = sum((self.problem.size(job, slot) or 0) * var for job, var in by_slot[slot])
            free = known.free_mib - pools.get(slot, 0)
            if self._over(slot):
                free = sum(
                    (self.problem.size(job, slot) or 0) * self.base.on[job.index].get(slot, 0)
                    for job, _ in by_slot[slot]
                )
            free = max(free, 0)
            limit = 1 if self.problem.gpus[slot] > 1 else MAX_REPLICAS_PER_SLOT - heads.get(slot, 0)
            if slot in pools:
                self.model.add(self.opened[slot] == 1)
                self.model.add(taken == 0)
            self.model.add(used + free * taken <= free * self.opened[slot])
            self.model.add(sum(var for _, var in by_slot[slot]) + limit * taken <= limit * self.opened[slot])

    def _sum(self, job: Job) -> Expr:
        if job.team:
            return sum(team for (index, _), team in self.teams.items() if index == job.index)
        return sum(var for (index, _), var in self.on.items() if index == job.index)

    # --- Rules --------------------------------------------------------------------------------------------------------

    def _inside(self, family: int, level: int, domain: int) -> list[Expr]:
        """Places of a family in a domain (a team counts each of its slots)."""
        found: list[Expr] = []
        for job in self.jobs:
            if job.family == family:
                for slot, number in enumerate(self.problem.domains[level]):
                    if number == domain:
                        found += [self.on[job.index, slot]] if (job.index, slot) in self.on else []
                        found += [self.joined[job.index, slot]] if (job.index, slot) in self.joined else []
        found += [
            self.start.on[job.index].get(slot, 0)
            for job in self.problem.jobs
            if job.pool and job.family == family
            for slot, number in enumerate(self.problem.domains[level])
            if number == domain
        ]
        return found

    def _touch(self, family: int, level: int, domain: int) -> cp_model.IntVar:
        """Whether a family has a place in a domain."""
        key = (family, level, domain)
        if key not in self.touched:
            inside = self._inside(family, level, domain)
            var = self.model.new_bool_var("")
            self.model.add(sum(inside) >= 1).only_enforce_if(var)
            self.model.add(sum(inside) == 0).only_enforce_if(var.negated())
            self.touched[key] = var
        return self.touched[key]

    def _rules(self, job: Job) -> None:
        numbers = [sorted(set(row)) for row in self.problem.domains]
        family = job.family
        if job.shadow and not job.alone_in and job.strategy != "strict_pack":
            return
        if job.alone_in is not None:
            for domain in numbers[job.alone_in]:
                inside = self._count(family, job.alone_in, domain)
                if inside:
                    self.model.add(sum(inside) <= 1)
        if job.strategy == "strict_pack":
            self.model.add(sum(self._touch(family, HOST_LEVEL, host) for host in numbers[HOST_LEVEL]) <= 1)
            if not job.shadow:
                whole = self.model.new_bool_var("")
                self.model.add(self.placed[job.index] == job.wanted * whole)
        if job.shadow:
            return
        for rule in job.apart:
            for domain in numbers[rule.level]:
                if rule.family == family:
                    self.model.add(sum(self._count(family, rule.level, domain)) <= 1)
                elif rule.family > family or self.problem.jobs[rule.family].pool:
                    mine = self._touch(family, rule.level, domain)
                    self.model.add(mine + self._touch(rule.family, rule.level, domain) <= 1)
        for rule in job.beside:
            if rule.family == NOBODY:
                self.model.add(self.placed[job.index] == 0)
            elif rule.family == family:
                self.model.add(sum(self._touch(family, rule.level, domain) for domain in numbers[rule.level]) <= 1)
            else:
                for domain in numbers[rule.level]:
                    there = self._touch(rule.family, rule.level, domain)
                    self.model.add_implication(self._touch(family, rule.level, domain), there)

    def _count(self, family: int, level: int, domain: int) -> list[Expr]:
        """Places of a family in a domain, a team once: teams do not cross hosts."""
        if level == GPU_LEVEL or not any(job.team for job in self.jobs if job.family == family):
            return self._inside(family, level, domain)
        return [
            team
            for (index, (host, _, _)), team in self.teams.items()
            if self.problem.jobs[index].family == family
            and self.problem.domains[level][self.problem.hosts[host][0]] == domain
        ]

    def _no_loss(self, stay: bool) -> None:
        """What stands is left out only for somebody of a higher priority."""
        if stay:
            return
        wanting = [job.deployment.priority for job in self.jobs if not job.shadow and self.start.missing(job) > 0]
        highest = max(wanting, default=0)
        for job in self.jobs:
            if not job.shadow and (not wanting or job.deployment.priority >= highest):
                self.model.add(self.placed[job.index] >= min(job.wanted, self.base.placed[job.index]))

    # --- Objectives ---------------------------------------------------------------------------------------------------

    def moved(self) -> Expr:
        """Standing places that do not stay though they are still wanted."""
        stood = sum(self.base.placed[job.index] for job in self.jobs if not job.shadow)
        return stood - sum(var for (index, _), var in self.kept.items() if not self.problem.jobs[index].shadow)

    def aims(self, least: Least, stay: bool, repack: bool) -> list[Aim]:
        """Every objective in its order."""
        stable = [] if stay else [Aim(self.moved(), self._moved)]
        own = [*self._domains(), *self._load(), *self._cost(least)]
        return [*self._left(), *own, *stable] if repack else [*self._left(), *stable, *own]

    def _moved(self, state: State) -> int:
        stays = 0
        for job in self.jobs:
            if not job.shadow:
                stays += sum(min(state.on[job.index].get(s, 0), n) for s, n in self.base.on[job.index].items())
                stays += sum(team in state.teams[job.index] for team in self.base.teams[job.index])
        return sum(self.base.placed[job.index] for job in self.jobs if not job.shadow) - stays

    def _left(self) -> list[Aim]:
        levels: dict[tuple[bool, int], list[Job]] = defaultdict(list)
        for job in self.jobs:
            levels[job.shadow, -job.deployment.priority].append(job)

        def aim(jobs: Sequence[Job]) -> Aim:
            wanted = sum(job.wanted for job in jobs)
            return Aim(
                wanted - sum(self.placed[job.index] for job in jobs),
                lambda state: sum(max(0, state.missing(job)) for job in jobs),
            )

        return [aim(jobs) for _, jobs in sorted(levels.items())]

    def _domains(self) -> list[Aim]:
        jobs = [job for job in spread_jobs(self.problem) if not job.pool]

        def aim(level: int) -> Aim:
            mine = [job for job in jobs if level >= job.widest]
            every = sorted(set(self.problem.domains[level]))
            touched = [self._touch(job.family, level, domain) for job in mine for domain in every]
            return Aim(
                len(touched) - sum(touched),
                lambda state: (
                    len(touched)
                    - sum(domains_of(self.problem, _all_slots(state, job), job.widest)[level] for job in mine)
                ),
            )

        return [aim(level) for level in range(GPU_LEVEL + 1)] if jobs else []

    def _load(self) -> list[Aim]:
        if not any(job.strategy == "balanced" for job in self.jobs):
            return []
        heaviest = self.model.new_int_var(0, 10**12, "")
        for slot in range(len(self.problem.slots)):
            rows: list[Expr] = []
            for job in self.jobs:
                micro = round(job.deployment.load * MICRO)
                if not job.shadow:
                    rows += [micro * self.on[job.index, slot]] if (job.index, slot) in self.on else []
                    rows += [micro * self.joined[job.index, slot]] if (job.index, slot) in self.joined else []
            if rows:
                self.model.add(heaviest >= sum(rows))

        def most(state: State) -> int:
            return max((round(load(state, slot) * MICRO) for slot in open_slots(state)), default=0)

        return [Aim(heaviest, most)]

    def _cost(self, least: Least) -> list[Aim]:
        if not any(job.strategy in ("pack", "strict_pack") for job in self.jobs):
            return []
        costs, gpus = self.problem.costs, self.problem.gpus

        def total(weights: Sequence[int], least: int) -> Aim:
            return Aim(
                sum(weight * var for weight, var in zip(weights, self.opened, strict=True)),
                lambda state: sum(weights[slot] for slot in open_slots(state)),
                least,
            )

        hosts = Aim(sum(self.hosts.values()), lambda state: len(state.opened), least.hosts)
        return [total(costs, least.cost), total(gpus, least.gpus), hosts]

    # --- Solving ------------------------------------------------------------------------------------------------------

    def minimise(self, expr: Expr, known: int, low: int, effort: float) -> tuple[int | None, int]:
        """The least value below ``known`` (None: none found) and the value proven."""
        self.model.add(expr <= known)
        self.model.add(expr >= low)
        self.model.minimize(expr)
        self.solver = cp_model.CpSolver()
        self.solver.parameters.num_workers = 1
        self.solver.parameters.random_seed = 1
        self.solver.parameters.max_deterministic_time = effort
        status = self.solver.solve(self.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None, low
        found, bound = round(self.solver.objective_value), round(self.solver.best_objective_bound)
        return (found if found < known else None), max(low, bound)

    def hint(self, state: State) -> None:
        """Start the next search from ``state``."""
        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for (index, slot), var in self.on.items():
            self.model.add_hint(var, state.on[index].get(slot, 0))
        for (index, slot), var in self.joined.items():
            self.model.add_hint(var, int(any(slot in team for team in state.teams[index])))
        for slot, var in enumerate(self.opened):
            self.model.add_hint(var, int(state.heads[slot] > 0))

    def state(self) -> State:
        """The plan that was found."""
        state = State(self.problem)
        for job in self.problem.jobs:
            if job.pool:
                for slot, places in self.start.on[job.index].items():
                    state.add(job, slot, places)
        for (index, slot), var in self.on.items():
            places = self.solver.value(var)
            if places:
                state.add(self.problem.jobs[index], slot, places)
        for (index, key), slots in self.groups.items():
            self._form(state, self.problem.jobs[index], [s for s in slots if self.solver.value(self.joined[index, s])])
            del key
        return state

    def _form(self, state: State, job: Job, able: Sequence[int]) -> None:
        """Teams of the slots chosen for one job on one host: those that stand, then by NVLink."""
        for team in self.base.teams[job.index]:
            if set(team) <= set(able):
                state.add_team(job, team)
        left = [slot for slot in able if not state.taken[slot]]
        while len(left) >= job.width:
            found = pick_team(state, job, left)
            if found is None:
                return
            state.add_team(job, found)
            left = [slot for slot in left if not state.taken[slot]]


def _all_slots(state: State, job: Job) -> Iterable[int]:
    """Every slot of a family, all members of teams."""
    teams = [
        slot
        for other in state.problem.jobs
        if other.family == job.family
        for t in state.teams[other.index]
        for slot in t
    ]
    return [*family_homes(state, job), *teams]
