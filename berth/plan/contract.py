"""The files of ``berth plan``: GPUs and deployments, as JSON or YAML, read strictly into slots and deployments.

The keys are published in ``docs/schemas``. All memory is in MiB.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints

from berth.codec import STRICT, load
from berth.errors import BerthError
from berth.footprint.products import product
from berth.plan.contract_model import Footprints, ModelEntry, predicted, read_model_source
from berth.plan.slots import natural
from berth.plan.types import (
    STRATEGIES,
    Affinity,
    Deployment,
    DomainName,
    HeadroomName,
    PlacementName,
    Slot,
    StrategyName,
)

LARGEST_MIB = 10**8
LARGEST_COUNT = 10**6
MEND_GPUS = "correct the file of --gpus (docs/planning.md)"
MEND_APPS = "correct the file of --apps (docs/planning.md)"


def _no_text(value: object) -> object:
    # pydantic takes "3" and true for numbers; a file in which they stand has a mistake.
    if isinstance(value, (bool, str)):
        raise ValueError("Input should be a number")
    return value


def _word(value: object) -> object:
    """Racks and groups are often numbers; as names they are text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _capability(value: object) -> object:
    if isinstance(value, str):
        return value.strip().removeprefix(">=").strip()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(float(value))
    return value


def _as_list(value: object) -> object:
    return value if isinstance(value, list) or value is None else [value]


