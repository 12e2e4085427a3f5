"""Ports of one host: refused exactly when two nodes, or Ray's workers, would want the same one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.preflight.ports import (
    EVERYWHERE,
    HEAD,
    PORTS,
    SLOT_BASES,
    SLOTS_ROOM,
    WORKER_PORTS,
    overlap,
    port_problems,
    single_ports,
)
from tests.unit.preflight.builders import values

NAMES = (*HEAD, *EVERYWHERE, *SLOT_BASES)
anything = st.dictionaries(st.sampled_from(NAMES), st.integers(-5, 70_000), min_size=len(NAMES), max_size=len(NAMES))
crowded = st.fixed_dictionaries({name: st.integers(30_000, 30_060) for name in NAMES})


def ports() -> dict[str, int]:
    return {name: int(values()[name]) for name in NAMES}


def test_the_defaults_are_apart() -> None:
    assert list(port_problems("gpu1", ports(), head=True, slots=True)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ray_head_gcs_port": 70_000}, "is no port that can be used"),
        ({"ray_head_gcs_port": 0}, "is no port that can be used"),
        ({"serve_apps_http_port": 80}, "is no port that can be used"),
        ({"ray_slot_metrics_port_base": 65_530}, "is no port that can be used"),
        ({"ray_head_client_port": 10_002}, "is in the range that Ray gives to workers"),
        ({"ray_slot_metrics_port_base": 9_999}, "is in the range that Ray gives to workers"),
        ({"ray_head_metrics_port": 8000}, "ray_head_metrics_port and serve_apps_http_port claim the same port"),
        ({"ray_head_metrics_port": 8515}, "ray_head_metrics_port and ray_slot_metrics_port_base claim the same port"),
    ],
)
def test_each_impossible_port_is_named(changes: dict[str, int], words: str) -> None:
    (problem,) = port_problems("gpu1", ports() | changes, head=True, slots=True)
    assert words in problem.what
    assert all(str(port) in problem.found for port in changes.values())


def test_ports_of_nodes_that_are_not_on_the_host_do_not_count() -> None:
    clash = ports() | {"ray_head_metrics_port": 8500}
    assert list(port_problems("gpu1", clash, head=False, slots=True)) == []
    assert list(port_problems("head1", clash, head=True, slots=False)) == []


@given(crowded)
def test_two_variables_are_refused_when_and_only_when_a_port_is_in_both(chosen: dict[str, int]) -> None:
    wide = {name: range(port, port + (SLOTS_ROOM if name in SLOT_BASES else 1)) for name, port in chosen.items()}
    pairs = {
        frozenset({left, right})
        for left in NAMES
        for right in NAMES
        if left < right and set(wide[left]) & set(wide[right])
    }
    told = {
        frozenset(item.what.split(" claim ")[0].split(" and "))
        for item in port_problems("gpu1", chosen, head=True, slots=True)
    }
    assert told == pairs


@given(anything)
def test_what_is_let_through_can_be_listened_on(chosen: dict[str, int]) -> None:
    if list(port_problems("gpu1", chosen, head=True, slots=True)):
        return
    every = list(single_ports(chosen, head=True, slots=True).values())
    assert len(every) == len(set(every)) == len(HEAD) + len(EVERYWHERE) + SLOTS_ROOM * len(SLOT_BASES)
    assert all(port in PORTS and port not in WORKER_PORTS for port in every)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 50), st.integers(1, 9))
def test_overlap_is_that_of_sets(first: int, long: int, second: int, wide: int) -> None:
    left, right = range(first, first + long), range(second, second + wide)
    assert overlap(left, right) == bool(set(left) & set(right)) == overlap(right, left)
