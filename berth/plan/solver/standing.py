"""What stays where it is. Moving a model costs minutes of start-up, so what stands is the first fact of a new plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from berth.plan.solver.problem import HOST_LEVEL, Job, Problem
from berth.plan.solver.state import State
from berth.plan.types import Berth, Plan, Slot

Before = dict[int, dict[tuple[int, ...], Berth]]
"""Family -> today's slots (several for a team) -> the berth of the previous plan."""


@dataclass(frozen=True)
class Standing:
    """What stays, and who lost room on which slot (deployment, slot name) -> replicas."""

    state: State
    evicted: Mapping[tuple[str, str], int] = field(default_factory=dict)


def keep(problem: Problem, hold: bool = False) -> Standing:
    """The state with every place that stays: under an unchanged strategy (``hold``: whatever it was), where it still
    fits and the rules allow it.

    With an unchanged footprint a replica may stay on a GPU that a stranger has entered since, while Berth's promises
    fit ``vram_mib`` and both together fit the card's total. Who asks for more memory than before yields to those who do
    not: only what changed may move.
    """
    state = State(problem)
    evicted: dict[tuple[str, str], int] = {}
    if problem.before is None:
        return Standing(state)
    before = _before(problem, problem.before)
    families = [job for job in problem.jobs if not job.shadow]
    shadows = {job.family: job for job in problem.jobs if job.shadow}
    for job in sorted(families, key=lambda job: (_changed(problem, job, before), -job.largest, job.name)):
        was = problem.before.strategies.get(job.name, problem.before.strategy)
        if (was != job.strategy and not hold) or job.family not in before:
            continue
        _keep(state, job, shadows.get(job.family), before[job.family], evicted)
    return Standing(state, evicted)


def _before(problem: Problem, previous: Plan) -> Before:
    families = {job.name: job.family for job in problem.jobs if not job.shadow}
    found: Before = defaultdict(dict)
    for berth in previous.berths:
        slots = problem.then.get(berth.slot)
        if slots and berth.deployment in families:
            found[families[berth.deployment]][slots] = berth
    return dict(found)


def _changed(problem: Problem, job: Job, before: Before) -> bool:
    there = before.get(job.family, {})
    return any(berth.vram_mib != problem.size(job, slot) for slots, berth in there.items() for slot in slots)


def _keep(
    state: State,
    job: Job,
    shadow: Job | None,
    there: Mapping[tuple[int, ...], Berth],
    evicted: dict[tuple[str, str], int],
) -> None:
    if job.pool:
        _keep_pool(state, job, there)
        return
    hosts: set[int] = set()
    stays: dict[tuple[int, ...], int] = {}
    for slots, berth in sorted(there.items()):
        host = state.problem.domains[HOST_LEVEL][slots[0]]
        if job.strategy == "strict_pack" and hosts - {host}:
            continue
        places = _stays(state, job, slots, berth)
        for _ in range(places):
            _add(state, job, slots)
        if places:
            hosts.add(host)
            stays[slots] = places
        if places < berth.replicas:
            evicted[job.name, berth.slot] = berth.replicas - places
    _settle(state, job, shadow, there, stays)


def _add(state: State, job: Job, slots: tuple[int, ...]) -> None:
    if job.team:
        state.add_team(job, slots)
    else:
        state.add(job, slots[0])


def _stays(state: State, job: Job, slots: tuple[int, ...], berth: Berth) -> int:
    """How many places of ``berth``, its reserved ones included, may stay."""
    if len(slots) != (job.width if job.team else 1):
        return 0
    places = berth.replicas + berth.reserved
    for slot in slots:
        size = state.problem.size(job, slot)
        if size is None or (job.team and state.heads[slot]):
            return 0
        known = state.problem.slots[slot]
        limit = known.free_mib if berth.vram_mib != size else standing_limit(known)
        # ``free`` counts from free_mib: what a stranger takes of it since does not push out what stands.
        places = min(places, state.fits(job, slot, size, state.free[slot] + limit - known.free_mib))
    # A rule that is new may forbid what stood; affinity is asked when everything is there.
    limit = 1 if job.alone_in is not None or any(rule.family == job.family for rule in job.apart) else places
    return min(places, limit) if _rules_hold(state, job, slots[0]) else 0


