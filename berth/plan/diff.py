"""What one plan changes against another, berth by berth, in the order in which it is safe to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from berth.plan.pools import pools_of
from berth.plan.slots import natural
from berth.plan.types import Berth, Deployment, Plan, StrategyName

ChangeKind = Literal["start", "scale", "resize", "regroup", "stop"]
# Starts before stops: on a flip, the new place is serving before the old one goes.
_ORDER: tuple[ChangeKind, ...] = ("start", "scale", "resize", "regroup", "stop")


@dataclass(frozen=True)
class Change:
    """One berth that differs: replica counts before and after, footprint per GPU in MiB before and after.

    ``team``: the slots of the replica that it is now a part of; ``pool``: those of the pool that it is now one of.
    """

    kind: ChangeKind
    berth: str
    before: int
    after: int
    vram_mib_before: int
    vram_mib: int
    team: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()


def diff_plans(old: Plan | None, new: Plan) -> tuple[Change, ...]:
    """Every berth that starts, stops, scales or changes its footprint between ``old`` and ``new``."""
    was = {berth.name: berth for berth in old.berths} if old else {}
    now = {berth.name: berth for berth in new.berths}
    pools, pooled = _pooled(old), _pooled(new)
    changes = [_change(name, was.get(name), now.get(name), pools, pooled) for name in {*was, *now}]
    found = [change for change in changes if change is not None]
    return tuple(sorted(found, key=lambda change: (_ORDER.index(change.kind), natural(change.berth))))


_Group = tuple[tuple[str, ...], int]
"""The slots of a pool and the most replicas on each: when it changes, Serve restarts all of the pool."""


def _pooled(plan: Plan | None) -> dict[str, _Group]:
    """By the name of every berth that is one of a pool."""
    pools = pools_of(plan).values() if plan else ()
    return {berth.name: (pool.slots, pool.each) for pool in pools for berth in pool.berths}


def _change(
    name: str, old: Berth | None, new: Berth | None, pools: Mapping[str, _Group], pooled: Mapping[str, _Group]
) -> Change | None:
    before, after = (old.replicas if old else 0), (new.replicas if new else 0)
    was, now = (old.vram_mib if old else 0), (new.vram_mib if new else 0)
    pool, _ = pooled.get(name, ((), 0))
    if old is None:
        return Change("start", name, before, after, now, now, new.team if new else (), pool)
    if new is None:
        return Change("stop", name, before, after, was, was)
    if was != now:
        return Change("resize", name, before, after, was, now, new.team, pool)
    if old.team != new.team or pools.get(name) != pooled.get(name):
        return Change("regroup", name, before, after, now, now, new.team, pool)
    return Change("scale", name, before, after, now, now, pool=pool) if before != after else None


def flips(old: Plan | None, deployments: Sequence[Deployment], strategy: StrategyName) -> bool:
    """Whether any deployment stands under another strategy than it is now asked for: then moving is what was asked."""
    if old is None:
        return False
    return any(
        old.strategies.get(item.name, old.strategy) != (item.strategy or strategy)
        for item in deployments
        if item.name in old.deployments
    )


def describe(changes: tuple[Change, ...]) -> list[str]:
    """One line for people per change."""
    return [_line(change) for change in changes]


def _line(change: Change) -> str:
    if change.pool:
        return _pool_line(change)
    if not change.before and not change.after:
        # Nothing but room (``Berth.reserved``).
        verb = "keep room at" if change.kind == "start" else "give up the room at"
        return f"{verb} {change.berth}: {change.vram_mib} MiB for each replica to come"
    if change.kind == "start":
        part = f", part of a replica over {', '.join(change.team)}" if change.team else ""
        return f"start {change.berth}: {_count(change.after)} of {change.vram_mib} MiB{part}"
    if change.kind == "stop":
        return f"stop {change.berth}: {_count(change.before)} of {change.vram_mib} MiB"
    if change.kind == "scale":
        return f"scale {change.berth}: {change.before} -> {_count(change.after)} of {change.vram_mib} MiB"
    if change.kind == "regroup":
        team = f"part of a replica over {', '.join(change.team)}" if change.team else "a berth of its own"
        return f"regroup {change.berth}: now {team} (which restarts)"
    counts = f", {change.before} -> {_count(change.after)}" if change.before != change.after else ""
    return f"resize {change.berth}: {change.vram_mib_before} -> {change.vram_mib} MiB{counts} (its replicas restart)"


def _pool_line(change: Change) -> str:
    slots = f"{len(change.pool)} slot{'s' if len(change.pool) > 1 else ''}"
    if change.kind == "start":
        return f"start {change.berth}: now one of the pool over {slots}, {change.vram_mib} MiB for each replica"
    if change.kind == "scale":
        return f"scale {change.berth}: {change.before} -> {change.after} of the replicas that its pool has at least"
    if change.kind == "resize":
        mib = f"{change.vram_mib_before} -> {change.vram_mib} MiB"
        return f"resize {change.berth}: {mib} for each replica of the pool over {slots} (all of which restart)"
    return f"regroup {change.berth}: now one of the pool over {slots} (all replicas of which restart)"


def _count(replicas: int) -> str:
    return f"{replicas} replica" if replicas == 1 else f"{replicas} replicas"


def _counts(berth: Berth) -> str:
    if berth.pool:
        return f"up to {_count(berth.replicas + berth.reserved)}"
    most = _count(berth.replicas + berth.reserved)
    return f"{berth.replicas} to {most}" if berth.reserved else most


def _team(berth: Berth) -> str:
    if berth.pool:
        return f", of a pool of {berth.pool} at most"
    return f", part of one over {', '.join(berth.team)}" if berth.team else ""


def plan_text(plan: Plan | None) -> str:
    """The plan as lines to compare by eye: every slot, what it is promised, and what stands on it."""
    if plan is None:
        return ""
    lines = [f"strategy {plan.strategy}"]
    for slot in plan.slots:
        here = [berth for berth in plan.berths if berth.slot == slot.name]
        promised = sum((berth.replicas + berth.reserved) * berth.vram_mib for berth in here)
        foreign = f", {slot.foreign_mib} foreign" if slot.foreign_mib else ""
        gpus = " + ".join(slot.gpu_uuids)
        lines.append(f"{slot.name} {slot.product} {gpus}: {promised} of {slot.vram_mib} MiB promised{foreign}")
        lines += [f"  {berth.name}: {_counts(berth)} of {berth.vram_mib} MiB{_team(berth)}" for berth in here]
    lines += [f"unplaced {item.deployment}: {_count(item.replicas)}: {item.reason}" for item in plan.unplaced]
    return "\n".join(lines) + "\n"


# --- What it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How long a replica takes to start: ``start_s`` whatever its size (processes, compilation, CUDA graphs), and its
    memory at ``load_mib_per_s``.

    The defaults are on the slow side of a local disk and a warm compile cache; measure yours (a replica's log tells
    when it began and when it served) and set them.
    """

    load_mib_per_s: float = 1024.0
    start_s: float = 60.0

    def seconds(self, vram_mib: int) -> float:
        """Seconds until a replica of ``vram_mib`` on each of its GPUs serves; its GPUs load at the same time. The KV
        cache is counted as if it were read too, so this errs on the long side."""
        return self.start_s + vram_mib / self.load_mib_per_s


