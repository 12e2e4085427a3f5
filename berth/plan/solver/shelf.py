"""Slots sorted by what is free on them, so that the best fit is found without looking at every slot."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

from berth.plan.solver.problem import HOST_LEVEL, Job
from berth.plan.solver.state import State

SCANNED = 64
"""How many equal slots are compared by host and history before the first in order is good enough."""


class Shelf:
    """The open and the empty slots of a state by kind. It sees only changes made through ``put``."""

    def __init__(self, state: State) -> None:
        """Sort what can take a place of anybody."""
        self.state = state
        kinds = range(len(state.problem.kinds))
        self.open: list[list[tuple[int, int]]] = [[] for _ in kinds]
        self.empty: list[dict[int, list[int]]] = [defaultdict(list) for _ in kinds]
        for slot, kind in enumerate(state.problem.kind):
            if state.problem.slots[slot].cordoned or state.taken[slot]:
                continue
            if not state.heads[slot]:
                self.empty[kind][state.free[slot]].append(slot)
            elif state.problem.gpus[slot] == 1:
                self.open[kind].append((state.free[slot], slot))
        for row in self.open:
            row.sort()

    def put(self, job: Job, slot: int, places: int = 1) -> None:
        """Place ``places`` of ``job`` on ``slot`` (less than zero: take away) and keep the order."""
        state = self.state
        self._take_out(slot)
        state.add(job, slot, places)
        self._put_in(slot)

    def _take_out(self, slot: int) -> None:
        state, kind = self.state, self.state.problem.kind[slot]
        free = state.free[slot]
        if not state.heads[slot]:
            bucket = self.empty[kind][free]
            bucket.remove(slot)
            if not bucket:
                del self.empty[kind][free]
        elif state.problem.gpus[slot] == 1:
            row = self.open[kind]
            del row[bisect_left(row, (free, slot))]

    def _put_in(self, slot: int) -> None:
        state, kind = self.state, self.state.problem.kind[slot]
        if not state.heads[slot]:
            insort(self.empty[kind][state.free[slot]], slot)
        elif state.problem.gpus[slot] == 1:
            insort(self.open[kind], (state.free[slot], slot))

    def best_open(self, job: Job) -> int | None:
        """The open slot on which the least is left over after one place of ``job``."""
        found: tuple[int, bool, int] | None = None
        for kind, size in enumerate(job.sizes):
            if size is None:
                continue
            row = self.open[kind]
            left: int | None = None
            for free, slot in row[bisect_left(row, (size, -1)) :] if job.ruled or job.pins else self._from(row, size):
                if left is not None and free - size > left:
                    break
                if self.state.room(job, slot):
                    left = free - size
                    key = (left, not self._was_here(job, slot), slot)
                    found = key if found is None else min(found, key)
        return None if found is None else found[2]

    def _from(self, row: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
        start = bisect_left(row, (size, -1))
        some = row[start : start + SCANNED]
        # A hundred tiny replicas fill a slot by count: only then is it worth to look at all of them.
        return some if any(self.state.heads[slot] < 100 for _, slot in some) else row[start:]

    def best_empty(self, job: Job, small_first: bool = True) -> int | None:
        """The empty slot to open: least cost per place it would hold, then a host in use, then the fit."""
        found: tuple[object, ...] | None = None
        missing = self.state.missing(job)
        for kind, size in enumerate(job.sizes):
            if size is None:
                continue
            for free, bucket in self.empty[kind].items():
                if free < size:
                    continue
                key = self._best_of(job, bucket, missing, free - size, small_first)
                if key is not None and (found is None or key < found):
                    found = key
        return None if found is None else int(str(found[-1]))

    def _best_of(
        self, job: Job, bucket: list[int], missing: int, left: int, small_first: bool
    ) -> tuple[object, ...] | None:
        """The key of the best of some equal slots, None when the rules keep the job away from all of them."""
        state = self.state
        some, plain = bucket, not (job.ruled or job.pins)
        if len(bucket) > SCANNED and plain:
            some = [slot for slot in bucket if self._was_here(job, slot)][:SCANNED] if state.problem.present else []
            some = some or bucket[:SCANNED]
        hosts = state.problem.domains[HOST_LEVEL]
        found: tuple[object, ...] | None = None
        same = min(missing, state.room(job, some[0])) if plain else 0
        for slot in some:
            holds = same if plain else min(missing, state.room(job, slot))
            if holds > 0:
                cost = state.problem.costs[slot] / holds
                closed = hosts[slot] not in state.opened
                size = left if small_first else -left
                key = (cost, -holds, closed, size, not self._was_here(job, slot), slot)
                found = key if found is None else min(found, key)
        return found

    def _was_here(self, job: Job, slot: int) -> bool:
        return (job.family, slot) in self.state.problem.present
