"""Pools: one Serve deployment over several slots, each reserved for the most replicas that Serve may put there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from berth.errors import BerthError
from berth.plan.slots import natural
from berth.plan.solver.problem import size_on
from berth.plan.types import Berth, Deployment, Plan, Slot


@dataclass(frozen=True)
class Pool:
    """The pool of one deployment: its berths, one for each slot, in the order of the slots' names."""

    deployment: str
    berths: tuple[Berth, ...]

    @property
    def app(self) -> str:
        """The name of its Serve app: ``chat@pool``."""
        return self.berths[0].app

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(berth.slot for berth in self.berths)

    @property
    def fewest(self) -> int:
        """Replicas that it has at least."""
        return sum(berth.replicas for berth in self.berths)

    @property
    def most(self) -> int:
        """Replicas that it may have, on all of its slots together."""
        return self.berths[0].pool

    @property
    def each(self) -> int:
        """Replicas that every one of its slots has room for: Serve knows one number for all of them."""
        return min(berth.replicas + berth.reserved for berth in self.berths)

    @property
    def count(self) -> str:
        """How many replicas are as planned: a number, or bounds where Serve scales it."""
        return f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"


def pools_of(plan: Plan) -> dict[str, Pool]:
    """Every pool of ``plan``, by the name of its Serve app."""
    found: dict[str, list[Berth]] = defaultdict(list)
    for berth in plan.berths:
        if berth.pool:
            found[berth.app].append(berth)
    return {
        app: Pool(berths[0].deployment, tuple(sorted(berths, key=lambda berth: natural(berth.slot))))
        for app, berths in sorted(found.items())
    }


def check_pools(deployments: Sequence[Deployment], slots: Sequence[Slot]) -> None:
    """Refuse a pool over GPUs of several products.

    A pool is one Serve deployment, and that has one footprint, one KV budget and one share of the GPU for its engine.

    Raises:
        BerthError: naming the products that a pool could be on.
    """
    for item in deployments:
        if item.placement != "pool":
            continue
        sizes = _sizes(item, slots)
        if len(sizes) > 1:
            first = next(iter(sizes))
            raise BerthError(
                f"app {item.name}: a pool is of one GPU product, because Serve knows one footprint for all of it",
                found="; ".join(f"{product} with {mib} MiB" for product, mib in sizes.items()),
                allowed="one of these",
                mend=f"set products: [{first}] for it, give each product an entry of its own, or set placement: berths",
            )


def _sizes(item: Deployment, slots: Sequence[Slot]) -> Mapping[str, int]:
    """Its footprint on each product that could hold a replica by itself."""
    found: dict[str, int] = {}
    for slot in slots:
        size = size_on(item, slot)
        pinned = not item.pins or not set(item.pins).isdisjoint(slot.gpu_uuids)
        if size is not None and size <= slot.vram_mib and pinned:
            found[slot.product] = size
    return dict(sorted(found.items()))
