"""The checker sees what is wrong with a plan, whoever made it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cases import H100, KINDS, L40S, Case, footprint_on, make_fleet, small_case
from bench.checker import Placement, check
from bench.peers import RULES
from berth.codec import replace
from berth.plan.types import Deployment
from tests.unit.plan.helpers import slot


def case_of(*deployments: Deployment, foreign: int = 0) -> Case:
    slots = [slot(f"h{host}-{gpu}", 40_000, product=L40S.name, foreign=foreign) for host in (0, 1) for gpu in (0, 1)]
    return Case("made", tuple(slots), deployments)


def on(name: str, *gpus: str) -> Placement:
    return Placement(name, tuple(f"GPU-{gpu}-0" for gpu in gpus))


SMALL = Deployment("small", 3, {"default": 20_000})
WIDE = Deployment("wide", 1, {"default": 30_000}, gpus_per_replica=2)


def test_a_sound_plan_has_nothing_against_it() -> None:
    verdict = check(case_of(SMALL), [on("small", "h0-0"), on("small", "h0-0"), on("small", "h1-0")])
    assert (verdict.gpus_used, verdict.hosts_used, verdict.placed, verdict.unplaced) == (2, 2, 3, 0)
    assert (verdict.oversold_gpus, verdict.oversold_mib, verdict.broken) == (0, 0, 0)


def test_one_replica_too_many_oversells_the_gpu() -> None:
    verdict = check(case_of(SMALL), [on("small", "h0-0")] * 3)
    assert (verdict.oversold_gpus, verdict.oversold_mib) == (1, 20_000)


def test_what_a_stranger_holds_is_not_free() -> None:
    verdict = check(case_of(SMALL, foreign=1), [on("small", "h0-0")] * 2)
    assert (verdict.oversold_gpus, verdict.oversold_mib) == (1, 1)


def test_a_footprint_is_the_one_of_the_product_it_lands_on() -> None:
    smaller = replace(SMALL, vram_mib={"default": 20_000, L40S.name: 13_000})
    assert check(case_of(smaller), [on("small", "h0-0")] * 3).oversold_gpus == 0


def test_replicas_left_out_are_counted() -> None:
    assert check(case_of(SMALL), [on("small", "h0-0")]).unplaced == 2


def test_a_forbidden_product_breaks_the_rules() -> None:
    elsewhere = replace(SMALL, products=(H100.name,))
    assert check(case_of(elsewhere), [on("small", "h0-0")]).broken == 1


def test_a_low_compute_capability_breaks_the_rules() -> None:
    newer = replace(SMALL, min_compute_capability="8.9")
    old = [replace(item, compute_capability="8.0") for item in case_of(newer).slots]
    assert check(Case("old", tuple(old), (newer,)), [on("small", "h0-0")]).broken == 1
    tenth = [replace(item, compute_capability="10.0") for item in old]
    assert check(Case("new", tuple(tenth), (newer,)), [on("small", "h0-0")]).broken == 0


def test_gpus_of_one_replica_share_a_host() -> None:
    assert check(case_of(WIDE), [on("wide", "h0-0", "h0-1")]).broken == 0
    assert check(case_of(WIDE), [on("wide", "h0-0", "h1-0")]).broken == 1
    assert check(case_of(WIDE), [on("wide", "h0-0")]).broken == 1


def test_gpus_of_a_wide_replica_are_its_own() -> None:
    tiny = Deployment("tiny", 1, {"default": 1_000})
    assert check(case_of(WIDE, tiny), [on("wide", "h0-0", "h0-1"), on("tiny", "h0-1")]).broken == 1


def test_more_replicas_than_wanted_break_the_rules() -> None:
    places = [on("small", "h0-0"), on("small", "h0-1"), on("small", "h1-0"), on("small", "h1-1")]
    assert check(case_of(SMALL), places).broken == 1


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(100, 400), rule=st.sampled_from(sorted(RULES)))
def test_rules_of_thumb_are_sound_and_a_planted_oversell_is_found(kind: str, seed: int, rule: str) -> None:
    case = small_case(kind, seed)
    placements = list(RULES[rule](case))
    sound = check(case, placements)
    assert (sound.oversold_gpus, sound.broken) == (0, 0)
    assert sound.placed + sound.unplaced == case.replicas
    slots = {item.gpu_uuids[0]: item for item in case.slots}
    wanted = {item.name: item for item in case.deployments}
    one = next((item for item in placements if len(item.gpus) == 1), None)
    if one is None:
        return
    gpu = slots[one.gpus[0]]
    size = footprint_on(wanted[one.deployment], gpu)
    assert size is not None
    # The checker alone: as many copies of one sound placement as one GPU cannot hold.
    copies = gpu.free_mib // size + 1
    alone = Case(case.name, case.slots, (replace(wanted[one.deployment], replicas=copies),))
    verdict = check(alone, [one] * copies)
    assert (verdict.oversold_gpus, verdict.oversold_mib) == (1, copies * size - gpu.free_mib)


def test_cost_is_the_sum_over_the_gpus_in_use() -> None:
    slots = make_fleet(random.Random(1), 8, [H100], priced=True, strangers=0.0)
    case = Case("priced", slots, (Deployment("a", 2, {"default": 1_000}),))
    places = [Placement("a", slots[0].gpu_uuids), Placement("a", slots[3].gpu_uuids)]
    assert check(case, places).cost == 2 * H100.cost
