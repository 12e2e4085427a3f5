"""From one plan to another, replica by replica, in an order that is safe at every step.

Safe means: a replica is made only where its GPUs have room for it now, beside all that stands there; and of no
deployment fewer than ``min_available`` replicas stay up, as far as so many were up at the start. Made before broken
where there is room. Where there is none (two replicas that swap full GPUs), who stands in the way waits on a spare GPU;
where no GPU has room for that, it is stopped first, if ``min_available`` allows; else the rest is refused, and why.

Room that the new plan reserves beyond its replicas (``Berth.reserved``) is taken at the end; what both plans reserve is
held all the way.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from berth.plan.diff import Cost, Rates, by_gpus, cost_of
from berth.plan.slots import natural
from berth.plan.solver.problem import MAX_REPLICAS_PER_SLOT, Job, Problem, build_problem
from berth.plan.types import Berth, Deployment, Plan

Gpus = tuple[str, ...]
Place = tuple[str, Gpus]
"""A deployment and the GPUs (UUIDs, sorted) of one of its replicas."""
SHOWN = 4


@dataclass(frozen=True)
class Step:
    """One replica that starts (``make``) or stops (``break``).

    ``slot`` is for people. ``temporary`` marks a start on a spare GPU, for as long as it takes to free another.
    ``begin_s`` and ``end_s`` count from the start of the migration: starts on one GPU go one after another, a stop
    waits for the starts of its deployment before it.
    """

    kind: Literal["make", "break"]
    deployment: str
    slot: str
    gpus: Gpus
    vram_mib: int
    why: str
    temporary: bool = False
    begin_s: float = 0.0
    end_s: float = 0.0


@dataclass(frozen=True)
class Migration:
    """The steps in order, what they cost, how long they take together, and what cannot be reached by safe steps."""

    steps: tuple[Step, ...]
    cost: Cost
    elapsed_s: float
    refused: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the steps lead all the way to the new plan."""
        return not self.refused


def floor_of(deployment: Deployment | None, asked_before: int, placed_after: int) -> int:
    """How many replicas stay up: ``min_available``, or all but one of those that both plans ask for; never more than
    the new plan places, none of a deployment that is not asked for any more."""
    if deployment is None:
        return 0
    least = deployment.min_available
    if least is None:
        least = max(0, min(deployment.replicas, asked_before) - 1)
    return min(least, placed_after)


def migrate(old: Plan | None, new: Plan, deployments: Sequence[Deployment], rates: Rates | None = None) -> Migration:
    """The steps from ``old`` to ``new``; ``deployments`` are those that ``new`` was planned for."""
    rates = rates or Rates()
    yard = _yard(old, new, deployments)
    _settle(yard, [place for place, count in yard.starts.items() if count], sorted(yard.stops_of))
    progress = True
    while progress and yard.starts:
        # Spares first for all: only when they help nobody any more, something is stopped before its time.
        progress = _sweep(yard, may_stop=False) or _sweep(yard, may_stop=True)
    steps = _timed(yard, rates)
    elapsed = max((step.end_s for step in steps), default=0.0)
    return Migration(steps, cost_of(old, new, rates), elapsed, _refusals(yard))


# --- The state on the way ---------------------------------------------------------------------------------------------


@dataclass
class _Gpu:
    """MiB that may still be promised, replicas here, and how many of those have the GPU to themselves."""

    free: int
    heads: int = 0
    alone: int = 0


@dataclass(frozen=True)
class _Move:
    """One replica that starts (``count`` 1) or stops (-1)."""

    place: Place
    size: int
    count: int
    why: str = ""
    temporary: bool = False

    @property
    def there(self) -> tuple[Place, int]:
        return self.place, self.size


