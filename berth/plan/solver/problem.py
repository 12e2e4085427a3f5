"""What is asked, in numbers: slots and deployments under their indices, with every rule of where a replica may be.

Slots are numbered in their natural order, so that the smallest number is the plan's own tie-breaker. All memory is in
MiB. Slots that any replica may use alike share a *kind*; footprints are kept per kind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from berth.errors import BerthError
from berth.plan.slots import natural
from berth.plan.types import DOMAINS, Deployment, DomainName, Plan, Slot, StrategyName

MAX_REPLICAS_PER_SLOT = 100
"""Each replica on a shared slot asks for 0.01 of Ray's ``GPU``: the hundred-and-first would pend for ever."""

GPU_LEVEL = DOMAINS.index("gpu")
HOST_LEVEL = DOMAINS.index("host")
MICRO = 1_000_000
NOBODY = -1
"""The family of a deployment that is named in a rule and not asked for."""


@dataclass(frozen=True)
class Rule:
    """A family (or NOBODY) and the level of domains (0 zone … 3 gpu) that a rule speaks of."""

    family: int
    level: int


@dataclass(frozen=True)
class Job:
    """Places to find for one deployment: its replicas, or (``shadow``) the room promised beyond them.

    ``family`` is the index of the job of the replicas; rules hold for a family as a whole. ``sizes`` are MiB per GPU
    by kind of slot, None where no replica may be. A ``team`` takes several 1-GPU slots of one host; a ``pool`` leaves
    the choice of slots to Serve. ``alone_in`` is the level of which no two places share a domain.
    ``simple`` jobs have no rule but their sizes: whatever fits is right.
    """

    index: int
    family: int
    deployment: Deployment
    strategy: StrategyName
    wanted: int
    sizes: tuple[int | None, ...]
    shadow: bool = False
    pins: frozenset[int] | None = None
    team: bool = False
    pool: bool = False
    alone_in: int | None = None
    widest: int = 0
    apart: tuple[Rule, ...] = ()
    beside: tuple[Rule, ...] = ()
    ruled: bool = False
    simple: bool = True

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployment.name

    @property
    def width(self) -> int:
        """GPUs per replica."""
        return self.deployment.gpus_per_replica

    @property
    def largest(self) -> int:
        """The largest footprint on any kind of slot, on all GPUs of the replica; 0 when it may be nowhere."""
        return max((size for size in self.sizes if size is not None), default=0) * self.width


@dataclass(frozen=True)
class Problem:
    """Everything that does not change while planning.

    ``free`` is what each slot may be promised when it is empty, ``costs`` what opening it costs for all of its GPUs, in
    millionths: sums of whole numbers compare exactly.
    """

    slots: tuple[Slot, ...]
    jobs: tuple[Job, ...]
    strategy: StrategyName
    kind: tuple[int, ...]
    kinds: tuple[Slot, ...]
    domains: tuple[tuple[int, ...], ...]
    gpus: tuple[int, ...]
    by_name: Mapping[str, int]
    present: frozenset[tuple[int, int]] = frozenset()
    then: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    before: Plan | None = None
    tracked: frozenset[int] = frozenset()
    hosts: tuple[tuple[int, ...], ...] = field(default=())
    free: tuple[int, ...] = ()
    costs: tuple[int, ...] = ()

    def size(self, job: Job, slot: int) -> int | None:
        """MiB of one place of ``job`` on each GPU of ``slot``, None where it may never be."""
        if job.pins is not None and slot not in job.pins:
            return None
        return job.sizes[self.kind[slot]]

    @property
    def total_gpus(self) -> int:
        """All GPUs of the fleet."""
        return sum(self.gpus)


