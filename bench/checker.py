"""What a set of placements really does to the GPUs, counted from the case alone: no planner's word is taken for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.cases import Case, footprint_on


@dataclass(frozen=True)
class Placement:
    """One replica and the GPUs (UUIDs) that hold it."""

    deployment: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What came of a plan.

    ``oversold_gpus`` hold more MiB than they have free, ``oversold_mib`` more in sum; a replica on a product where its
    deployment may not be, or on the wrong number of GPUs, or across hosts, is ``broken``.
    """

    gpus_used: int
    hosts_used: int
    cost: float
    placed: int
    unplaced: int
    oversold_gpus: int
    oversold_mib: int
    broken: int


def check(case: Case, placements: Iterable[Placement]) -> Verdict:
    """Count what ``placements`` do on the fleet of ``case``.

    Raises:
        KeyError: for a GPU or a deployment that the case does not have.
    """
    slots = {uuid: slot for slot in case.slots for uuid in slot.gpu_uuids}
    wanted = {deployment.name: deployment for deployment in case.deployments}
    held: Counter[str] = Counter()
    heads: Counter[str] = Counter()
    alone: set[str] = set()
    placed: Counter[str] = Counter()
    broken = 0
    for item in placements:
        deployment = wanted[item.deployment]
        placed[item.deployment] += 1
        sizes = [footprint_on(deployment, slots[uuid]) for uuid in item.gpus]
        hosts = {slots[uuid].host for uuid in item.gpus}
        right = len(set(item.gpus)) == deployment.gpus_per_replica and len(hosts) == 1
        broken += not right or None in sizes
        for uuid, size in zip(item.gpus, sizes, strict=True):
            held[uuid] += deployment.vram_mib["default"] if size is None else size
            heads[uuid] += 1
        if len(item.gpus) > 1:
            alone.update(item.gpus)
    # A replica of several GPUs has them to itself: whoever else is there breaks the rule.
    broken += sum(heads[uuid] > 1 for uuid in alone)
    broken += sum(max(0, placed[name] - wanted[name].replicas) for name in placed)
    over = [held[uuid] - slots[uuid].free_mib for uuid in held if held[uuid] > slots[uuid].free_mib]
    return Verdict(
        gpus_used=len(heads),
        hosts_used=len({slots[uuid].host for uuid in heads}),
        cost=sum(slots[uuid].cost for uuid in heads),
        placed=sum(placed.values()),
        unplaced=case.replicas - sum(placed.values()),
        oversold_gpus=len(over),
        oversold_mib=sum(over),
        broken=broken,
    )
