"""Where things are while a plan is being made. Counts and the sums that follow from them; every rule is asked here.

All memory is in MiB per GPU. A *place* is a replica, or room promised for one. A team's places are kept apart: each
holds several 1-GPU slots as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from berth.plan.solver.problem import GPU_LEVEL, HOST_LEVEL, MAX_REPLICAS_PER_SLOT, Job, Problem

Team = tuple[int, ...]


class State:
    """Places per job and slot."""

    def __init__(self, problem: Problem) -> None:
        """Nothing is placed."""
        count = len(problem.slots)
        self.problem = problem
        self.free = list(problem.free)
        self.heads = [0] * count
        self.taken = [False] * count  # by a team, as a whole
        self.here: list[dict[int, int]] = [{} for _ in range(count)]
        self.on: list[dict[int, int]] = [{} for _ in problem.jobs]
        self.teams: list[list[Team]] = [[] for _ in problem.jobs]
        self.placed = [0] * len(problem.jobs)
        self.opened: dict[int, int] = {}
        # Domains of the families that some rule speaks of: family -> level -> domain -> places.
        self.counts: dict[int, tuple[dict[int, int], ...]] = {
            job.family: ({}, {}, {}, {}) for job in problem.jobs if job.ruled or job.family in problem.tracked
        }

    def copy(self) -> State:
        """An equal state that shares nothing that changes."""
        other = State.__new__(State)
        other.problem = self.problem
        other.free = list(self.free)
        other.heads = list(self.heads)
        other.taken = list(self.taken)
        other.here = [dict(item) for item in self.here]
        other.on = [dict(item) for item in self.on]
        other.teams = [list(item) for item in self.teams]
        other.placed = list(self.placed)
        other.opened = dict(self.opened)
        other.counts = {
            family: (dict(levels[0]), dict(levels[1]), dict(levels[2]), dict(levels[3]))
            for family, levels in self.counts.items()
        }
        return other

    # --- Changes ------------------------------------------------------------------------------------------------------

    def add(self, job: Job, slot: int, places: int = 1) -> None:
        """Put ``places`` (less than zero: take away) of ``job`` on ``slot``; what is allowed is the caller's to ask."""
        size = job.sizes[self.problem.kind[slot]] or 0
        self._count(job, slot, places)
        self.free[slot] -= size * places
        on, here = self.on[job.index], self.here[slot]
        on[slot] = here[job.index] = on.get(slot, 0) + places
        if not on[slot]:
            del on[slot], here[job.index]
        self.placed[job.index] += places

    def add_team(self, job: Job, team: Team) -> None:
        """Give all of ``team`` to one place of ``job``."""
        for slot in team:
            self._count(job, slot, 1)
            self.free[slot] -= job.sizes[self.problem.kind[slot]] or 0
            self.here[slot][job.index] = 1
            self.taken[slot] = True
        self.teams[job.index].append(team)
        self.placed[job.index] += 1

    def remove_team(self, job: Job, team: Team) -> None:
        """Take one place of ``job`` off ``team``."""
        for slot in team:
            self._count(job, slot, -1)
            self.free[slot] += job.sizes[self.problem.kind[slot]] or 0
            del self.here[slot][job.index]
            self.taken[slot] = False
        self.teams[job.index].remove(team)
        self.placed[job.index] -= 1

    def _count(self, job: Job, slot: int, places: int) -> None:
        was = self.heads[slot]
        self.heads[slot] = was + places
        if not was or not self.heads[slot]:
            host = self.problem.domains[HOST_LEVEL][slot]
            self.opened[host] = self.opened.get(host, 0) + (1 if not was else -1)
            if not self.opened[host]:
                del self.opened[host]
        levels = self.counts.get(job.family)
        if levels is not None:
            for level, domains in enumerate(self.problem.domains):
                domain, counts = domains[slot], levels[level]
                counts[domain] = counts.get(domain, 0) + places
                if not counts[domain]:
                    del counts[domain]

    # --- Questions ----------------------------------------------------------------------------------------------------

    def missing(self, job: Job) -> int:
        """Places of ``job`` that are still nowhere (less than zero: too many)."""
        return job.wanted - self.placed[job.index]

    def room(self, job: Job, slot: int) -> int:
        """How many more places of ``job`` the slot can be promised now; 0 for teams, which ask ``can_join``."""
        problem = self.problem
        size = problem.size(job, slot)
        if size is None or job.team or problem.slots[slot].cordoned:
            return 0
        return min(self.fits(job, slot, size, self.free[slot]), self.allowed(job, slot))

    def fits(self, job: Job, slot: int, size: int, free: int) -> int:
        """Places of ``size`` that fit into ``free`` MiB of ``slot``, whatever the rules say."""
        if self.taken[slot]:
            return 0
        # Ray gives a slot of several GPUs to one replica as a whole: its workers talk over all of them.
        limit = 1 if self.problem.gpus[slot] > 1 else MAX_REPLICAS_PER_SLOT
        return max(0, min(free // size, limit - self.heads[slot]))

    def can_join(self, job: Job, slot: int) -> bool:
        """Whether an empty slot may be part of a team of ``job``."""
        size = self.problem.size(job, slot)
        if size is None or self.heads[slot] or self.problem.slots[slot].cordoned:
            return False
        return self.free[slot] >= size and self.allowed(job, slot) > 0

    def allowed(self, job: Job, slot: int) -> int:
        """How many more places of ``job`` the rules between deployments and of strict strategies allow on ``slot``."""
        if not job.ruled:
            return MAX_REPLICAS_PER_SLOT
        mine = self.counts[job.family]
        limit = MAX_REPLICAS_PER_SLOT
        if job.alone_in is not None:
            limit = 0 if self._domain(job.alone_in, slot) in mine[job.alone_in] else 1
        if job.strategy == "strict_pack" and set(mine[HOST_LEVEL]) - {self._domain(HOST_LEVEL, slot)}:
            return 0
        for rule in job.apart:
            if self._domain(rule.level, slot) in self.counts[rule.family][rule.level]:
                return 0
            if rule.family == job.family:
                limit = min(limit, 1)
        return limit if all(self._beside(job, rule.family, rule.level, slot) for rule in job.beside) else 0

    def _beside(self, job: Job, family: int, level: int, slot: int) -> bool:
        if family not in self.counts:
            return False
        there = self.counts[family][level]
        if self._domain(level, slot) in there:
            return True
        # The first of those that want to be together is free to choose.
        mutual = family == job.family or any(rule.family == job.family for rule in self.problem.jobs[family].beside)
        return mutual and not there

    def _domain(self, level: int, slot: int) -> int:
        return self.problem.domains[level][slot]

    def homes(self, job: Job) -> list[int]:
        """Every slot that holds places of ``job``, one entry per place (teams: their first slot)."""
        singles = [slot for slot, places in sorted(self.on[job.index].items()) for _ in range(places)]
        return singles + [team[0] for team in self.teams[job.index]]

    def is_open(self, slot: int) -> bool:
        """Whether anything stands on ``slot``."""
        return self.heads[slot] > 0


def unmet(state: State) -> list[tuple[Job, int]]:
    """Places on slots (a team: its first) whose affinity holds no more, now that everything is where it is."""
    found = []
    for job in state.problem.jobs:
        for slot in sorted(set(state.homes(job))):
            if any(
                rule.family not in state.counts
                or state.problem.domains[rule.level][slot] not in state.counts[rule.family][rule.level]
                for rule in job.beside
            ):
                found.append((job, slot))
    return found


def drop_unmet(state: State) -> None:
    """Take away, until nobody is left, every place whose affinity is not met."""
    while found := unmet(state):
        for job, slot in found:
            if job.team:
                for team in [team for team in state.teams[job.index] if team[0] == slot]:
                    state.remove_team(job, team)
            else:
                state.add(job, slot, -state.on[job.index][slot])


def domains_of(problem: Problem, homes: Iterable[int], widest: int = 0) -> tuple[int, ...]:
    """How many domains of each level from ``widest`` on ``homes`` touch; 0 for wider levels."""
    slots = list(homes)
    return tuple(
        len({problem.domains[level][slot] for slot in slots}) if level >= widest else 0
        for level in range(GPU_LEVEL + 1)
    )


def open_slots(state: State) -> Sequence[int]:
    """Every slot that holds something, in the plan's order."""
    return [slot for slot, heads in enumerate(state.heads) if heads]
