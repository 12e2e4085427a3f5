"""GPUs of hosts -> slots with names that stay, and what strangers hold on each. All memory is in MiB."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from berth.codec import STRICT, load
from berth.errors import BerthError
from berth.gpu.types import Gpu, HostGpus
from berth.plan.types import Plan, Slot

DEFAULT_RESERVE_MIB = 512
"""Left unpromised on every GPU: CUDA contexts of short-lived helpers and the allocator's rounding."""

FOREIGN_STEP_MIB = 256
"""Foreign memory is counted in steps of this size. It moves by a few MiB all the time (a desktop, a monitoring
agent); counted to the MiB, every run would write a new plan."""

UNACCOUNTED_TOLERANCE_MIB = 64
"""What a GPU may hold beyond the sum of its processes before it counts as foreign: the driver rounds each process
to its page size and keeps channel memory that belongs to none."""


@dataclass(frozen=True)
class HostInput:
    """One host for the planner: its GPUs, where it stands, and which GPUs are grouped into one slot.

    ``shapes`` lists groups of GPU UUIDs (or driver indices); every GPU in no group is a slot of its own.
    ``cordoned`` names GPUs (UUIDs or indices) that take nothing new; ``costs`` maps a product to what one of its GPUs
    counts in `pack` (1 when not named).
    """

    gpus: HostGpus
    rack: str = ""
    zone: str = ""
    shapes: tuple[tuple[str | int, ...], ...] = ()
    cordoned: tuple[str | int, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _RawHost:
    __pydantic_config__ = STRICT
    host_gpus: HostGpus
    rack: str | int | None = None
    zone: str | int | None = None
    slot_shapes: tuple[tuple[str | int, ...], ...] | None = None
    cordoned_gpus: tuple[str | int, ...] | None = None
    gpu_costs: dict[str, float] | None = None


def load_hosts(data: object) -> tuple[HostInput, ...]:
    """Read a list of ``{host_gpus, rack, zone, slot_shapes, cordoned_gpus, gpu_costs}``.

    Raises:
        BerthError: naming every key that is unknown, missing or of the wrong kind.
    """
    mend = "give each host what the gpu_info module returned for it, and rack, zone, slot_shapes from the inventory"
    return tuple(
        HostInput(
            raw.host_gpus,
            _word(raw.rack),
            _word(raw.zone),
            raw.slot_shapes or (),
            raw.cordoned_gpus or (),
            raw.gpu_costs or {},
        )
        for raw in load(tuple[_RawHost, ...], data, "hosts", mend)
    )


def build_slots(
    hosts: Sequence[HostInput],
    previous: Plan | None = None,
    reserve_mib: int = DEFAULT_RESERVE_MIB,
    cluster: str = "",
) -> tuple[tuple[Slot, ...], dict[str, str], tuple[str, ...]]:
    """The slots of these hosts, the retired slot names (first UUID -> name), and problems in words.

    ``reserve_mib`` is what Berth leaves unpromised on each GPU; ``cluster`` tells our own processes from strangers'.
    A slot's name belongs to its first GPU's UUID for ever: a renumbered card keeps it, a GPU that is gone retires it.
    A multi-GPU slot with a GPU lost or gone is no slot, and its other GPUs wait for it: regrouping them would be a
    change of shape, which only the inventory may ask for.

    Raises:
        BerthError: for a host or GPU named twice, a shape naming a GPU that never was there, one GPU in two shapes,
            or a shape of unequal products.
    """
    _refuse_duplicates(hosts)
    if reserve_mib < 0:
        raise BerthError("reserve_mib is negative", found=reserve_mib, allowed=">= 0 MiB")
    before = {slot.gpu_uuids[0]: slot for slot in previous.slots} if previous else {}
    names = dict(previous.retired) if previous else {}
    names |= {uuid: slot.name for uuid, slot in before.items()}
    busy = {berth.slot for berth in previous.berths} if previous else set()
    slots: list[Slot] = []
    problems: list[str] = []
    for host in sorted(hosts, key=lambda item: item.gpus.host):
        _check_marks(host, before)
        groups = _groups(host, before, problems)
        for number, gpus in groups:
            name = names.get(gpus[0].uuid) or _new_name(host.gpus.host, number, names.values())
            names[gpus[0].uuid] = name
            slots.append(
                _slot(name, host, gpus, before.get(gpus[0].uuid), name in busy, reserve_mib, cluster, problems)
            )
    problems += _vanished(hosts, before)
    problems += _drivers(hosts)
    present = {slot.gpu_uuids[0] for slot in slots}
    retired = {uuid: name for uuid, name in sorted(names.items()) if uuid not in present}
    return tuple(sorted(slots, key=lambda slot: natural(slot.name))), retired, tuple(problems)


def driver_versions(hosts: Iterable[HostGpus]) -> dict[str, tuple[str, ...]]:
    """The hosts by the version of their driver, versions in order of their text. Hosts without a GPU do not count."""
    found: dict[str, list[str]] = {}
    for host in hosts:
        if host.gpus:
            found.setdefault(host.driver_version, []).append(host.host)
    return {version: tuple(sorted(names)) for version, names in sorted(found.items())}


def _drivers(hosts: Sequence[HostInput]) -> list[str]:
    versions = driver_versions(item.gpus for item in hosts)
    if len(versions) < 2:
        return []
    told = "; ".join(f"{version}: {', '.join(names)}" for version, names in versions.items())
    return [f"the hosts have different NVIDIA drivers ({told}): a footprint measured on one may not hold on another"]


def _vanished(hosts: Sequence[HostInput], before: Mapping[str, Slot]) -> list[str]:
    """GPUs of the last plan that their host's driver shows no more, or that another host shows now."""
    owner = {gpu.uuid: item.gpus.host for item in hosts for gpu in item.gpus.gpus}
    # A lost card may have no UUID left to show: one that is missing beside it has not vanished.
    whole = {item.gpus.host for item in hosts if all(gpu.lost is None for gpu in item.gpus.gpus)}
    told = []
    for slot in sorted(before.values(), key=lambda item: natural(item.name)):
        for uuid in slot.gpu_uuids:
            if slot.host in whole and owner.get(uuid) != slot.host:
                where = f"{owner[uuid]} has it now" if uuid in owner else f"{slot.host}'s driver does not show it"
                told.append(f"GPU {uuid} of slot {slot.name} has vanished since the last plan: {where}")
    return told


def _check_marks(host: HostInput, before: Mapping[str, Slot]) -> None:
    for key in host.cordoned:
        if _find(host.gpus.gpus, key) is None and not _was_there(host, host.gpus.gpus, key, before):
            raise BerthError(
                f"cordoned_gpus of {host.gpus.host} names a GPU that is not there",
                found=key,
                allowed=", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in host.gpus.gpus) or "none",
                mend="correct placement_cordoned_gpus of this host",
            )
    for product, cost in host.costs.items():
        if not cost > 0:
            raise BerthError(
                f"gpu_costs of {host.gpus.host}: the cost of {product} is not a price",
                found=cost,
                allowed="> 0",
                mend="correct placement_gpu_costs",
            )


def _nvlink_group(gpus: Sequence[Gpu], host: HostInput) -> str:
    """The NVLink island that all of ``gpus`` are in, called after the lowest index in it; "" when in none."""
    peers = {gpu.uuid: set(gpu.nvlink_peers) for gpu in host.gpus.gpus}
    island, edge = {gpus[0].uuid}, [gpus[0].uuid]
    while edge:
        found = {uuid for uuid in peers.get(edge.pop(), set()) if uuid in peers} - island
        island |= found
        edge += sorted(found)
    if len(island) < 2 or any(gpu.uuid not in island for gpu in gpus):
        return ""
    return f"nvlink{min(gpu.index for gpu in host.gpus.gpus if gpu.uuid in island)}"


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """Sort key that puts ``gpu01-10`` after ``gpu01-2``."""
    return tuple((word, int(number or 0)) for word, number in re.findall(r"(\D*)(\d*)", name))


def _word(value: str | int | None) -> str:
    return "" if value is None else str(value)


def _refuse_duplicates(hosts: Sequence[HostInput]) -> None:
    seen_hosts: set[str] = set()
    seen_gpus: dict[str, str] = {}
    for item in hosts:
        host = item.gpus.host
        if host in seen_hosts:
            raise BerthError("hosts: the same host is listed twice", found=host, mend="name each host once")
        seen_hosts.add(host)
        for gpu in item.gpus.gpus:
            # Each host invents the same placeholder ids for cards whose UUID the driver can no longer read.
            if gpu.lost is None and gpu.uuid in seen_gpus:
                raise BerthError(
                    f"GPU {gpu.uuid} is on two hosts, {seen_gpus[gpu.uuid]} and {host}",
                    mend="two inventory names for one machine, or a copied simulation profile: remove one",
                )
            seen_gpus[gpu.uuid] = host


def _new_name(host: str, number: int, taken: Iterable[str]) -> str:
    used = set(taken)
    if f"{host}-{number}" not in used:
        return f"{host}-{number}"
    mine = [int(name[len(host) + 1 :]) for name in used if re.fullmatch(re.escape(host) + r"-\d+", name)]
    return f"{host}-{max(mine) + 1}"


def _groups(host: HostInput, before: Mapping[str, Slot], problems: list[str]) -> list[tuple[int, tuple[Gpu, ...]]]:
    """(number by driver order, GPUs) of each slot this host can have now."""
    parents = {gpu.mig_parent for gpu in host.gpus.gpus if gpu.mig_parent}
    # A GPU cut into MIG instances takes no work itself.
    cards = [gpu for gpu in host.gpus.gpus if gpu.uuid not in parents]
    for gpu in cards:
        if gpu.lost:
            problems.append(f"{host.gpus.host}: GPU {gpu.index} ({gpu.uuid}) gets no slot: {gpu.lost}")
    shaped: dict[str, tuple[Gpu, ...] | None] = {}
    for shape in host.shapes:
        _resolve_shape(host, cards, shape, before, shaped, problems)
    groups: list[tuple[int, tuple[Gpu, ...]]] = []
    number = 0
    for gpu in cards:
        group = shaped.get(gpu.uuid, (gpu,))
        if group is not None and gpu.uuid != group[0].uuid:
            continue
        if group is not None and all(member.lost is None for member in group):
            groups.append((number, group))
        number += 1
    return groups


def _resolve_shape(
    host: HostInput,
    cards: Sequence[Gpu],
    shape: tuple[str | int, ...],
    before: Mapping[str, Slot],
    shaped: dict[str, tuple[Gpu, ...] | None],
    problems: list[str],
) -> None:
    """Enter each GPU of ``shape`` into ``shaped`` with its group, or with None where the group cannot stand now."""
    found = [gpu for gpu in (_find(cards, key) for key in shape) if gpu is not None]
    for gpu in found:
        if gpu.uuid in shaped or found.count(gpu) > 1:
            raise BerthError(
                f"slot_shapes of {host.gpus.host}: GPU {gpu.index} ({gpu.uuid}) is named twice",
                found=[list(item) for item in host.shapes],
                allowed="each GPU in one slot",
                mend="correct slot_shapes of this host",
            )
    missing = [key for key in shape if _find(cards, key) is None]
    for key in missing:
        if not _was_there(host, cards, key, before):
            raise BerthError(
                f"slot_shapes of {host.gpus.host} names a GPU that is not there",
                found=key,
                allowed=", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in cards) or "none: the host shows no GPU",
                mend="correct slot_shapes of this host",
            )
    usable = not missing and all(gpu.lost is None for gpu in found)
    if not usable:
        problems.append(
            f"{host.gpus.host}: slot of GPUs {', '.join(map(str, shape))} cannot stand while one of them is gone or "
            "lost; its other GPUs are not used"
        )
    products = sorted({gpu.product for gpu in found})
    if usable and len(products) > 1:
        raise BerthError(
            f"slot_shapes of {host.gpus.host} groups unequal GPUs: the smallest would bind every one of them",
            found=", ".join(products),
            allowed="one GPU product in a slot",
            mend="correct slot_shapes of this host",
        )
    group = _in_known_order(found, cards, before) if usable and found else None
    shaped.update(dict.fromkeys((gpu.uuid for gpu in found), group))


def _find(cards: Sequence[Gpu], key: str | int) -> Gpu | None:
    if isinstance(key, int) or key.isdigit():
        return next((gpu for gpu in cards if gpu.index == int(key)), None)
    return next((gpu for gpu in cards if gpu.uuid == key), None)


def _was_there(host: HostInput, cards: Sequence[Gpu], key: str | int, before: Mapping[str, Slot]) -> bool:
    # A lost card may show a placeholder instead of its UUID: it can be the one that the shape names.
    if not isinstance(key, int) and any(gpu.lost for gpu in cards):
        return True
    mine = [slot for slot in before.values() if slot.host == host.gpus.host]
    return any(key in slot.gpu_uuids or str(key) in map(str, slot.gpu_indices) for slot in mine)


def _in_known_order(found: Sequence[Gpu], cards: Sequence[Gpu], before: Mapping[str, Slot]) -> tuple[Gpu, ...]:
    """Driver order at first sight; afterwards the order the slot already has, so that its first UUID stays first."""
    by_uuid = {gpu.uuid: gpu for gpu in found}
    for slot in before.values():
        if set(slot.gpu_uuids) == set(by_uuid):
            return tuple(by_uuid[uuid] for uuid in slot.gpu_uuids)
    order = [gpu.uuid for gpu in cards]
    return tuple(sorted(found, key=lambda gpu: order.index(gpu.uuid)))


def _slot(
    name: str,
    host: HostInput,
    gpus: tuple[Gpu, ...],
    before: Slot | None,
    busy: bool,
    reserve_mib: int,
    cluster: str,
    problems: list[str],
) -> Slot:
    vram = min(gpu.total_mib - gpu.reserved_mib for gpu in gpus) - reserve_mib
    if vram <= 0:
        problems.append(f"{name}: nothing can be promised: reserve_mib {reserve_mib} leaves {vram} MiB of its GPU")
    hidden = [gpu.index for gpu in gpus if gpu.processes is None]
    if hidden:
        counted = "as ours, because the last plan has berths here" if busy else "as foreign, all of what is used"
        problems.append(f"{name}: the driver shows no processes on GPU {hidden[0]}; its memory in use counts {counted}")
    foreign = max(foreign_mib(gpu, cluster, busy) for gpu in gpus)
    return Slot(
        name=name,
        host=host.gpus.host,
        gpu_uuids=tuple(gpu.uuid for gpu in gpus),
        gpu_indices=tuple(gpu.index for gpu in gpus),
        product=gpus[0].product,
        vram_mib=max(0, vram),
        total_mib=min(gpu.total_mib for gpu in gpus),
        foreign_mib=_step(foreign, before.foreign_mib if before else 0),
        rack=host.rack,
        zone=host.zone,
        compute_capability=gpus[0].compute_capability or "",
        nvlink_group=_nvlink_group(gpus, host),
        cost=host.costs.get(gpus[0].product, 1.0),
        cordoned=any(_find(host.gpus.gpus, key) in gpus for key in host.cordoned),
    )


def foreign_mib(gpu: Gpu, cluster: str, busy: bool) -> int:
    """MiB on ``gpu`` that processes outside ``cluster`` hold, and what is in use beyond all processes.

    Where the driver shows no processes the answer is a judgement: all of it when Berth has nothing there
    (``busy`` is False), else none.
    """
    if gpu.processes is None:
        return 0 if busy else gpu.used_mib
    strangers = sum(process.vram_mib or 0 for process in gpu.processes if process.cluster != cluster)
    rest = gpu.used_mib - sum(process.vram_mib or 0 for process in gpu.processes)
    # A process of ours whose size the driver does not tell explains the rest: its footprint is promised already.
    ours_untold = any(process.vram_mib is None and process.cluster == cluster for process in gpu.processes)
    return strangers + (rest if rest > UNACCOUNTED_TOLERANCE_MIB and not ours_untold else 0)


def _step(found: int, before: int) -> int:
    stepped = -(-found // FOREIGN_STEP_MIB) * FOREIGN_STEP_MIB
    # A value that swings around a step's edge would still flap: go down only once it has fallen by a whole step.
    return before if stepped < before < stepped + 2 * FOREIGN_STEP_MIB and found > 0 else stepped
