"""Local search on a finished state: slots are emptied, replicas spread, loads levelled.

What stood before may be moved too, within a budget of moves. Jobs with rules stay where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from berth.plan.solver.measure import family_homes, load
from berth.plan.solver.problem import HOST_LEVEL, Job
from berth.plan.solver.shelf import Shelf
from berth.plan.solver.spreading import Tree
from berth.plan.solver.state import State, domains_of, open_slots

FAILURES = 150
"""Slots in a row that could not be emptied before the search ends: the emptiest are tried first."""


@dataclass
class Budget:
    """How many of what stands in ``base`` may still be moved."""

    base: State
    left: int

    def price(self, state: State, slot: int) -> int:
        """Standing places that emptying ``slot`` would move."""
        return sum(min(places, self.base.on[job].get(slot, 0)) for job, places in state.here[slot].items())


def improve(state: State, budget: Budget) -> None:
    """Serve every job's strategy better by as many moves as the budget allows."""
    _spread_out(state, budget)
    level(state, budget)
    close_slots(state, (), budget)


def close_slots(state: State, fixed: Collection[int], budget: Budget | None = None) -> None:
    """Empty slots not in ``fixed`` into other open slots, the least filled first."""
    shelf = Shelf(state)
    failures = 0
    for slot in _emptiest(state, fixed):
        if failures >= FAILURES:
            return
        price = budget.price(state, slot) if budget is not None else 0
        done = (budget is None or price <= budget.left) and _empty(shelf, slot)
        failures = 0 if done else failures + 1
        if done and budget is not None:
            budget.left -= price


def _spread_out(state: State, budget: Budget) -> None:
    """Move replicas of spread jobs, one after the other, to domains that they do not touch yet."""
    for job in state.problem.jobs:
        if job.strategy != "spread" or not job.simple or job.team:
            continue
        while budget.left > 0:
            before = domains_of(state.problem, family_homes(state, job), job.widest)
            crowded = max(state.on[job.index].items(), key=lambda item: (item[1], item[0]), default=None)
            if crowded is None:
                break
            state.add(job, crowded[0], -1)
            tree = Tree(state, job)
            slot = tree.take()
            slot = crowded[0] if slot is None else slot
            state.add(job, slot)
            if domains_of(state.problem, family_homes(state, job), job.widest) <= before:
                state.add(job, slot, -1)
                state.add(job, crowded[0])
                break
            budget.left -= 1


def level(state: State, budget: Budget | None = None) -> None:
    """Move balanced places off the slot with most load to slots that then have less than it had."""
    jobs = [job for job in state.problem.jobs if job.strategy == "balanced" and job.simple and not job.team]
    if not jobs:
        return
    for _ in range(len(state.heads) * 4):
        loads = {slot: load(state, slot) for slot in open_slots(state)}
        if not loads or not _relieve(state, jobs, loads, budget):
            return


def _relieve(state: State, jobs: Iterable[Job], loads: dict[int, float], budget: Budget | None) -> bool:
    top = max(loads.values())
    for slot in sorted(slot for slot, value in loads.items() if value == top):
        for job in jobs:
            stands = budget is not None and 0 < state.on[job.index].get(slot, 0) <= budget.base.on[job.index].get(
                slot, 0
            )
            if job.index not in state.here[slot] or (stands and budget is not None and budget.left <= 0):
                continue
            weight = job.deployment.load
            able = [
                other
                for other in range(len(state.heads))
                if other != slot and loads.get(other, 0.0) + weight < top - 1e-9 and state.room(job, other)
            ]
            if weight > 0 and able:
                state.add(job, slot, -1)
                state.add(job, min(able, key=lambda other: (loads.get(other, 0.0), other)))
                if stands and budget is not None:
                    budget.left -= 1
                return True
    return False


def _emptiest(state: State, fixed: Collection[int]) -> list[int]:
    movable = [
        slot
        for slot in range(len(state.heads))
        if state.heads[slot] and slot not in fixed and not state.taken[slot] and _free_to_move(state, slot)
    ]
    slots = state.problem.slots
    return sorted(movable, key=lambda slot: (slots[slot].free_mib - state.free[slot], -slot))


def _free_to_move(state: State, slot: int) -> bool:
    return all(
        state.problem.jobs[job].simple and state.problem.jobs[job].strategy == "pack" for job in state.here[slot]
    )


def _empty(shelf: Shelf, slot: int) -> bool:
    """Move everything on ``slot`` to other open slots, or nothing."""
    state = shelf.state
    jobs = state.problem.jobs
    content = sorted(state.here[slot].items(), key=lambda item: (-jobs[item[0]].largest, item[0]))
    for job, places in content:
        shelf.put(jobs[job], slot, -places)
    moved: list[tuple[Job, int]] = []
    for job, places in content:
        for _ in range(places):
            target = shelf.best_open(jobs[job])
            if target is None:
                for item, there in moved:
                    shelf.put(item, there, -1)
                for item_index, count in content:
                    shelf.put(jobs[item_index], slot, count)
                return False
            shelf.put(jobs[job], target)
            moved.append((jobs[job], target))
    return True


def close_hosts(state: State, fixed: Collection[int]) -> None:
    """Move whole loads to empty slots of fuller hosts, at no more cost, when that frees a host."""
    hosts = state.problem.domains[HOST_LEVEL]
    spare = _empty_slots(state)
    for host in sorted(state.opened, key=lambda host: (state.opened[host], -host)):
        mine = [slot for slot in state.problem.hosts[host] if state.heads[slot]]
        if any(slot in fixed or state.taken[slot] or not _free_to_move(state, slot) for slot in mine):
            continue
        targets: list[tuple[int, int]] = []
        for slot in mine:
            used = state.problem.slots[slot].free_mib - state.free[slot]
            key = state.problem.kind[slot], state.problem.costs[slot]
            able = [
                other
                for other in spare.get(key, [])
                if hosts[other] != host
                and state.opened.get(hosts[other], 0) >= max(1, len(mine))
                and state.free[other] >= used
                and all(other != target for _, target in targets)
            ]
            if not able:
                break
            targets.append((slot, max(able, key=lambda other: (state.opened[hosts[other]], -other))))
        else:
            for slot, target in targets:
                _carry(state, slot, target)
                spare[state.problem.kind[slot], state.problem.costs[slot]].remove(target)


def _empty_slots(state: State) -> dict[tuple[int, int], list[int]]:
    """Empty slots on hosts in use, by kind and cost."""
    found: dict[tuple[int, int], list[int]] = {}
    for slot, known in enumerate(state.problem.slots):
        in_use = state.problem.domains[HOST_LEVEL][slot] in state.opened
        if in_use and not state.heads[slot] and not known.cordoned and state.problem.gpus[slot] == 1:
            found.setdefault((state.problem.kind[slot], state.problem.costs[slot]), []).append(slot)
    return found


def _carry(state: State, slot: int, target: int) -> None:
    for job, places in list(state.here[slot].items()):
        state.add(state.problem.jobs[job], slot, -places)
        state.add(state.problem.jobs[job], target, places)
