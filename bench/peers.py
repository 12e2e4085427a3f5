"""How the peers place: simple rules written here, and Ray Serve's own scheduler run by Ray's interpreter.

Every peer gets the case as it is and answers with placements; ``bench.checker`` says what they do to the GPUs.
"""

from __future__ import annotations

import heapq
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cases import Case, footprint_on
from bench.checker import Placement
from berth.errors import BerthError
from berth.plan.types import Deployment, Slot

Rule = Callable[[Case], tuple[Placement, ...]]

# --- Rules of thumb ---------------------------------------------------------------------------------------------------


@dataclass
class _Fleet:
    """Free MiB of each GPU and who is on it; GPUs in the order in which a first fit looks at them."""

    slots: list[Slot]
    free: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = {slot.name: slot.free_mib for slot in self.slots}
        self.heads = dict.fromkeys(self.free, 0)

    def fits(self, deployment: Deployment, slot: Slot) -> bool:
        size = footprint_on(deployment, slot)
        return size is not None and size <= self.free[slot.name]

    def take(self, deployment: Deployment, slots: Sequence[Slot]) -> Placement:
        for slot in slots:
            # A replica of several GPUs has them to itself.
            left = self.free[slot.name] - (footprint_on(deployment, slot) or 0)
            self.free[slot.name] = left if len(slots) == 1 else -1
            self.heads[slot.name] += 1
        return Placement(deployment.name, tuple(slot.gpu_uuids[0] for slot in slots))

    def group(self, deployment: Deployment) -> list[Slot]:
        """The first empty GPUs of one host that hold one replica of several GPUs, [] when no host has them."""
        by_host: dict[str, list[Slot]] = {}
        for slot in self.slots:
            if not self.heads[slot.name] and self.fits(deployment, slot):
                found = by_host.setdefault(slot.host, [])
                found.append(slot)
                if len(found) == deployment.gpus_per_replica:
                    return found
        return []


Rank = Callable[[_Fleet, Slot], tuple[bool, int]]
"""What a rule looks at: the GPU with the smallest rank gets the replica, the first of them on a tie."""


def first_fit_decreasing(case: Case) -> tuple[Placement, ...]:
    """The largest replica first, each on the first GPU of the inventory that has room."""
    return _largest_first(case, list(case.slots), lambda fleet, slot: (False, 0))


def first_fit_decreasing_large(case: Case) -> tuple[Placement, ...]:
    """As first-fit-decreasing, the GPUs with the most memory first: the stronger order where products differ."""
    return _largest_first(case, sorted(case.slots, key=lambda slot: -slot.free_mib), lambda fleet, slot: (False, 0))


def best_fit_decreasing(case: Case) -> tuple[Placement, ...]:
    """The largest replica first, each on the used GPU that it fills best; an unused GPU only when none has room."""

    def rank(fleet: _Fleet, slot: Slot) -> tuple[bool, int]:
        used = fleet.heads[slot.name] > 0
        return not used, fleet.free[slot.name] if used else -slot.free_mib

    return _largest_first(case, list(case.slots), rank)


def least_free_memory(case: Case) -> tuple[Placement, ...]:
    """In the order of arrival, each replica on the GPU with the least free memory that still holds it.

    This is the fit by free memory of ray-hive, and what the VRAM term of GPUStack's binpack score chooses
    (claim / allocatable, largest first; its RAM term is left out).
    """
    return _place(case, case.deployments, list(case.slots), lambda fleet, slot: (False, fleet.free[slot.name]))


def _largest_first(case: Case, order: list[Slot], rank: Rank) -> tuple[Placement, ...]:
    def size(deployment: Deployment) -> int:
        return max(footprint_on(deployment, slot) or 0 for slot in kinds)

    kinds = list({(slot.product, slot.compute_capability): slot for slot in case.slots}.values())
    jobs = sorted(case.deployments, key=lambda item: (-item.gpus_per_replica, -size(item), item.name))
    return _place(case, jobs, order, rank)


def _place(case: Case, jobs: Iterable[Deployment], order: list[Slot], rank: Rank) -> tuple[Placement, ...]:
    fleet = _Fleet(order)
    found: list[Placement] = []
    for deployment in jobs:
        place = _place_groups if deployment.gpus_per_replica > 1 else _place_singles
        found += place(fleet, deployment, rank)
    return tuple(found)


def _place_groups(fleet: _Fleet, deployment: Deployment, rank: Rank) -> Iterator[Placement]:
    for _ in range(deployment.replicas):
        group = fleet.group(deployment)
        if not group:
            return
        yield fleet.take(deployment, group)


