"""Slots and deployments -> plan. A pure function: the same input gives the same plan. All memory is in MiB.

The order of work: keep what may stay (``_keep``), place what is missing (``_place_all``), say why (``reasons``).
What each strategy means here:

pack
    fewest GPUs, then fewest hosts. Replicas go where the least is left over; a new GPU is opened only when no open one
    has room. Several greedy openings are tried and the one with the fewest GPUs wins.
spread
    each replica goes to a zone, rack, host, GPU that has none of its deployment yet, in that order of weight; then
    where fewest are; then to the GPU with the smallest promised share.
strict_pack
    all replicas on one host: the one that needs the fewest GPUs for them with what is free there now. Standing
    replicas stay; when their host has no room for more, all of them move to one that has. No such host: unplaced.
strict_spread
    as spread, but never two replicas of the deployment on one slot. Too few slots: the rest is unplaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from berth.errors import BerthError
from berth.plan import reasons
from berth.plan.slots import natural
from berth.plan.types import STRATEGIES, Berth, Deployment, Plan, Slot, Solution, StrategyName, Summary, Unplaced

MAX_REPLICAS_PER_SLOT = 100
"""Each replica on a shared slot asks for 0.01 of Ray's ``GPU``: the hundred-and-first would pend for ever."""

SEARCH_NODES = 4000
"""Steps of the last-resort search; some tenths of a second, enough for the small tight cases that greedy refuses."""


@dataclass(frozen=True)
class Options:
    """How to plan: ``max_moves`` bounds the standing replicas that may be moved, ``repack`` puts the strategy before
    standing still, ``regroup`` joins 1-GPU slots of one host for replicas of several GPUs, and fleets of at most
    ``exact_gpus`` GPUs are planned by exact search (0: never)."""

    max_moves: int | None = None
    repack: bool = False
    regroup: bool = False
    exact_gpus: int = 64


def solve(
    slots: Sequence[Slot],
    deployments: Sequence[Deployment],
    strategy: str,
    previous: Plan | None = None,
    retired: Mapping[str, str] | None = None,
    *,
    options: Options | None = None,
) -> Solution:
    """The plan and how good it is."""
    plan = make_plan(slots, deployments, strategy, previous, retired)
    by_name = {slot.name: slot for slot in plan.slots}
    used = [by_name[name] for name in sorted({berth.slot for berth in plan.berths})]
    gpus = sum(len(slot.gpu_uuids) for slot in used)
    cost = sum(slot.cost * len(slot.gpu_uuids) for slot in used)
    summary = Summary(gpus, len({slot.host for slot in used}), 0, 0.0, 0, 0.0, cost, 0.0, False, "greedy")
    return Solution(plan, summary)


