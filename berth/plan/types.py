"""What a plan is made from and what it says. Pure data; all memory is in MiB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from berth.codec import STRICT

StrategyName = Literal["pack", "spread", "strict_pack", "strict_spread", "balanced"]
STRATEGIES: tuple[StrategyName, ...] = ("pack", "spread", "strict_pack", "strict_spread", "balanced")
DomainName = Literal["zone", "rack", "host", "gpu"]
DOMAINS: tuple[DomainName, ...] = ("zone", "rack", "host", "gpu")
"""Where failures come together, the widest first."""
HeadroomName = Literal["promised", "shared", "best_effort"]
PlacementName = Literal["berths", "pool"]
PLAN_VERSION = 1
POOL = "pool"
"""In a pool's name, where a berth has its slot: ``chat@pool``. No slot is called so: their names end in a number."""


@dataclass(frozen=True)
class Slot:
    """One Ray worker node: the GPUs of one host that it may see.

    ``vram_mib`` is what each of its GPUs can promise to replicas: the driver's total less the driver's own
    reserve and ours. It does not move with what runs now, so a raylet that advertises it never restarts for it.
    ``foreign_mib`` is the most that strangers hold now on any one of its GPUs: the planner does not promise that part.
    ``gpu_indices`` is for people to read, never an identity. ``compute_capability`` is NVIDIA's ("8.9"; "" when not
    known), ``nvlink_group`` the name within the host of the GPUs linked by NVLink ("" for none), ``cost`` what each GPU
    of the slot counts in `pack`. A ``cordoned`` slot takes nothing new; what stands there stays.
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
    compute_capability: str = ""
    nvlink_group: str = ""
    cost: float = 1.0
    cordoned: bool = False

    @property
    def free_mib(self) -> int:
        """What the planner may promise on each GPU of the slot."""
        return max(0, self.vram_mib - self.foreign_mib)


@dataclass(frozen=True)
class Affinity:
    """Another deployment, and the domain that replicas of both must share (affinity) or must not (anti-affinity)."""

    __pydantic_config__ = STRICT
    deployment: str
    domain: DomainName = "host"


@dataclass(frozen=True)
class Deployment:
    """What the planner needs to know of one model: how many replicas, how large on which product.

    ``vram_mib`` maps a GPU product to the footprint per GPU of one replica; ``default`` stands for every
    product not named. ``replicas`` run now; with ``max_replicas`` Serve may grow up to it, and ``headroom`` says what
    room that has: ``promised`` (reserved, nobody else's), ``shared`` (reserved once for all shared deployments, as much
    as the one that grows most), ``best_effort`` (none). ``placement: pool`` lets Serve choose among the slots of the
    plan: each is reserved for the most replicas that Serve may put there.
    ``products``, ``min_compute_capability``, ``require_nvlink`` and ``pins`` (GPU UUIDs) say where a replica may be at
    all, ``affinity`` and ``anti_affinity`` beside whom; ``spread_over`` is the widest domain that `spread` looks at
    (every one when None; for `strict_spread` the domain of which no two replicas share one, "gpu" when None).
    Of what does not fit, the lowest ``priority`` is left out first. ``load`` is the expected load of one replica on its
    GPU, in any unit, for `balanced`. ``min_available`` replicas stay up during a migration (all but one when None).
    A replica on several hosts takes ``slots_per_replica`` slots of ``gpus_per_replica`` GPUs each, all of one product.
    """

    __pydantic_config__ = STRICT
    name: str
    replicas: int
    vram_mib: dict[str, int]
    gpus_per_replica: int = 1
    strategy: StrategyName | None = None
    products: tuple[str, ...] = ()
    max_replicas: int | None = None
    headroom: HeadroomName = "promised"
    placement: PlacementName = "berths"
    min_compute_capability: str = ""
    require_nvlink: bool = False
    spread_over: DomainName | None = None
    affinity: tuple[Affinity, ...] = ()
    anti_affinity: tuple[Affinity, ...] = ()
    pins: tuple[str, ...] = ()
    priority: int = 0
    load: float = 1.0
    min_available: int | None = None
    slots_per_replica: int = 1

    def footprint_mib(self, product: str) -> int | None:
        """MiB per GPU on ``product``, or None when the model may not run there."""
        if self.products and product not in self.products:
            return None
        return self.vram_mib.get(product, self.vram_mib.get("default"))


@dataclass(frozen=True)
class Berth:
    """One model's place on one slot: ``replicas`` of them, each taking ``vram_mib`` on each GPU of the slot.

    ``reserved`` more may come there (autoscaling, pools) and have their room already; a berth may be nothing but room.
    A replica over several slots has a berth on each: ``team`` names them all, in the order of its engine's nodes.
    With a ``pool`` it is one slot of a pool and Serve chooses who stands where: up to ``replicas + reserved`` here, at
    least the sum of ``replicas`` and at most ``pool`` over all slots of the pool.
    """

    __pydantic_config__ = STRICT
    deployment: str
    slot: str
    replicas: int
    vram_mib: int
    reason: str
    reserved: int = 0
    team: tuple[str, ...] = ()
    pool: int = 0

    @property
    def name(self) -> str:
        """The stable name of the berth: ``chat@gpu01-0``."""
        return f"{self.deployment}@{self.slot}"

    @property
    def app(self) -> str:
        """The name of its Serve app: the berth's own, or its pool's, or that of its team's first slot, which has the
        API."""
        if self.pool:
            return f"{self.deployment}@{POOL}"
        return f"{self.deployment}@{self.team[0]}" if self.team else self.name

    @property
    def leads(self) -> bool:
        """Whether its replicas are counted here: not at the other slots of a team."""
        return not self.team or self.team[0] == self.slot


@dataclass(frozen=True)
class Unplaced:
    """Replicas that fit nowhere, the sum that shows why, and the cheapest way out.

    ``shortage_mib`` is what is missing on the GPU nearest to holding one more, when memory is what is missing.
    ``room`` counts places beyond ``replicas`` that are promised (``headroom``, pools) and could not be reserved.
    """

    __pydantic_config__ = STRICT
    deployment: str
    replicas: int
    reason: str
    shortage_mib: int | None = None
    room: int = 0


@dataclass(frozen=True)
class PlannedFootprint:
    """Where a footprint on one GPU product comes from.

    ``kv_cache_memory_bytes`` is the KV budget that belongs to it, to be set in vLLM. ``key`` is a hash of all it
    follows from: while that stays, so does the figure, and no replica restarts for a better guess.
    """

    __pydantic_config__ = STRICT
    vram_mib: int
    source: Literal["predicted", "measured"]
    key: str
    kv_cache_memory_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Slots, berths and reasons. The same input gives the same plan, byte for byte.

    ``retired`` keeps the slot name of every GPU that once had one (first UUID -> name), so that a GPU which
    comes back gets its old name and no other GPU ever gets it.
    ``deployments`` lists every deployment asked for with its replica count, zero included, and ``strategies`` the
    strategy that held for each (its own, else the cluster's).
    ``footprints`` tells for each deployment whose footprint is not given, and each product, where it comes from.
    ``drained`` names the slots that are emptied for maintenance, until they are undrained.
    """

    __pydantic_config__ = STRICT
    strategy: StrategyName
    slots: tuple[Slot, ...]
    berths: tuple[Berth, ...]
    unplaced: tuple[Unplaced, ...] = ()
    deployments: dict[str, int] = field(default_factory=dict)
    strategies: dict[str, StrategyName] = field(default_factory=dict)
    retired: dict[str, str] = field(default_factory=dict)
    footprints: dict[str, dict[str, PlannedFootprint]] = field(default_factory=dict)
    drained: tuple[str, ...] = ()
    version: int = PLAN_VERSION


@dataclass(frozen=True)
class Summary:
    """How good a plan is, and how good any could be.

    ``lower_bound_gpus`` is proven: no plan that places as many replicas opens fewer GPUs (``lower_bound_cost``: costs
    less). ``gap`` is (used - bound) / bound of what the strategy minimises, 0.0 when nothing is used; ``optimal`` says
    that a solver proved the whole objective. ``moves`` counts standing replicas that leave a GPU which is still there
    for another, ``replaced`` those whose GPU is gone and that have a new place; ``max_gpu_load`` is the largest
    promised share of any GPU (0..1). ``method`` names how the plan was found.
    """

    __pydantic_config__ = STRICT
    gpus_used: int
    hosts_used: int
    lower_bound_gpus: int
    gap: float
    moves: int
    max_gpu_load: float
    cost: float
    lower_bound_cost: float
    optimal: bool
    method: str
    replaced: int = 0


@dataclass(frozen=True)
class Solution:
    """A plan and its summary, which is not part of it: planning anew with nothing to do is the same plan."""

    plan: Plan
    summary: Summary