def _place_singles(fleet: _Fleet, deployment: Deployment, rank: Rank) -> Iterator[Placement]:
    # One replica changes the rank of one GPU: a heap of all GPUs serves every replica of the deployment.
    heap = [(rank(fleet, slot), at) for at, slot in enumerate(fleet.slots) if fleet.fits(deployment, slot)]
    heapq.heapify(heap)
    for _ in range(deployment.replicas):
        if not heap:
            return
        at = heapq.heappop(heap)[1]
        slot = fleet.slots[at]
        yield fleet.take(deployment, [slot])
        if fleet.fits(deployment, slot):
            heapq.heappush(heap, (rank(fleet, slot), at))


RULES: Mapping[str, Rule] = {
    "first-fit-decreasing": first_fit_decreasing,
    "first-fit-decreasing, large GPUs first": first_fit_decreasing_large,
    "best-fit-decreasing": best_fit_decreasing,
    "least-free-memory": least_free_memory,
}

# --- Ray Serve --------------------------------------------------------------------------------------------------------

UNITS = 10_000
"""Ray counts resources in steps of 1/10,000 (FixedPoint)."""

TOKEN = 100
"""0.01 GPU: what a replica asks for where VRAM_MB binds."""


@dataclass(frozen=True)
class RayNode:
    """One raylet: its GPUs (UUIDs), its VRAM_MB (0 where it has no such resource) and its labels."""

    node_id: str
    gpus: tuple[str, ...]
    vram_mib: int
    labels: Mapping[str, str]


@dataclass(frozen=True)
class RayDemand:
    """One deployment as Serve sees it; ``gpu_units`` in 1/10,000 of a GPU, ``products`` None for any."""

    deployment: Deployment
    gpu_units: int
    vram_mib: int
    products: tuple[str, ...] | None


@dataclass(frozen=True)
class RayJob:
    """One case for Ray Serve."""

    nodes: tuple[RayNode, ...]
    demands: tuple[RayDemand, ...]


