"""The peers do what they are known for."""

from __future__ import annotations

import pytest

from bench.cases import A100, L40S, Case, small_case
from bench.checker import Placement, check
from bench.peers import (
    TOKEN,
    UNITS,
    _instances,
    best_fit_decreasing,
    first_fit_decreasing,
    first_fit_decreasing_large,
    least_free_memory,
    ray_slots,
    ray_whole_hosts,
    run_ray,
)
from berth.plan.types import Deployment, Slot
from tests.unit.plan.helpers import slot


def fleet(*sizes: int, product: str = L40S.name) -> tuple[Slot, ...]:
    return tuple(slot(f"h0-{number}", size, product=product) for number, size in enumerate(sizes))


def model(name: str, replicas: int, size: int, gpus: int = 1) -> Deployment:
    return Deployment(name, replicas, {"default": size}, gpus_per_replica=gpus)


def spots(placements: tuple[Placement, ...]) -> list[tuple[str, str]]:
    return [(item.deployment, ",".join(gpu.split("-")[2] for gpu in item.gpus)) for item in placements]


def test_first_fit_decreasing_takes_the_first_gpu_with_room() -> None:
    case = Case("c", fleet(10, 30, 30), (model("a", 2, 8), model("b", 1, 20)))
    assert spots(first_fit_decreasing(case)) == [("b", "1"), ("a", "0"), ("a", "1")]


def test_large_gpus_first_opens_the_largest() -> None:
    case = Case("c", fleet(10, 20, 30), (model("a", 3, 10),))
    assert spots(first_fit_decreasing_large(case)) == [("a", "2"), ("a", "2"), ("a", "2")]


def test_best_fit_decreasing_fills_the_fullest_gpu_in_use() -> None:
    case = Case("c", fleet(30, 30, 30), (model("a", 1, 20), model("b", 1, 18), model("c", 1, 10)))
    assert spots(best_fit_decreasing(case)) == [("a", "0"), ("b", "1"), ("c", "0")]


def test_least_free_memory_serves_in_the_order_of_arrival() -> None:
    case = Case("c", fleet(30, 20, 10), (model("small", 1, 8), model("large", 1, 25)))
    assert spots(least_free_memory(case)) == [("small", "2"), ("large", "0")]


def test_a_wide_replica_takes_empty_gpus_of_one_host() -> None:
    slots = (slot("h0-0", 30), slot("h1-0", 30), slot("h1-1", 30))
    placements = first_fit_decreasing(Case("c", slots, (model("wide", 1, 20, gpus=2), model("one", 1, 5))))
    assert placements[0].gpus == ("GPU-h1-0-0", "GPU-h1-1-0")
    assert placements[1].gpus == ("GPU-h0-0-0",)


def test_ray_gives_a_fraction_to_the_gpu_with_the_least_left() -> None:
    assert _instances([UNITS, UNITS, UNITS, UNITS], 2_500) == [0]
    assert _instances([UNITS, 5_000, 2_500], 2_500) == [2]
    # Four of 0.6 leave 1.6 GPU in sum and no room for 0.5.
    assert _instances([4_000, 4_000, 4_000, 4_000], 5_000) == []


def test_ray_gives_whole_gpus_only_when_enough_are_free() -> None:
    assert _instances([UNITS, 9_999, UNITS], 2 * UNITS) == [0, 2]
    assert _instances([UNITS, 9_999, 0], 2 * UNITS) == []


def test_the_share_comes_from_the_largest_card_of_the_fleet() -> None:
    slots = (slot("h0-0", 40_000, total=40_000), slot("h1-0", 80_000, product=A100.name, total=80_000))
    job = ray_whole_hosts(Case("c", slots, (model("a", 1, 30_001),)))
    # 30,001 / 80,000 in steps of 1/10,000, rounded up: on the small card that is a promise of three replicas.
    assert job.demands[0].gpu_units == 3_751


@pytest.mark.runtime
class TestRayServe:
    """Ray's own scheduler, in Ray's own interpreter."""

    def test_pack_fills_one_node_and_spread_takes_each_in_turn(self, runtime_python: str) -> None:
        case = Case("c", fleet(40, 40, 40, 40), (model("a", 4, 10),))
        job = ray_slots(case, case.slots)
        assert job.demands[0].gpu_units == TOKEN
        version, packed = run_ray([job], runtime_python, pack=True, by_shape=True)
        _, spread = run_ray([job], runtime_python, pack=False, by_shape=True)
        assert version
        assert len({item.gpus for item in packed[0]}) == 1
        assert [item.gpus[0] for item in spread[0]] == [f"GPU-h0-{number}-0" for number in range(4)]

    def test_whole_hosts_oversell_the_smaller_cards(self, runtime_python: str) -> None:
        small = tuple(slot(f"h0-{gpu}", 40_000, total=40_000) for gpu in range(2))
        large = (slot("h1-0", 80_000, product=A100.name, total=80_000),)
        case = Case("c", small + large, (model("a", 6, 30_000),))
        _, placed = run_ray([ray_whole_hosts(case)], runtime_python, pack=True, by_shape=False)
        verdict = check(case, placed[0])
        assert verdict.placed == 6
        assert verdict.oversold_gpus == 2

    def test_slots_with_vram_are_never_oversold(self, runtime_python: str) -> None:
        cases = [small_case(kind, 0) for kind in ("restricted", "strangers", "overfull")]
        jobs = [ray_slots(case, case.slots) for case in cases]
        for pack in (True, False):
            _, placed = run_ray(jobs, runtime_python, pack=pack, by_shape=True)
            for case, found in zip(cases, placed, strict=True):
                verdict = check(case, found)
                assert (verdict.oversold_gpus, verdict.broken) == (0, 0)
                assert verdict.placed > 0
