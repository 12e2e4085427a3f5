"""Replicas that need several slots, often of several hosts: planned part by part, then put together.

Each part is a replica of its own to the solver: on a slot by itself, packed, so that those of one model end up near
each other. Parts then form teams, the nearest first. What does not make a whole team is not planned at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from berth.codec import replace
from berth.plan.reasons import gib
from berth.plan.slots import natural
from berth.plan.types import Affinity, Berth, Deployment, Plan, Slot, Solution, Unplaced

TOLD = "; part of one replica over "
"""Where a berth's reason begins to speak of its team."""
Team = tuple[str, ...]


Solve = Callable[[Sequence[Deployment], Plan | None], Solution]


@dataclass(frozen=True)
class _Try:
    """What one call of the solver gave: its answer, the teams of each model, and its parts that are in none."""

    solution: Solution
    teams: dict[str, list[Team]]
    spare: dict[str, int]

    @property
    def merit(self) -> tuple[int, int, int]:
        """Whole replicas placed, parts in vain, everybody else left out: the larger the better."""
        others = sum(item.replicas for item in self.solution.plan.unplaced if item.deployment not in self.teams)
        return sum(map(len, self.teams.values())), -sum(self.spare.values()), -others


def solve_teams(
    slots: Sequence[Slot], deployments: Sequence[Deployment], previous: Plan | None, solve: Solve
) -> Solution:
    """``solve``'s answer with the parts of every deployment of several ``slots_per_replica`` put together.

    ``Summary`` counts parts as replicas. A team that stands stays, as long as all of its slots do. Raises what
    ``solve`` raises.
    """
    wide = {item.name: item for item in deployments if item.slots_per_replica > 1}
    wanted = {name: item.replicas for name, item in wide.items()}

    def attempt(only: Mapping[str, str]) -> _Try:
        parts = [_parts(item, wanted, wide, only) for item in deployments]
        found = solve(parts, _parts_before(previous, wide, wanted))
        teams = {name: _teams(found.plan, item, previous) for name, item in wide.items()}
        placed = Counter(berth.deployment for berth in found.plan.berths)
        spare = {name: placed[name] - len(teams[name]) * item.slots_per_replica for name, item in wide.items()}
        return _Try(found, teams, spare)

    only: dict[str, str] = {}
    best = attempt(only)
    # The solver does not know that a team wants one product: where it mixed them, each is tried by itself.
    for name in sorted(name for name, spare in best.spare.items() if spare):
        for product in _products(slots, wide[name]):
            found = attempt({**only, name: product})
            if found.merit > best.merit:
                only, best = {**only, name: product}, found
    while any(best.spare.values()):
        # Parts in no team take nothing from others: planned anew with as many as make whole teams.
        wanted |= {name: len(best.teams[name]) for name, spare in best.spare.items() if spare}
        best = attempt(only)
    return replace(best.solution, plan=_whole(best.solution.plan, wide, best.teams))


def _products(slots: Sequence[Slot], item: Deployment) -> list[str]:
    """Products of which there are slots enough for one team, those with the most first."""
    counts = Counter(
        slot.product
        for slot in slots
        if len(slot.gpu_uuids) == item.gpus_per_replica and item.footprint_mib(slot.product) is not None
    )
    return [product for product, count in counts.most_common() if count >= item.slots_per_replica]


def _parts(item: Deployment, wanted: Mapping[str, int], wide: Iterable[str], only: Mapping[str, str]) -> Deployment:
    """The planner's view of the parts of ``item``: no two parts of whatever teams on one slot.

    A start of a team waits for all of its slots; two teams that share one could wait for each other for ever.
    """
    if item.slots_per_replica == 1:
        return item
    apart = tuple(Affinity(name, "gpu") for name in wide)
    return replace(
        item,
        replicas=wanted[item.name] * item.slots_per_replica,
        slots_per_replica=1,
        strategy="pack",
        anti_affinity=(*item.anti_affinity, *apart),
        min_available=None,
        products=(only[item.name],) if item.name in only else item.products,
    )


def _parts_before(previous: Plan | None, wide: Mapping[str, Deployment], wanted: Mapping[str, int]) -> Plan | None:
    """The plan before as the solver would have made it; of teams that are too many, none of the parts."""
    if previous is None:
        return None
    stays = {
        (name, slot)
        for name, item in wide.items()
        for team in _standing(previous, item)[: wanted[name]]
        for slot in team
    }
    counts = {
        name: count * (wide[name].slots_per_replica if name in wide else 1)
        for name, count in previous.deployments.items()
    }
    berths = tuple(
        replace(item, team=(), reason=item.reason.partition(TOLD)[0])
        for item in previous.berths
        if item.deployment not in wide or (item.deployment, item.slot) in stays
    )
    return replace(previous, deployments=counts, berths=berths)


