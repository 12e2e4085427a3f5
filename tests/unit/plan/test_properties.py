"""What every plan must be, judged from the contract alone: the checker here knows nothing of the solver."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from berth.codec import replace
from berth.plan.planner import Options, solve
from berth.plan.types import STRATEGIES, Affinity, Deployment, Plan, Slot, Solution
from tests.unit.plan.helpers import A100, L40S, T4, grid, model, slot, where

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
CAPABILITY = {L40S: "8.9", T4: "7.5", A100: "8.0"}
MEMORY = {L40S: 44_000, T4: 14_500, A100: 80_000}
STRATEGY = st.sampled_from(STRATEGIES)
DOMAIN = {
    "zone": lambda item: item.zone,
    "rack": lambda item: (item.zone, item.rack),
    "host": lambda item: item.host,
    "gpu": lambda item: item.name,
}


# --- Inputs -----------------------------------------------------------------------------------------------------------


@st.composite
def fleets(draw: st.DrawFn, priced: bool = True) -> tuple[Slot, ...]:
    """Up to four hosts of one to four GPUs: unequal, linked, partly used, cordoned, priced."""
    slots: list[Slot] = []
    for host in range(draw(st.integers(1, 4))):
        product = draw(st.sampled_from([L40S, T4, A100]))
        zone, rack = draw(st.sampled_from(["", "a", "b"])), draw(st.sampled_from(["", "r1", "r2"]))
        cost = draw(st.sampled_from([1.0, 1.0, 0.5, 2.5])) if priced else 1.0
        links = draw(st.sampled_from(["", "nvlink0", "pairs"]))
        for number in range(draw(st.integers(1, 4))):
            made = slot(
                f"h{host}-{number}",
                MEMORY[product],
                product=product,
                foreign=draw(st.sampled_from([0, 0, 0, 256, 5_120, 20_480])),
                zone=zone,
                rack=rack,
            )
            slots.append(
                replace(
                    made,
                    compute_capability=CAPABILITY[product],
                    nvlink_group=f"nvlink{number // 2}" if links == "pairs" else links,
                    cost=cost,
                    cordoned=draw(st.integers(0, 9)) == 0,
                )
            )
    return tuple(slots)


SIZE = st.sampled_from([500, 2_000, 4_000, 9_828, 14_000, 21_000, 40_000])


@st.composite
def mixes(draw: st.DrawFn, slots: Sequence[Slot] = ()) -> tuple[Deployment, ...]:
    """Up to five deployments with every rule that the contract knows."""
    names = [f"m{number}" for number in range(draw(st.integers(1, 5)))]
    uuids = [uuid for item in slots for uuid in item.gpu_uuids]
    found = []
    for name in names:
        replicas = draw(st.integers(0, 4))
        rules = st.lists(
            st.builds(Affinity, st.sampled_from(names), st.sampled_from(["zone", "host", "gpu"])), max_size=1
        ).map(tuple)
        rare = draw(st.integers(0, 4))
        found.append(
            Deployment(
                name,
                replicas,
                draw(
                    st.one_of(SIZE.map(lambda mib: {"default": mib}), st.fixed_dictionaries({L40S: SIZE, A100: SIZE}))
                ),
                draw(st.sampled_from([1, 1, 1, 2])),
                draw(st.sampled_from([None, None, None, *STRATEGIES])),
                draw(st.sampled_from([(), (), (L40S,), (T4, A100)])),
                max_replicas=replicas + draw(st.integers(0, 2)),
                headroom=draw(st.sampled_from(["promised", "shared", "best_effort"])),
                placement="pool" if rare == 4 else "berths",
                min_compute_capability=draw(st.sampled_from(["", "", "", "8.0", "8.9"])),
                require_nvlink=draw(st.integers(0, 5)) == 0,
                spread_over=draw(st.sampled_from([None, None, "host", "gpu"])),
                affinity=draw(rules) if rare == 0 else (),
                anti_affinity=draw(rules) if rare == 1 else (),
                pins=tuple(draw(st.sets(st.sampled_from(uuids), max_size=3))) if uuids and rare == 2 else (),
                priority=draw(st.integers(0, 1)),
                load=draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
            )
        )
    return tuple(found)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Slot, ...], tuple[Deployment, ...]]:
    slots = draw(fleets())
    return slots, draw(mixes(slots))


# --- The checker ------------------------------------------------------------------------------------------------------


def check(slots: Sequence[Slot], deployments: Sequence[Deployment], solution: Solution) -> None:
    """Every promise of the contract for a plan made without a previous one."""
    plan, summary = solution.plan, solution.summary
    by_uuid = {uuid: item for item in slots for uuid in item.gpu_uuids}
    made = {item.name: item for item in plan.slots}
    assert sorted(uuid for item in plan.slots for uuid in item.gpu_uuids) == sorted(by_uuid)
    homes: dict[str, list[Slot]] = defaultdict(list)
    held: Counter[str] = Counter()
    places: Counter[str] = Counter()
    by_name = {item.name: item for item in deployments}
    for berth in plan.berths:
        item, where_ = by_name[berth.deployment], made[berth.slot]
        homes[item.name] += [where_] * (berth.replicas + berth.reserved)
        held[berth.slot] += berth.vram_mib * (berth.replicas + berth.reserved)
        places[berth.slot] += berth.replicas + berth.reserved
        assert berth.reason.startswith(f"{plan.strategies[item.name]}: ")
        check_slot(item, where_, [by_uuid[uuid] for uuid in where_.gpu_uuids], berth.vram_mib)
    for name, mib in held.items():
        members = [by_uuid[uuid] for uuid in made[name].gpu_uuids]
        assert mib <= min(item.free_mib for item in members)
        assert places[name] <= (1 if len(members) > 1 else 100)
    for item in deployments:
        check_counts(item, plan)
        check_rules(item, plan.strategies[item.name], homes)
    used = [made[name] for name in held]
    assert summary.gpus_used == sum(len(item.gpu_uuids) for item in used)
    assert summary.hosts_used == len({item.host for item in used})
    assert summary.lower_bound_gpus <= summary.gpus_used
    assert summary.lower_bound_cost <= summary.cost + 1e-9
    assert summary.gap >= 0


def check_slot(item: Deployment, where_: Slot, members: Sequence[Slot], vram_mib: int) -> None:
    """One replica on one slot: the right GPUs, as many as it needs, nothing new on a cordoned one."""
    assert len(where_.gpu_uuids) == item.gpus_per_replica
    assert len({(member.host, member.product) for member in members}) == 1
    assert vram_mib == item.footprint_mib(where_.product)
    assert not any(member.cordoned for member in members)
    if item.pins:
        assert set(where_.gpu_uuids) <= set(item.pins)
    if item.min_compute_capability:
        assert float(where_.compute_capability) >= float(item.min_compute_capability)
    if item.require_nvlink:
        assert len({member.nvlink_group for member in members}) == 1
        assert members[0].nvlink_group


def check_counts(item: Deployment, plan: Plan) -> None:
    """Nobody is lost between placed, reserved and unplaced."""
    mine = [berth for berth in plan.berths if berth.deployment == item.name]
    gone = [entry for entry in plan.unplaced if entry.deployment == item.name]
    assert sum(berth.replicas for berth in mine) + sum(entry.replicas for entry in gone) == item.replicas
    reserved, room = sum(berth.reserved for berth in mine), sum(entry.room for entry in gone)
    extra = (item.max_replicas or item.replicas) - item.replicas
    if item.placement == "pool" and item.gpus_per_replica == 1:
        # Serve may put as many on each slot as on the fullest, in any way, and all of them fit.
        assert len({berth.replicas + berth.reserved for berth in mine}) <= 1
        places = sum(berth.replicas + berth.reserved for berth in mine)
        assert {berth.pool for berth in mine} <= {min(places, item.replicas + extra)}
        assert (
            reserved + sum(berth.replicas for berth in mine) + sum(e.replicas + e.room for e in gone)
            >= item.replicas + extra
        )
    elif item.headroom == "promised":
        assert reserved + room == extra
    elif item.headroom == "best_effort":
        assert reserved == room == 0
    else:
        assert reserved + room <= extra


def check_rules(item: Deployment, strategy: str, homes: dict[str, list[Slot]]) -> None:
    """Strict strategies and the rules between deployments."""
    mine = homes[item.name]
    if strategy == "strict_pack":
        assert len({home.host for home in mine}) <= 1
    if strategy == "strict_spread":
        domains = [DOMAIN[item.spread_over or "gpu"](home) for home in mine]
        assert len(domains) == len(set(domains))
    for rule in item.anti_affinity:
        mine_there = [DOMAIN[rule.domain](home) for home in mine]
        if rule.deployment == item.name:
            assert len(mine_there) == len(set(mine_there))
        else:
            assert not set(mine_there) & {DOMAIN[rule.domain](home) for home in homes[rule.deployment]}
    for rule in item.affinity:
        there = {DOMAIN[rule.domain](home) for home in homes[rule.deployment]}
        assert {DOMAIN[rule.domain](home) for home in mine} <= there
        if rule.deployment == item.name:
            assert len(there) <= 1


def placed(plan: Plan) -> int:
    return sum(berth.replicas for berth in plan.berths)


def anew(case: tuple[Sequence[Slot], Sequence[Deployment]], strategy: str, **options: object) -> Solution:
    return solve(*case, strategy, options=Options(regroup=True, **options))  # type: ignore[arg-type]


# --- Properties -------------------------------------------------------------------------------------------------------


@FEW
@given(cases(), STRATEGY)
def test_every_plan_keeps_the_contract_whatever_the_order_of_input(case, strategy):
    solution = anew(case, strategy)
    check(*case, solution)
    mixed = random.Random(3)
    shuffled = tuple(mixed.sample(part, len(part)) for part in case)
    assert anew(shuffled, strategy) == solution


@FEW
@given(cases(), STRATEGY)
def test_planning_again_changes_nothing(case, strategy):
    first = anew(case, strategy)
    again = solve(*case, strategy, first.plan, options=Options(regroup=True))
    if not first.plan.unplaced:
        assert again.plan == first.plan
        assert again.summary.moves == 0


@FEW
@given(cases(), STRATEGY)
def test_the_heuristic_alone_is_sound_and_never_better(case, strategy):
    quick, exact = anew(case, strategy, exact_gpus=0), anew(case, strategy)
    check(*case, quick)
    left = [sum(entry.replicas for entry in item.plan.unplaced) for item in (quick, exact)]
    assert len({item.priority for item in case[1]}) > 1 or left[1] <= left[0]
    if strategy == "pack" and all(item.strategy is None for item in case[1]) and quick.plan.unplaced == ():
        assert exact.summary.cost <= quick.summary.cost + 1e-9


@FEW
@given(fleets(), st.data(), STRATEGY)
def test_more_gpus_never_place_fewer(slots, data, strategy):
    deployments = tuple(replace(item, priority=0, placement="berths", max_replicas=None) for item in data.draw(mixes()))
    more = (*slots, *(replace(item, cordoned=False) for item in grid(1, 2, 44_000)))
    before, after = anew((slots, deployments), strategy), anew((more, deployments), strategy)
    assert placed(after.plan) >= placed(before.plan)


@FEW
@given(fleets(), st.data(), STRATEGY)
def test_losing_a_host_moves_only_what_was_on_it(slots, data, strategy):
    deployments = tuple(
        model(f"m{number}", data.draw(st.integers(1, 3)), data.draw(SIZE))
        for number in range(data.draw(st.integers(1, 4)))
    )
    before = anew((slots, deployments), strategy)
    lost = data.draw(st.sampled_from(sorted({item.host for item in slots})))
    rest = tuple(item for item in slots if item.host != lost)
    after = solve(rest, deployments, strategy, before.plan, options=Options(regroup=True, max_moves=0))
    assume(strategy != "strict_pack")
    for berth in before.plan.berths:
        if berth.slot in {item.name for item in rest}:
            assert where(after.plan, berth.deployment).get(berth.slot, 0) >= berth.replicas
    for berth in after.plan.berths:
        if where(before.plan, berth.deployment).get(berth.slot, 0) == 0 and not before.plan.unplaced:
            assert "takes the place of" in berth.reason


@FEW
@given(fleets(), st.data(), st.integers(0, 3))
def test_a_shortage_is_what_one_gpu_lacks_and_freeing_it_helps(slots, data, priority):
    slots = tuple(replace(item, cordoned=False) for item in slots)
    deployments = tuple(model(f"m{n}", data.draw(st.integers(1, 4)), data.draw(SIZE)) for n in range(3))
    plan = anew((slots, deployments), "pack").plan
    for entry in plan.unplaced:
        if entry.shortage_mib is None:
            continue
        mine = next(item for item in deployments if item.name == entry.deployment)
        held = Counter[str]()
        for berth in plan.berths:
            held[berth.slot] += berth.replicas * berth.vram_mib
        lacks = {
            item.name: mine.vram_mib["default"] - (item.free_mib - held[item.name])
            for item in slots
            if mine.vram_mib["default"] <= item.vram_mib
        }
        lacks = lacks or {item.name: mine.vram_mib["default"] - item.vram_mib for item in slots}
        assert entry.shortage_mib == min(lacks.values())
        assert entry.shortage_mib > 0


# --- Against brute force ----------------------------------------------------------------------------------------------


def every_way(slots: Sequence[Slot], units: Sequence[Deployment]) -> Iterator[tuple[int | None, ...]]:
    """Each replica on each slot that it may be on, or nowhere; nothing oversold."""
    choices = [
        [None, *(n for n, item in enumerate(slots) if (unit.footprint_mib(item.product) or 10**9) <= item.free_mib)]
        for unit in units
    ]
    for way in itertools.product(*choices):
        held = Counter[int]()
        for unit, number in zip(units, way, strict=True):
            if number is not None:
                held[number] += unit.footprint_mib(slots[number].product) or 0
        if all(held[number] <= slots[number].free_mib for number in held):
            yield way


@settings(FEW, max_examples=40)
@given(st.data())
def test_pack_is_what_brute_force_finds(data):
    products = data.draw(st.lists(st.sampled_from([L40S, T4, A100]), min_size=1, max_size=4))
    cost = {product: data.draw(st.sampled_from([1.0, 1.5, 0.7])) for product in (L40S, T4, A100)}
    slots = tuple(
        replace(slot(f"h{n // 2}-{n % 2}", MEMORY[product], product=product), cost=cost[product])
        for n, product in enumerate(products)
    )
    deployments = tuple(
        replace(model(f"m{n}", data.draw(st.integers(1, 2)), data.draw(SIZE)), priority=data.draw(st.integers(0, 1)))
        for n in range(data.draw(st.integers(1, 3)))
    )
    units = [item for item in deployments for _ in range(item.replicas)]

    def value(way: Sequence[int | None]) -> tuple[float, ...]:
        used = sorted({number for number in way if number is not None})
        left = Counter(unit.priority for unit, number in zip(units, way, strict=True) if number is None)
        return (
            *(left[priority] for priority in sorted({item.priority for item in deployments}, reverse=True)),
            round(sum(slots[number].cost for number in used), 6),
            len(used),
            len({slots[number].host for number in used}),
        )

    solution = anew((slots, deployments), "pack")
    check(slots, deployments, solution)
    left = {item.deployment: item.replicas for item in solution.plan.unplaced}
    levels = sorted({item.priority for item in deployments}, reverse=True)
    ours = (
        *(sum(left.get(item.name, 0) for item in deployments if item.priority == level) for level in levels),
        round(solution.summary.cost, 6),
        solution.summary.gpus_used,
        solution.summary.hosts_used,
    )
    best = min(value(way) for way in every_way(slots, units))
    assert solution.summary.optimal
    assert ours == best
    assert solution.summary.lower_bound_gpus <= min(
        value(way)[-2] for way in every_way(slots, units) if value(way)[: len(levels)] == ours[: len(levels)]
    )


@settings(FEW, max_examples=30)
@given(st.data(), st.sampled_from(["pack", "spread", "balanced"]))
def test_as_many_are_placed_as_brute_force_can(data, strategy):
    slots = tuple(slot(f"h{n}-0", data.draw(st.sampled_from([10_000, 14_000, 20_000]))) for n in range(3))
    deployments = tuple(model(f"m{n}", 1, data.draw(st.integers(2, 9)) * 1_000) for n in range(5))
    solution = anew((slots, deployments), strategy)
    most = max(sum(number is not None for number in way) for way in every_way(slots, deployments))
    assert placed(solution.plan) == most
