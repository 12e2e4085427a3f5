"""Room for who is left out: others move within a budget of moves; those of a lower priority leave.

An opening is a slot (for a team: the slots of one host and product) and what has to go from there first. Of all
openings looked at, the one is taken for which the fewest are left out, then the fewest of what stands are moved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from berth.plan.solver.greedy import linked, pick_team
from berth.plan.solver.problem import HOST_LEVEL, Job
from berth.plan.solver.state import State, Team

LOOKED_AT = 48
"""Openings that are tried for each place that is left out, the nearest first."""
TOLD = 8
"""Deployments for which the cheapest way in is looked for, the highest priority first."""
MOVING = ("pack", "spread", "balanced")
EVERYTHING = 1 << 60


@dataclass(frozen=True)
class Step:
    """One place that goes from ``here`` (a team: all its slots) to ``there``, or is left out (None).

    ``stood`` tells whether it stood before this plan: only then is it a move.
    """

    job: Job
    here: Team
    there: Team | None
    stood: bool


@dataclass
class _Trial:
    """Steps on a state, which can be taken back."""

    state: State
    base: State
    steps: list[Step] = field(default_factory=list)

    def go(self, job: Job, here: Team, there: Team | None) -> None:
        if job.team:
            stood = here in self.base.teams[job.index]
        else:
            # Of several on one slot, those that are new go first.
            stood = self.base.on[job.index].get(here[0], 0) >= self.state.on[job.index][here[0]]
        _put(self.state, job, here, -1)
        if there is not None:
            _put(self.state, job, there, 1)
        self.steps.append(Step(job, here, there, stood and not job.shadow))

    def back(self, to: int = 0) -> None:
        while len(self.steps) > to:
            step = self.steps.pop()
            if step.there is not None:
                _put(self.state, step.job, step.there, -1)
            _put(self.state, step.job, step.here, 1)


def _put(state: State, job: Job, slots: Team, places: int) -> None:
    if not job.team:
        state.add(job, slots[0], places)
    elif places > 0:
        state.add_team(job, slots)
    else:
        state.remove_team(job, slots)


def make_room(base: State, start: State, max_moves: int | None) -> State:
    """``start`` with somebody more placed where others can make room; what ``base`` holds counts as moved.

    First by moving only; then those with a lower priority are left out, and that they stop counts as a move too. At
    most ``max_moves`` of what ``base`` holds are not in their place at the end.
    """
    state = start.copy()
    left = EVERYTHING if max_moves is None else max_moves - moved(base, start)
    for job in _by_priority(state):
        for leaving in (False, True):
            while state.missing(job) > 0:
                found = _opening(state, base, job, left, leaving)
                if found is None:
                    break
                slots, steps = found
                trial = _Trial(state, base)
                for step in steps:
                    trial.go(step.job, step.here, step.there)
                _put(state, job, slots, 1)
                left -= _stood(steps)
    return state


def moved(base: State, state: State) -> int:
    """Replicas of ``base`` that are not in their place in ``state``."""
    return sum(
        sum(max(0, places - state.on[job.index].get(slot, 0)) for slot, places in base.on[job.index].items())
        + sum(team not in state.teams[job.index] for team in base.teams[job.index])
        for job in base.problem.jobs
        if not job.shadow
    )


def ways_in(state: State) -> dict[int, tuple[Step, ...]]:
    """For the families that are left out: what would have to go, if everything might move, to let one more in."""
    trial, base = state.copy(), state.copy()
    short = [job for job in _by_priority(state) if not job.shadow and state.missing(job) > 0]
    found = {}
    for job in short[:TOLD]:
        for leaving in (False, True):
            opening = _opening(trial, base, job, EVERYTHING, leaving)
            if opening is not None:
                found[job.family] = tuple(step for step in opening[1] if step.stood)
                break
    return {family: steps for family, steps in found.items() if steps}


def _by_priority(state: State) -> list[Job]:
    """Of one priority the small ones first: each counts as much as a large one and takes less."""
    jobs = [job for job in state.problem.jobs if not job.pool and job.strategy != "strict_pack"]
    return sorted(jobs, key=lambda job: (job.shadow, -job.deployment.priority, job.largest, job.name))


def _stood(steps: Sequence[Step]) -> int:
    return sum(step.stood for step in steps)


def _opening(state: State, base: State, job: Job, budget: int, leaving: bool) -> tuple[Team, tuple[Step, ...]] | None:
    """The best slots for one more place of ``job``, and the steps that free them; at most ``budget`` of base's move."""
    best: tuple[tuple[object, ...], Team, tuple[Step, ...]] | None = None
    if leaving and job.shadow:
        return None
    for number, able in enumerate(_nearest(state, base, job)):
        trial = _Trial(state, base)
        slots = _clear_any(trial, job, able, leaving)
        steps = tuple(trial.steps)
        if slots is not None and _stood(steps) <= budget:
            left = _left(steps)
            key = (*left, _stood(steps), job.team and not linked(state.problem, slots), number)
            if best is None or key < best[0]:
                best = key, slots, steps
        trial.back()
        if best is not None and not any(_left(best[2])) and _stood(best[2]) <= 1:
            break
    return None if best is None else best[1:]


