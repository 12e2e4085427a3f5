"""Why a berth is where it is and why replicas fit nowhere, in words with numbers, for the engineer on call.

Reasons follow from the finished plan alone, so planning twice tells the same; what happened once (a move) is kept with
the berth for as long as nothing around it changes. What many reasons speak of is counted once, in a ``Story``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from berth.plan.types import Berth, Deployment, Plan, Slot, StrategyName, Unplaced

SHOWN_SLOTS = 8
SHOWN_WAYS = 4
Look = tuple[str, str, int, int, int, int]


def gib(mib: int) -> str:
    """MiB as GiB with one decimal, the unit in which people think of GPUs."""
    return f"{mib / 1024:.1f}"


def short_product(product: str) -> str:
    """The product without the maker's name."""
    return product.removeprefix("NVIDIA ").strip()


@dataclass(frozen=True)
class Story:
    """A plan and the one before it, indexed. ``evicted`` tells who lost room on which slot in this run."""

    plan: Plan
    previous: Plan | None
    evicted: Mapping[tuple[str, str], int]
    slots: Mapping[str, Slot]
    by_slot: Mapping[str, tuple[Berth, ...]]
    by_deployment: Mapping[str, tuple[Berth, ...]]
    old_slots: Mapping[str, Slot]
    old_berths: Mapping[tuple[str, str], Berth]
    old_by_deployment: Mapping[str, tuple[Berth, ...]]
    same_slots: frozenset[str]
    same_deployments: frozenset[str]
    uuids: frozenset[str]

    @staticmethod
    def of(plan: Plan, previous: Plan | None, evicted: Mapping[tuple[str, str], int]) -> Story:
        """Index ``plan`` and ``previous``."""
        by_slot, by_deployment = _by(plan, _slot), _by(plan, _deployment)
        old_by_slot, old_by_deployment = _by(previous, _slot), _by(previous, _deployment)
        return Story(
            plan=plan,
            previous=previous,
            evicted=evicted,
            slots={slot.name: slot for slot in plan.slots},
            by_slot=by_slot,
            by_deployment=by_deployment,
            old_slots={slot.name: slot for slot in previous.slots} if previous else {},
            old_berths={(item.deployment, item.slot): item for item in previous.berths} if previous else {},
            old_by_deployment=old_by_deployment,
            same_slots=_same(by_slot, old_by_slot),
            same_deployments=_same(by_deployment, old_by_deployment),
            uuids=frozenset(uuid for slot in plan.slots for uuid in slot.gpu_uuids),
        )


def _slot(berth: Berth) -> str:
    return berth.slot


def _deployment(berth: Berth) -> str:
    return berth.deployment


def _by(plan: Plan | None, key: Callable[[Berth], str]) -> dict[str, tuple[Berth, ...]]:
    found: dict[str, list[Berth]] = defaultdict(list)
    for berth in plan.berths if plan else ():
        found[key(berth)].append(berth)
    return {name: tuple(berths) for name, berths in found.items()}


def _same(now: Mapping[str, tuple[Berth, ...]], then: Mapping[str, tuple[Berth, ...]]) -> frozenset[str]:
    return frozenset(name for name in now if name in then and _looks(now[name]) == _looks(then[name]))


def _looks(berths: Sequence[Berth]) -> set[Look]:
    """Everything that a berth's reason speaks of."""
    return {(item.deployment, item.slot, item.replicas, item.reserved, item.vram_mib, item.pool) for item in berths}


# --- Why here ---------------------------------------------------------------------------------------------------------


def why_here(berth: Berth, story: Story) -> str:
    """The reason of one berth of the story's plan."""
    before = _same_as_before(berth, story)
    if before is not None:
        return before
    slot = story.slots[berth.slot]
    strategy = story.plan.strategies[berth.deployment]
    where = f"{short_product(slot.product)} {slot.name}"
    promised = sum((item.replicas + item.reserved) * item.vram_mib for item in story.by_slot[slot.name])
    per_gpu = " on each GPU" if len(slot.gpu_uuids) > 1 else ""
    parts = [
        f"{strategy}: {_manner(berth, slot, where, story, strategy)}",
        f"{gib(promised)} of {gib(slot.vram_mib)} GiB promised{per_gpu}",
    ]
    if slot.foreign_mib:
        parts.append(f"{gib(slot.foreign_mib)} GiB held by strangers")
    if berth.reserved and not berth.pool:
        parts.append(f"room for {berth.reserved} more is kept")
    moved = _moved(berth, story)
    return "; ".join(parts) + (f"; {moved}" if moved else "")


