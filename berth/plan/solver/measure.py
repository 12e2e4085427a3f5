"""What a state is worth: the lexicographic objectives, as tuples that compare. See docs/decisions/0013."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from berth.plan.solver.problem import HOST_LEVEL, Job, Problem
from berth.plan.solver.state import State, domains_of, open_slots


def unplaced(state: State) -> tuple[int, ...]:
    """Replicas that are nowhere, the highest priority first; last, room promised and not found."""
    levels: dict[int, int] = defaultdict(int)
    rooms = 0
    for job in state.problem.jobs:
        missing = max(0, state.missing(job))
        if job.pool:
            missing = max(0, job.wanted - state.placed[job.index])
            rooms += max(
                0, max(job.wanted, job.deployment.max_replicas or 0) - max(job.wanted, state.placed[job.index])
            )
        if job.shadow:
            rooms += missing
        else:
            levels[job.deployment.priority] += missing
    return (*(levels[priority] for priority in sorted(levels, reverse=True)), rooms)


def pack_value(state: State) -> tuple[int, ...]:
    """What `pack` minimises: cost, GPUs, hosts; then, to break ties, MiB opened."""
    problem, used = state.problem, open_slots(state)
    return (
        sum(problem.costs[slot] for slot in used),
        sum(problem.gpus[slot] for slot in used),
        len({problem.domains[HOST_LEVEL][slot] for slot in used}),
        sum(problem.slots[slot].total_mib for slot in used),
    )


def spread_value(state: State) -> tuple[float, ...]:
    """What `spread` minimises: domains not touched, as negative sums over deployments; then the fullest share."""
    sums = [0, 0, 0, 0]
    for job in spread_jobs(state.problem):
        for level, touched in enumerate(domains_of(state.problem, family_homes(state, job), job.widest)):
            sums[level] -= touched
    return (*sums, *sorted((share(state, slot) for slot in open_slots(state)), reverse=True)[:1])


def spread_jobs(problem: Problem) -> tuple[Job, ...]:
    """Jobs of replicas that are spread."""
    return tuple(job for job in problem.jobs if not job.shadow and job.strategy in ("spread", "strict_spread"))


def family_homes(state: State, job: Job) -> list[int]:
    """Where the replicas of ``job`` and the room promised for them are."""
    return [slot for item in state.problem.jobs if item.family == job.family for slot in state.homes(item)]


def share(state: State, slot: int) -> float:
    """The promised part of a slot's memory, 0 to 1."""
    vram = state.problem.slots[slot].vram_mib
    return (state.problem.free[slot] - state.free[slot]) / vram if vram else 0.0


def load(state: State, slot: int) -> float:
    """The expected load on each GPU of ``slot``: of what runs, not of room."""
    jobs = state.problem.jobs
    return sum(jobs[job].deployment.load * places for job, places in state.here[slot].items() if not jobs[job].shadow)


def balanced_value(state: State) -> tuple[float, ...]:
    """What `balanced` minimises: the loads of all slots, the largest first."""
    return tuple(sorted((round(load(state, slot), 9) for slot in open_slots(state)), reverse=True))


def value(state: State) -> tuple[float, ...]:
    """What the plan's own strategy minimises."""
    if state.problem.strategy in ("pack", "strict_pack"):
        return pack_value(state)
    if state.problem.strategy == "balanced":
        return balanced_value(state)
    return spread_value(state)


@dataclass(frozen=True)
class Changes:
    """Replicas that stood and now are elsewhere: ``moved`` off a GPU that is still there, ``replaced`` as theirs is
    gone."""

    moved: int = 0
    replaced: int = 0


def changes(state: State) -> Changes:
    """Who of the previous plan changes the slot: those that stood, are still wanted and stay no more."""
    before = state.problem.before
    if before is None:
        return Changes()
    families = {job.name: job for job in state.problem.jobs if not job.shadow}
    stood, gone, stays = defaultdict[str, int](int), defaultdict[str, int](int), defaultdict[str, int](int)
    here = {uuid for slot in state.problem.slots for uuid in slot.gpu_uuids}
    there = {slot.name: here.issuperset(slot.gpu_uuids) for slot in before.slots}
    for berth in before.berths:
        job = families.get(berth.deployment)
        if job is None:
            continue
        (stood if there[berth.slot] else gone)[job.name] += berth.replicas
        stays[job.name] += min(berth.replicas, _now(state, job, state.problem.then.get(berth.slot, ())))
    moved = {name: max(0, min(stood[name], state.placed[families[name].index]) - stays[name]) for name in stays}
    left = {name: state.placed[families[name].index] - stays[name] - moved[name] for name in stays}
    return Changes(sum(moved.values()), sum(min(gone[name], left[name]) for name in stays))


def _now(state: State, job: Job, slots: tuple[int, ...]) -> int:
    if job.team:
        return sum(set(team) == set(slots) for team in state.teams[job.index])
    return state.on[job.index].get(slots[0], 0) if len(slots) == 1 else 0


def best(states: Iterable[State]) -> State:
    """The best of ``states``: least unplaced, then the strategy's objective, then fewest moves; the first of equals."""
    return min(states, key=lambda state: (unplaced(state), value(state), changes(state).moved))