def build_problem(
    slots: Sequence[Slot],
    deployments: Sequence[Deployment],
    strategy: StrategyName,
    previous: Plan | None,
    regroup: bool,
) -> Problem:
    """Number slots and deployments and resolve every rule.

    Raises:
        BerthError: for two slots or deployments of one name, or a number that means nothing.
    """
    _refuse_twice("slots", [slot.name for slot in slots])
    _refuse_twice("deployments", [deployment.name for deployment in deployments])
    ordered = tuple(sorted(slots, key=lambda slot: natural(slot.name)))
    wanted = sorted(deployments, key=lambda item: item.name)
    for deployment in wanted:
        _check(deployment)
    kind, kinds = _kinds(ordered)
    domains = _domains(ordered)
    jobs = _jobs(wanted, strategy, ordered, kinds, regroup)
    numbers = {slot.name: number for number, slot in enumerate(ordered)}
    families = {job.name: job.family for job in jobs if not job.shadow}
    then = _then(previous, ordered, numbers)
    present = frozenset(
        (families[berth.deployment], number)
        for berth in (previous.berths if previous else ())
        if berth.deployment in families
        for number in then.get(berth.slot, ())
    )
    hosts: dict[int, list[int]] = defaultdict(list)
    for number, host in enumerate(domains[HOST_LEVEL]):
        hosts[host].append(number)
    return Problem(
        slots=ordered,
        jobs=jobs,
        strategy=strategy,
        kind=kind,
        kinds=kinds,
        domains=domains,
        gpus=tuple(len(slot.gpu_uuids) for slot in ordered),
        by_name=numbers,
        present=present,
        then=then,
        before=previous,
        tracked=frozenset(rule.family for job in jobs for rule in (*job.apart, *job.beside) if rule.family != NOBODY),
        hosts=tuple(tuple(hosts[host]) for host in sorted(hosts)),
        free=tuple(slot.free_mib for slot in ordered),
        costs=tuple(round(slot.cost * MICRO) * len(slot.gpu_uuids) for slot in ordered),
    )


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise BerthError(f"{what}: a name is used twice", found=", ".join(twice), allowed="unique names")


def _check(deployment: Deployment) -> None:
    for product, size in deployment.vram_mib.items():
        if size < 1:
            raise BerthError(f"deployment {deployment.name}: footprint on {product}", found=size, allowed=">= 1 MiB")
    for what, value, low in (
        ("replicas", deployment.replicas, 0),
        ("gpus_per_replica", deployment.gpus_per_replica, 1),
    ):
        if value < low:
            raise BerthError(f"deployment {deployment.name}: {what} is too small", found=value, allowed=f">= {low}")
    if deployment.load < 0:
        raise BerthError(f"deployment {deployment.name}: load is negative", found=deployment.load, allowed=">= 0")
    version(deployment.min_compute_capability, f"deployment {deployment.name}: min_compute_capability")


def version(text: str, what: str) -> tuple[int, ...]:
    """A compute capability such as "8.9" as numbers; () when it is not given.

    Raises:
        BerthError: when ``text`` is something else; ``what`` names it.
    """
    try:
        return tuple(int(part) for part in text.split(".")) if text else ()
    except ValueError:
        raise BerthError(f"{what} is no compute capability", found=text, allowed='such as "8.9"') from None


def _kinds(slots: Sequence[Slot]) -> tuple[tuple[int, ...], tuple[Slot, ...]]:
    """The kind of each slot, and for each kind a slot that stands for it."""
    numbers: dict[tuple[object, ...], int] = {}
    kinds: list[Slot] = []
    kind: list[int] = []
    for slot in slots:
        look = (len(slot.gpu_uuids), slot.product, slot.compute_capability, bool(slot.nvlink_group))
        if look not in numbers:
            numbers[look] = len(kinds)
            kinds.append(slot)
        kind.append(numbers[look])
    return tuple(kind), tuple(kinds)


def _domains(slots: Sequence[Slot]) -> tuple[tuple[int, ...], ...]:
    """For zone, rack, host and GPU the number of each slot's domain. A rack's name means something in its zone only."""
    keys = (
        lambda slot: (slot.zone,),
        lambda slot: (slot.zone, slot.rack),
        lambda slot: (slot.host,),
        lambda slot: (slot.name,),
    )
    found = []
    for key in keys:
        numbers: dict[tuple[str, ...], int] = {}
        found.append(tuple(numbers.setdefault(key(slot), len(numbers)) for slot in slots))
    return tuple(found)


def _jobs(
    deployments: Sequence[Deployment],
    strategy: StrategyName,
    slots: Sequence[Slot],
    kinds: Sequence[Slot],
    regroup: bool,
) -> tuple[Job, ...]:
    families = {deployment.name: number for number, deployment in enumerate(deployments)}
    apart, beside = _rules(deployments, families)
    widths = {len(slot.gpu_uuids) for slot in kinds}
    numbers = {uuid: number for number, slot in enumerate(slots) for uuid in slot.gpu_uuids}
    jobs: list[Job] = []
    for family, item in enumerate(deployments):
        own = item.strategy or strategy
        team = regroup and item.gpus_per_replica > 1 and item.gpus_per_replica not in widths
        rules = (tuple(sorted(apart[family], key=_by_family)), tuple(sorted(beside[family], key=_by_family)))
        alone = _level(item.spread_over or "gpu") if own == "strict_spread" else None
        ruled = bool(any(rules)) or own in ("strict_pack", "strict_spread")
        watched = any(rule.family == family for rows in (*apart, *beside) for rule in rows)
        pool = item.placement == "pool" and item.gpus_per_replica == 1
        jobs.append(
            Job(
                index=family,
                family=family,
                deployment=item,
                strategy=own,
                wanted=item.replicas,
                sizes=tuple(size_on(item, slot, team) for slot in kinds),
                pins=frozenset(numbers[uuid] for uuid in item.pins if uuid in numbers) if item.pins else None,
                team=team,
                pool=pool,
                alone_in=alone,
                widest=_level(item.spread_over or "zone"),
                apart=rules[0],
                beside=rules[1],
                ruled=ruled,
                simple=not (ruled or watched or pool or item.pins),
            )
        )
    for job in _reserving(jobs):
        jobs.append(_shadow(job, len(jobs), _growth(job)))
    return tuple(jobs)


