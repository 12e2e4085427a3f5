"""What one plan changes against another, berth by berth, in the order in which it is safe to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from berth.plan.slots import natural
from berth.plan.types import Berth, Plan

ChangeKind = Literal["start", "scale", "resize", "stop"]
# Starts before stops: on a flip, the new place is serving before the old one goes.
_ORDER: tuple[ChangeKind, ...] = ("start", "scale", "resize", "stop")


@dataclass(frozen=True)
class Change:
    """One berth that differs: replica counts before and after, footprint per GPU in MiB before and after."""

    kind: ChangeKind
    berth: str
    before: int
    after: int
    vram_mib_before: int
    vram_mib: int


def diff_plans(old: Plan | None, new: Plan) -> tuple[Change, ...]:
    """Every berth that starts, stops, scales or changes its footprint between ``old`` and ``new``."""
    was = {berth.name: berth for berth in old.berths} if old else {}
    now = {berth.name: berth for berth in new.berths}
    changes = [_change(name, was.get(name), now.get(name)) for name in {*was, *now}]
    found = [change for change in changes if change is not None]
    return tuple(sorted(found, key=lambda change: (_ORDER.index(change.kind), natural(change.berth))))


def _change(name: str, old: Berth | None, new: Berth | None) -> Change | None:
    before, after = (old.replicas if old else 0), (new.replicas if new else 0)
    was, now = (old.vram_mib if old else 0), (new.vram_mib if new else 0)
    if old is None:
        return Change("start", name, before, after, now, now)
    if new is None:
        return Change("stop", name, before, after, was, was)
    if was != now:
        return Change("resize", name, before, after, was, now)
    return Change("scale", name, before, after, now, now) if before != after else None


def describe(changes: tuple[Change, ...]) -> list[str]:
    """One line for people per change."""
    return [_line(change) for change in changes]


def _line(change: Change) -> str:
    if change.kind == "start":
        return f"start {change.berth}: {_count(change.after)} of {change.vram_mib} MiB"
    if change.kind == "stop":
        return f"stop {change.berth}: {_count(change.before)} of {change.vram_mib} MiB"
    if change.kind == "scale":
        return f"scale {change.berth}: {change.before} -> {_count(change.after)} of {change.vram_mib} MiB"
    counts = f", {change.before} -> {_count(change.after)}" if change.before != change.after else ""
    return f"resize {change.berth}: {change.vram_mib_before} -> {change.vram_mib} MiB{counts} (its replicas restart)"


def _count(replicas: int) -> str:
    return f"{replicas} replica" if replicas == 1 else f"{replicas} replicas"


def plan_text(plan: Plan | None) -> str:
    """The plan as lines to compare by eye: every slot, what it is promised, and what stands on it."""
    if plan is None:
        return ""
    lines = [f"strategy {plan.strategy}"]
    for slot in plan.slots:
        here = [berth for berth in plan.berths if berth.slot == slot.name]
        promised = sum(berth.replicas * berth.vram_mib for berth in here)
        foreign = f", {slot.foreign_mib} foreign" if slot.foreign_mib else ""
        gpus = " + ".join(slot.gpu_uuids)
        lines.append(f"{slot.name} {slot.product} {gpus}: {promised} of {slot.vram_mib} MiB promised{foreign}")
        lines += [f"  {berth.name}: {_count(berth.replicas)} of {berth.vram_mib} MiB" for berth in here]
    lines += [f"unplaced {item.deployment}: {_count(item.replicas)}: {item.reason}" for item in plan.unplaced]
    return "\n".join(lines) + "\n"
