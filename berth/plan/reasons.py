"""Why a berth is where it is and why replicas fit nowhere, in words with numbers, for the engineer on call.

Reasons follow from the finished plan alone, so planning twice tells the same; what happened once (a move) is kept with
the berth for as long as nothing around it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from berth.plan.types import Berth, Deployment, Plan, Slot, StrategyName

SHOWN_SLOTS = 8


def gib(mib: int) -> str:
    """MiB as GiB with one decimal, the unit in which people think of GPUs."""
    return f"{mib / 1024:.1f}"


def short_product(product: str) -> str:
    """The product without the maker's name."""
    return product.removeprefix("NVIDIA ").strip()


def why_here(
    berth: Berth, slot: Slot, plan: Plan, previous: Plan | None, evicted: Mapping[tuple[str, str], int]
) -> str:
    """The reason of one berth of ``plan``; ``evicted`` tells who lost room on which slot in this run."""
    before = _same_as_before(berth, slot, plan, previous)
    if before is not None:
        return before
    strategy = plan.strategies[berth.deployment]
    where = f"{short_product(slot.product)} {slot.name}"
    promised = sum(item.replicas * item.vram_mib for item in plan.berths if item.slot == slot.name)
    per_gpu = " on each GPU" if len(slot.gpu_uuids) > 1 else ""
    parts = [
        f"{strategy}: {_manner(berth, slot, where, plan, strategy)}",
        f"{gib(promised)} of {gib(slot.vram_mib)} GiB promised{per_gpu}",
    ]
    if slot.foreign_mib:
        parts.append(f"{gib(slot.foreign_mib)} GiB held by strangers")
    moved = _moved(berth, plan, previous, evicted)
    return "; ".join(parts) + (f"; {moved}" if moved else "")


def _same_as_before(berth: Berth, slot: Slot, plan: Plan, previous: Plan | None) -> str | None:
    if previous is None or slot not in previous.slots:
        return None
    if plan.strategies[berth.deployment] != previous.strategies.get(berth.deployment):
        return None
    if plan.deployments[berth.deployment] != previous.deployments.get(berth.deployment):
        return None
    if _around(berth, plan) != _around(berth, previous):
        return None
    return next((item.reason for item in previous.berths if item.name == berth.name), None)


def _around(berth: Berth, plan: Plan) -> set[tuple[str, str, int, int]]:
    """Everything that a berth's reason speaks of."""
    return {
        (item.deployment, item.slot, item.replicas, item.vram_mib)
        for item in plan.berths
        if item.slot == berth.slot or item.deployment == berth.deployment
    }


def _manner(berth: Berth, slot: Slot, where: str, plan: Plan, strategy: StrategyName) -> str:
    if len(slot.gpu_uuids) > 1:
        return f"has all {len(slot.gpu_uuids)} GPUs of {where} to itself"
    mine = [item for item in plan.berths if item.deployment == berth.deployment]
    if strategy in ("spread", "strict_spread"):
        return _spread_manner(berth, where, plan, mine)
    others = [
        item.deployment for item in plan.berths if item.slot == berth.slot and item.deployment != berth.deployment
    ]
    total = plan.deployments[berth.deployment]
    one = berth.replicas == 1
    together = f"{berth.replicas} of {total} replica{'s' if total > 1 else ''}"
    beside = (
        f"{together} share{'s' if one else ''} {where} with {', '.join(others)}"
        if others
        else f"{together} alone on {where}"
    )
    if strategy == "strict_pack":
        return f"{beside}; all replicas are on {slot.host}, on {len(mine)} GPU{'s' if len(mine) > 1 else ''}"
    return f"{beside}; {'it opens this GPU' if one and not others else 'opening another GPU was not needed'}"


def _spread_manner(berth: Berth, where: str, plan: Plan, mine: Sequence[Berth]) -> str:
    by_name = {slot.name: slot for slot in plan.slots}
    homes = [by_name[item.slot] for item in mine]
    counts = [
        (len({home.zone for home in homes}), "zone"),
        (len({(home.zone, home.rack) for home in homes}), "rack"),
        (len({home.host for home in homes}), "host"),
        (len(homes), "GPU"),
    ]
    told = [f"{number} {word}s" for number, word in counts if number > 1] or ["1 GPU"]
    total = sum(item.replicas for item in mine)
    replicas = "1 replica" if total == 1 else f"{total} replicas"
    return f"{berth.replicas} on {where}; {replicas} over {', '.join(told)}"


def _moved(berth: Berth, plan: Plan, previous: Plan | None, evicted: Mapping[tuple[str, str], int]) -> str:
    if previous is None or any(item.name == berth.name for item in previous.berths):
        return ""
    was = previous.strategies.get(berth.deployment)
    if was is not None and was != plan.strategies[berth.deployment]:
        return f"planned anew, the strategy was {was}"
    by_name = {slot.name: slot for slot in plan.slots}
    for (deployment, name), replicas in sorted(evicted.items()):
        if deployment == berth.deployment:
            slot = by_name[name]
            stranger = f" and strangers hold {gib(slot.foreign_mib)} GiB there" if slot.foreign_mib else ""
            return f"{replicas} moved off {name}, which can promise {gib(slot.vram_mib)} GiB{stranger}"
    gone = [item.slot for item in previous.berths if item.deployment == berth.deployment and item.slot not in by_name]
    return f"takes the place of {', '.join(gone)}, which is gone" if gone else ""


