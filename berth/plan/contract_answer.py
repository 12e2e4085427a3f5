"""What ``berth plan --format json`` says, one entry per replica, and the same read back for ``--previous``.

A replica that stands keeps its number from one plan to the next, so that two answers can be compared line by line.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from berth.codec import dump, load, replace
from berth.errors import BerthError
from berth.plan.slots import natural
from berth.plan.types import PLAN_VERSION, Berth, Deployment, Plan, Slot, Solution, StrategyName

MEND = "give the file that berth plan --format json wrote, or a plan.json"
Place = tuple[str, frozenset[str]]
"""A deployment and the GPUs (UUIDs) of one of its replicas."""


# --- The answer -------------------------------------------------------------------------------------------------------


def answer(solution: Solution, numbers: Mapping[Place, Sequence[int]] | None = None) -> dict[str, Any]:
    """The object of ``--format json``; ``numbers`` are the replica numbers of the previous plan."""
    plan = solution.plan
    slots = {slot.name: slot for slot in plan.slots}
    given, unused = number_replicas(plan, numbers or {})
    assignments = [
        {
            "deployment": berth.deployment,
            "replica": number,
            "host": slots[berth.slot].host,
            "gpus": list(slots[berth.slot].gpu_uuids),
            "vram_mib": berth.vram_mib,
            "reason": berth.reason,
        }
        for berth, taken in zip(plan.berths, given, strict=True)
        for number in taken
    ]
    unplaced = [item for items in _unplaced(plan, unused).values() for item in items]
    placed = len(assignments)
    return {
        "version": PLAN_VERSION,
        "strategy": plan.strategy,
        "ok": not plan.unplaced,
        "assignments": sorted(assignments, key=_by_replica),
        "reservations": [
            {
                "deployment": berth.deployment,
                "replicas": berth.reserved,
                "host": slots[berth.slot].host,
                "gpus": list(slots[berth.slot].gpu_uuids),
                "vram_mib": berth.vram_mib,
                "reason": berth.reason,
            }
            for berth in plan.berths
            if berth.reserved
        ],
        "unplaced": sorted(unplaced, key=_by_replica),
        "slots": _slots(plan),
        "deployments": [
            {"name": name, "replicas": replicas, "strategy": plan.strategies.get(name, plan.strategy)}
            for name, replicas in sorted(plan.deployments.items())
        ],
        "summary": {
            "replicas": sum(plan.deployments.values()),
            "placed": placed,
            "unplaced": sum(item.replicas for item in plan.unplaced),
            **dump(solution.summary),
        },
    }


def _by_replica(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return item["deployment"], item["replica"]


def number_replicas(
    plan: Plan, numbers: Mapping[Place, Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], dict[str, tuple[int, ...]]]:
    """The numbers of the replicas of each berth, in the plan's order, and the numbers that no placed replica has.

    ``numbers`` are those they had before: who stays keeps his, the others get the lowest that are left.
    """
    gpus = {slot.name: frozenset(slot.gpu_uuids) for slot in plan.slots}
    free = {name: set(range(replicas)) for name, replicas in plan.deployments.items()}
    kept: list[list[int]] = []
    for berth in plan.berths:
        before = numbers.get((berth.deployment, gpus[berth.slot]), ())
        stay = sorted(free[berth.deployment].intersection(before))[: berth.replicas]
        free[berth.deployment].difference_update(stay)
        kept.append(stay)
    left = {name: sorted(unused, reverse=True) for name, unused in free.items()}
    for berth, stay in zip(plan.berths, kept, strict=True):
        stay += [left[berth.deployment].pop() for _ in range(berth.replicas - len(stay))]
    return tuple(tuple(sorted(stay)) for stay in kept), {name: tuple(reversed(rest)) for name, rest in left.items()}


def _unplaced(plan: Plan, unused: Mapping[str, Sequence[int]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    reserved = Counter[str]()
    for berth in plan.berths:
        reserved[berth.deployment] += berth.reserved
    for item in plan.unplaced:
        asked = plan.deployments[item.deployment]
        # Room that is promised beyond the replicas and is not there has the numbers that its replicas would get.
        first = asked + reserved[item.deployment]
        numbers = [*unused[item.deployment], *range(first, first + item.room)]
        short = {} if item.shortage_mib is None else {"shortage_mib": item.shortage_mib}
        found[item.deployment] = [
            {
                "deployment": item.deployment,
                "replica": number,
                "reason": item.reason,
                **short,
                **({"room": True} if number >= asked else {}),
            }
            for number in numbers
        ]
    return found


def _slots(plan: Plan) -> list[dict[str, Any]]:
    promised, reserved = Counter[str](), Counter[str]()
    for berth in plan.berths:
        promised[berth.slot] += berth.replicas * berth.vram_mib
        reserved[berth.slot] += berth.reserved * berth.vram_mib
    return [
        {
            "name": slot.name,
            "host": slot.host,
            "gpus": list(slot.gpu_uuids),
            "indices": list(slot.gpu_indices),
            "product": slot.product,
            "memory_mib": slot.total_mib,
            "usable_mib": slot.vram_mib,
            "foreign_mib": slot.foreign_mib,
            "promised_mib": promised[slot.name],
            "reserved_mib": reserved[slot.name],
            "free_mib": max(0, slot.free_mib - promised[slot.name] - reserved[slot.name]),
            "rack": slot.rack,
            "zone": slot.zone,
            "compute_capability": slot.compute_capability,
            "nvlink_group": slot.nvlink_group,
            "cost": slot.cost,
            "cordoned": slot.cordoned,
        }
        for slot in plan.slots
    ]


def to_json(data: Mapping[str, Any]) -> str:
    """``data`` as JSON with one line per entry of each list: quick for 20,000 replicas, and good to compare."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list) and value:
            lines = ",\n    ".join(json.dumps(item) for item in value)
            parts.append(f"  {json.dumps(key)}: [\n    {lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# --- The previous plan ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """An assignment (one ``replica``) or a reservation (room for ``replicas``)."""

    deployment: str
    gpus: list[str]
    replica: int = 0
    replicas: int = 1
    host: str = ""
    reason: str = ""
    vram_mib: int | None = None


@dataclass(frozen=True)
class _Slot:
    name: str
    host: str
    gpus: list[str]
    product: str
    memory_mib: int
    usable_mib: int
    indices: list[int] = field(default_factory=list)
    foreign_mib: int = 0
    rack: str = ""
    zone: str = ""
    compute_capability: str = ""
    nvlink_group: str = ""
    cost: float = 1.0
    cordoned: bool = False

    def slot(self) -> Slot:
        return Slot(
            self.name,
            self.host,
            tuple(self.gpus),
            tuple(self.indices),
            self.product,
            self.usable_mib,
            self.memory_mib,
            self.foreign_mib,
            self.rack,
            self.zone,
            self.compute_capability,
            self.nvlink_group,
            self.cost,
            self.cordoned,
        )


@dataclass(frozen=True)
class _Asked:
    name: str
    replicas: int
    strategy: StrategyName


# Keys that a later Berth adds are passed over: only what is asked for here is needed to stand still.
@dataclass(frozen=True)
class _Answer:
    version: int
    strategy: StrategyName
    assignments: list[_Held]
    reservations: list[_Held] = field(default_factory=list)
    slots: list[_Slot] = field(default_factory=list)
    deployments: list[_Asked] = field(default_factory=list)


@dataclass(frozen=True)
class Previous:
    """A previous plan in today's slot names, and the numbers its replicas had."""

    plan: Plan
    numbers: Mapping[Place, tuple[int, ...]]


def load_previous(data: object, what: str) -> _Answer | Plan:
    """The previous plan as it was written: an answer of ``berth plan``, or a ``plan.json``.

    Raises:
        BerthError: when it is neither, or of a version that this Berth does not know.
    """
    if not isinstance(data, dict):
        raise BerthError(f"{what} is no plan", found=type(data).__name__, allowed="an object", mend=MEND)
    if data.get("version") != PLAN_VERSION:
        raise BerthError(f"{what} has an unknown version", found=data.get("version"), allowed=PLAN_VERSION, mend=MEND)
    if "berths" not in data:
        return load(_Answer, data, what, MEND)
    plan = load(Plan, data, what, MEND)
    known = {slot.name for slot in plan.slots}
    for berth in plan.berths:
        if berth.slot not in known:
            raise BerthError(f"{what}: berth {berth.name} is on no slot of the plan", mend=MEND)
    return plan


def gpus_of(previous: _Answer | Plan) -> frozenset[str]:
    """Every GPU (UUID) that the previous plan knew."""
    if isinstance(previous, Plan):
        return frozenset(uuid for slot in previous.slots for uuid in slot.gpu_uuids)
    used = [item.gpus for item in (*previous.assignments, *previous.reservations)]
    return frozenset(uuid for gpus in (*used, *(slot.gpus for slot in previous.slots)) for uuid in gpus)


def as_previous(raw: _Answer | Plan, slots: Sequence[Slot], deployments: Sequence[Deployment]) -> Previous:
    """The previous plan in the names of today's ``slots``: a GPU is known by its UUID, whatever it was called.

    Where an assignment does not tell its footprint (a plan that somebody else wrote), today's is taken.

    Raises:
        BerthError: an assignment on no GPU at all.
    """
    if isinstance(raw, Plan):
        plan = _renamed(raw, slots)
        return Previous(plan, _in_order(plan))
    known = _known_slots(raw, slots)
    berths = _berths(raw, known, {item.name: item for item in deployments})
    numbers: dict[Place, list[int]] = defaultdict(list)
    for item in raw.assignments:
        numbers[item.deployment, frozenset(item.gpus)].append(item.replica)
    placed = Counter(item.deployment for item in raw.assignments)
    plan = Plan(
        strategy=raw.strategy,
        slots=tuple(sorted(known.values(), key=lambda slot: natural(slot.name))),
        berths=berths,
        deployments={**placed, **{item.name: item.replicas for item in raw.deployments}},
        strategies={**dict.fromkeys(placed, raw.strategy), **{item.name: item.strategy for item in raw.deployments}},
    )
    return Previous(_renamed(plan, slots), {place: tuple(taken) for place, taken in numbers.items()})


def _in_order(plan: Plan) -> dict[Place, tuple[int, ...]]:
    gpus = {slot.name: frozenset(slot.gpu_uuids) for slot in plan.slots}
    counts, found = Counter[str](), dict[Place, tuple[int, ...]]()
    for berth in plan.berths:
        first = counts[berth.deployment]
        counts[berth.deployment] += berth.replicas
        found[berth.deployment, gpus[berth.slot]] = tuple(range(first, first + berth.replicas))
    return found


def _known_slots(raw: _Answer, slots: Sequence[Slot]) -> dict[frozenset[str], Slot]:
    """The slot of each set of GPUs that the answer speaks of, made up where the answer does not describe it."""
    known = {frozenset(slot.gpus): slot.slot() for slot in raw.slots}
    today = {uuid: slot for slot in slots for uuid in slot.gpu_uuids}
    for item in (*raw.assignments, *raw.reservations):
        gpus = frozenset(item.gpus)
        if not gpus:
            raise BerthError(f"the previous plan has a replica of {item.deployment} on no GPU", mend=MEND)
        if gpus in known:
            continue
        there = today.get(item.gpus[0])
        product, mib = (there.product, there.vram_mib) if there else ("", 0)
        known[gpus] = Slot(
            name="+".join(item.gpus),
            host=item.host or (there.host if there else ""),
            gpu_uuids=tuple(item.gpus),
            gpu_indices=(),
            product=product,
            vram_mib=mib,
            total_mib=there.total_mib if there else 0,
        )
    return known


def _berths(
    raw: _Answer, known: Mapping[frozenset[str], Slot], deployments: Mapping[str, Deployment]
) -> tuple[Berth, ...]:
    found: dict[tuple[str, frozenset[str]], Berth] = {}
    every = [(item, 1, 0) for item in raw.assignments] + [(item, 0, item.replicas) for item in raw.reservations]
    for item, replicas, reserved in every:
        gpus = frozenset(item.gpus)
        slot, wanted = known[gpus], deployments.get(item.deployment)
        mib = item.vram_mib or (wanted.footprint_mib(slot.product) if wanted else None) or 0
        before = found.get((item.deployment, gpus), Berth(item.deployment, slot.name, 0, mib, item.reason))
        found[item.deployment, gpus] = Berth(
            item.deployment, slot.name, before.replicas + replicas, mib, item.reason, before.reserved + reserved
        )
    return tuple(sorted(found.values(), key=lambda berth: (berth.deployment, natural(berth.slot))))


def _renamed(plan: Plan, slots: Sequence[Slot]) -> Plan:
    """``plan`` with each single GPU under the name it has today, and no vanished one under a name of today."""
    today = {slot.gpu_uuids: slot.name for slot in slots}
    taken = {slot.name for slot in slots}
    names = {
        slot.name: today.get(slot.gpu_uuids)
        or (slot.name if slot.name not in taken else f"{slot.name} ({slot.gpu_uuids[0]})")
        for slot in plan.slots
    }
    return Plan(
        strategy=plan.strategy,
        slots=tuple(_called(slot, names[slot.name]) for slot in plan.slots),
        berths=tuple(
            Berth(item.deployment, names[item.slot], item.replicas, item.vram_mib, item.reason, item.reserved)
            for item in plan.berths
        ),
        unplaced=plan.unplaced,
        deployments=plan.deployments,
        strategies=plan.strategies,
        retired=plan.retired,
        footprints=plan.footprints,
    )


def _called(slot: Slot, name: str) -> Slot:
    return slot if slot.name == name else replace(slot, name=name)