@dataclass
class _Yard:
    """What stands where now, what has still to start and to stop, and the steps so far."""

    gpus: dict[str, _Gpu]
    slots: dict[Gpus, str]
    problem: Problem
    jobs: Mapping[str, Job]
    final: Counter[str]
    floor: Mapping[str, int]
    up: Counter[str] = field(default_factory=Counter)
    running: Counter[tuple[Place, int]] = field(default_factory=Counter)
    sizes: dict[Place, int] = field(default_factory=dict)
    starts: Counter[Place] = field(default_factory=Counter)
    stops: Counter[tuple[Place, int]] = field(default_factory=Counter)
    starts_on: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    stops_on: dict[str, set[tuple[Place, int]]] = field(default_factory=lambda: defaultdict(set))
    stops_of: dict[str, set[tuple[Place, int]]] = field(default_factory=lambda: defaultdict(set))
    steps: list[_Move] = field(default_factory=list)
    no_spare: set[str] = field(default_factory=set)
    """Deployments for which no GPU has room; forgotten when something stops."""

    def shift(self, place: Place, size: int, count: int) -> None:
        """``count`` replicas more (or fewer) of ``size`` at ``place``."""
        name, gpus = place
        self.up[name] += count
        self.running[place, size] += count
        for uuid in gpus:
            gpu = self.gpus[uuid]
            gpu.free -= size * count
            gpu.heads += count
            gpu.alone += count if len(gpus) > 1 else 0

    def want_start(self, place: Place, count: int) -> None:
        self.starts[place] += count
        for uuid in place[1]:
            (self.starts_on[uuid].add if self.starts[place] else self.starts_on[uuid].discard)(place)

    def want_stop(self, there: tuple[Place, int], count: int) -> None:
        self.stops[there] += count
        (name, gpus), pending = there[0], self.stops[there]
        (self.stops_of[name].add if pending else self.stops_of[name].discard)(there)
        for uuid in gpus:
            (self.stops_on[uuid].add if pending else self.stops_on[uuid].discard)(there)

    def do(self, move: _Move) -> None:
        """Take the step; a temporary replica has to stop again."""
        self.shift(move.place, move.size, move.count)
        if move.temporary:
            self.want_stop(move.there, move.count)
        elif move.count > 0:
            self.want_start(move.place, -1)
        else:
            self.want_stop(move.there, -1)
        self.steps.append(move)
        if move.count < 0:
            self.no_spare.clear()

    def undo(self) -> None:
        move = self.steps.pop()
        self.shift(move.place, move.size, -move.count)
        if move.temporary:
            self.want_stop(move.there, -move.count)
        elif move.count > 0:
            self.want_start(move.place, 1)
        else:
            self.want_stop(move.there, 1)

    def fits(self, place: Place, size: int) -> bool:
        """Whether one more of ``size`` may stand at ``place`` now."""
        gpus = [self.gpus[uuid] for uuid in place[1]]
        if any(gpu.free < size or gpu.alone or gpu.heads >= MAX_REPLICAS_PER_SLOT for gpu in gpus):
            return False
        if len(gpus) > 1 and any(gpu.heads for gpu in gpus):
            return False
        # A berth has one size: with another it is another process, and the old one goes first.
        return not any(other != size for (there, other) in self.stops_on[place[1][0]] if there == place)

    def blocks(self, place: Place) -> int:
        """How many places wait for room on the GPUs of ``place``."""
        return sum(len(self.starts_on[uuid]) for uuid in place[1])


def _yard(old: Plan | None, new: Plan, deployments: Sequence[Deployment]) -> _Yard:
    slots = {tuple(sorted(slot.gpu_uuids)): slot.name for plan in (old, new) if plan for slot in plan.slots}
    problem = build_problem(new.slots, deployments, new.strategy, None, False)
    known = {item.name: item for item in deployments}
    gpus = {uuid: _Gpu(slot.free_mib) for slot in new.slots for uuid in slot.gpu_uuids}
    was = {place: berth for place, berth in by_gpus(old).items() if all(uuid in gpus for uuid in place[1])}
    now = by_gpus(new)
    final = Counter[str]()
    for berth in new.berths:
        final[berth.deployment] += berth.replicas
    asked = old.deployments if old else {}
    floor = {name: floor_of(known.get(name), asked.get(name, 0), final[name]) for name in {*known, *asked, *final}}
    jobs = {job.name: job for job in problem.jobs if not job.shadow}
    yard = _Yard(gpus, slots, problem, jobs, final, floor)
    for place in sorted({*was, *now}, key=lambda place: (place[0], natural(slots[place[1]]))):
        _enter(yard, place, was.get(place), now.get(place))
    return yard