def _left(steps: Sequence[Step]) -> tuple[int, ...]:
    """Who leaves: replicas by priority, the highest first, then room. Only what is equal in this compares further."""
    gone = Counter(step.job.deployment.priority for step in steps if step.there is None and not step.job.shadow)
    rooms = sum(step.there is None and step.job.shadow for step in steps)
    # A few of a low priority are less than one of a higher: the highest that leaves decides, then how many.
    worst = max(gone, default=None)
    return (worst is not None, 0 if worst is None else worst, 0 if worst is None else gone[worst], gone.total(), rooms)


# --- Where ------------------------------------------------------------------------------------------------------------


def _nearest(state: State, base: State, job: Job) -> Iterator[Sequence[int]]:
    """Slots that could hold one more were they emptier, one by one or (teams) host by host, the nearest first."""
    able = [slot for slot in range(len(state.heads)) if _may_hold(state, job, slot)]
    if not job.team:
        able.sort(key=lambda slot: (_lack(state, job, slot), slot))
        yield from ([slot] for slot in able[:LOOKED_AT])
        return
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for slot in able:
        groups[state.problem.domains[HOST_LEVEL][slot], state.problem.slots[slot].product].append(slot)
    ranked = []
    for members in groups.values():
        links: dict[str, list[int]] = defaultdict(list)
        for slot in members:
            links[state.problem.slots[slot].nvlink_group].append(slot)
        whole = [row for name, row in links.items() if name]
        for row in whole if job.deployment.require_nvlink else [*whole, members]:
            if len(row) >= job.width:
                row.sort(key=lambda slot: _busy(state, base, slot))
                ranked.append(([_busy(state, base, slot)[0] for slot in row[: job.width]], row))
    ranked.sort(key=lambda item: (sum(item[0]), item[1][0]))
    yield from (row for _, row in ranked[:LOOKED_AT])


def _lack(state: State, job: Job, slot: int) -> int:
    """MiB that have to go from ``slot`` before one more place of ``job`` fits; all where it is needed or held whole."""
    whole = job.team or state.problem.gpus[slot] > 1 or state.taken[slot]
    if whole and state.heads[slot]:
        return EVERYTHING
    return (state.problem.size(job, slot) or 0) - state.free[slot]


def _may_hold(state: State, job: Job, slot: int) -> bool:
    size, known = state.problem.size(job, slot), state.problem.slots[slot]
    return size is not None and size <= known.free_mib and not known.cordoned and state.allowed(job, slot) > 0


def _busy(state: State, base: State, slot: int) -> tuple[int, int, int]:
    """How many places have to go to empty ``slot``, and how much they hold; those that are new count little."""
    stood = sum(min(places, base.here[slot].get(job, 0)) for job, places in state.here[slot].items())
    return stood, state.heads[slot], slot