def _same_as_before(berth: Berth, story: Story) -> str | None:
    before, name = story.previous, berth.deployment
    if before is None or story.old_slots.get(berth.slot) != story.slots[berth.slot]:
        return None
    if story.plan.strategies[name] != before.strategies.get(name):
        return None
    if story.plan.deployments[name] != before.deployments.get(name):
        return None
    if berth.slot not in story.same_slots or name not in story.same_deployments:
        return None
    return story.old_berths[name, berth.slot].reason


def _manner(berth: Berth, slot: Slot, where: str, story: Story, strategy: StrategyName) -> str:
    if len(slot.gpu_uuids) > 1:
        link = f", linked by {slot.nvlink_group}" if slot.nvlink_group else ""
        return f"has all {len(slot.gpu_uuids)} GPUs of {where} to itself{link}"
    mine = story.by_deployment[berth.deployment]
    if berth.pool:
        return _pool_manner(berth, where, mine)
    if not berth.replicas:
        return f"nothing but room on {where}"
    if strategy in ("spread", "strict_spread"):
        return _spread_manner(berth, where, story, mine)
    others = [item.deployment for item in story.by_slot[berth.slot] if item.deployment != berth.deployment]
    total = story.plan.deployments[berth.deployment]
    one = berth.replicas == 1
    together = f"{berth.replicas} of {total} replica{'s' if total > 1 else ''}"
    beside = (
        f"{together} share{'s' if one else ''} {where} with {', '.join(others)}"
        if others
        else f"{together} alone on {where}"
    )
    if strategy == "strict_pack":
        return f"{beside}; all replicas are on {slot.host}, on {len(mine)} GPU{'s' if len(mine) > 1 else ''}"
    if strategy == "balanced":
        return f"{beside}; no GPU that may take it promises less load"
    return f"{beside}; {'it opens this GPU' if one and not others else 'opening another GPU was not needed'}"


def _pool_manner(berth: Berth, where: str, mine: Sequence[Berth]) -> str:
    least, here = sum(item.replicas for item in mine), berth.replicas + berth.reserved
    count = f"{least} to {berth.pool}" if least < berth.pool else f"{least}"
    slots = "1 slot" if len(mine) == 1 else f"{len(mine)} slots"
    return f"up to {here} on {where} of a pool of {count} over {slots}, among which Serve chooses"


def _spread_manner(berth: Berth, where: str, story: Story, mine: Sequence[Berth]) -> str:
    homes = [story.slots[item.slot] for item in mine]
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


def _moved(berth: Berth, story: Story) -> str:
    name = berth.deployment
    if story.previous is None or (name, berth.slot) in story.old_berths:
        return ""
    was = story.previous.strategies.get(name)
    if was is not None and was != story.plan.strategies[name]:
        return f"planned anew, the strategy was {was}"
    old = story.old_by_deployment.get(name, ())
    for item in old:
        replicas = story.evicted.get((name, item.slot))
        if replicas:
            slot = story.slots[item.slot]
            stranger = f" and strangers hold {gib(slot.foreign_mib)} GiB there" if slot.foreign_mib else ""
            return f"{replicas} moved off {item.slot}, which can promise {gib(slot.vram_mib)} GiB{stranger}"
    gone = [item.slot for item in old if not story.uuids.issuperset(story.old_slots[item.slot].gpu_uuids)]
    if gone:
        return f"takes the place of {listed(gone)}, which is gone"
    now = {item.slot: item.replicas for item in story.by_deployment[name]}
    left = [item.slot for item in old if now.get(item.slot, 0) < item.replicas]
    return f"moved from {listed(left)} so that the plan as a whole is better" if left else ""


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - SHOWN_WAYS} more" if len(names) > SHOWN_WAYS else ""
    return ", ".join(names[:SHOWN_WAYS]) + rest