def _enter(yard: _Yard, place: Place, before: Berth | None, after: Berth | None) -> None:
    """What stands at ``place``, and what of it must go and come."""
    was, now = (before.replicas if before else 0), (after.replicas if after else 0)
    if before is not None:
        yard.shift(place, before.vram_mib, was)
    if before is not None and after is not None and before.vram_mib == after.vram_mib:
        for uuid in place[1]:
            yard.gpus[uuid].free -= min(before.reserved, after.reserved) * after.vram_mib
        was, now = max(0, was - now), max(0, now - was)
    if before is not None and was:
        yard.want_stop((place, before.vram_mib), was)
    if after is not None:
        yard.sizes[place] = after.vram_mib
        if now:
            yard.want_start(place, now)


# --- The order --------------------------------------------------------------------------------------------------------


def _settle(yard: _Yard, places: Iterable[Place], names: Iterable[str]) -> None:
    """Start what fits and stop what its deployment has too much of, until neither is left."""
    queue = deque([*_shed(yard, names), *places])
    while queue:
        place = queue.popleft()
        while yard.starts[place] and yard.fits(place, yard.sizes[place]):
            yard.do(_Move(place, yard.sizes[place], 1, "there is room beside all that stands here"))
            queue.extend(_shed(yard, [place[0]]))


def _shed(yard: _Yard, names: Iterable[str]) -> list[Place]:
    """Stop replicas beyond those the plan ends with; the places that may have room now."""
    freed: list[Place] = []
    for name in names:
        while yard.stops_of[name] and yard.up[name] > yard.final[name]:
            there = max(yard.stops_of[name], key=lambda item: (yard.blocks(item[0]), item))
            yard.do(_Move(*there, -1, f"{yard.up[name] - 1} others of {name} are up"))
            freed += sorted({place for uuid in there[0][1] for place in yard.starts_on[uuid]})
    return freed


def _sweep(yard: _Yard, may_stop: bool) -> bool:
    """Make room once for each place that waits; whether that helped any."""
    helped = False
    for place in sorted(
        (place for place, count in yard.starts.items() if count), key=lambda item: _urgency(yard, item)
    ):
        if not yard.starts[place]:
            continue
        before = len(yard.steps)
        if _make_room(yard, place, may_stop):
            helped = True
            touched = {uuid for move in yard.steps[before:] for uuid in move.place[1]}
            names = sorted({move.place[0] for move in yard.steps[before:]})
            _settle(yard, sorted({item for uuid in touched for item in yard.starts_on[uuid]}), names)
            if may_stop:
                # With one out of the way, spares may do for the others.
                return True
    return helped


def _waiting(yard: _Yard) -> list[Place]:
    return sorted((place for place, count in yard.starts.items() if count), key=lambda item: _urgency(yard, item))


def _urgency(yard: _Yard, place: Place) -> tuple[object, ...]:
    name = place[0]
    job = yard.jobs.get(name)
    priority = job.deployment.priority if job else 0
    return yard.up[name] >= yard.floor[name], -priority, -yard.sizes[place], place


def _make_room(yard: _Yard, place: Place, may_stop: bool) -> bool:
    """Move or stop who is in the way of one replica at ``place``, and start it; or change nothing."""
    size, begun = yard.sizes[place], len(yard.steps)
    name = f"{place[0]} on {yard.slots[place[1]]}"
    while not yard.fits(place, size):
        there = _in_the_way(yard, place)
        if there is None or not (_step_aside(yard, there, place, name) or (may_stop and _stop(yard, there, name))):
            while len(yard.steps) > begun:
                yard.undo()
            return False
    yard.do(_Move(place, size, 1, "its GPU was made free for it"))
    return True


