"""What spread and balanced cannot do better than, whatever the plan: counted, without a solver."""

from __future__ import annotations

from berth.plan.solver.problem import HOST_LEVEL, Problem
from berth.plan.solver.state import State


def touchable(problem: Problem, placed: dict[int, int], family: int) -> tuple[int, ...]:
    """The most domains of each level that the placed replicas of a family can touch."""
    job = problem.jobs[family]
    able = [
        slot
        for slot, known in enumerate(problem.slots)
        if (size := problem.size(job, slot)) is not None
        and size <= known.vram_mib
        and (not known.cordoned or (family, slot) in problem.present)
    ]
    count = placed[family]
    most = []
    for level in range(HOST_LEVEL + 2):
        if level < job.widest:
            most.append(0)
            continue
        touched = len({problem.domains[level][slot] for slot in able})
        most.append(min(count, touched))
    return tuple(most)


def least_max_load(state: State) -> float:
    """No plan with as many placed has a GPU that is promised less load than this at the most."""
    problem = state.problem
    found = 0.0
    groups: dict[frozenset[int], list[tuple[float, int]]] = {}
    for job in problem.jobs:
        count = state.placed[job.index]
        if job.shadow or not count or not job.deployment.load:
            continue
        kinds = frozenset(kind for kind, size in enumerate(job.sizes) if size is not None)
        groups.setdefault(kinds, []).append((job.deployment.load, count * (job.width if job.team else 1)))
    usable = {
        kind: sum(
            1
            for slot, known in enumerate(problem.slots)
            if problem.kind[slot] == kind and (not known.cordoned or state.heads[slot])
        )
        for kind in range(len(problem.kinds))
    }
    for kinds in groups:
        inside = [row for other, rows in groups.items() if other <= kinds for row in rows]
        slots = sum(usable[kind] for kind in kinds)
        if slots:
            mean = sum(load * count for load, count in inside) / slots
            found = max(found, *(load for load, _ in inside), mean, _crowded(inside, slots))
    return found


def _crowded(rows: list[tuple[float, int]], slots: int) -> float:
    """More replicas than slots: some slot holds m + 1 of the (m * slots + 1) largest, which are at least this."""
    rows = sorted(rows, reverse=True)
    total, best, each = sum(count for _, count in rows), 0.0, 1
    while each * slots + 1 <= total:
        seen = 0
        for load, count in rows:
            seen += count
            if seen >= each * slots + 1:
                best = max(best, (each + 1) * load)
                break
        each += 1
    return best