def _growth(job: Job) -> int:
    return 0 if job.pool else max(0, (job.deployment.max_replicas or 0) - job.wanted)


def _reserving(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that get room of their own: promised ones, and of shared ones those that no other's room holds."""
    leaders: list[Job] = []
    for job in sorted(jobs, key=lambda job: (-_growth(job) * job.largest, job.name)):
        shared = job.deployment.headroom == "shared" and _growth(job)
        if shared and not any(_holds(leader, job) for leader in leaders):
            leaders.append(job)
    return [
        job
        for job in jobs
        if _growth(job)
        and (job in leaders if job.deployment.headroom == "shared" else job.deployment.headroom == "promised")
    ]


def _holds(leader: Job, job: Job) -> bool:
    """Whether all that ``job`` may grow fits the room of ``leader``, wherever that will be."""
    if leader.ruled or job.ruled or leader.pins != job.pins or leader.width != job.width:
        return False
    pairs = [(room, size) for room, size in zip(leader.sizes, job.sizes, strict=True) if room is not None]
    if any(size is None or size > room for room, size in pairs):
        return False
    each = 1 if job.width > 1 else min((room // (size or room) for room, size in pairs), default=0)
    return _growth(job) <= _growth(leader) * each


def _shadow(job: Job, index: int, wanted: int) -> Job:
    fields = {name: getattr(job, name) for name in job.__dataclass_fields__}
    return Job(**{**fields, "index": index, "wanted": wanted, "shadow": True, "simple": False})


def _by_family(rule: Rule) -> tuple[int, int]:
    return rule.family, rule.level


def _level(domain: DomainName) -> int:
    return DOMAINS.index(domain)


def _rules(deployments: Sequence[Deployment], families: Mapping[str, int]) -> tuple[list[set[Rule]], list[set[Rule]]]:
    """Whom each family must keep away from (both ways), and whom it must stand beside."""
    apart: list[set[Rule]] = [set() for _ in deployments]
    beside: list[set[Rule]] = [set() for _ in deployments]
    for family, item in enumerate(deployments):
        for rule in item.anti_affinity:
            other = families.get(rule.deployment)
            if other is not None:
                apart[family].add(Rule(other, _level(rule.domain)))
                apart[other].add(Rule(family, _level(rule.domain)))
        for rule in item.affinity:
            beside[family].add(Rule(families.get(rule.deployment, NOBODY), _level(rule.domain)))
    return apart, beside


def size_on(item: Deployment, slot: Slot, team: bool = False) -> int | None:
    """MiB that a replica takes on each GPU of ``slot``, None where it may not be; a ``team`` fuses slots of one GPU."""
    if len(slot.gpu_uuids) != (1 if team else item.gpus_per_replica):
        return None
    if item.require_nvlink and not slot.nvlink_group:
        return None
    needed = version(item.min_compute_capability, f"deployment {item.name}: min_compute_capability")
    if needed and version(slot.compute_capability, f"slot {slot.name}: compute_capability") < needed:
        return None
    return item.footprint_mib(slot.product)


def _then(previous: Plan | None, slots: Sequence[Slot], numbers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The slots of today that make up each slot of ``previous``: one, or the members of a group; none when gone."""
    if previous is None:
        return {}
    by_uuid = {slot.gpu_uuids[0]: number for number, slot in enumerate(slots) if len(slot.gpu_uuids) == 1}
    found: dict[str, tuple[int, ...]] = {}
    for slot in previous.slots:
        if slot.name in numbers:
            found[slot.name] = (numbers[slot.name],)
        elif all(uuid in by_uuid for uuid in slot.gpu_uuids):
            found[slot.name] = tuple(by_uuid[uuid] for uuid in slot.gpu_uuids)
    return found