def _in_the_way(yard: _Yard, place: Place) -> tuple[Place, int] | None:
    """Who is to go from the GPUs of ``place`` next: an old size of the same, then the largest of those that go."""
    going = {there for uuid in place[1] for there in yard.stops_on[uuid]}
    return max(going, key=lambda there: (there[0] == place, there[1], there), default=None)


def _step_aside(yard: _Yard, there: tuple[Place, int], place: Place, name: str) -> bool:
    """Let a replica wait on a spare GPU for its own place."""
    (who, gpus), _ = there
    spare = _spare(yard, who, {*gpus, *place[1]})
    if spare is None:
        return False
    slot, size = spare
    yard.do(_Move((who, slot), size, 1, f"a spare GPU, until its own is free; makes room for {name}", True))
    yard.do(_Move(*there, -1, f"makes room for {name}"))
    return True


def _spare(yard: _Yard, who: str, barred: set[str]) -> tuple[Gpus, int] | None:
    """The GPUs with the least room left that could hold one more of ``who``, best those for which nobody waits."""
    job = yard.jobs.get(who)
    if job is None or job.ruled or who in yard.no_spare:
        return None
    best: tuple[tuple[object, ...], Gpus, int] | None = None
    any_room = False
    for number, slot in enumerate(yard.problem.slots):
        size = yard.problem.size(job, number)
        gpus = tuple(sorted(slot.gpu_uuids))
        if size is None or slot.cordoned or not yard.fits((who, gpus), size):
            continue
        any_room = True
        if barred.intersection(gpus):
            continue
        rank = (yard.blocks((who, gpus)), yard.gpus[gpus[0]].free - size, number)
        if best is None or rank < best[0]:
            best = (rank, gpus, size)
    if not any_room:
        yard.no_spare.add(who)
    return (best[1], best[2]) if best else None


def _stop(yard: _Yard, there: tuple[Place, int], name: str) -> bool:
    """Stop a replica before its successor is there, if ``min_available`` allows."""
    who = there[0][0]
    if yard.up[who] - 1 < yard.floor[who]:
        return False
    yard.do(_Move(*there, -1, f"no GPU has room for a while; {yard.up[who] - 1} others of {who} stay up; for {name}"))
    return True


# --- What comes of it -------------------------------------------------------------------------------------------------


def _timed(yard: _Yard, rates: Rates) -> tuple[Step, ...]:
    """The steps with the time each takes: engines on one GPU start one after another."""
    clock: Counter[str] = Counter()
    ready: Counter[str] = Counter()
    steps = []
    for move in yard.steps:
        name, gpus = move.place
        begin = max(clock[uuid] for uuid in gpus)
        if move.count > 0:
            end = begin + round(10 * rates.seconds(move.size))
            ready[name] = max(ready[name], end)
        else:
            begin = end = max(begin, ready[name])
        for uuid in gpus:
            clock[uuid] = end
        kind: Literal["make", "break"] = "make" if move.count > 0 else "break"
        slot = yard.slots[gpus]
        steps.append(Step(kind, name, slot, gpus, move.size, move.why, move.temporary, begin / 10, end / 10))
    return tuple(steps)


def _refusals(yard: _Yard) -> tuple[str, ...]:
    return tuple(_refusal(yard, place) for place in _waiting(yard))


def _refusal(yard: _Yard, place: Place) -> str:
    name, gpus = place
    size = yard.sizes[place]
    free = min(yard.gpus[uuid].free for uuid in gpus)
    held = sorted({there for uuid in gpus for there in yard.stops_on[uuid]})
    told = [
        f"{who} ({size} MiB; {yard.up[who]} up, min_available {yard.floor[who]})" for (who, _), size in held[:SHOWN]
    ]
    more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
    models = ", ".join(sorted({who for (who, _), _ in held}))
    return (
        f"{yard.starts[place]} of {name} cannot start on {yard.slots[gpus]}: each takes {size} MiB, "
        f"{max(0, free)} MiB are free there, in the way stand {', '.join(told)}{more}, "
        f"and no other GPU has room for them meanwhile; "
        f"way out: lower min_available of {models or name}, or add a GPU for the time of the migration"
    )
