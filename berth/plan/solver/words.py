"""From the finished state to the plan in words: teams become slots, places become berths, each with its reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from berth.codec import replace
from berth.plan import reasons
from berth.plan.slots import natural
from berth.plan.solver.problem import Job, Problem
from berth.plan.solver.room import Step, Ways
from berth.plan.solver.state import State, Team
from berth.plan.types import DOMAINS, Berth, Plan, Slot, Unplaced


def to_plan(
    state: State, retired: Mapping[str, str], evicted: Mapping[tuple[str, str], int], ways: Ways | None = None
) -> Plan:
    """The plan that ``state`` stands for; ``ways`` tells what would have to go to let in who is left out."""
    problem = state.problem
    fused = {team: fuse(problem, team) for teams in state.teams for team in teams}
    names = {team: slot.name for team, slot in fused.items()}
    slots = tuple(
        sorted(
            [slot for number, slot in enumerate(problem.slots) if not state.taken[number]] + list(fused.values()),
            key=lambda slot: natural(slot.name),
        )
    )
    order = {slot.name: number for number, slot in enumerate(slots)}
    mains = [job for job in problem.jobs if not job.shadow]
    shadows = {job.family: job for job in problem.jobs if job.shadow}
    berths = tuple(
        berth
        for job in mains
        for berth in sorted(_berths(state, job, shadows.get(job.family), names), key=lambda item: order[item.slot])
    )
    bare = Plan(
        strategy=problem.strategy,
        slots=slots,
        berths=berths,
        deployments={job.name: job.deployment.replicas for job in mains},
        strategies={job.name: job.strategy for job in mains},
        retired=dict(sorted(retired.items())),
    )
    story = reasons.Story.of(bare, problem.before, evicted)
    return replace(
        bare,
        berths=tuple(replace(berth, reason=reasons.why_here(berth, story)) for berth in berths),
        unplaced=tuple(
            item
            for job in mains
            if (item := _unplaced(state, job, shadows.get(job.family), bare, story, (ways or {}).get(job.family, ())))
            is not None
        ),
    )


def fuse(problem: Problem, team: Team) -> Slot:
    """One slot of all GPUs of ``team``; it can promise what the one with least can."""
    members = [problem.slots[number] for number in team]
    first = members[0]
    vram = min(slot.vram_mib for slot in members)
    groups = {slot.nvlink_group for slot in members}
    indices = tuple(index for slot in members for index in slot.gpu_indices)
    return replace(
        first,
        name=f"{first.host}-{'+'.join(map(str, indices))}",
        gpu_uuids=tuple(uuid for slot in members for uuid in slot.gpu_uuids),
        gpu_indices=indices,
        vram_mib=vram,
        total_mib=min(slot.total_mib for slot in members),
        foreign_mib=vram - min(slot.free_mib for slot in members),
        nvlink_group=groups.pop() if len(groups) == 1 else "",
        cost=sum(slot.cost for slot in members) / len(members),
        cordoned=any(slot.cordoned for slot in members),
    )


def _berths(state: State, job: Job, shadow: Job | None, names: Mapping[Team, str]) -> list[Berth]:
    problem, counts = state.problem, defaultdict[tuple[str, int], list[int]](lambda: [0, 0])
    for place, item in enumerate((job, shadow)):
        if item is None:
            continue
        for slot, places in state.on[item.index].items():
            counts[problem.slots[slot].name, problem.size(item, slot) or 0][place] += places
        for team in state.teams[item.index]:
            counts[names[team], max(problem.size(item, slot) or 0 for slot in team)][place] += 1
    most = 0
    if job.pool:
        most = min(max(job.wanted, job.deployment.max_replicas or 0), state.placed[job.index])
        _share_out(counts, job)
    return [
        Berth(job.name, slot, replicas, size, "", reserved, pool=most)
        for (slot, size), (replicas, reserved) in counts.items()
        if replicas or reserved
    ]


def _share_out(counts: dict[tuple[str, int], list[int]], job: Job) -> None:
    """Of the places of a pool, as many as replicas run now, in turn over the slots; the rest is room."""
    left = job.wanted
    keys = sorted(counts, key=lambda key: natural(key[0]))
    each = {key: counts[key][0] for key in keys}
    for key in keys:
        counts[key] = [0, each[key]]
    while left > 0 and any(counts[key][1] for key in keys):
        for key in keys:
            if left > 0 and counts[key][1]:
                counts[key] = [counts[key][0] + 1, counts[key][1] - 1]
                left -= 1


def _unplaced(
    state: State, job: Job, shadow: Job | None, plan: Plan, story: reasons.Story, steps: Sequence[Step]
) -> Unplaced | None:
    missing = max(0, state.missing(job))
    room = max(0, state.missing(shadow)) if shadow is not None else 0
    if job.pool:
        wanted = max(job.wanted, job.deployment.max_replicas or 0)
        room = max(0, wanted - max(state.placed[job.index], job.wanted))
    if not missing and not room:
        return None
    problem = state.problem
    left: dict[str, int] = {}
    fitting: list[tuple[Slot, int]] = []
    blocked = 0
    for number, slot in enumerate(problem.slots):
        size = problem.size(job, number)
        if size is None:
            continue
        alone = state.taken[number] or (state.heads[number] and (problem.gpus[number] > 1 or job.team))
        left[slot.name] = 0 if alone else max(0, state.free[number])
        fitting.append((slot, size))
        if left[slot.name] >= size and not slot.cordoned and not state.allowed(job, number):
            blocked += 1
    width = 1 if job.team else job.width
    options = reasons.Options(job.deployment, job.strategy, fitting, left, width, _way_in(problem, steps, missing))
    here = {item.slot: item.replicas for item in story.by_deployment.get(job.name, ())}
    told = _rules(state, job) if blocked else ""
    return reasons.why_nowhere(options, plan, missing, here, told, room)


def _way_in(problem: Problem, steps: Sequence[Step], missing: int) -> str:
    """``moving a@x, 2 of b@y and leaving out c@z (priority -10) (max_moves 4) would let it in``; "" without steps."""
    if not steps:
        return ""
    moving, leaving = Counter[str](), Counter[str]()
    for step in steps:
        slot = fuse(problem, step.here) if step.job.team else problem.slots[step.here[0]]
        name = f"{step.job.name}@{slot.name}"
        if step.there is None:
            leaving[f"{name} (priority {step.job.deployment.priority})"] += 1
        else:
            moving[name] += 1
    told = [
        f"{verb} {reasons.listed([f'{count} of {name}' if count > 1 else name for name, count in counts.items()])}"
        for verb, counts in (("moving", moving), ("leaving out", leaving))
        if counts
    ]
    return f"{' and '.join(told)} (max_moves {len(steps)}) would let {'it' if missing == 1 else 'one more'} in"


def _rules(state: State, job: Job) -> str:
    jobs = state.problem.jobs
    told = [f"not in one {DOMAINS[rule.level]} with {jobs[rule.family].name}" for rule in job.apart]
    told += [
        f"in one {DOMAINS[rule.level]} with {jobs[rule.family].name if rule.family >= 0 else 'what is not asked for'}"
        for rule in job.beside
    ]
    return f"slots with memory enough are barred by its rules: {', '.join(told)}" if told else ""
