"""The generators: the same seed gives the same case, and every case is what its name says."""

from __future__ import annotations

import pytest

from bench.cases import KINDS, RESERVE_MIB, Case, footprint_on, large_case, small_case, small_cases


def holds_one(case: Case, number: int) -> bool:
    deployment = case.deployments[number]
    return any((footprint_on(deployment, slot) or slot.free_mib + 1) <= slot.free_mib for slot in case.slots)


def test_the_same_seed_gives_the_same_case() -> None:
    assert small_cases(20) == small_cases(20)
    assert large_case(240, 3) == large_case(240, 3)


def test_another_seed_gives_another_case() -> None:
    assert len({case.deployments for case in map(_hashable, small_cases(100))}) == 100
    assert large_case(240, 3).slots != large_case(240, 4).slots


def _hashable(case: Case) -> Case:
    return Case(case.name, case.slots, tuple(str(item) for item in case.deployments))  # type: ignore[arg-type]


def test_small_cases_have_at_most_64_gpus_and_every_kind() -> None:
    cases = small_cases(100)
    assert all(4 <= len(case.slots) <= 64 for case in cases)
    assert {case.name.rsplit("-", 1)[0] for case in cases} == set(KINDS)
    assert len({case.name for case in cases}) == 100


def test_the_largest_case_is_the_promised_one() -> None:
    case = large_case(8000)
    assert len(case.slots) == 8000
    assert len({slot.host for slot in case.slots}) == 1000
    assert case.replicas == 20_000
    assert 200 <= len(case.deployments) <= 500
    assert {item.gpus_per_replica for item in case.deployments} == {1, 2, 4, 8}
    assert all(holds_one(case, number) for number in range(len(case.deployments)))


@pytest.mark.parametrize("seed", range(5))
def test_a_tight_case_fills_half_of_its_gpus_to_the_last_mib(seed: int) -> None:
    case = small_case("tight", seed)
    asked = sum(item.replicas * item.vram_mib["default"] for item in case.deployments)
    assert asked == len(case.slots) // 2 * case.slots[0].free_mib
    assert case.slots[0].free_mib == case.slots[0].total_mib - RESERVE_MIB


def test_kinds_are_hard_in_their_own_way() -> None:
    parallel = [small_case("tensor-parallel", seed) for seed in range(10)]
    assert any(item.gpus_per_replica > 1 for case in parallel for item in case.deployments)
    assert any(slot.foreign_mib for slot in small_case("strangers", 0).slots)
    assert any(small_case("priced", seed).priced for seed in range(3))
    assert not small_case("one-product", 0).priced
    restricted = [item for seed in range(3) for item in small_case("restricted", seed).deployments]
    assert any(item.products for item in restricted)
    assert any(item.min_compute_capability for item in restricted)