Number = BeforeValidator(_no_text)
Mib = Annotated[int, Number, Field(ge=1, le=LARGEST_MIB)]
Used = Annotated[int, Number, Field(ge=0, le=LARGEST_MIB)]
Count = Annotated[int, Number, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[float, Number, Field(gt=0, le=1e9, allow_inf_nan=False)]
Load = Annotated[float, Number, Field(ge=0, le=1e9, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^\S(.*\S)?$")]
Word = Annotated[str, BeforeValidator(_word, json_schema_input_type=str | int)]
Capability = Annotated[
    str,
    BeforeValidator(_capability, json_schema_input_type=str | float),
    StringConstraints(pattern=r"^\d{1,3}(\.\d{1,2})?$"),
]
Names = Annotated[list[Name], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Switch = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True)
class DomainEntry:
    """Where a host stands."""

    __pydantic_config__ = STRICT
    rack: Word | None = None
    zone: Word | None = None


@dataclass(frozen=True)
class GpuEntry:
    """One GPU, or one MIG instance, of a host. ``used_mib`` is what others than Berth hold there."""

    __pydantic_config__ = STRICT
    uuid: Name
    index: Count
    product: Name
    memory_mib: Mib
    used_mib: Used | None = None
    nvlink_group: Word | None = None
    compute_capability: Capability | None = None
    cordoned: Switch | None = None
    cost: Positive | None = None


@dataclass(frozen=True)
class HostEntry:
    """One host."""

    __pydantic_config__ = STRICT
    name: Name
    gpus: list[GpuEntry]
    domain: DomainEntry | None = None


@dataclass(frozen=True)
class GpusFile:
    """The file of ``--gpus``."""

    __pydantic_config__ = ConfigDict(extra="forbid", title="berth plan --gpus")
    hosts: list[HostEntry]


@dataclass(frozen=True)
class RangeEntry:
    """Replicas of an autoscaled deployment: ``min`` run now, room for ``max`` is kept as ``headroom`` says."""

    __pydantic_config__ = STRICT
    min: Count
    max: Annotated[int, Number, Field(ge=1, le=LARGEST_COUNT)]


@dataclass(frozen=True)
class RequireEntry:
    """What a GPU must be. ``compute_capability`` is the least that will do."""

    __pydantic_config__ = STRICT
    product: Names | None = None
    compute_capability: Capability | None = None
    nvlink: Switch | None = None


def _rules(value: object) -> object:
    """``embed``, ``{deployment: embed, domain: rack}``, or a list of such."""
    items = _as_list(value)
    if not isinstance(items, list):
        return items
    return [{"deployment": item} if isinstance(item, str) else item for item in items]


Rules = Annotated[list[Affinity], BeforeValidator(_rules, json_schema_input_type=str | Affinity | list[str | Affinity])]


@dataclass(frozen=True)
class DeploymentEntry:
    """One deployment: its footprint, or the model that it is predicted from. See ``berth.plan.types.Deployment``."""

    __pydantic_config__ = STRICT
    name: Name
    replicas: Count | RangeEntry
    footprint_mib: Annotated[float, Number, Field(gt=0, le=LARGEST_MIB)] | dict[Name, Mib] | None = None
    model: ModelEntry | None = None
    gpus_per_replica: Annotated[int, Number, Field(ge=1, le=1024)] | None = None
    strategy: StrategyName | None = None
    require: RequireEntry | None = None
    spread_over: DomainName | None = None
    pin: Names | None = None
    priority: Annotated[int, Number, Field(ge=-(10**6), le=10**6)] | None = None
    affinity: Rules | None = None
    anti_affinity: Rules | None = None
    headroom: HeadroomName | None = None
    placement: PlacementName | None = None
    load: Load | None = None
    min_available: Count | None = None


@dataclass(frozen=True)
class AppsFile:
    """The file of ``--apps``."""

    __pydantic_config__ = ConfigDict(extra="forbid", title="berth plan --apps")
    deployments: list[DeploymentEntry]


@dataclass(frozen=True)
class Apps:
    """What is asked for. ``notes`` are for people, ``shortfalls`` the words of predictions that fit no GPU here."""

    deployments: tuple[Deployment, ...]
    notes: tuple[str, ...] = ()
    shortfalls: Mapping[str, str] = field(default_factory=dict)


# --- GPUs -------------------------------------------------------------------------------------------------------------


def load_gpus(data: object, reserve_mib: int = 0) -> tuple[Slot, ...]:
    """One slot per GPU of ``{hosts: […]}``, named ``host-index``, in natural order.

    ``reserve_mib`` stays unpromised on each GPU. What a compute capability is missing, the product tells if it is a
    known one.

    Raises:
        BerthError: naming the host or GPU that is wrong, what was found there and what is allowed.
    """
    if reserve_mib < 0:
        raise BerthError("--reserve-mib is negative", found=reserve_mib, allowed=">= 0")
    hosts = _load_named(GpusFile, data, "GPUs", MEND_GPUS, _blame_gpus).hosts
    _refuse_repeated("two hosts have the same name", [host.name for host in hosts], MEND_GPUS)
    where: dict[str, str] = {}
    slots: list[Slot] = []
    for host in hosts:
        for gpu, name in zip(host.gpus, _slot_names(host), strict=True):
            if gpu.uuid in where:
                raise BerthError(
                    f"GPU {gpu.uuid} is listed twice, on {where[gpu.uuid]} and {host.name}",
                    allowed="each UUID once",
                    mend=MEND_GPUS,
                )
            where[gpu.uuid] = host.name
            slots.append(_slot(host, gpu, name, reserve_mib))
    _refuse_repeated("two GPUs would have the same slot name", [slot.name for slot in slots], MEND_GPUS)
    return tuple(sorted(slots, key=lambda slot: natural(slot.name)))


def _slot_names(host: HostEntry) -> list[str]:
    """``host-index``; MIG instances share the index of their card and get a number of their own by UUID."""
    twins: dict[int, list[str]] = {}
    for gpu in host.gpus:
        twins.setdefault(gpu.index, []).append(gpu.uuid)
    for index, uuids in sorted(twins.items()):
        if len(uuids) > 1 and not all(uuid.startswith("MIG-") for uuid in uuids):
            raise BerthError(
                f"host {host.name}: two GPUs have the index {index}",
                found=", ".join(sorted(uuids)),
                allowed="an index of its own for each GPU (MIG instances, MIG-…, may share one)",
                mend=MEND_GPUS,
            )
    numbers = {uuid: n for uuids in twins.values() if len(uuids) > 1 for n, uuid in enumerate(sorted(uuids))}
    return [f"{host.name}-{gpu.index}" + (f".{numbers[gpu.uuid]}" if gpu.uuid in numbers else "") for gpu in host.gpus]


def _slot(host: HostEntry, gpu: GpuEntry, name: str, reserve_mib: int) -> Slot:
    used = gpu.used_mib or 0
    if used > gpu.memory_mib:
        raise BerthError(
            f"GPU {gpu.uuid} of host {host.name}: used_mib is more than the GPU has",
            found=used,
            allowed=f"0 to memory_mib, {gpu.memory_mib}",
            mend=MEND_GPUS,
        )
    domain = host.domain or DomainEntry()
    return Slot(
        name=name,
        host=host.name,
        gpu_uuids=(gpu.uuid,),
        gpu_indices=(gpu.index,),
        product=gpu.product,
        vram_mib=max(0, gpu.memory_mib - reserve_mib),
        total_mib=gpu.memory_mib,
        foreign_mib=used,
        rack=domain.rack or "",
        zone=domain.zone or "",
        compute_capability=gpu.compute_capability or known_capability(gpu.product),
        nvlink_group=gpu.nvlink_group or "",
        cost=1.0 if gpu.cost is None else gpu.cost,
        cordoned=bool(gpu.cordoned),
    )


def known_capability(name: str) -> str:
    """The compute capability of a known product ("8.9"), of a MIG instance that of its card; "" when not known."""
    try:
        return product(name.split(" MIG ")[0]).compute_capability
    except BerthError:
        return ""


def same_product(one: str, other: str) -> bool:
    """Whether two names are of one product: "L40S" is "NVIDIA L40S"."""
    if one == other:
        return True
    try:
        return product(one) is product(other)
    except BerthError:
        return one.casefold().removeprefix("nvidia ") == other.casefold().removeprefix("nvidia ")


# --- Deployments ------------------------------------------------------------------------------------------------------


def load_deployments(data: object, slots: Sequence[Slot], base: Path | None = None, gone: Collection[str] = ()) -> Apps:
    """The deployments of ``{deployments: […]}`` for the fleet of ``slots``.

    Product names are resolved to those of the fleet, pins to GPU UUIDs; models are read relative to ``base`` and their
    footprints predicted for each product of the fleet. A pin may name one of the GPUs (UUIDs) that are ``gone``.

    Raises:
        BerthError: naming the deployment that is wrong, what was found there and what is allowed.
    """
    entries = _load_named(AppsFile, data, "apps", MEND_APPS, _blame_apps).deployments
    _refuse_repeated("two deployments have the same name", [entry.name for entry in entries], MEND_APPS)
    names = {entry.name for entry in entries}
    uuids = {uuid: uuid for slot in slots for uuid in slot.gpu_uuids}
    pins = uuids | {f"{slot.host}/{slot.gpu_indices[0]}": slot.gpu_uuids[0] for slot in slots}
    cards = _cards(slots)
    found: list[Deployment] = []
    notes: list[str] = []
    shortfalls: dict[str, str] = {}
    for entry in sorted(entries, key=lambda item: item.name):
        _check(entry, names)
        footprints = _footprints(entry, cards, base or Path())
        notes += [f"{entry.name}: {note}" for note in footprints.notes]
        if footprints.shortfall:
            shortfalls[entry.name] = footprints.shortfall
        found.append(_deployment(entry, footprints, _pins(entry, pins, gone), cards))
    return Apps(tuple(found), tuple(notes), shortfalls)


def _cards(slots: Sequence[Slot]) -> dict[str, Slot]:
    """Each product of the fleet with the slot that stands for it: the one with the least memory."""
    cards: dict[str, Slot] = {}
    for slot in sorted(slots, key=lambda item: (item.product, item.total_mib, natural(item.name))):
        cards.setdefault(slot.product, slot)
    return cards


def _check(entry: DeploymentEntry, names: set[str]) -> None:
    what = f"deployment {entry.name}"
    if (entry.footprint_mib is None) == (entry.model is None):
        raise BerthError(
            f"{what}: its footprint is given twice or not at all",
            found="footprint_mib and model" if entry.model else "neither footprint_mib nor model",
            allowed="one of footprint_mib and model",
            mend=MEND_APPS,
        )
    if entry.footprint_mib == {}:
        raise BerthError(f"{what}: footprint_mib names no GPU product", allowed="MiB, or {product: MiB, default: MiB}")
    if isinstance(entry.replicas, RangeEntry) and entry.replicas.max < entry.replicas.min:
        raise BerthError(
            f"{what}: replicas.max is less than replicas.min",
            found=entry.replicas.max,
            allowed=f">= {entry.replicas.min}",
            mend=MEND_APPS,
        )
    for key, rules in (("affinity", entry.affinity), ("anti_affinity", entry.anti_affinity)):
        for rule in rules or ():
            if rule.deployment not in names:
                known = ", ".join(sorted(names))
                raise BerthError(
                    f"{what}: {key} names no deployment", found=rule.deployment, allowed=known, mend=MEND_APPS
                )
            if rule.deployment == entry.name:
                raise BerthError(f"{what}: {key} names itself", mend="use strategy and spread_over for that")


def _footprints(entry: DeploymentEntry, cards: Mapping[str, Slot], base: Path) -> Footprints:
    width = entry.gpus_per_replica
    if entry.model is not None:
        source = read_model_source(entry.model, width, entry.name, base)
        return predicted(source, _allowed(entry, cards), entry.name)
    if isinstance(entry.footprint_mib, dict):
        given = entry.footprint_mib
        named = [(key, name) for key in given for name in cards if key != "default" and same_product(key, name)]
        return Footprints({**{name: given[key] for key, name in named}, **given}, width or 1)
    # Half a MiB is a MiB that somebody else cannot have.
    return Footprints({"default": math.ceil(entry.footprint_mib or 0)}, width or 1)


def _allowed(entry: DeploymentEntry, cards: Mapping[str, Slot]) -> dict[str, Slot]:
    wanted = entry.require.product if entry.require else None
    return {
        name: slot for name, slot in cards.items() if wanted is None or any(same_product(item, name) for item in wanted)
    }


def _pins(entry: DeploymentEntry, known: Mapping[str, str], gone: Collection[str]) -> tuple[str, ...]:
    found = []
    for pin in entry.pin or ():
        if pin not in known and pin not in gone:
            some = ", ".join(sorted(known, key=natural)[:8])
            raise BerthError(
                f"deployment {entry.name}: pin names a GPU that is not there",
                found=pin,
                allowed=f"a GPU UUID or host/index: {some}" + (", …" if len(known) > 8 else ""),
                mend=MEND_APPS,
            )
        found.append(known.get(pin, pin))
    return tuple(sorted(set(found)))


def _deployment(
    entry: DeploymentEntry, footprints: Footprints, pins: tuple[str, ...], cards: Mapping[str, Slot]
) -> Deployment:
    scaled = entry.replicas if isinstance(entry.replicas, RangeEntry) else None
    require = entry.require or RequireEntry()
    # A product that is not here stays under the name it was asked for, so that the reason can tell it.
    wanted = {name: [here for here in cards if same_product(name, here)] or [name] for name in require.product or ()}
    return Deployment(
        name=entry.name,
        replicas=entry.replicas.min if isinstance(entry.replicas, RangeEntry) else entry.replicas,
        vram_mib=dict(footprints.sizes),
        gpus_per_replica=footprints.gpus,
        strategy=entry.strategy,
        products=tuple(sorted({name for names in wanted.values() for name in names})),
        max_replicas=scaled.max if scaled else None,
        headroom=entry.headroom or "promised",
        placement=entry.placement or "berths",
        min_compute_capability=max(
            require.compute_capability or "", footprints.min_compute_capability, key=lambda text: float(text or 0)
        ),
        require_nvlink=bool(require.nvlink),
        spread_over=entry.spread_over,
        affinity=tuple(entry.affinity or ()),
        anti_affinity=tuple(entry.anti_affinity or ()),
        pins=pins,
        priority=entry.priority or 0,
        load=1.0 if entry.load is None else entry.load,
        min_available=entry.min_available,
    )


# --- Errors that name the object --------------------------------------------------------------------------------------


def _load_named(kind: Any, data: object, what: str, mend: str, blame: Callable[[Mapping[Any, Any]], None]) -> Any:
    """``load`` at once; only when that fails object by object, so that the error tells names and not numbers."""
    if not isinstance(data, dict):
        key = "hosts" if kind is GpusFile else "deployments"
        raise BerthError(f"{what}: not an object", found=_kind(data), allowed=f"{{{key}: […]}}", mend=mend)
    try:
        return load(kind, data, what, mend)
    except BerthError:
        blame(data)
        raise


def _blame_gpus(data: Mapping[Any, Any]) -> None:
    for number, host in enumerate(_items(data, "hosts")):
        name = f"host {_called(host, 'name', number)}"
        for place, gpu in enumerate(_items(host, "gpus")):
            load(GpuEntry, gpu, f"GPU {_called(gpu, 'uuid', place)} of {name}", MEND_GPUS)
        load(HostEntry, host, name, MEND_GPUS)


def _blame_apps(data: Mapping[Any, Any]) -> None:
    for number, entry in enumerate(_items(data, "deployments")):
        strategy = entry.get("strategy") if isinstance(entry, dict) else None
        if strategy is not None and strategy not in STRATEGIES:
            raise BerthError(
                f"deployment {_called(entry, 'name', number)}: strategy is unknown",
                found=strategy,
                allowed=", ".join(STRATEGIES),
                mend=MEND_APPS,
            )
        load(DeploymentEntry, entry, f"deployment {_called(entry, 'name', number)}", MEND_APPS)


def _items(data: object, key: str) -> list[Any]:
    found = data.get(key) if isinstance(data, dict) else None
    return found if isinstance(found, list) else []


def _called(item: object, key: str, number: int) -> str:
    name = item.get(key) if isinstance(item, dict) else None
    return name if isinstance(name, str) and name else f"number {number + 1}"


def _kind(data: object) -> str:
    return {type(None): "nothing", list: "a list", str: "text"}.get(type(data), type(data).__name__)


def _refuse_repeated(what: str, names: Sequence[str], mend: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise BerthError(what, found=", ".join(twice), allowed="unique names", mend=mend)
