"""What if: a fleet described by host types and counts, planned, grown until it is full, and robbed of each host."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from berth.codec import STRICT, load, replace
from berth.errors import BerthError
from berth.footprint.products import product
from berth.plan.contract import Count, Mib, Name, Number, Positive, Switch, Word, load_deployments, load_gpus
from berth.plan.planner import Options, solve
from berth.plan.slots import natural
from berth.plan.types import Deployment, Plan, Slot, Solution, StrategyName

MEND = "correct the fleet file (docs/planning.md)"
SHOWN_LOSSES = 24
"""Hosts (or racks) whose loss is planned; hosts that look alike count once, the fullest come first."""
RESOLUTION = 0.01
QUICK = Options(regroup=True, exact_gpus=0)
"""Growth and losses are planned by heuristic: dozens of plans, none of which anybody is going to run."""


@dataclass(frozen=True)
class HostGroup:
    """``count`` equal hosts, ``name`` with a number each, of ``gpus`` GPUs, evenly over ``racks`` (names, or how many).

    ``memory_mib`` may be left out for a product that Berth knows.
    """

    __pydantic_config__ = STRICT
    name: Name
    count: Annotated[int, Number, Field(ge=1, le=100_000)]
    gpus: Annotated[int, Number, Field(ge=1, le=64)]
    product: Name
    memory_mib: Mib | None = None
    used_mib: Count | None = None
    racks: Annotated[int, Number, Field(ge=1, le=10_000)] | list[Word] = 1
    zone: Word | None = None
    nvlink: Switch = False
    cost: Positive | None = None


@dataclass(frozen=True)
class Demand:
    """Work to be done, and what one replica does: together they tell how many replicas there must be."""

    __pydantic_config__ = STRICT
    tokens_per_s: Positive
    per_replica: Positive


@dataclass(frozen=True)
class Growth:
    """How far to grow at most, and factors to show besides those that the search for the limit takes."""

    __pydantic_config__ = STRICT
    up_to: Annotated[float, Number, Field(gt=1, le=10_000)] = 64.0
    show: list[Annotated[float, Number, Field(gt=0, le=10_000)]] = field(default_factory=list)


@dataclass(frozen=True)
class FleetFile:
    """The file of ``berth simulate``. A deployment is one of ``--apps`` with ``demand`` instead of ``replicas`` where
    that is known, and ``grows: false`` where it stays as it is."""

    __pydantic_config__ = STRICT
    hosts: list[HostGroup]
    deployments: list[dict[str, Any]]
    strategy: StrategyName = "pack"
    reserve_mib: Count = 0
    growth: Growth = field(default_factory=Growth)
    losses: list[Literal["host", "rack", "zone"]] = field(default_factory=lambda: ["host", "rack"])


@dataclass(frozen=True)
class Fleet:
    """A fleet to simulate. ``replicas`` is the exact number of replicas per deployment before it is rounded up, and
    ``fixed`` are those that do not grow."""

    slots: tuple[Slot, ...]
    deployments: tuple[Deployment, ...]
    replicas: Mapping[str, float]
    fixed: frozenset[str]
    strategy: StrategyName
    growth: Growth
    losses: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """The fleet at ``factor`` times the load. ``refused`` is the first deployment that does not fit, and ``why``."""

    factor: float
    replicas: int
    gpus_used: int
    hosts_used: int
    unplaced: int
    refused: str = ""
    why: str = ""


@dataclass(frozen=True)
class Lost:
    """Replicas of one deployment that found no new place."""

    deployment: str
    replicas: int
    why: str


@dataclass(frozen=True)
class Loss:
    """What becomes of the replicas of a host, a rack or a zone that is lost; ``alike`` others would do the same.

    ``moved`` replicas that stood elsewhere move to make room.
    """

    domain: str
    name: str
    alike: int
    gpus: int
    replicas: int
    again: int
    lost: tuple[Lost, ...]
    moved: int = 0


@dataclass(frozen=True)
class Simulation:
    """The plan as things are, the way to full, and the losses.

    ``full_at`` is the largest growth factor found at which all fits (below 1 when the load of today does not; None: no
    part of it does), ``limit`` the factor at which the first replica is refused (None: not up to ``growth.up_to``).
    ``skipped`` losses are not planned.
    """

    solution: Solution
    points: tuple[Point, ...]
    full_at: float | None
    limit: float | None
    losses: tuple[Loss, ...]
    skipped: int


# --- The file ---------------------------------------------------------------------------------------------------------


def load_fleet(data: object, base: Path | None = None) -> Fleet:
    """The fleet of a file; models are read relative to ``base``.

    Raises:
        BerthError: naming the group or deployment that is wrong, what was found and what is allowed.
    """
    if not isinstance(data, dict):
        raise BerthError(
            "fleet: not an object", found=type(data).__name__, allowed="{hosts: […], deployments: […]}", mend=MEND
        )
    groups = data.get("hosts")
    for number, group in enumerate(groups if isinstance(groups, list) else ()):
        name = group.get("name") if isinstance(group, dict) else None
        load(HostGroup, group, f"hosts {name or number + 1}", MEND)
    file = load(FleetFile, data, "fleet", MEND)
    slots = load_gpus({"hosts": [host for group in file.hosts for host in _hosts(group)]}, file.reserve_mib)
    entries, replicas, fixed = [], {}, set()
    for raw in file.deployments:
        entry = dict(raw)
        name = str(entry.get("name"))
        replicas[name] = _replicas(entry, name)
        grows = entry.pop("grows", True)
        if not isinstance(grows, bool):
            raise BerthError(f"deployment {name}: grows", found=grows, allowed="true or false", mend=MEND)
        if not grows:
            fixed.add(name)
        entries.append(entry)
    apps = load_deployments({"deployments": entries}, slots, base)
    return Fleet(slots, apps.deployments, replicas, frozenset(fixed), file.strategy, file.growth, tuple(file.losses))


def _hosts(group: HostGroup) -> list[dict[str, Any]]:
    digits = max(2, len(str(group.count)))
    racks = [f"r{n + 1}" for n in range(group.racks)] if isinstance(group.racks, int) else group.racks
    if not racks:
        raise BerthError(f"hosts {group.name}: racks is empty", allowed="names of racks, or how many", mend=MEND)
    mib = group.memory_mib if group.memory_mib is not None else _known_mib(group)
    hosts = []
    for number in range(group.count):
        name = f"{group.name}{number + 1:0{digits}}"
        gpu = {"product": group.product, "memory_mib": mib, "cost": group.cost, "used_mib": group.used_mib}
        link = {"nvlink_group": "nvlink0"} if group.nvlink else {}
        gpus = [{"uuid": f"GPU-{name}-{index}", "index": index, **gpu, **link} for index in range(group.gpus)]
        domain = {"rack": racks[number * len(racks) // group.count], "zone": group.zone}
        hosts.append({"name": name, "domain": domain, "gpus": gpus})
    return hosts


def _known_mib(group: HostGroup) -> int:
    try:
        return product(group.product).total_mib
    except BerthError as error:
        raise BerthError(f"hosts {group.name}: {error.what}", found=group.product, mend="give its memory_mib") from None


def _replicas(entry: dict[str, Any], name: str) -> float:
    """The exact number of replicas; ``entry`` gets the whole one."""
    demand = entry.pop("demand", None)
    if demand is None:
        found = entry.get("replicas")
        least = found.get("min") if isinstance(found, dict) else found
        return float(least) if isinstance(least, (int, float)) else 0.0
    if "replicas" in entry:
        raise BerthError(f"deployment {name}: replicas and demand are both given", allowed="one of them", mend=MEND)
    asked = load(Demand, demand, f"deployment {name}: demand", MEND)
    exact = asked.tokens_per_s / asked.per_replica
    entry["replicas"] = math.ceil(exact)
    return exact


# --- The simulation ---------------------------------------------------------------------------------------------------


def simulate(fleet: Fleet) -> Simulation:
    """Plan the fleet as it is, find where growth fills it, and take each host and rack away once."""
    solution = solve(fleet.slots, fleet.deployments, fleet.strategy, options=Options(regroup=True))
    points = {1.0: _point(1.0, solution)}
    full_at, limit = _grow(fleet, points)
    for factor in fleet.growth.show:
        _at(fleet, factor, points)
    losses, skipped = _losses(fleet, solution.plan)
    ordered = tuple(points[factor] for factor in sorted(points))
    return Simulation(solution, ordered, full_at, limit, losses, skipped)


def grown(fleet: Fleet, factor: float) -> tuple[Deployment, ...]:
    """The deployments at ``factor`` times the load."""
    return tuple(
        item if item.name in fleet.fixed else _grown(item, fleet.replicas[item.name], factor)
        for item in fleet.deployments
    )


def _grown(item: Deployment, exact: float, factor: float) -> Deployment:
    # 1e-9: that 3 replicas at a factor of 1.1 / 1.1 are not four.
    most = item.max_replicas if item.max_replicas is None else math.ceil(item.max_replicas * factor - 1e-9)
    return replace(item, replicas=math.ceil(exact * factor - 1e-9), max_replicas=most)


def _at(fleet: Fleet, factor: float, points: dict[float, Point]) -> Point:
    if factor not in points:
        points[factor] = _point(factor, solve(fleet.slots, grown(fleet, factor), fleet.strategy, options=QUICK))
    return points[factor]


def _point(factor: float, solution: Solution) -> Point:
    plan, told = solution.plan, solution.summary
    first = min(plan.unplaced, key=lambda item: (item.replicas + item.room, item.deployment), default=None)
    return Point(
        factor=factor,
        replicas=sum(plan.deployments.values()),
        gpus_used=told.gpus_used,
        hosts_used=told.hosts_used,
        unplaced=sum(item.replicas + item.room for item in plan.unplaced),
        refused=first.deployment if first else "",
        why=first.reason if first else "",
    )


def _grow(fleet: Fleet, points: dict[float, Point]) -> tuple[float | None, float | None]:
    """The largest factor that fits and the smallest that does not, RESOLUTION apart."""
    if all(item.name in fleet.fixed or not fleet.replicas[item.name] for item in fleet.deployments):
        return (1.0, None) if not points[1.0].unplaced else (None, 1.0)
    low, high = 1.0, 1.0
    if points[1.0].unplaced:
        low = 0.0
    else:
        while True:
            high = min(2 * high, fleet.growth.up_to)
            if _at(fleet, high, points).unplaced:
                break
            low = high
            if high >= fleet.growth.up_to:
                return high, None
    while high - low > RESOLUTION * max(1.0, low) + 1e-9:
        middle = round((low + high) / 2, 3)
        low, high = (low, middle) if _at(fleet, middle, points).unplaced else (middle, high)
    return low or None, high


def _losses(fleet: Fleet, plan: Plan) -> tuple[tuple[Loss, ...], int]:
    found: list[Loss] = []
    skipped = 0
    for domain in fleet.losses:
        classes = _classes(domain, plan)
        for names in classes[:SHOWN_LOSSES]:
            found.append(_loss(fleet, plan, domain, names[0], len(names) - 1))
        skipped += sum(len(names) for names in classes[SHOWN_LOSSES:])
    return tuple(found), skipped


def _classes(domain: str, plan: Plan) -> list[list[str]]:
    """The hosts (racks, zones) in use, those together that look alike, those with most replicas first."""
    members: dict[str, list[Slot]] = defaultdict(list)
    for slot in plan.slots:
        members[_name(domain, slot)].append(slot)
    berths: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for berth in plan.berths:
        berths[berth.slot].append((berth.deployment, berth.replicas))
    classes: dict[tuple[object, ...], list[str]] = defaultdict(list)
    weight: dict[str, int] = {}
    for name, slots in members.items():
        weight[name] = sum(replicas for slot in slots for _, replicas in berths[slot.name])
        look = tuple(sorted((slot.product, slot.free_mib, *berths[slot.name]) for slot in slots))
        # Where a rack is part of the question, two hosts of different racks are not alike.
        place = (slots[0].zone, slots[0].rack) if domain == "host" else ()
        if weight[name] and name:
            classes[place, look].append(name)
    ordered = [sorted(names, key=natural) for names in classes.values()]
    return sorted(ordered, key=lambda names: (-weight[names[0]], natural(names[0])))


def _name(domain: str, slot: Slot) -> str:
    if domain == "host":
        return slot.host
    if domain == "zone":
        return slot.zone
    return f"{slot.zone}/{slot.rack}" if slot.zone and slot.rack else slot.rack


def _loss(fleet: Fleet, plan: Plan, domain: str, name: str, alike: int) -> Loss:
    gone = {uuid for slot in plan.slots if _name(domain, slot) == name for uuid in slot.gpu_uuids}
    left = tuple(slot for slot in fleet.slots if not gone.intersection(slot.gpu_uuids))
    found = solve(left, fleet.deployments, fleet.strategy, plan, options=QUICK)
    standing = {slot.name for slot in plan.slots if not gone.intersection(slot.gpu_uuids)}
    hit = sum(berth.replicas for berth in plan.berths if berth.slot not in standing)
    before = {item.deployment: item.replicas for item in plan.unplaced}
    lost = tuple(
        Lost(item.deployment, more, item.reason)
        for item in found.plan.unplaced
        if (more := item.replicas - before.get(item.deployment, 0)) > 0
    )
    again = max(0, hit - sum(item.replicas for item in lost))
    return Loss(domain, name, alike, len(gone), hit, again, lost, found.summary.moves)
