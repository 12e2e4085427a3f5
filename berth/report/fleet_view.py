"""A plan as a picture sees it: racks, hosts, GPUs, and on each GPU the blocks of memory that are spoken for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from berth.plan.reasons import gib
from berth.plan.slots import natural
from berth.plan.types import Plan, Slot, Solution, Unplaced

BlockKind = Literal["replicas", "reserved", "foreign"]
_KINDS: tuple[tuple[BlockKind, str], ...] = (("replicas", "replicas"), ("reserved", "reserved"))


@dataclass(frozen=True)
class Block:
    """Memory of one GPU that is spoken for: ``count`` replicas (or places kept free for them), ``mib`` together."""

    kind: BlockKind
    deployment: str
    count: int
    mib: int


@dataclass(frozen=True)
class Bar:
    """One slot: each of its GPUs looks like this."""

    slot: Slot
    blocks: tuple[Block, ...]

    @property
    def label(self) -> str:
        """The GPU's index, or "0-3" for several; the tail of the slot's name where that tells more (MIG instances)."""
        indices = sorted(self.slot.gpu_indices)
        if len(indices) == 1:
            tail = self.slot.name.removeprefix(f"{self.slot.host}-")
            return tail if tail.startswith(str(indices[0])) and len(tail) <= 5 else str(indices[0])
        if indices == list(range(indices[0], indices[-1] + 1)) and len(indices) > 2:
            return f"{indices[0]}-{indices[-1]}"
        return "+".join(map(str, indices)) if len(indices) <= 2 else f"{len(indices)} GPUs"

    @property
    def promised_mib(self) -> int:
        """What Berth has promised on each GPU."""
        return sum(block.mib for block in self.blocks if block.kind != "foreign")

    @property
    def taken_mib(self) -> int:
        """What is spoken for on each GPU, by whomever."""
        return sum(block.mib for block in self.blocks)


@dataclass(frozen=True)
class HostView:
    """One host and its GPUs."""

    name: str
    zone: str
    rack: str
    products: tuple[str, ...]
    bars: tuple[Bar, ...]

    @property
    def place(self) -> str:
        """Zone and rack in words; "" when neither is known."""
        named = [f"{word} {name}" for word, name in (("zone", self.zone), ("rack", self.rack)) if name]
        return ", ".join(named)


@dataclass(frozen=True)
class ModelView:
    """One deployment: its number in the legend, and how much of it is placed."""

    number: int
    name: str
    placed: int
    asked: int
    mib: int


@dataclass(frozen=True)
class FleetView:
    """Everything a picture shows."""

    hosts: tuple[HostView, ...]
    models: Mapping[str, ModelView]
    unplaced: tuple[Unplaced, ...]

    @property
    def bars(self) -> int:
        """How many bars there are to draw."""
        return sum(len(host.bars) for host in self.hosts)


def fleet_view(plan: Plan) -> FleetView:
    """``plan`` by rack, host and GPU, in natural order; the refused by priority of what is missing most."""
    blocks: dict[str, list[Block]] = defaultdict(list)
    placed: dict[str, int] = defaultdict(int)
    mib: dict[str, int] = defaultdict(int)
    width = {slot.name: len(slot.gpu_uuids) for slot in plan.slots}
    for berth in plan.berths:
        placed[berth.deployment] += berth.replicas if berth.leads else 0
        mib[berth.deployment] += berth.replicas * berth.vram_mib * width[berth.slot]
        for kind, count in _KINDS:
            if number := getattr(berth, count):
                blocks[berth.slot].append(Block(kind, berth.deployment, number, number * berth.vram_mib))
    hosts: dict[str, list[Bar]] = defaultdict(list)
    for slot in plan.slots:
        foreign = [Block("foreign", "", 1, slot.foreign_mib)] if slot.foreign_mib else []
        hosts[slot.host].append(Bar(slot, (*blocks[slot.name], *foreign)))
    names = sorted({*plan.deployments, *placed})
    return FleetView(
        tuple(sorted((_host(name, bars) for name, bars in hosts.items()), key=_by_place)),
        {
            name: ModelView(number, name, placed[name], plan.deployments.get(name, placed[name]), mib[name])
            for number, name in enumerate(names, 1)
        },
        tuple(sorted(plan.unplaced, key=lambda item: (-item.replicas, item.deployment))),
    )


def _host(name: str, bars: list[Bar]) -> HostView:
    first = bars[0].slot
    ordered = sorted(bars, key=lambda bar: (bar.slot.gpu_indices, natural(bar.slot.name)))
    return HostView(name, first.zone, first.rack, tuple(sorted({bar.slot.product for bar in bars})), tuple(ordered))


def _by_place(host: HostView) -> tuple[object, ...]:
    return natural(host.zone), natural(host.rack), natural(host.name)


def headline(solution: Solution) -> str:
    """How good the plan is, in one sentence with its proof."""
    plan, told = solution.plan, solution.summary
    asked, missing = sum(plan.deployments.values()), sum(item.replicas for item in plan.unplaced)
    every = sum(len(slot.gpu_uuids) for slot in plan.slots)
    hosts = len({slot.host for slot in plan.slots})
    parts = [
        f"{plan.strategy}: {asked - missing} of {asked} replicas placed on {told.gpus_used} of {every} GPUs, "
        f"{told.hosts_used} of {hosts} hosts",
        f"no plan can use fewer than {told.lower_bound_gpus} GPUs",
        "proven optimal" if told.optimal else f"gap to the bound {told.gap:.1%}",
        f"fullest GPU {told.max_gpu_load:.0%}",
    ]
    if told.cost != told.gpus_used:
        parts.append(f"cost {told.cost:g} (at least {told.lower_bound_cost:g})")
    if told.moves:
        parts.append(f"{told.moves} standing replica{'s' if told.moves > 1 else ''} moved")
    if told.replaced:
        gone = (
            "replica is replaced, its GPU is gone" if told.replaced == 1 else "replicas are replaced, their GPU is gone"
        )
        parts.append(f"{told.replaced} {gone}")
    return "; ".join(parts)


def missing_of(replicas: int, room: int) -> str:
    """``2 replicas and room for 1 more``: what has no place."""
    parts = [f"{replicas} replica{'s' if replicas != 1 else ''}"] if replicas else []
    return " and ".join([*parts, *([f"room for {room} more"] if room else [])])


def filled(bar: Bar) -> str:
    """ "38.2 of 44.4" GiB of each GPU of the bar."""
    return f"{gib(bar.taken_mib)} of {gib(bar.slot.vram_mib)}"