def _clear_any(trial: _Trial, job: Job, able: Sequence[int], leaving: bool) -> Team | None:
    """Slots of ``able`` for one place of ``job``, freed; None (and perhaps steps to take back) when there are none."""
    state, chosen = trial.state, list[int]()
    wanted = job.width if job.team else 1
    for slot in able:
        barred = {*able[:wanted], *chosen, slot}
        before = len(trial.steps)
        free = _clear(trial, job, slot, barred, leaving)
        if free and (state.can_join(job, slot) if job.team else state.room(job, slot) > 0):
            chosen.append(slot)
        else:
            trial.back(before)
        if len(chosen) == wanted:
            return tuple(sorted(chosen))
    return None


def _clear(trial: _Trial, job: Job, slot: int, barred: Collection[int], leaving: bool) -> bool:
    """Free ``slot`` for one place of ``job``, all of it where the place needs it whole."""
    while (lack := _lack(trial.state, job, slot)) > 0:
        if not (_one_moves(trial, slot, lack, barred) or (leaving and _one_leaves(trial, job, slot))):
            return False
    return True


# --- Who goes ---------------------------------------------------------------------------------------------------------


def _one_moves(trial: _Trial, slot: int, lack: int, barred: Collection[int]) -> bool:
    """Move one place off ``slot``: one that is enough, one that is new, one that is hardly larger than need be."""
    state, jobs = trial.state, trial.state.problem.jobs
    rows = sorted(
        (size < lack, trial.base.on[index].get(slot, 0) >= places, abs(size - lack), index)
        for index, places in state.here[slot].items()
        if jobs[index].simple and jobs[index].strategy in MOVING
        for size in [state.problem.size(jobs[index], slot) or 0]
    )
    for *_, index in rows:
        job = jobs[index]
        there = _team_elsewhere(state, job, barred) if job.team else _elsewhere(state, job, barred)
        if there is not None:
            trial.go(job, _home(state, job, slot), there)
            return True
    return False


def _one_leaves(trial: _Trial, job: Job, slot: int) -> bool:
    """Leave out one place on ``slot`` of a lower priority than ``job``: room first, then the lowest, the largest."""
    state, jobs = trial.state, trial.state.problem.jobs
    leaned_on = {rule.family for item in jobs for rule in item.beside}
    weak = min(
        (
            (
                not jobs[index].shadow,
                jobs[index].deployment.priority,
                -(state.problem.size(jobs[index], slot) or 0),
                index,
            )
            for index in state.here[slot]
            if jobs[index].shadow or jobs[index].deployment.priority < job.deployment.priority
            if jobs[index].strategy != "strict_pack" and not jobs[index].pool
            if jobs[index].family not in leaned_on
        ),
        default=None,
    )
    if weak is None:
        return False
    leaver = jobs[weak[-1]]
    trial.go(leaver, _home(state, leaver, slot), None)
    return True


def _home(state: State, job: Job, slot: int) -> Team:
    return next(team for team in state.teams[job.index] if slot in team) if job.team else (slot,)


def _elsewhere(state: State, job: Job, barred: Collection[int]) -> Team | None:
    """The open slot that is filled best by one more place of ``job``, else an empty one."""
    kind, free, sizes = state.problem.kind, state.free, job.sizes
    best: tuple[bool, int, int] | None = None
    for other, left in enumerate(free):
        size = sizes[kind[other]]
        if size is not None and left >= size and other not in barred and state.room(job, other):
            key = (not state.heads[other], left, other)
            best = key if best is None or key < best else best
    return None if best is None else (best[-1],)


def _team_elsewhere(state: State, job: Job, barred: Collection[int]) -> Team | None:
    """Empty slots of one host and product, of the host with the fewest to spare."""
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for slot, host in enumerate(state.problem.domains[HOST_LEVEL]):
        if slot not in barred and state.can_join(job, slot):
            groups[host, state.problem.slots[slot].product].append(slot)
    teams = [(len(able), team) for able in groups.values() if (team := pick_team(state, job, able)) is not None]
    return min(teams, default=(0, None))[1]


Ways = Mapping[int, tuple[Step, ...]]
"""By family, the standing places that would have to go to let one more in."""