def why_nowhere(
    deployment: Deployment, strategy: StrategyName, plan: Plan, left: Mapping[str, int], missing: int
) -> str:
    """The sum that shows why ``missing`` replicas of ``deployment`` are in no slot of ``plan``.

    ``left`` is what may still be promised on each GPU of each slot, in MiB; zero where one replica holds the slot.
    """
    head = f"{missing} of {deployment.replicas} replicas fit nowhere"
    shaped = [slot for slot in plan.slots if len(slot.gpu_uuids) == deployment.gpus_per_replica]
    if not plan.slots:
        return f"{head}: there is no GPU slot at all"
    if not shaped:
        sizes = sorted({len(slot.gpu_uuids) for slot in plan.slots})
        return (
            f"{head}: each needs a slot of {deployment.gpus_per_replica} GPUs, slots here have "
            f"{', '.join(map(str, sizes))}; group GPUs with slot_shapes"
        )
    fitting = [(slot, size) for slot in shaped if (size := deployment.footprint_mib(slot.product)) is not None]
    if not fitting:
        allowed = deployment.products or tuple(deployment.vram_mib)
        here = sorted({slot.product for slot in shaped})
        return f"{head}: it may run on {', '.join(sorted(allowed))} only, here are {', '.join(here)}"
    if all(size > slot.vram_mib for slot, size in fitting):
        largest, size = max(fitting, key=lambda pair: (pair[0].vram_mib, -pair[1]))
        return (
            f"{head}: {deployment.name} is larger than any GPU here: it takes {gib(size)} GiB ({size} MiB) on each "
            f"GPU; the largest, {largest.product}, can promise {gib(largest.vram_mib)} GiB ({largest.vram_mib} MiB)"
        )
    return f"{head}: " + "; ".join(_sums(deployment, strategy, plan, left, missing, fitting))


def _sums(
    deployment: Deployment,
    strategy: StrategyName,
    plan: Plan,
    left: Mapping[str, int],
    missing: int,
    fitting: Sequence[tuple[Slot, int]],
) -> list[str]:
    sizes = sorted({size for _, size in fitting})
    span = " to ".join(f"{gib(size)} GiB ({size} MiB)" for size in (sizes if len(sizes) < 2 else (sizes[0], sizes[-1])))
    best = max(fitting, key=lambda pair: left[pair[0].name])[0]
    best_left = left[best.name]
    each = deployment.gpus_per_replica
    free = sum(left[slot.name] * each for slot, _ in fitting)
    sums = [
        f"each takes {span} on each of {each} GPUs" if each > 1 else f"each takes {span} on one GPU",
        f"largest free is {gib(best_left)} GiB ({best_left} MiB, {short_product(best.product)} {best.name})",
    ]
    sums += _strict(deployment, strategy, plan, left, fitting)
    demand = missing * sizes[0] * each
    sums.append(f"free in all {gib(free)} GiB, wanted {gib(demand)} GiB")
    if demand > free:
        sums.append("more is asked than there is")
    elif strategy in ("pack", "spread"):
        sums.append("enough in sum, but in pieces too small, and standing replicas are not moved to join them")
    shown = sorted(fitting, key=lambda pair: -left[pair[0].name])[:SHOWN_SLOTS]
    rest = f" and {len(fitting) - len(shown)} more" if len(fitting) > len(shown) else ""
    sums.append("free by slot: " + ", ".join(f"{slot.name} {gib(left[slot.name])}" for slot, _ in shown) + rest)
    return sums


def _strict(
    deployment: Deployment,
    strategy: StrategyName,
    plan: Plan,
    left: Mapping[str, int],
    fitting: Sequence[tuple[Slot, int]],
) -> list[str]:
    here = {item.slot: item.replicas for item in plan.berths if item.deployment == deployment.name}
    if strategy == "strict_spread":
        able = sum(1 for slot, size in fitting if slot.name in here or left[slot.name] >= size)
        return [f"strict_spread needs {deployment.replicas} GPUs with one replica each, {able} have room"]
    if strategy == "strict_pack":
        rooms: dict[str, int] = {}
        for slot, size in fitting:
            fits = left[slot.name] // size
            more = min(fits, 1) if deployment.gpus_per_replica > 1 else fits
            rooms[slot.host] = rooms.get(slot.host, 0) + more + here.get(slot.name, 0)
        told = ", ".join(f"{host} has room for {room}" for host, room in sorted(rooms.items()))
        return [f"strict_pack needs room for all {deployment.replicas} on one host: {told}"]
    return []
