"""One job after the other, each as its strategy would have it. The manner is chosen by ``Way``; the caller compares.

pack places by best fit, spread by the domains that are touched least, balanced by the least load. Rules between
deployments are asked of the state at each step, so whatever order is chosen the result is sound.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from berth.plan.solver.measure import load, share
from berth.plan.solver.problem import HOST_LEVEL, Job, Problem
from berth.plan.solver.shelf import Shelf
from berth.plan.solver.spreading import Shares, Tree
from berth.plan.solver.state import State, Team, drop_unmet

Rank = Callable[[int], tuple[object, ...]]


@dataclass(frozen=True)
class Way:
    """One manner of being greedy: open large slots first, pack whatever the strategy is, priority before size."""

    large_first: bool = False
    pack_all: bool = False
    by_priority: bool = False
    small_jobs_first: bool = False


WAYS = (Way(), Way(large_first=True), Way(pack_all=True), Way(large_first=True, pack_all=True))
URGENT_WAYS = (
    Way(by_priority=True),
    Way(by_priority=True, pack_all=True),
    Way(by_priority=True, pack_all=True, small_jobs_first=True),
)


def order_of(problem: Problem, way: Way) -> list[Job]:
    """Who goes first: whom others lean on, teams, the constrained, the large. Promised room comes last."""
    depths = {job.family: _depth(problem, job.family, frozenset()) for job in problem.jobs}
    urgency = _urgency(problem) if way.by_priority else {}
    sign = 1 if way.small_jobs_first else -1

    def key(job: Job) -> tuple[object, ...]:
        first = (job.shadow, -urgency.get(job.family, 0), depths[job.family])
        kind = (not job.team, job.simple, -job.deployment.load if job.strategy == "balanced" else 0.0)
        return (*first, *(() if way.small_jobs_first else kind), sign * job.largest, job.name)

    return sorted(problem.jobs, key=key)


def _depth(problem: Problem, family: int, seen: frozenset[int]) -> int:
    if family in seen or family < 0:
        return 0
    beside = problem.jobs[family].beside
    return max((1 + _depth(problem, rule.family, seen | {family}) for rule in beside), default=0)


def _urgency(problem: Problem) -> dict[int, int]:
    """The priority of each family, raised to that of the most urgent one that leans on it."""
    found = {job.family: job.deployment.priority for job in problem.jobs}
    for _ in problem.jobs:
        before = dict(found)
        for job in problem.jobs:
            for rule in job.beside:
                if rule.family in found:
                    found[rule.family] = max(found[rule.family], found[job.family])
        if found == before:
            break
    return found


def greedy(base: State, order: Sequence[Job], way: Way) -> State:
    """``base`` with the missing places of ``order`` added, one job at a time."""
    state = base.copy()
    place_all(state, order, way)
    drop_unmet(state)
    return state


def place_all(state: State, order: Sequence[Job], way: Way) -> None:
    """Add the missing places of ``order`` to ``state``."""
    shelf: Shelf | None = None
    shares: Shares | None = None
    for job in order:
        if state.missing(job) <= 0 and not job.pool:
            continue
        if _packs(job, way):
            shelf, shares = shelf or Shelf(state), None
            _place_best_fit(shelf, job, way)
        elif job.strategy in ("spread", "strict_spread") and not (job.team or job.pool):
            shelf, shares = None, shares or Shares(state)
            _place_spread(state, job, shares)
        else:
            shelf, shares = None, None
            _place(state, job)


def _packs(job: Job, way: Way) -> bool:
    if job.pool or job.team:
        return False
    return job.strategy == "pack" or (way.pack_all and job.strategy in ("spread", "balanced"))


def _place_best_fit(shelf: Shelf, job: Job, way: Way) -> None:
    while shelf.state.missing(job) > 0:
        slot = shelf.best_open(job)
        if slot is None:
            slot = shelf.best_empty(job, not way.large_first)
        if slot is None:
            return
        shelf.put(job, slot)


def _place_spread(state: State, job: Job, shares: Shares) -> None:
    tree = Tree(state, job, shares)
    while state.missing(job) > 0 and (slot := tree.take()) is not None:
        state.add(job, slot)
        tree.update()
        shares.changed(slot)


def _place(state: State, job: Job) -> None:
    if job.pool:
        _place_pool(state, job)
    elif job.strategy == "strict_pack":
        _place_on_one_host(state, job)
    elif job.team:
        place_teams(state, job)
    else:
        _place_level(state, job)


def _place_level(state: State, job: Job) -> None:
    """Each place where the load is least, then where the promised share is."""
    rows = [(*_level(state, job, slot), slot) for slot in range(len(state.heads)) if state.room(job, slot)]
    heapq.heapify(rows)
    while rows and state.missing(job) > 0:
        slot = rows[0][-1]
        if not state.room(job, slot):
            heapq.heappop(rows)
            continue
        state.add(job, slot)
        heapq.heapreplace(rows, (*_level(state, job, slot), slot))


def _level(state: State, job: Job, slot: int) -> tuple[float, float, bool]:
    return round(load(state, slot), 9), share(state, slot), (job.family, slot) not in state.problem.present


# --- Teams ------------------------------------------------------------------------------------------------------------


Quota = tuple[str | None, int | None]
"""How many teams on which product; None for any."""


def place_teams(
    state: State, job: Job, hosts: frozenset[int] | None = None, quotas: Sequence[Quota] = ((None, None),)
) -> None:
    """Teams of empty slots of one host and product, for each of ``quotas`` in turn as long as there are any."""
    groups = _groups(state, job, hosts)
    touched = _touched(state, job)
    for product, most in quotas:
        stop = max(0, state.missing(job) - most) if most is not None else 0
        ranked: dict[tuple[int, str], tuple[tuple[object, ...], Team]] = {}
        changed = stale = [key for key in groups if product in (None, key[1])]
        while state.missing(job) > stop:
            picked = {key: pick_team(state, job, groups[key]) for key in changed}
            for key in stale:
                team = picked[key] if key in picked else ranked[key][1] if key in ranked else None
                ranked.pop(key, None)
                if team is not None:
                    ranked[key] = (_team_rank(state, job, team, groups[key], touched), team)
            if not ranked:
                break
            key, (_, team) = min(ranked.items(), key=lambda item: item[1])
            state.add_team(job, team)
            _touch(state.problem, touched, team)
            changed = [other for other in groups if product in (None, other[1])] if job.ruled else [key]
            for other in groups if job.ruled else changed:
                groups[other] = [slot for slot in groups[other] if state.can_join(job, slot)]
            # Of the others only those on the same host look different now, unless domains are counted.
            everywhere = job.ruled or job.strategy != "pack"
            stale = [other for other in groups if product in (None, other[1]) and (everywhere or other[0] == key[0])]


def _touched(state: State, job: Job) -> list[dict[int, int]]:
    """How many teams of ``job`` are in each zone, rack and host."""
    touched: list[dict[int, int]] = [{} for _ in range(HOST_LEVEL + 1)]
    for team in state.teams[job.index]:
        _touch(state.problem, touched, team)
    return touched


def _touch(problem: Problem, touched: list[dict[int, int]], team: Team) -> None:
    for level, counts in enumerate(touched):
        domain = problem.domains[level][team[0]]
        counts[domain] = counts.get(domain, 0) + 1


def _groups(state: State, job: Job, hosts: frozenset[int] | None) -> dict[tuple[int, str], list[int]]:
    """The slots that may join a team, by host and product."""
    found: dict[tuple[int, str], list[int]] = {}
    for slot, host in enumerate(state.problem.domains[HOST_LEVEL]):
        if (hosts is None or host in hosts) and state.can_join(job, slot):
            found.setdefault((host, state.problem.slots[slot].product), []).append(slot)
    return {key: able for key, able in found.items() if len(able) >= job.width}


def pick_team(state: State, job: Job, able: Sequence[int]) -> Team | None:
    """The best ``width`` of ``able``: in the smallest NVLink group that holds them, else over as few as possible."""
    width = job.width
    if len(able) < width:
        return None
    slots = state.problem.slots
    links: dict[str, list[int]] = {}
    for slot in sorted(
        able, key=lambda slot: ((job.family, slot) not in state.problem.present, slots[slot].free_mib, slot)
    ):
        links.setdefault(slots[slot].nvlink_group, []).append(slot)
    whole = [members for name, members in links.items() if name and len(members) >= width]
    if whole:
        members = min(whole, key=lambda members: (len(members), members[0]))
    elif job.deployment.require_nvlink:
        return None
    else:
        members = [slot for row in sorted(links.values(), key=lambda row: (-len(row), row[0])) for slot in row]
    return tuple(sorted(members[:width]))


def linked(problem: Problem, team: Team) -> bool:
    """Whether all GPUs of ``team`` are in one NVLink group."""
    names = {problem.slots[slot].nvlink_group for slot in team}
    return len(names) == 1 and "" not in names


def _team_rank(
    state: State, job: Job, team: Team, able: Sequence[int], touched: Sequence[dict[int, int]]
) -> tuple[object, ...]:
    problem = state.problem
    here = problem.slots[team[0]]
    host = problem.domains[HOST_LEVEL][team[0]]
    unlinked = not linked(problem, team)
    strange = sum((job.family, slot) not in problem.present for slot in team)
    rest = len(able) - len(team)
    if job.strategy in ("spread", "strict_spread"):
        counts = [
            counts.get(problem.domains[level][team[0]], 0) if level >= job.widest else 0
            for level, counts in enumerate(touched)
        ]
        return (*(count > 0 for count in counts), *counts, unlinked, strange, here.vram_mib, rest, team)
    cost = sum(problem.costs[slot] for slot in team)
    closed = host not in state.opened
    return (cost, here.vram_mib, unlinked, closed, strange, rest, team)


# --- All on one host --------------------------------------------------------------------------------------------------


def _place_on_one_host(state: State, job: Job) -> None:
    """All of the missing beside those that stand, else all of them elsewhere, else none."""
    if state.missing(job) <= 0:
        return
    later = sum(state.missing(item) for item in state.problem.jobs if item.family == job.family and item.shadow)
    later = 0 if job.shadow else max(0, later)
    if _fill_one_host(state, job, later) or (later and _fill_one_host(state, job, 0)) or job.shadow:
        return
    before = state.copy()
    for slot, places in list(state.on[job.index].items()):
        state.add(job, slot, -places)
    for team in list(state.teams[job.index]):
        state.remove_team(job, team)
    if not (_fill_one_host(state, job, later) or _fill_one_host(state, job, 0)):
        state.__dict__.update(before.__dict__)


def _fill_one_host(state: State, job: Job, later: int) -> bool:
    """Put everything that is missing on the best host with room for it and for ``later`` more."""
    missing = state.missing(job)
    ranked = [
        rank for slots in state.problem.hosts if (rank := _host_rank(state, job, slots, missing + later)) is not None
    ]
    if not ranked:
        return False
    host = min(ranked)[-1]
    slots = next(item for item in state.problem.hosts if state.problem.domains[HOST_LEVEL][item[0]] == host)
    if job.team:
        place_teams(state, job, frozenset([int(str(host))]))
        return state.missing(job) <= 0
    before = state.copy()
    while state.missing(job) > 0:
        able = [slot for slot in slots if state.room(job, slot)]
        if not able:
            # Its own anti-affinity bars what its size does not.
            state.__dict__.update(before.__dict__)
            return False
        state.add(job, min(able, key=_fill_rank(state, job)))
    return True


def _fill_rank(state: State, job: Job) -> Rank:
    missing = state.missing(job)

    def rank(slot: int) -> tuple[object, ...]:
        holds = min(missing, state.room(job, slot))
        left = state.free[slot] - holds * (state.problem.size(job, slot) or 0)
        strange = (job.family, slot) not in state.problem.present
        return (slot not in state.on[job.index], -holds, not state.heads[slot], left, strange, slot)

    return rank


def _host_rank(state: State, job: Job, slots: Sequence[int], replicas: int) -> tuple[object, ...] | None:
    """How well a host takes ``replicas`` places: GPUs to open, GPUs in all; None when they do not fit."""
    problem = state.problem
    there = sum((job.family, slot) in problem.present for slot in slots)
    opened = sum(state.is_open(slot) for slot in slots)
    host = problem.domains[HOST_LEVEL][slots[0]]
    if job.team:
        able = _groups(state, job, frozenset([host]))
        if sum(len(row) // job.width for row in able.values()) < replicas:
            return None
        cost = min(problem.costs[slot] for row in able.values() for slot in row)
        return (cost * replicas * job.width, replicas * job.width, -there, -opened, host)
    rooms = sorted(((state.room(job, slot), slot) for slot in slots), key=lambda item: (-item[0], item[1]))
    if sum(room for room, _ in rooms) < replicas:
        return None
    left, gpus, cost = replicas - sum(room for room, slot in rooms if slot in state.on[job.index]), 0, 0
    for room, slot in rooms:
        if left > 0 and room and slot not in state.on[job.index]:
            left, gpus, cost = left - room, gpus + problem.gpus[slot], cost + problem.costs[slot]
    return (gpus, cost, -there, -opened, host)


# --- Pools ------------------------------------------------------------------------------------------------------------


def _place_pool(state: State, job: Job) -> None:
    """Slots and the most per slot such that any way in which Serve fills them is safe: each is reserved in full.

    The fewest places too many come first, then what the strategy likes: few slots or many.
    """
    wanted = max(job.wanted, job.deployment.max_replicas or 0)
    if state.placed[job.index] or not wanted:
        return
    rooms = [(state.room(job, slot), slot) for slot in range(len(state.heads))]
    few = job.strategy in ("pack", "strict_pack")
    found: tuple[tuple[int, int, int], int, list[int]] | None = None
    for each in range(1, max((room for room, _ in rooms), default=0) + 1):
        able = [slot for room, slot in rooms if room >= each]
        need = -(-wanted // each)
        if job.strategy == "strict_pack":
            able = _one_host(state, able, need)
        able.sort(key=_pool_rank(state, job, few))
        able = _together(state, job, able, each, need)
        count = len(able)
        short = max(0, wanted - count * each)
        key = (short, max(0, count * each - wanted), count if few else -count)
        if count and (found is None or key < found[0]):
            found = (key, each, able[:count])
    for slot in found[2] if found else ():
        state.add(job, slot, found[1] if found else 0)


def _together(state: State, job: Job, able: Sequence[int], each: int, need: int) -> list[int]:
    """The first ``need`` of ``able`` that may all hold ``each`` places: the job's own rules count those before."""
    if not job.ruled:
        return list(able[:need])
    trial, found = state.copy(), list[int]()
    for slot in able:
        if len(found) < need and trial.room(job, slot) >= each:
            trial.add(job, slot, each)
            found.append(slot)
    return found


def _pool_rank(state: State, job: Job, few: bool) -> Rank:
    def rank(slot: int) -> tuple[object, ...]:
        strange = (job.family, slot) not in state.problem.present
        if few:
            host = state.problem.domains[HOST_LEVEL][slot] not in state.opened
            return (not state.heads[slot], strange, host, state.free[slot], slot)
        return (strange, share(state, slot), slot)

    return rank


def _one_host(state: State, able: Sequence[int], need: int) -> list[int]:
    hosts: dict[int, list[int]] = {}
    for slot in able:
        hosts.setdefault(state.problem.domains[HOST_LEVEL][slot], []).append(slot)
    return next((row for row in hosts.values() if len(row) >= need), [])


def squeaky(base: State, way: Way, rounds: int) -> Iterator[State]:
    """Greedy plans in which whoever was refused goes first the next time."""
    queue = order_of(base.problem, way)
    for _ in range(min(rounds, len(queue) + 1)):
        state = greedy(base, queue, way)
        yield state
        refused = [job for job in queue if state.missing(job) > 0 and not job.pool]
        again = sorted(refused, key=lambda job: (job.shadow, -job.deployment.priority)) + [
            job for job in queue if job not in refused
        ]
        if again == queue:
            return
        queue = again
