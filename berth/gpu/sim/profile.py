"""The profile of a simulated driver: read strictly, made whole, and compiled for the C library.

Memory is in MiB. A profile as people write it may leave out UUIDs and PCI addresses and repeat a card; ``expand``
makes it whole, and only whole profiles are compiled.
"""

from __future__ import annotations

import re
import uuid as uuids
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from berth.codec import STRICT, dump, load, replace
from berth.errors import BerthError

MAX_GPUS = 32
MAX_MIGS = 7
FALLEN_OFF_THE_BUS = 79
"""The XID that the driver logs when a GPU stops answering on PCIe."""

_NAMESPACE = uuids.UUID("6f1d7c3e-43a5-5b0e-9c55-0d6a54f6b5a1")
_NVLINK_VERSION = {7: 2, 8: 3, 9: 4, 10: 5}
_LINKS_TO_SWITCH = 18

# 16 TiB: what fits the library's arithmetic whatever is added up.
Count = Annotated[int, Field(strict=True, ge=0, le=2**24)]
Positive = Annotated[int, Field(strict=True, gt=0, le=2**24)]
Flag = Annotated[bool, Field(strict=True)]
GpuUuid = Annotated[str, Field(pattern=r"^GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
MigUuid = Annotated[str, Field(pattern=r"^MIG-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Product = Annotated[str, Field(pattern=r"^[\x21-\x7e]([\x20-\x7e]{0,70}[\x21-\x7e])?$")]
Group = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,32}$")]


@dataclass(frozen=True)
class MigInstance:
    """One MIG instance. ``profile`` is NVIDIA's name for its shape, such as ``3g.40gb``."""

    __pydantic_config__ = STRICT
    profile: Annotated[str, Field(pattern=r"^[1-7]g\.[0-9]{1,3}gb(\+me)?$")]
    memory_mib: Positive
    uuid: MigUuid | None = None
    reserved_mib: Count = 0
    leak_mib: Count = 0
    multiprocessors: Positive | None = None


@dataclass(frozen=True)
class SimGpu:
    """One card, and what is wrong with it.

    ``memory_mib`` is what the driver calls total and ``reserved_mib`` what it keeps of that. ``nvlink`` is a list of
    the positions of its peers, or the name of a group whose cards all meet behind a switch. ``mig`` turns MIG mode
    on. ``repeat`` stands for that many such cards. ``lost``, ``xid`` and ``leak_mib`` are faults.
    """

    __pydantic_config__ = STRICT
    product: Product
    memory_mib: Positive
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
    reserved_mib: Count = 0
    uuid: GpuUuid | None = None
    pci_bus_id: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{4}){1,2}(:[0-9A-Fa-f]{2}){2}\.0$")] | None = None
    pci_device_id: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    numa_node: Annotated[int, Field(strict=True, ge=0, lt=64)] | None = None
    nvlink: Group | tuple[Count, ...] | None = None
    mig: Annotated[tuple[MigInstance, ...], Field(max_length=MAX_MIGS)] | None = None
    utilization_percent: Annotated[int, Field(strict=True, ge=0, le=100)] = 0
    temperature_c: Annotated[int, Field(strict=True, ge=0, le=150)] | None = None
    power_w: Annotated[int, Field(strict=True, ge=0, le=100_000)] | None = None
    persistence_mode: Flag = True
    repeat: Annotated[int, Field(strict=True, ge=1, le=MAX_GPUS)] = 1
    lost: Flag = False
    xid: Annotated[int, Field(strict=True, gt=0, lt=1000)] | None = None
    leak_mib: Count = 0


@dataclass(frozen=True)
class Profile:
    """What one simulated driver shows.

    ``vram_scale`` is simulated MiB for each MiB really held; ``context_mib`` what a process takes with its first
    allocation on a GPU. ``order`` lists positions in ``gpus`` (after ``repeat``) by the index they are shown under.
    With ``show_processes`` false the driver lists no pids, as in some containers.
    """

    __pydantic_config__ = STRICT
    driver_version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){1,3}$")]
    gpus: tuple[SimGpu, ...]
    cuda_version: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")] = "13.0"
    vram_scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    context_mib: Count = 300
    show_processes: Flag = True
    order: tuple[Count, ...] | None = None


def parse(data: object, what: str) -> Profile:
    """The profile in plain YAML data; ``what`` names where it came from in errors.

    Raises:
        BerthError: naming the key, what was found there and what is allowed.
    """
    if not isinstance(data, dict):
        raise BerthError(f"{what}: a GPU profile is a mapping", found=type(data).__name__, allowed=_keys())
    return load(Profile, data, what, mend=f"correct that key; known at the top: {_keys()}")


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file.

    Raises:
        BerthError: the file cannot be read or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BerthError(f"GPU profile {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise BerthError(f"GPU profile {path} is not YAML: {error}") from None


def named(name: str) -> tuple[object, str]:
    """The profile that comes with Berth under this name, or is at this path, and where it was read.

    Raises:
        BerthError: there is none, or it is no YAML.
    """
    path = shipped().get(name, Path(name))
    return read_yaml(path), str(path)


def shipped() -> dict[str, Path]:
    """The profiles that come with Berth, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "profiles").glob("*.yml"))}


def expand(profile: Profile, seed: str, what: str) -> Profile:
    """The whole profile: repeats written out, every card and instance with a UUID and an address.

    UUIDs left out follow from ``seed`` (the host's name, so that no two hosts share one) and the position alone.

    Raises:
        BerthError: cards that contradict each other or themselves.
    """
    cards = [card for card in profile.gpus for _ in range(card.repeat)]
    if len(cards) > MAX_GPUS:
        raise BerthError(f"{what}: gpus: too many cards", found=len(cards), allowed=f"at most {MAX_GPUS}")
    gpus = tuple(_complete(card, position, seed) for position, card in enumerate(cards))
    order = profile.order if profile.order is not None else tuple(range(len(gpus)))
    if sorted(order) != list(range(len(gpus))):
        allowed = f"every position from 0 to {len(gpus) - 1} once"
        raise BerthError(f"{what}: order: not a permutation of the cards", found=list(order), allowed=allowed)
    for position, gpu in enumerate(gpus):
        _check_card(gpu, f"{what}: gpus.{position}")
        _check_peers(gpus, position, f"{what}: gpus.{position}.nvlink")
    _check_unique("uuid", [gpu.uuid for gpu in gpus] + [mig.uuid for gpu in gpus for mig in gpu.mig or ()], what)
    _check_unique("pci_bus_id", [gpu.pci_bus_id for gpu in gpus], what)
    return replace(profile, gpus=gpus, order=order)


def to_yaml(profile: Profile) -> str:
    """A profile for people to read; what stands at its default is left out."""
    data = {key: value for key, value in dump(profile).items() if value is not None}
    data["gpus"] = [_sparse(gpu) for gpu in data["gpus"]]
    return yaml.safe_dump(data, sort_keys=False, width=100)


def compile_text(profile: Profile) -> str:
    """The lines that nvml.c reads; the profile must be whole (``expand``)."""
    cuda_major, cuda_minor = profile.cuda_version.split(".")
    lines = [
        "berth-gpu-sim 1",
        f"driver {profile.driver_version}",
        f"nvml {cuda_major}.{profile.driver_version}",
        f"cuda {int(cuda_major) * 1000 + int(cuda_minor) * 10}",
        f"vram_scale {profile.vram_scale!r}",
        f"context_mib {profile.context_mib}",
        f"show_processes {int(profile.show_processes)}",
    ]
    index = {position: shown for shown, position in enumerate(profile.order or ())}
    groups = sorted({gpu.nvlink for gpu in profile.gpus if isinstance(gpu.nvlink, str)})
    for position, gpu in enumerate(profile.gpus):
        lines += [f"gpu {position}", f"index {index[position]}", *_card_lines(gpu, groups)]
    return "\n".join([*lines, "end"]) + "\n"


def kernel_log(profile: Profile) -> str:
    """What the kernel would have logged of the cards' XIDs."""
    lines = []
    for gpu in profile.gpus:
        if xid := effective_xid(gpu):
            address = nvml_pci(gpu.pci_bus_id or "")[4:-2].lower()
            tail = "GPU has fallen off the bus." if gpu.lost else "pid='<unknown>', name=<unknown>"
            lines.append(f"kernel: NVRM: Xid (PCI:{address}): {xid}, {tail}")
    return "".join(f"{line}\n" for line in lines)


def effective_xid(gpu: SimGpu) -> int | None:
    """The last XID of a card; losing one raises 79."""
    return gpu.xid or (FALLEN_OFF_THE_BUS if gpu.lost else None)


def nvml_pci(address: str) -> str:
    """A PCI address as NVML writes it: ``0000:3b:00.0`` -> ``00000000:3B:00.0``."""
    domain, rest = address.split(":", 1)
    return f"{domain:0>8}:{rest}".upper()


def _keys() -> str:
    return ", ".join(Profile.__dataclass_fields__)


def _complete(card: SimGpu, position: int, seed: str) -> SimGpu:
    migs = card.mig and tuple(
        replace(mig, uuid=mig.uuid or f"MIG-{uuids.uuid5(_NAMESPACE, f'{seed}/{position}/{number}')}")
        for number, mig in enumerate(card.mig)
    )
    return replace(
        card,
        repeat=1,
        uuid=card.uuid or f"GPU-{uuids.uuid5(_NAMESPACE, f'{seed}/{position}')}",
        pci_bus_id=nvml_pci(card.pci_bus_id or f"0000:{0x0B + 4 * position:02x}:00.0"),
        mig=migs,
    )


def _check_card(gpu: SimGpu, where: str) -> None:
    if gpu.reserved_mib + gpu.leak_mib > gpu.memory_mib:
        found = f"{gpu.reserved_mib} + {gpu.leak_mib}"
        raise BerthError(
            f"{where}: reserved_mib + leak_mib is more than the card has", found=found, allowed=gpu.memory_mib
        )
    if gpu.mig is None:
        return
    if not _mig_capable(gpu):
        raise BerthError(
            f"{where}.mig: {gpu.product} has no MIG",
            found=f"compute capability {gpu.compute_capability}",
            allowed="8.0, 9.0, 10.0",
        )
    if gpu.leak_mib or gpu.nvlink is not None:
        raise BerthError(
            f"{where}: a card in MIG mode has no leak_mib or nvlink of its own", allowed="leak_mib under mig"
        )
    if any(mig.reserved_mib + mig.leak_mib > mig.memory_mib for mig in gpu.mig):
        raise BerthError(f"{where}.mig: reserved_mib + leak_mib is more than the instance's memory_mib")
    slices, memory = sum(int(mig.profile[0]) for mig in gpu.mig), sum(mig.memory_mib for mig in gpu.mig)
    if slices > MAX_MIGS:
        raise BerthError(
            f"{where}.mig: more compute slices than the card has", found=slices, allowed=f"at most {MAX_MIGS}"
        )
    if memory > gpu.memory_mib:
        raise BerthError(
            f"{where}.mig: more memory than the card has", found=memory, allowed=f"at most {gpu.memory_mib}"
        )


def _check_peers(gpus: tuple[SimGpu, ...], position: int, where: str) -> None:
    peers = gpus[position].nvlink
    if peers is None or isinstance(peers, str):
        return
    for peer in peers:
        if peer == position or peer >= len(gpus):
            raise BerthError(f"{where}: no such peer", found=peer, allowed="positions of other cards")
        back = gpus[peer].nvlink
        if not isinstance(back, tuple) or position not in back:
            raise BerthError(f"{where}: a link has two ends, and card {peer} does not name {position}", found=back)
    if len(peers) > _LINKS_TO_SWITCH or len(set(peers)) < len(peers):
        raise BerthError(f"{where}: a peer twice, or more than {_LINKS_TO_SWITCH}", found=list(peers))


def _check_unique(key: str, values: list[str | None], what: str) -> None:
    twice = sorted({value for value in values if value and values.count(value) > 1})
    if twice:
        raise BerthError(
            f"{what}: {key}: the same twice", found=", ".join(twice), allowed="one card each (not with repeat)"
        )


def _mig_capable(gpu: SimGpu) -> bool:
    """A100/A30, Hopper and data-centre Blackwell."""
    return re.fullmatch(r"8\.0|9\.0|10\.[0-9]", gpu.compute_capability) is not None


def _card_lines(gpu: SimGpu, groups: list[str]) -> list[str]:
    major = int(gpu.compute_capability.split(".")[0])
    known = {
        "uuid": gpu.uuid,
        "name": gpu.product,
        "pci": (gpu.pci_bus_id or "").removesuffix(".0"),
        "pci_device_id": gpu.pci_device_id,
        "cc": gpu.compute_capability,
        "numa": -1 if gpu.numa_node is None else gpu.numa_node,
        "total_mib": gpu.memory_mib,
        "reserved_mib": gpu.reserved_mib,
        "leak_mib": gpu.leak_mib,
        "lost": int(gpu.lost),
        "xid": effective_xid(gpu) or 0,
        "mig_capable": int(_mig_capable(gpu)),
        "mig_enabled": int(gpu.mig is not None),
        "persistence": int(gpu.persistence_mode),
        "temperature": -1 if gpu.temperature_c is None else gpu.temperature_c,
        "power_mw": -1 if gpu.power_w is None else gpu.power_w * 1000,
        "utilization": gpu.utilization_percent,
        "nvlink_version": _NVLINK_VERSION.get(major, 0),
    }
    lines = [f"{key} {value}" for key, value in known.items()]
    lines += [_mig_line(gpu, mig, number) for number, mig in enumerate(gpu.mig or ())]
    if isinstance(gpu.nvlink, str):
        return lines + [f"link switch {groups.index(gpu.nvlink)}"] * _LINKS_TO_SWITCH
    return lines + [f"link gpu {peer}" for peer in gpu.nvlink or ()]


def _mig_line(gpu: SimGpu, mig: MigInstance, number: int) -> str:
    slices = int(mig.profile[0])
    # 14 multiprocessors to a slice is the A100's figure.
    multiprocessors = mig.multiprocessors or 14 * slices
    numbers = f"{number + 1} {slices} {multiprocessors} {mig.memory_mib} {mig.reserved_mib} {mig.leak_mib}"
    return f"mig {mig.uuid} {numbers} {gpu.product} MIG {mig.profile}"


def _sparse(gpu: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: item.default for name, item in SimGpu.__dataclass_fields__.items()}
    kept = {key: value for key, value in gpu.items() if value != defaults[key]}
    if kept.get("mig"):
        kept["mig"] = [{key: value for key, value in mig.items() if value} for mig in kept["mig"]]
    return kept
