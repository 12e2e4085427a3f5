"""The domain that is touched least, found along zone, rack, host and slot in a tree of heaps.

The key of a slot is: which of its domains hold none of the deployment yet (the widest first), how many each holds, the
promised share, history, number. It grows only where a place is put, so after each placement only the tops on the path
of the last choice change.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from berth.plan.solver.problem import GPU_LEVEL, HOST_LEVEL, Job
from berth.plan.solver.state import State

Key = tuple[tuple[bool, ...], tuple[int, ...], float, bool, int]


@dataclass
class _Node:
    """A domain, or everything (level -1): its places so far and what is in it, the best on top of the heap.

    Entries are (key, number of the child domain; of a host's: of the slot).
    """

    level: int
    places: int = 0
    heap: list[tuple[Key, int]] = field(default_factory=list)
    children: dict[int, _Node] = field(default_factory=dict)


class Shares:
    """The slots of each host by promised share, kept from job to job: most jobs look only at the first of each."""

    def __init__(self, state: State) -> None:
        """Sort every host's slots."""
        self.state = state
        kind = state.problem.kind
        self.even = [len({kind[slot] for slot in slots}) == 1 for slots in state.problem.hosts]
        self.rows = [sorted(slots, key=self._share) for slots in state.problem.hosts]

    def _share(self, slot: int) -> tuple[float, int]:
        problem = self.state.problem
        return ((problem.free[slot] - self.state.free[slot]) / (problem.slots[slot].vram_mib or 1), slot)

    def changed(self, slot: int) -> None:
        """Something was put on ``slot``."""
        self.rows[self.state.problem.domains[HOST_LEVEL][slot]].sort(key=self._share)


class Tree:
    """Chooses slots for one spread job."""

    def __init__(self, state: State, job: Job, shares: Shares | None = None) -> None:
        """Look at every slot with room for ``job``; with ``shares``, at the best of a host until it is chosen."""
        self.state, self.job = state, job
        self.widest = job.widest if job.alone_in is None else min(job.widest, job.alone_in)
        self.root = _Node(-1)
        self.path: list[_Node] = []
        self.places: dict[int, int] = {}
        family = [item for item in state.problem.jobs if item.family == job.family]
        homes = [slot for item in family for slot in state.homes(item)]
        for slot in homes:
            self.places[slot] = self.places.get(slot, 0) + 1
        plain = not (job.ruled or job.pins or homes or state.problem.present)
        self.lazy: set[int] = set()
        for host, slots in enumerate(state.problem.hosts):
            if shares is not None and plain and shares.even[host]:
                able = next(([slot] for slot in shares.rows[host] if state.room(job, slot)), [])
                self.lazy.add(host)
            else:
                able = self._able(slots)
            if able:
                self._host(able[0]).heap = [(self._slot_key(slot), slot) for slot in able]
        self._count(homes)
        self._build(self.root)

    def _able(self, slots: Sequence[int]) -> list[int]:
        return [slot for slot in slots if self.state.room(self.job, slot)]

    def _host(self, slot: int) -> _Node:
        node = self.root
        for level in range(GPU_LEVEL):
            domain = self.state.problem.domains[level][slot]
            child = node.children.get(domain)
            if child is None:
                child = node.children[domain] = _Node(level)
            node = child
        return node

    def _count(self, homes: list[int]) -> None:
        """Enter what the deployment has already, in domains that may still grow."""
        for slot in homes:
            node = self.root
            for level in range(GPU_LEVEL):
                child = node.children.get(self.state.problem.domains[level][slot])
                if child is None:
                    break
                child.places += 1
                node = child

    def _build(self, node: _Node) -> None:
        for name, child in node.children.items():
            self._build(child)
            node.heap.append((self._key(child), name))
        heapq.heapify(node.heap)

    def _slot_key(self, slot: int) -> Key:
        problem, places = self.state.problem, self.places.get(slot, 0)
        size = self.job.sizes[problem.kind[slot]] or 0
        part = (problem.free[slot] - self.state.free[slot] + size) / (problem.slots[slot].vram_mib or 1)
        return ((places > 0,), (places,), part, (self.job.family, slot) not in problem.present, slot)

    def _key(self, node: _Node) -> Key:
        flags, counts, part, strange, slot = node.heap[0][0]
        if node.level < self.widest:
            return flags, counts, part, strange, slot
        return (node.places > 0, *flags), (node.places, *counts), part, strange, slot

    def take(self) -> int | None:
        """The best slot with room, None when there is none. ``update`` must follow once the place is put there."""
        while self.root.heap:
            node, self.path = self.root, [self.root]
            while node.level < HOST_LEVEL:
                node = node.children[node.heap[0][1]]
                self.path.append(node)
            slot = node.heap[0][1]
            self._unfold(node, slot)
            slot = node.heap[0][1]
            if self.state.room(self.job, slot):
                return slot
            heapq.heappop(node.heap)
            self._refresh()
        return None

    def _unfold(self, node: _Node, slot: int) -> None:
        """Look at all slots of a host now that it is chosen; its best stays its best (but for unequal reserves)."""
        host = self.state.problem.domains[HOST_LEVEL][slot]
        if host in self.lazy:
            self.lazy.discard(host)
            others = [other for other in self._able(self.state.problem.hosts[host]) if other != slot]
            node.heap += [(self._slot_key(other), other) for other in others]
            node.heap.sort()

    def update(self) -> None:
        """Count the place that was put on the slot last taken."""
        host = self.path[-1]
        slot = host.heap[0][1]
        self.places[slot] = self.places.get(slot, 0) + 1
        heapq.heapreplace(host.heap, (self._slot_key(slot), slot))
        for node in self.path:
            node.places += 1
        self._refresh()

    def _refresh(self) -> None:
        for parent, child in zip(self.path[-2::-1], self.path[:0:-1], strict=True):
            if child.heap:
                heapq.heapreplace(parent.heap, (self._key(child), parent.heap[0][1]))
            else:
                heapq.heappop(parent.heap)