def _rules_hold(state: State, job: Job, slot: int) -> bool:
    for rule in job.apart:
        if state.problem.domains[rule.level][slot] in state.counts[rule.family][rule.level]:
            return False
    if job.alone_in is not None:
        return state.problem.domains[job.alone_in][slot] not in state.counts[job.family][job.alone_in]
    return True


def standing_limit(slot: Slot) -> int:
    """What replicas that already stand on ``slot`` may sum up to, in MiB.

    They hold their memory, and so does the stranger that came after them: both are there. Restarting a model because a
    desktop grew by a step would be the greater harm, so only what can no longer be true makes them move.
    """
    return min(slot.vram_mib, slot.total_mib - slot.foreign_mib)


def _settle(
    state: State,
    job: Job,
    shadow: Job | None,
    there: Mapping[tuple[int, ...], Berth],
    stays: Mapping[tuple[int, ...], int],
) -> None:
    """Make what stays of one family as many replicas and as much room as are wanted.

    What stood as room is given to replicas first when more are wanted (growing into it moves nobody), then stays room,
    then goes.
    """
    rooms = {slots: max(0, places - there[slots].replicas) for slots, places in stays.items()}
    spare = max(0, state.placed[job.index] - job.wanted)
    for slots, places in sorted(rooms.items(), key=lambda item: item[0], reverse=True):
        for _ in range(min(places, spare)):
            _remove(state, job, slots)
            if shadow is not None and state.missing(shadow) > 0:
                _add(state, shadow, slots)
            spare -= 1
    while state.missing(job) < 0:
        slots = _surplus(state, job)
        _remove(state, job, slots)


def _remove(state: State, job: Job, slots: tuple[int, ...]) -> None:
    if job.team:
        state.remove_team(job, slots)
    else:
        state.add(job, slots[0], -1)


def _surplus(state: State, job: Job) -> tuple[int, ...]:
    """Where to take one replica away so that the strategy is served best."""
    standing: Sequence[tuple[int, ...]] = (
        sorted(state.teams[job.index]) if job.team else [(slot,) for slot in sorted(state.on[job.index])]
    )
    problem = state.problem
    if job.strategy in ("pack", "strict_pack"):
        # The emptiest GPU first: it is the nearest to being free as a whole.
        return min(standing, key=lambda slots: (_used(state, slots[0]), -slots[0]))
    counts: list[dict[int, int]] = [{}, {}, {}, {}]
    for slot in state.homes(job):
        for level, numbers in enumerate(problem.domains):
            counts[level][numbers[slot]] = counts[level].get(numbers[slot], 0) + 1

    def crowding(slots: tuple[int, ...]) -> tuple[float, ...]:
        levels = tuple(-counts[level][problem.domains[level][slots[0]]] for level in (3, 2, 1, 0))
        return (*levels, -_used(state, slots[0]) / max(1, problem.slots[slots[0]].vram_mib), -slots[0])

    return min(standing, key=crowding)


def _used(state: State, slot: int) -> int:
    return state.problem.slots[slot].free_mib - state.free[slot]


def _keep_pool(state: State, job: Job, there: Mapping[tuple[int, ...], Berth]) -> None:
    """A pool stays as a whole, with the same most per slot, or not at all."""
    needed = max(job.wanted, job.deployment.max_replicas or 0)
    each = {berth.replicas + berth.reserved for berth in there.values()}
    if len(each) != 1 or len(there) * max(each) < needed or (len(there) - 1) * max(each) >= max(needed, 1):
        return
    if any(_stays(state, job, slots, berth) < max(each) for slots, berth in there.items()):
        return
    for slots in sorted(there):
        state.add(job, slots[0], max(each))