def ray_whole_hosts(case: Case) -> RayJob:
    """One raylet per host; ``num_gpus`` is the footprint over the largest card's memory, as QueryLake sizes it."""
    largest = max(slot.total_mib for slot in case.slots)
    hosts: dict[str, list[Slot]] = {}
    for slot in case.slots:
        hosts.setdefault(slot.host, []).append(slot)
    nodes = tuple(
        RayNode(_node_id(number), tuple(uuid for slot in mine for uuid in slot.gpu_uuids), 0, _labels(mine[0]))
        for number, mine in enumerate(hosts.values())
    )
    demands = []
    for deployment in case.deployments:
        whole = deployment.gpus_per_replica * UNITS
        share = -(-_largest_footprint(case, deployment) * UNITS // largest)
        units = whole if deployment.gpus_per_replica > 1 else min(whole, share)
        demands.append(RayDemand(deployment, units, 0, _allowed_products(case, deployment)))
    return RayJob(nodes, tuple(demands))


def ray_slots(case: Case, slots: Sequence[Slot]) -> RayJob:
    """One raylet per slot with VRAM_MB, as Berth starts them: slots of several GPUs are the ones that Berth chose."""
    nodes = tuple(
        RayNode(_node_id(number), slot.gpu_uuids, slot.free_mib, _labels(slot)) for number, slot in enumerate(slots)
    )
    demands = tuple(
        RayDemand(
            deployment,
            TOKEN if deployment.gpus_per_replica == 1 else deployment.gpus_per_replica * UNITS,
            _largest_footprint(case, deployment),
            _allowed_products(case, deployment),
        )
        for deployment in case.deployments
    )
    return RayJob(nodes, demands)


def _node_id(number: int) -> str:
    return f"{number:056x}"


def _labels(slot: Slot) -> dict[str, str]:
    return {"product": _word(slot.product), "shape": str(len(slot.gpu_uuids))}


def _word(product: str) -> str:
    return product.replace(" ", "-")


def _allowed_products(case: Case, deployment: Deployment) -> tuple[str, ...] | None:
    able = {slot.product for slot in case.slots if footprint_on(deployment, slot) is not None}
    return None if able == {slot.product for slot in case.slots} else tuple(sorted(able))


def _largest_footprint(case: Case, deployment: Deployment) -> int:
    """Serve knows one size per deployment: it must be enough on every product that it may run on."""
    return max((footprint_on(deployment, slot) or 0 for slot in case.slots), default=0)


def run_ray(jobs: Sequence[RayJob], python: str, *, pack: bool, by_shape: bool) -> tuple[str, list[list[Placement]]]:
    """Ray's version and the placements of each job.

    Serve's scheduler decides (its own code, in a process of ``python``); what it leaves to Ray's core, and the choice
    of the GPU inside a node, follows the core's rules (``_Core``). ``by_shape`` keeps a replica to slots of its width.

    Raises:
        BerthError: when the process fails.
    """
    text = json.dumps([_to_json(job, by_shape) for job in jobs])
    environment = {
        **os.environ,
        "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1" if pack else "0",
        # Without it Serve compares nodes by free GPU share first and VRAM_MB last: this is the stronger setting.
        "RAY_SERVE_HIGH_PRIORITY_CUSTOM_RESOURCES": "VRAM_MB",
        "PYTHONHASHSEED": "0",
    }
    script = Path(__file__).with_name("ray_serve_driver.py")
    done = subprocess.run(
        [python, str(script)], input=text, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BerthError("Ray Serve's scheduler did not answer", found=done.stderr.strip()[-500:])
    answer = json.loads(done.stdout)
    placed = [
        _Core(job, spread=not pack, by_shape=by_shape).place(sent)
        for job, sent in zip(jobs, answer["sent"], strict=True)
    ]
    return str(answer["ray"]), placed


def _to_json(job: RayJob, by_shape: bool) -> dict[str, Any]:
    nodes = [{"id": node.node_id, "resources": _resources(node), "labels": dict(node.labels)} for node in job.nodes]
    deployments = [
        {
            "name": demand.deployment.name,
            "replicas": demand.deployment.replicas,
            "ray_actor_options": {
                "num_cpus": 0,
                "num_gpus": demand.gpu_units / UNITS,
                "resources": {"VRAM_MB": demand.vram_mib} if demand.vram_mib else {},
                "label_selector": _selector(demand, by_shape),
            },
        }
        for demand in job.demands
    ]
    return {"nodes": nodes, "deployments": deployments}


def _resources(node: RayNode) -> dict[str, float]:
    return {"CPU": 128.0, "GPU": float(len(node.gpus)), **({"VRAM_MB": float(node.vram_mib)} if node.vram_mib else {})}


def _selector(demand: RayDemand, by_shape: bool) -> dict[str, str]:
    selector = {"shape": str(demand.deployment.gpus_per_replica)} if by_shape else {}
    if demand.products is not None:
        # No product at all is a label that no node has.
        selector["product"] = f"in({','.join(_word(product) for product in demand.products) or 'none'})"
    return selector


class _Core:
    """Ray's core as far as it chooses: the node under SPREAD or DEFAULT, and the GPU inside a node.

    SPREAD takes the nodes in turn, beginning after the last one taken (``SpreadSchedulingPolicy``). Inside a node
    whole GPUs are the first free ones, and a fraction goes to the GPU with the least left that holds it, the lowest
    index on a tie (``NodeResourceInstanceSet::TryAllocate``). Kinder than the core in one thing: a replica that its
    node has room for in sum but on no single GPU goes on to the next node, where Ray would leave it pending.
    """

    def __init__(self, job: RayJob, *, spread: bool, by_shape: bool) -> None:
        self.nodes = sorted(job.nodes, key=lambda node: node.node_id)
        self.place_of = {node.node_id: number for number, node in enumerate(self.nodes)}
        self.gpus = {node.node_id: [UNITS] * len(node.gpus) for node in self.nodes}
        self.vram = {node.node_id: node.vram_mib for node in self.nodes}
        self.demands = {demand.deployment.name: demand for demand in job.demands}
        self.spread, self.by_shape, self.next = spread, by_shape, 0

    def place(self, sent: Iterable[tuple[str, str | None]]) -> list[Placement]:
        """Where each replica that Serve sent comes to stand; those that find nothing stay pending and are left out."""
        found = []
        for deployment, node_id in sent:
            demand = self.demands[deployment]
            for number in self._order(node_id):
                node = self.nodes[number]
                gpus = self._allocate(node, demand)
                if gpus:
                    found.append(Placement(deployment, gpus))
                    self.next = (number + 1) % len(self.nodes) if self.spread else 0
                    break
        return found

    def _order(self, node_id: str | None) -> Iterator[int]:
        if node_id is not None:
            yield self.place_of[node_id]
        yield from ((self.next + step) % len(self.nodes) for step in range(len(self.nodes)))

    def _allocate(self, node: RayNode, demand: RayDemand) -> tuple[str, ...]:
        wrong_shape = self.by_shape and len(node.gpus) != demand.deployment.gpus_per_replica
        products = demand.products
        if wrong_shape or (products is not None and node.labels["product"] not in map(_word, products)):
            return ()
        if self.vram[node.node_id] < demand.vram_mib:
            return ()
        free = self.gpus[node.node_id]
        chosen = _instances(free, demand.gpu_units)
        for index in chosen:
            free[index] -= min(demand.gpu_units, UNITS)
        if chosen:
            self.vram[node.node_id] -= demand.vram_mib
        return tuple(node.gpus[index] for index in chosen)


def _instances(free: Sequence[int], units: int) -> list[int]:
    """The GPUs of a node that Ray gives to a request, [] when it has none for it."""
    if units >= UNITS:
        whole = [index for index, left in enumerate(free) if left == UNITS][: units // UNITS]
        return whole if len(whole) == units // UNITS else []
    able = [index for index, left in enumerate(free) if left >= units]
    return [min(able, key=lambda index: free[index])] if able else []