@dataclass(frozen=True)
class Cost:
    """What going from one plan to another takes, in replicas.

    ``moved`` leave a GPU that is still there for another, ``restarted`` stay on theirs with another footprint,
    ``replaced`` stood on GPUs that are gone, ``lost`` too, and have no new place. ``reload_mib`` is the VRAM that is
    filled anew on all GPUs together, ``cold_start_s`` the seconds of all starts, one after another.
    """

    moved: int
    restarted: int
    replaced: int
    lost: int
    added: int
    removed: int
    reload_mib: int
    cold_start_s: float


@dataclass
class _Flow:
    """Replicas of one deployment that start and stop."""

    starts: int = 0
    stops: int = 0
    restarts: int = 0
    lost: int = 0


def cost_of(old: Plan | None, new: Plan, rates: Rates | None = None) -> Cost:
    """The cost of going from ``old`` to ``new``; a GPU is the same where its UUID is, whatever its slot is called."""
    rates = rates or Rates()
    was, now = by_gpus(old), by_gpus(new)
    here = {uuid for slot in new.slots for uuid in slot.gpu_uuids}
    flows: dict[str, _Flow] = {}
    reload_mib, seconds = 0, 0.0
    for key in sorted({*was, *now}):
        name, gpus = key
        flow = flows.setdefault(name, _Flow())
        before, after = was.get(key), now.get(key)
        old_count, new_count = (before.replicas if before else 0), (after.replicas if after else 0)
        same = before is None or after is None or before.vram_mib == after.vram_mib
        starts = max(0, new_count - old_count) if same else new_count
        if not here.issuperset(gpus):
            flow.lost += old_count
            continue
        flow.restarts += 0 if same else min(old_count, new_count)
        flow.starts += max(0, new_count - old_count)
        flow.stops += max(0, old_count - new_count)
        if after is not None:
            reload_mib += starts * after.vram_mib * len(gpus)
            seconds += starts * rates.seconds(after.vram_mib)
    moved = {name: min(flow.starts, flow.stops) for name, flow in flows.items()}
    replaced = {name: min(flow.starts - moved[name], flow.lost) for name, flow in flows.items()}
    return Cost(
        moved=sum(moved.values()),
        restarted=sum(flow.restarts for flow in flows.values()),
        replaced=sum(replaced.values()),
        lost=sum(flow.lost - replaced[name] for name, flow in flows.items()),
        added=sum(flow.starts - replaced[name] - moved[name] for name, flow in flows.items()),
        removed=sum(flow.stops - moved[name] for name, flow in flows.items()),
        reload_mib=reload_mib,
        cold_start_s=round(seconds, 1),
    )


def by_gpus(plan: Plan | None) -> dict[tuple[str, tuple[str, ...]], Berth]:
    """The berths of ``plan`` by deployment and GPUs (UUIDs, sorted)."""
    if plan is None:
        return {}
    gpus = {slot.name: tuple(sorted(slot.gpu_uuids)) for slot in plan.slots}
    return {(berth.deployment, gpus[berth.slot]): berth for berth in plan.berths}