def _standing(previous: Plan, item: Deployment) -> list[Team]:
    return [
        berth.team
        for berth in previous.berths
        if berth.deployment == item.name and berth.leads and len(berth.team) == item.slots_per_replica
    ]


def _teams(plan: Plan, item: Deployment, previous: Plan | None) -> list[Team]:
    """As many teams as the planned parts of ``item`` make: those that stand, then the nearest."""
    slots = {slot.name: slot for slot in plan.slots}
    free = {berth.slot for berth in plan.berths if berth.deployment == item.name}
    size = item.slots_per_replica
    teams: list[Team] = []
    for team in _standing(previous, item) if previous else ():
        if free.issuperset(team):
            teams.append(team)
            free.difference_update(team)
    nearness: tuple[Callable[[Slot], tuple[str, ...]], ...] = (
        lambda slot: (slot.product, slot.zone, slot.rack, slot.host),
        lambda slot: (slot.product, slot.zone, slot.rack),
        lambda slot: (slot.product, slot.zone),
        lambda slot: (slot.product,),
    )
    for key in nearness:
        near: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in sorted(free, key=natural):
            near[key(slots[name])].append(name)
        for _, names in sorted(near.items()):
            for first in range(0, len(names) - size + 1, size):
                teams.append(tuple(names[first : first + size]))
                free.difference_update(teams[-1])
    return sorted(teams, key=lambda team: natural(team[0]))


def _whole(plan: Plan, wide: Mapping[str, Deployment], teams: Mapping[str, list[Team]]) -> Plan:
    team_of = {(name, slot): team for name, mine in teams.items() for team in mine for slot in team}
    berths = tuple(_told(berth, team_of.get((berth.deployment, berth.slot), ())) for berth in plan.berths)
    short = [_unplaced(plan, item, len(teams[name])) for name, item in wide.items() if item.replicas > len(teams[name])]
    rest = [item for item in plan.unplaced if item.deployment not in wide]
    counts = {name: wide[name].replicas if name in wide else count for name, count in plan.deployments.items()}
    unplaced = tuple(sorted([*rest, *short], key=lambda item: item.deployment))
    return replace(plan, berths=berths, unplaced=unplaced, deployments=counts)


def _told(berth: Berth, team: Team) -> Berth:
    return replace(berth, team=team, reason=f"{berth.reason}{TOLD}{', '.join(team)}") if team else berth


def _unplaced(plan: Plan, item: Deployment, placed: int) -> Unplaced:
    """The sum that shows why there are no more teams: which slots could hold one more part, how much the next one
    lacks."""
    size, gpus = item.slots_per_replica, item.gpus_per_replica
    taken = {berth.slot for berth in plan.berths if berth.team or berth.deployment == item.name}
    promised: dict[str, int] = defaultdict(int)
    for berth in plan.berths:
        promised[berth.slot] += (berth.replicas + berth.reserved) * berth.vram_mib
    room: dict[str, list[str]] = defaultdict(list)
    lacking: list[tuple[int, str]] = []
    for slot in plan.slots:
        need = item.footprint_mib(slot.product)
        if need is None or len(slot.gpu_uuids) != gpus or slot.cordoned or slot.name in taken:
            continue
        free = slot.free_mib - promised[slot.name]
        if free >= need:
            room[slot.product].append(slot.name)
        else:
            lacking.append((need - free, f"{slot.name} lacks {gib(need - free)} GiB"))
    each = " or ".join(sorted({gib(mib) for mib in item.vram_mib.values()}))
    most = max(room.values(), key=len, default=[])
    parts = [
        f"{placed} of {item.replicas} replicas fit: each needs {size} slots of one product at once, {gpus} "
        f"{'GPU' if gpus == 1 else 'GPUs'} each, {each} GiB on each GPU, and none with a part of another",
        f"slots with room left: {', '.join(most) or 'none'}",
        *([min(lacking)[1]] if lacking else []),
        f"way out: {size - len(most)} more such slots" if len(most) < size else "way out: relax the rules of the model",
    ]
    return Unplaced(item.name, item.replicas - placed, "; ".join(parts), min(lacking)[0] if lacking else None)