# --- Why nowhere ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What a deployment that is short could use: its fitting slots with footprint, and what is left on each.

    ``left`` is what may still be promised on each GPU of each slot, in MiB; zero where one replica holds the slot.
    ``way_in`` says whose moves would let it in ("" when none would, or all were tried).
    """

    deployment: Deployment
    strategy: StrategyName
    fitting: Sequence[tuple[Slot, int]]
    left: Mapping[str, int]
    width: int
    way_in: str = ""


def why_nowhere(
    options: Options, plan: Plan, missing: int, here: Mapping[str, int], blocked: str = "", room: int = 0
) -> Unplaced:
    """The sum that shows why ``missing`` replicas (and ``room`` promised places) are in no slot of ``plan``.

    ``here`` tells how many replicas stand on which slot, ``blocked`` names a rule that bars slots with memory enough.
    """
    deployment = options.deployment
    head = f"{missing} of {deployment.replicas} replicas fit nowhere" if missing else ""
    if room:
        told = f"room for {room} of {(deployment.max_replicas or 0) - deployment.replicas} more replicas is promised"
        head = f"{head}; {told} and there is none" if head else f"{told} and there is none"
    reason = _nowhere_at_all(options, plan)
    if reason is not None:
        return Unplaced(deployment.name, missing, f"{head}: {reason}", _too_large_by(options), room)
    sums = _sums(options, plan, max(missing, room), here)
    if blocked:
        sums.append(blocked)
    short = _shortage(options, here)
    ways = _ways_out(options, short, missing + room)
    if ways:
        sums.append(f"way out: {ways}")
    return Unplaced(deployment.name, missing, f"{head}: " + "; ".join(sums), short[0] if short else None, room)


def _nowhere_at_all(options: Options, plan: Plan) -> str | None:
    deployment, width = options.deployment, options.width
    shaped = [slot for slot in plan.slots if len(slot.gpu_uuids) == width] or (
        list(plan.slots) if width != deployment.gpus_per_replica else []
    )
    if not plan.slots:
        return "there is no GPU slot at all"
    if not shaped:
        sizes = sorted({len(slot.gpu_uuids) for slot in plan.slots})
        return (
            f"each needs a slot of {deployment.gpus_per_replica} GPUs, slots here have "
            f"{', '.join(map(str, sizes))}; group GPUs with slot_shapes"
        )
    if not options.fitting:
        return _no_such_gpu(deployment, shaped)
    if all(size > slot.vram_mib for slot, size in options.fitting):
        largest, size = max(options.fitting, key=lambda pair: (pair[0].vram_mib, -pair[1]))
        return (
            f"{deployment.name} is larger than any GPU here: it takes {gib(size)} GiB ({size} MiB) on each "
            f"GPU; the largest, {largest.product}, can promise {gib(largest.vram_mib)} GiB ({largest.vram_mib} MiB)"
        )
    return None


def _no_such_gpu(deployment: Deployment, shaped: Sequence[Slot]) -> str:
    able = [slot for slot in shaped if deployment.footprint_mib(slot.product) is not None]
    here = sorted({slot.product for slot in shaped})
    if not able:
        allowed = deployment.products or tuple(deployment.vram_mib)
        return f"it may run on {', '.join(sorted(allowed))} only, here are {', '.join(here)}"
    if deployment.pins and not {uuid for slot in able for uuid in slot.gpu_uuids} & set(deployment.pins):
        return f"it is pinned to {listed(sorted(deployment.pins))}, which no slot here has"
    if deployment.min_compute_capability:
        there = ", ".join(
            f"{slot} {cap or 'unknown'}" for slot, cap in sorted({(s.product, s.compute_capability) for s in able})
        )
        return f"it needs compute capability {deployment.min_compute_capability}, here are {there}"
    return "its rules (NVLink, pins) allow none of the GPUs here"


def _too_large_by(options: Options) -> int | None:
    short = [size - slot.vram_mib for slot, size in options.fitting]
    return min(short) if short and min(short) > 0 else None


def _sums(options: Options, plan: Plan, missing: int, here: Mapping[str, int]) -> list[str]:
    deployment, left = options.deployment, options.left
    sizes = sorted({size for _, size in options.fitting})
    span = " to ".join(f"{gib(size)} GiB ({size} MiB)" for size in (sizes if len(sizes) < 2 else (sizes[0], sizes[-1])))
    # What a cordoned slot has left is nobody's; it is told with its name below.
    usable = [(slot, size) for slot, size in options.fitting if not slot.cordoned] or options.fitting
    best = max(usable, key=lambda pair: left[pair[0].name])[0]
    best_left = left[best.name]
    each = deployment.gpus_per_replica
    free = sum(left[slot.name] * options.width for slot, _ in usable)
    sums = [
        f"each takes {span} on each of {each} GPUs" if each > 1 else f"each takes {span} on one GPU",
        f"largest free is {gib(best_left)} GiB ({best_left} MiB, {short_product(best.product)} {best.name})",
    ]
    sums += _strict(options, here)
    demand = missing * sizes[0] * each
    sums.append(f"free in all {gib(free)} GiB, wanted {gib(demand)} GiB")
    if demand > free and not options.way_in:
        sums.append("more is asked than there is")
    elif demand <= free and options.strategy in ("pack", "spread", "balanced") and best_left < sizes[-1]:
        sums.append("enough in sum, but in pieces too small, and no standing replica may or can move to join them")
    shown = sorted(options.fitting, key=lambda pair: -left[pair[0].name])[:SHOWN_SLOTS]
    more = len(options.fitting) - len(shown)
    rest = f" and {more} more" if more > 0 else ""
    sums.append("free by slot: " + ", ".join(_left_on(slot, left) for slot, _ in shown) + rest)
    return sums


def _left_on(slot: Slot, left: Mapping[str, int]) -> str:
    return f"{slot.name} {gib(left[slot.name])}{' (cordoned)' if slot.cordoned else ''}"


def _strict(options: Options, here: Mapping[str, int]) -> list[str]:
    deployment, left = options.deployment, options.left
    if options.strategy == "strict_spread":
        able = [slot for slot, size in options.fitting if slot.name in here or left[slot.name] >= size]
        if deployment.spread_over in (None, "gpu"):
            return [f"strict_spread needs {deployment.replicas} GPUs with one replica each, {len(able)} have room"]
        names: dict[str, Callable[[Slot], object]] = {
            "host": lambda slot: slot.host,
            "rack": lambda slot: (slot.zone, slot.rack),
            "zone": lambda slot: slot.zone,
        }
        domain = str(deployment.spread_over)
        count = len({names[domain](slot) for slot in able})
        return [f"strict_spread needs {deployment.replicas} {domain}s with one replica each, {count} have room"]
    if options.strategy == "strict_pack":
        rooms: Counter[str] = Counter()
        for slot, size in options.fitting:
            fits = left[slot.name] // size
            rooms[slot.host] += (min(fits, 1) if deployment.gpus_per_replica > 1 else fits) + here.get(slot.name, 0)
        if options.width != deployment.gpus_per_replica:
            rooms = Counter({host: room // deployment.gpus_per_replica for host, room in rooms.items()})
        told = ", ".join(f"{host} has room for {room}" for host, room in sorted(rooms.items())[:SHOWN_SLOTS])
        more = f" and {len(rooms) - SHOWN_SLOTS} hosts more" if len(rooms) > SHOWN_SLOTS else ""
        return [f"strict_pack needs room for all {deployment.replicas} on one host: {told}{more}"]
    return []


def _shortage(options: Options, here: Mapping[str, int]) -> tuple[int, list[str]] | None:
    """What is missing on the slots nearest to holding one more, and their names; None when memory is not what lacks."""
    alone = options.strategy == "strict_spread"
    lacks = [
        (size - options.left[slot.name], slot.name)
        for slot, size in options.fitting
        if not slot.cordoned and size <= slot.vram_mib and not (alone and slot.name in here)
    ]
    if not lacks:
        return None
    least = min(lack for lack, _ in lacks)
    return (least, [name for lack, name in lacks if lack == least]) if least > 0 else None


def _ways_out(options: Options, short: tuple[int, list[str]] | None, missing: int) -> str:
    """The cheapest ways to place what is short: others moved, a cordon lifted, memory freed, GPUs added."""
    ways = [options.way_in] if options.way_in else []
    free = [slot.name for slot, size in options.fitting if slot.cordoned and options.left[slot.name] >= size]
    if free:
        ways.append(f"uncordon {' or '.join(free[:SHOWN_WAYS])}")
    if short is not None and options.width == options.deployment.gpus_per_replica:
        lack, names = short
        any_of = "any of " if len(names) > 1 else ""
        ways.append(f"free {gib(lack)} GiB ({lack} MiB) on {any_of}{listed(names)} for one more")
    elif options.width != options.deployment.gpus_per_replica:
        ways.append(f"empty {options.deployment.gpus_per_replica} GPUs of one product on one host")
    if options.strategy != "strict_pack" and (more := _more_gpus(options, missing)):
        ways.append(more)
    return "; or ".join(ways)


def _more_gpus(options: Options, missing: int) -> str:
    found: list[tuple[float, int, str]] = []
    for product in sorted({slot.product for slot, _ in options.fitting}):
        slot, size = next((slot, size) for slot, size in options.fitting if slot.product == product)
        each = slot.vram_mib // size
        if options.deployment.gpus_per_replica > 1:
            count = missing * options.deployment.gpus_per_replica if each else 0
        elif options.strategy == "strict_spread":
            count = missing if each else 0
        else:
            count = -(-missing // each) if each else 0
        if count:
            found.append((count * slot.cost, count, product))
    if not found:
        return ""
    _, count, product = min(found)
    number = "one" if count == 1 else str(count)
    what = "it" if missing == 1 else f"all {missing}"
    return f"{number} more {short_product(product)} would hold {what}"
