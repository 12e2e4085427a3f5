"""What a plan is made from and what it says. Pure data; all memory is in MiB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from berth.codec import STRICT

StrategyName = Literal["pack", "spread", "strict_pack", "strict_spread"]
STRATEGIES: tuple[StrategyName, ...] = ("pack", "spread", "strict_pack", "strict_spread")
PLAN_VERSION = 1


@dataclass(frozen=True)
class Slot:
    """One Ray worker node: the GPUs of one host that it may see.

    ``vram_mib`` is what each of its GPUs can promise to replicas: the driver's total less the driver's own
    reserve and ours. It does not move with what runs now, so a raylet that advertises it never restarts for it.
    ``foreign_mib`` is the most that strangers hold now on any one of its GPUs: the planner does not promise that part.
    ``gpu_indices`` is for people to read, never an identity.
    """

    __pydantic_config__ = STRICT
    name: str
    host: str
    gpu_uuids: tuple[str, ...]
    gpu_indices: tuple[int, ...]
    product: str
    vram_mib: int
    total_mib: int
    foreign_mib: int = 0
    rack: str = ""
    zone: str = ""

    @property
    def free_mib(self) -> int:
        """What the planner may promise on each GPU of the slot."""
        return max(0, self.vram_mib - self.foreign_mib)


@dataclass(frozen=True)
class Deployment:
    """What the planner needs to know of one model: how many replicas, how large on which product.

    ``vram_mib`` maps a GPU product to the footprint per GPU of one replica; ``default`` stands for every
    product not named.
    """

    __pydantic_config__ = STRICT
    name: str
    replicas: int
    vram_mib: dict[str, int]
    gpus_per_replica: int = 1
    strategy: StrategyName | None = None
    products: tuple[str, ...] = ()

    def footprint_mib(self, product: str) -> int | None:
        """MiB per GPU on ``product``, or None when the model may not run there."""
        if self.products and product not in self.products:
            return None
        return self.vram_mib.get(product, self.vram_mib.get("default"))


@dataclass(frozen=True)
class Berth:
    """One model's place on one slot: ``replicas`` of them, each taking ``vram_mib`` on each GPU of the slot."""

    __pydantic_config__ = STRICT
    deployment: str
    slot: str
    replicas: int
    vram_mib: int
    reason: str

    @property
    def name(self) -> str:
        """The stable name of the Serve app: ``chat@gpu01-0``."""
        return f"{self.deployment}@{self.slot}"


@dataclass(frozen=True)
class Unplaced:
    """Replicas that fit nowhere, and the sum that shows why."""

    __pydantic_config__ = STRICT
    deployment: str
    replicas: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Slots, berths and reasons. The same input gives the same plan, byte for byte.

    ``retired`` keeps the slot name of every GPU that once had one (first UUID -> name), so that a GPU which
    comes back gets its old name and no other GPU ever gets it.
    ``deployments`` lists every deployment asked for with its replica count, zero included, and ``strategies`` the
    strategy that held for each (its own, else the cluster's).
    """

    __pydantic_config__ = STRICT
    strategy: StrategyName
    slots: tuple[Slot, ...]
    berths: tuple[Berth, ...]
    unplaced: tuple[Unplaced, ...] = ()
    deployments: dict[str, int] = field(default_factory=dict)
    strategies: dict[str, StrategyName] = field(default_factory=dict)
    retired: dict[str, str] = field(default_factory=dict)
    version: int = PLAN_VERSION