def make_plan(
    slots: Sequence[Slot],
    deployments: Sequence[Deployment],
    strategy: str,
    previous: Plan | None = None,
    retired: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for ``deployments`` on ``slots``.

    Nothing new is promised beyond ``slot.free_mib``. What the previous plan placed under the same strategy stays while
    it fits; with an unchanged footprint it may stay on a GPU that a stranger has entered since, as long as Berth's
    promises fit ``vram_mib`` and both together fit the card's total.

    Raises:
        BerthError: for an unknown strategy, or two slots or deployments of one name.
    """
    default = check_strategy(strategy)
    _refuse_twice("slots", [slot.name for slot in slots])
    _refuse_twice("deployments", [deployment.name for deployment in deployments])
    ordered = tuple(sorted(slots, key=lambda slot: natural(slot.name)))
    jobs = tuple(_Job(item, item.strategy or default) for item in sorted(deployments, key=lambda item: item.name))
    kept, evicted = _keep(ordered, jobs, previous)
    state = _place_all(kept, jobs)
    return _to_plan(state, jobs, default, previous, dict(retired or {}), evicted)


def check_strategy(strategy: str) -> StrategyName:
    """``strategy`` as one of the four.

    Raises:
        BerthError: naming the allowed ones.
    """
    for name in STRATEGIES:
        if name == strategy:
            return name
    raise BerthError(
        "strategy is unknown", found=repr(strategy), allowed=", ".join(STRATEGIES), mend="set strategy to one of these"
    )


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BerthError(f"{what}: a name is used twice", found=", ".join(twice), allowed="unique names")


@dataclass(frozen=True)
class _Job:
    """A deployment and the strategy that holds for it."""

    deployment: Deployment
    strategy: StrategyName

    @property
    def name(self) -> str:
        return self.deployment.name

    def footprint(self, slot: Slot) -> int | None:
        """MiB on each GPU of ``slot``, None where a replica of this deployment can never be."""
        if len(slot.gpu_uuids) != self.deployment.gpus_per_replica:
            return None
        return self.deployment.footprint_mib(slot.product)


@dataclass
class _State:
    """Replica counts per (deployment, slot) and the sums that follow from them."""

    slots: tuple[Slot, ...]
    present: frozenset[tuple[str, str]] = frozenset()
    count: dict[tuple[str, str], int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(self.slots, self.present, dict(self.count), dict(self.used), dict(self.heads))

    def add(self, job: _Job, slot: Slot, replicas: int = 1) -> None:
        key = (job.name, slot.name)
        self.count[key] = self.count.get(key, 0) + replicas
        self.used[slot.name] = self.used.get(slot.name, 0) + replicas * (job.footprint(slot) or 0)
        self.heads[slot.name] = self.heads.get(slot.name, 0) + replicas

    def on(self, job: _Job, slot: Slot) -> int:
        return self.count.get((job.name, slot.name), 0)

    def placed(self, job: _Job) -> int:
        return sum(self.on(job, slot) for slot in self.slots)

    def missing(self, job: _Job) -> int:
        return job.deployment.replicas - self.placed(job)

    def left(self, slot: Slot) -> int:
        return slot.free_mib - self.used.get(slot.name, 0)

    def room(self, job: _Job, slot: Slot) -> int:
        """How many more replicas of ``job`` the slot can be promised."""
        size = job.footprint(slot)
        if size is None:
            return 0
        heads = self.heads.get(slot.name, 0)
        # Ray gives a slot of several GPUs to one replica as a whole: its workers talk over all of them.
        limit = 1 if len(slot.gpu_uuids) > 1 else MAX_REPLICAS_PER_SLOT
        fits = max(0, min(self.left(slot) // size, limit - heads))
        return min(fits, 1 - self.on(job, slot)) if job.strategy == "strict_spread" else fits


# --- What stays -------------------------------------------------------------------------------------------------------


def _keep(
    slots: tuple[Slot, ...], jobs: Sequence[_Job], previous: Plan | None
) -> tuple[_State, dict[tuple[str, str], int]]:
    """The state with every replica that stays, and how many had to leave each berth because its GPU lost room."""
    before = {(berth.deployment, berth.slot): berth for berth in previous.berths} if previous else {}
    state = _State(slots, frozenset(before))
    evicted: dict[tuple[str, str], int] = {}

    def changed(job: _Job) -> bool:
        return any(_changed(job, slot, before) for slot in slots)

    # Who asks for more memory than before yields to those who do not: only what changed may move.
    for job in sorted(jobs, key=lambda job: (changed(job), *_large_first(slots)(job))):
        if previous is None or previous.strategies.get(job.name, previous.strategy) != job.strategy:
            continue
        _keep_job(state, job, before, evicted)
        for _ in range(-state.missing(job)):
            state.add(job, _surplus(state, job), -1)
    return state, evicted


def _changed(job: _Job, slot: Slot, before: Mapping[tuple[str, str], Berth]) -> bool:
    berth = before.get((job.name, slot.name))
    return berth is not None and berth.vram_mib != job.footprint(slot)


def _keep_job(
    state: _State,
    job: _Job,
    before: Mapping[tuple[str, str], Berth],
    evicted: dict[tuple[str, str], int],
) -> None:
    hosts: set[str] = set()
    for slot in state.slots:
        berth = before.get((job.name, slot.name))
        size = job.footprint(slot)
        if berth is None or size is None or (job.strategy == "strict_pack" and hosts - {slot.host}):
            continue
        used = state.used.get(slot.name, 0)
        limit = slot.free_mib if berth.vram_mib != size else _standing_limit(slot)
        stays = min(berth.replicas, max(0, (limit - used) // size))
        if stays:
            state.add(job, slot, stays)
            hosts.add(slot.host)
        if stays < berth.replicas:
            evicted[job.name, slot.name] = berth.replicas - stays


def _standing_limit(slot: Slot) -> int:
    """What replicas that already stand on ``slot`` may sum up to.

    They hold their memory, and so does the stranger that came after them: both are there. Restarting a model because a
    desktop grew by a step would be the greater harm, so only what can no longer be true makes them move.
    """
    return min(slot.vram_mib, slot.total_mib - slot.foreign_mib)


def _surplus(state: _State, job: _Job) -> Slot:
    """Where to take one replica away so that the strategy is served best."""
    standing = [slot for slot in state.slots if state.on(job, slot)]
    if job.strategy in ("pack", "strict_pack"):
        # The emptiest GPU first: it is the nearest to being free as a whole.
        return min(standing, key=lambda slot: (state.used[slot.name], _last(slot, state)))
    counts = _domain_counts(state, job)

    def crowding(slot: Slot) -> tuple[float, ...]:
        levels = tuple(-counts[domain] for domain in reversed(_domains(slot)))
        return (*levels, -state.used[slot.name] / slot.vram_mib, _last(slot, state))

    return min(standing, key=crowding)


def _last(slot: Slot, state: _State) -> int:
    return -state.slots.index(slot)


# --- Where the missing go ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """One manner of being greedy."""

    large_first: bool = False
    pack_all: bool = False


_WAYS = (_Way(), _Way(large_first=True), _Way(pack_all=True), _Way(large_first=True, pack_all=True))


def _place_all(kept: _State, jobs: Sequence[_Job]) -> _State:
    """The best of several greedy plans; if none is whole, of reordered ones; at last, of a bounded search."""
    order = sorted(jobs, key=_large_first(kept.slots))
    own = [_greedy(kept, order, way) for way in _WAYS[:2]]
    whole = [state for state in own if not _unplaced(state, jobs)]
    if whole:
        return min(whole, key=lambda state: _cost(state, jobs))
    tried = [own]
    for way in _WAYS:
        tried.append(list(_squeaky(kept, order, way)))
        for state in tried[-1]:
            if not _unplaced(state, jobs):
                return state
    # Who can be placed is placed by its own strategy as far as that refuses nobody more than it must.
    best = min((state for states in tried for state in states), key=lambda state: _unplaced(state, jobs))
    return _search(kept, order) or best


def _greedy(kept: _State, order: Sequence[_Job], way: _Way) -> _State:
    state = kept.copy()
    for job in order:
        _place(state, job, way)
    return state


def _place(state: _State, job: _Job, way: _Way) -> None:
    if job.strategy == "strict_pack":
        _place_on_one_host(state, job, way)
        return
    for _ in range(state.missing(job)):
        slot = next(_candidates(state, job, way), None)
        if slot is None:
            return
        state.add(job, slot)


def _place_on_one_host(state: _State, job: _Job, way: _Way) -> None:
    """All of the missing beside those that stand, else all of them elsewhere, else none."""
    if state.missing(job) <= 0:
        return
    standing = [(slot, state.on(job, slot)) for slot in state.slots if state.on(job, slot)]
    if next(_candidates(state, job, way), None) is None:
        for slot, replicas in standing:
            state.add(job, slot, -replicas)
        if next(_candidates(state, job, way), None) is None:
            for slot, replicas in standing:
                state.add(job, slot, replicas)
            return
    for _ in range(state.missing(job)):
        state.add(job, next(_candidates(state, job, way)))


def _squeaky(kept: _State, order: Sequence[_Job], way: _Way) -> Iterator[_State]:
    """Greedy plans in which whoever was refused goes first the next time."""
    queue = list(order)
    for _ in range(len(queue) + 1):
        state = _greedy(kept, queue, way)
        yield state
        refused = [job for job in queue if state.missing(job) > 0]
        again = refused + [job for job in queue if job not in refused]
        if again == queue:
            return
        queue = again


def _search(kept: _State, order: Sequence[_Job]) -> _State | None:
    """Depth-first search for a plan without anything unplaced, within ``SEARCH_NODES`` steps."""
    if any(_hopeless(kept, job) for job in order):
        return None
    state, budget = kept.copy(), [SEARCH_NODES]
    queue = [job for job in order for _ in range(max(0, kept.missing(job)))]
    if not queue or len(queue) > 200:
        # Deeper than Python's stack is worth: at this size best-fit is near the optimum.
        return None
    return state if _descend(state, queue, 0, budget) else None


def _descend(state: _State, queue: Sequence[_Job], depth: int, budget: list[int]) -> bool:
    if depth == len(queue):
        return True
    job = queue[depth]
    seen: set[tuple[object, ...]] = set()
    for slot in list(_candidates(state, job, _Way())):
        # Two slots that look the same from here on lead to the same end.
        look = (slot.product, state.left(slot), state.on(job, slot), state.heads.get(slot.name, 0), _peers(slot, job))
        if look in seen:
            continue
        seen.add(look)
        budget[0] -= 1
        if budget[0] < 0:
            return False
        state.add(job, slot)
        if _descend(state, queue, depth + 1, budget):
            return True
        state.add(job, slot, -1)
    return False


def _peers(slot: Slot, job: _Job) -> str:
    return slot.host if job.strategy == "strict_pack" else ""


def _hopeless(state: _State, job: _Job) -> bool:
    return state.missing(job) > sum(state.room(job, slot) for slot in state.slots)


def _candidates(state: _State, job: _Job, way: _Way) -> Iterator[Slot]:
    """The slots that may take one more replica of ``job``, best first."""
    able = [slot for slot in state.slots if state.room(job, slot) > 0]
    rank: Callable[[Slot], tuple[object, ...]]
    if job.strategy == "strict_pack":
        able = _one_host(state, job, able)
        rank = _strict_pack_rank(state, job, able)
    elif job.strategy == "pack" or (way.pack_all and job.strategy == "spread"):
        rank = _pack_rank(state, job, way)
    else:
        rank = _spread_rank(state, job)
    # The plan's own order of slots breaks the last tie: sorted() is stable.
    return iter(sorted(able, key=rank))


def _pack_rank(state: _State, job: _Job, way: _Way) -> Callable[[Slot], tuple[object, ...]]:
    hosts = {slot.host for slot in state.slots if state.heads.get(slot.name)}
    missing = state.missing(job)

    def rank(slot: Slot) -> tuple[object, ...]:
        opens = not state.heads.get(slot.name)
        holds = min(missing, state.room(job, slot)) if opens else 0
        left = state.left(slot) - (job.footprint(slot) or 0)
        size = -left if opens and way.large_first else left
        return (opens, -holds, slot.host not in hosts, size, (job.name, slot.name) not in state.present)

    return rank


def _spread_rank(state: _State, job: _Job) -> Callable[[Slot], tuple[object, ...]]:
    counts = _domain_counts(state, job)

    def rank(slot: Slot) -> tuple[object, ...]:
        levels = [counts.get(domain, 0) for domain in _domains(slot)]
        share = (state.used.get(slot.name, 0) + (job.footprint(slot) or 0)) / slot.vram_mib
        # An untouched domain first, the widest before the narrower: only then even numbers.
        return (*(level > 0 for level in levels), *levels, share, (job.name, slot.name) not in state.present)

    return rank


def _one_host(state: _State, job: _Job, able: Sequence[Slot]) -> list[Slot]:
    """Those of ``able`` on hosts that can take everything that is missing, and on no second host."""
    missing = state.missing(job)
    hosts = {slot.host for slot in state.slots if state.on(job, slot)} or {slot.host for slot in able}
    rooms = {host: sum(state.room(job, slot) for slot in able if slot.host == host) for host in hosts}
    return [slot for slot in able if rooms.get(slot.host, 0) >= missing]


def _strict_pack_rank(state: _State, job: _Job, able: Sequence[Slot]) -> Callable[[Slot], tuple[object, ...]]:
    missing = state.missing(job)
    hosts = {slot.host for slot in able}
    needed = {host: _gpus_needed(state, job, [slot for slot in able if slot.host == host], missing) for host in hosts}
    there = {host: sum(slot.host == host and (job.name, slot.name) in state.present for slot in able) for host in hosts}
    opened = {host: sum(slot.host == host and bool(state.heads.get(slot.name)) for slot in able) for host in hosts}

    def rank(slot: Slot) -> tuple[object, ...]:
        here = state.on(job, slot) == 0
        holds = min(missing, state.room(job, slot))
        left = state.left(slot) - holds * (job.footprint(slot) or 0)
        host = (needed[slot.host], -there[slot.host], -opened[slot.host], natural(slot.host))
        return (*host, here, -holds, not state.heads.get(slot.name), left, (job.name, slot.name) not in state.present)

    return rank


def _gpus_needed(state: _State, job: _Job, slots: Sequence[Slot], replicas: int) -> int:
    """GPUs to open for ``replicas``, those that hold some of the deployment already not counted."""
    replicas -= sum(state.room(job, slot) for slot in slots if state.on(job, slot))
    gpus = 0
    for room, size in sorted(
        ((state.room(job, slot), len(slot.gpu_uuids)) for slot in slots if not state.on(job, slot)), reverse=True
    ):
        if replicas <= 0:
            break
        replicas, gpus = replicas - room, gpus + size
    return gpus


def _domains(slot: Slot) -> tuple[tuple[str, ...], ...]:
    """Zone, rack, host, slot. A rack's name means something only inside its zone."""
    return (
        ("zone", slot.zone),
        ("rack", slot.zone, slot.rack),
        ("host", slot.host),
        ("slot", slot.name),
    )


def _domain_counts(state: _State, job: _Job) -> dict[tuple[str, ...], int]:
    counts: dict[tuple[str, ...], int] = {}
    for slot in state.slots:
        replicas = state.on(job, slot)
        if replicas:
            for domain in _domains(slot):
                counts[domain] = counts.get(domain, 0) + replicas
    return counts


def _large_first(slots: Iterable[Slot]) -> Callable[[_Job], tuple[int, str]]:
    everywhere = tuple(slots)

    def key(job: _Job) -> tuple[int, str]:
        sizes = [job.footprint(slot) or 0 for slot in everywhere] or [0]
        return (-max(sizes) * job.deployment.gpus_per_replica, job.name)

    return key


def _unplaced(state: _State, jobs: Sequence[_Job]) -> int:
    return sum(max(0, state.missing(job)) for job in jobs)


def _cost(state: _State, jobs: Sequence[_Job]) -> tuple[int, ...]:
    """What to prefer among finished states: nothing refused, few GPUs, few hosts, small GPUs, few moves."""
    opened = [slot for slot in state.slots if state.heads.get(slot.name)]
    moves = sum(1 for key, replicas in state.count.items() if replicas and key not in state.present)
    return (
        _unplaced(state, jobs),
        sum(len(slot.gpu_uuids) for slot in opened),
        len({slot.host for slot in opened}),
        sum(slot.total_mib for slot in opened),
        moves,
    )


# --- The plan in words ------------------------------------------------------------------------------------------------


def _promisable(state: _State, slot: Slot) -> int:
    taken_whole = len(slot.gpu_uuids) > 1 and state.heads.get(slot.name, 0) > 0
    return 0 if taken_whole else max(0, state.left(slot))


def _to_plan(
    state: _State,
    jobs: Sequence[_Job],
    strategy: StrategyName,
    previous: Plan | None,
    retired: dict[str, str],
    evicted: Mapping[tuple[str, str], int],
) -> Plan:
    by_name = {slot.name: slot for slot in state.slots}
    berths = tuple(
        Berth(job.name, slot.name, state.on(job, slot), job.footprint(slot) or 0, "")
        for job in jobs
        for slot in state.slots
        if state.on(job, slot)
    )
    bare = Plan(
        strategy=strategy,
        slots=state.slots,
        berths=berths,
        deployments={job.name: job.deployment.replicas for job in jobs},
        strategies={job.name: job.strategy for job in jobs},
        retired=dict(sorted(retired.items())),
    )
    left = {slot.name: _promisable(state, slot) for slot in state.slots}
    told = tuple(
        Berth(
            berth.deployment,
            berth.slot,
            berth.replicas,
            berth.vram_mib,
            reasons.why_here(berth, by_name[berth.slot], bare, previous, evicted),
        )
        for berth in berths
    )
    unplaced = tuple(
        Unplaced(
            job.name,
            state.missing(job),
            reasons.why_nowhere(job.deployment, job.strategy, bare, left, state.missing(job)),
        )
        for job in jobs
        if state.missing(job) > 0
    )
    return Plan(
        strategy=strategy,
        slots=bare.slots,
        berths=told,
        unplaced=unplaced,
        deployments=bare.deployments,
        strategies=bare.strategies,
        retired=bare.retired,
    )
