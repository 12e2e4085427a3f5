"""The domain that is touched least, found along zone, rack, host and slot in a tree of heaps.

The key of a slot is: which of its domains hold none of the deployment yet (the widest first), how many each holds, the
promised share, history, number. It grows only where a place is put, so after each placement only the tops on the path
of the last choice change.
"""

from __future__ import annotations

import heapq
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


class Tree:
    """Chooses slots for one spread job."""

    def __init__(self, state: State, job: Job) -> None:
        """Look at every slot with room for ``job``."""
        self.state, self.job = state, job
        self.widest = job.widest if job.alone_in is None else min(job.widest, job.alone_in)
        self.root = _Node(-1)
        self.path: list[_Node] = []
        self.places: dict[int, int] = {}
        family = [item for item in state.problem.jobs if item.family == job.family]
        homes = [slot for item in family for slot in state.homes(item)]
        for slot in homes:
            self.places[slot] = self.places.get(slot, 0) + 1
        hosts: dict[int, _Node] = {}
        for slot in self._able():
            host = state.problem.domains[HOST_LEVEL][slot]
            node = hosts.get(host)
            if node is None:
                node = hosts[host] = self._host(slot)
            node.heap.append((self._slot_key(slot), slot))
        self._count(homes)
        self._build(self.root)

    def _able(self) -> list[int]:
        state, job = self.state, self.job
        if job.ruled or job.pins is not None:
            return [slot for slot in range(len(state.heads)) if state.room(job, slot)]
        # The same in one look: a rule-free job asks for memory only, nearly always.
        sizes, free, slots = job.sizes, state.free, state.problem.slots
        return [
            slot
            for slot, kind in enumerate(state.problem.kind)
            if (size := sizes[kind]) is not None
            and free[slot] >= size
            and not slots[slot].cordoned
            and state.fits(job, slot, size, free[slot])
        ]

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
            if self.state.room(self.job, slot):
                return slot
            heapq.heappop(node.heap)
            self._refresh()
        return None

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
