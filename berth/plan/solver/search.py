"""Which plan to take: greedy ones compared, patterns for the packed, exact search where the fleet is small.

OR-tools and numpy are imported only here, when they are needed: hosts that verify plans have neither. Without them the
greedy plans are all there is, and nothing is proven.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from berth.codec import replace
from berth.plan.solver.greedy import URGENT_WAYS, WAYS, greedy, order_of, squeaky
from berth.plan.solver.improve import Budget, improve, level
from berth.plan.solver.measure import best, pack_value, unplaced
from berth.plan.solver.problem import Problem
from berth.plan.solver.room import make_room
from berth.plan.solver.state import State

if TYPE_CHECKING:
    from berth.plan.solver.bound import Bounds

LARGE = 512
"""Slots from which on each greedy plan takes long enough to make fewer of them."""
UNIT_MIB = 4
"""Sizes are rounded down to this for the bound of a large fleet."""


@dataclass(frozen=True)
class Effort:
    """``exact_gpus``: fleets up to this size are searched exactly; ``steps``: deterministic time per objective."""

    exact_gpus: int
    steps: float


@dataclass(frozen=True)
class Found:
    """A finished state and how it was found; what is proven of its cost (millionths) and GPUs; whether of all of it."""

    state: State
    method: str
    gpus: int = 0
    cost: int = 0
    optimal: bool = False


def whole(state: State) -> bool:
    """Whether nothing is left out."""
    return not any(unplaced(state))


def find(base: State, effort: Effort, max_moves: int | None, repack: bool) -> Found:
    """The plan that keeps ``base``, or, where that leaves somebody out, moves of it as little as it must.

    ``repack`` moves of it what serves the strategies, at most ``max_moves``.
    """
    start = heuristic(base)
    if not _is_large(base.problem):
        level(start, Budget(base, 0))
    start = _roomier(base, start, max_moves)
    if repack:
        start = best((start, _improved(base, start, max_moves or 0)))
    if importlib.util.find_spec("ortools") is None or importlib.util.find_spec("numpy") is None:
        return Found(start, "greedy")
    small = base.problem.total_gpus <= effort.exact_gpus
    found = _small(base, start, effort, max_moves, repack) if small else _large(base, start)
    # Packed anew, there may be another way in.
    return found if found.optimal else replace(found, state=_roomier(base, found.state, max_moves))


def _roomier(base: State, state: State, max_moves: int | None) -> State:
    """``state``, or with more placed where what stands can make room."""
    if whole(state) or base.problem.before is None:
        return state
    more = make_room(base, state, max_moves)
    return more if unplaced(more) < unplaced(state) else state


def _improved(base: State, start: State, max_moves: int) -> State:
    state = start.copy()
    improve(state, Budget(base, max_moves))
    return state


# --- Greedy -----------------------------------------------------------------------------------------------------------


def heuristic(base: State) -> State:
    """The best of several greedy plans; when none is whole, of reordered ones too."""
    problem = base.problem
    ways = WAYS[:1] if _is_large(problem) else WAYS[:2]
    tried = [greedy(base, order_of(problem, way), way) for way in ways]
    if any(whole(state) for state in tried):
        return best(tried)
    rounds = 2 if _is_large(problem) else 12
    for way in (*ways, *WAYS[2:]) if not _is_large(problem) else ways:
        tried += squeaky(base, way, rounds)
    tried += [greedy(base, order_of(problem, way), way) for way in URGENT_WAYS]
    return best(tried)


def _is_large(problem: Problem) -> bool:
    return len(problem.slots) > LARGE


# --- With a solver ----------------------------------------------------------------------------------------------------


def _large(base: State, start: State) -> Found:
    from berth.plan.solver import bound, patterns

    if _worth_packing(base, start):
        packed = patterns.pack(_without_packed(base, start), start, patterns.LARGE)
        offers = bound.offers(packed.packing, packed.found.prices)
        state, method = best((packed.state, start)), "column generation"
    else:
        state, offers, method = start, (), "greedy"
    bounds = bound.prove(state, offers, UNIT_MIB, quick=not _packs(base.problem))
    return Found(state, method, bounds.gpus, bounds.cost, False)


def _packs(problem: Problem) -> bool:
    return problem.strategy in ("pack", "strict_pack")


def _worth_packing(base: State, start: State) -> bool:
    """Whether enough is new to make patterns of it: a few places beside what stands are as good by best fit."""
    new = sum(start.placed) - sum(base.placed)
    return new * 4 >= sum(start.placed) and any(job.simple and job.strategy == "pack" for job in base.problem.jobs)


def _without_packed(base: State, start: State) -> State:
    """``start`` without what patterns may place better: the packed places without rules that ``base`` does not hold."""
    state = start.copy()
    for job in state.problem.jobs:
        if job.simple and job.strategy == "pack":
            for slot, places in list(state.on[job.index].items()):
                state.add(job, slot, base.on[job.index].get(slot, 0) - places)
            for team in list(state.teams[job.index]):
                if team not in base.teams[job.index]:
                    state.remove_team(job, team)
    return state


def _small(base: State, start: State, effort: Effort, max_moves: int | None, repack: bool) -> Found:
    from berth.plan.solver import bound

    problem = base.problem
    plain = all(job.simple and job.strategy == "pack" for job in problem.jobs)
    bounds = bound.prove(start, (), 1, quick=not _packs(problem))
    if not repack and _keeps(base, start) and _at_bound(base, start, bounds):
        return Found(start, "greedy, proven", bounds.gpus, bounds.cost, True)
    # Half a second of imports, which most runs that change nothing do not need.
    from berth.plan.solver import exact, small

    state, least = start, exact.Least(*_least(base, bounds.cost, bounds.gpus))
    if not repack and any(job.simple and job.strategy == "pack" for job in problem.jobs) and _keeps(base, start):
        proof = small.solve_small(_without_packed(base, start), start, nodes=int(NODES * effort.steps))
        state = best((proof.state, start))
        if plain and (whole(state) or not _stands(base)):
            least = replace(least, reached=proof.reached, proven=proof.proven)
            if proof.optimal:
                return _found(state, start, bounds, "patterns, proven", True)
    stay = not _stands(base) or (whole(state) and _keeps(base, state) and not repack)
    searched = exact.search(base, state, least, effort.steps, max_moves, stay, repack)
    return _found(
        best((searched.state, state)) if stay else searched.state, start, bounds, "exact search", searched.optimal
    )


def _found(state: State, start: State, bounds: Bounds, method: str, optimal: bool) -> Found:
    """With bounds for as many as ``state`` has: those of ``start`` if it has as many."""
    from berth.plan.solver import bound

    if unplaced(state) != unplaced(start):
        bounds = bound.prove(state, (), 1, quick=not _packs(state.problem))
    return Found(state, method, bounds.gpus, bounds.cost, optimal)


NODES = 400
"""Nodes of the small integer programs per unit of effort."""


def _stands(base: State) -> bool:
    return any(base.placed)


def _keeps(base: State, state: State) -> bool:
    """Whether everything that ``base`` holds is still there in ``state``."""
    return all(
        state.on[job.index].get(slot, 0) >= places
        for job in base.problem.jobs
        for slot, places in base.on[job.index].items()
    ) and all(team in state.teams[job.index] for job in base.problem.jobs for team in base.teams[job.index])


def _least(base: State, cost: int, gpus: int) -> tuple[int, int, int]:
    """What is proven of the whole plan; hosts: those that stand, and as many as the GPUs need at the least."""
    sizes = sorted((sum(base.problem.gpus[slot] for slot in host) for host in base.problem.hosts), reverse=True)
    hosts = 0
    while hosts < len(sizes) and sum(sizes[:hosts]) < gpus:
        hosts += 1
    return cost, gpus, max(hosts, len(base.opened))


def _at_bound(base: State, state: State, bounds: Bounds) -> bool:
    """Whether a packed plan is whole and reaches every bound that holds for all plans."""
    problem = base.problem
    if not whole(state) or any(job.pool for job in problem.jobs):
        return False
    if any(job.strategy not in ("pack", "strict_pack") for job in problem.jobs):
        return False
    cost, gpus, hosts = _least(base, bounds.cost, bounds.gpus)
    return pack_value(state)[:3] == (cost, gpus, hosts)
