"""The ports of a host's nodes: each once, each for somebody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.ray.ports import NodePorts, fixed, ranges, slot_ports, uses

HEAD = NodePorts(52690, 8490, 12000, 100, gcs_port=6390, client_port=20190, dashboard_port=8275)
BASES = (52700, 8500, 12100, 100)


@given(st.integers(1, 40), st.integers(9, 200))
def test_no_two_slots_of_a_host_share_a_port(slots: int, count: int) -> None:
    every = [use for n in range(slots) for use in uses(slot_ports(f"gpu01-{n}", 52700, 8500, 12100, count))]
    taken = [port for use in every for port in range(use.first, use.last + 1)]
    assert len(taken) == len(set(taken))
    assert fixed({str(n): slot_ports(f"gpu01-{n}", 52700, 8500, 12100, count) for n in range(slots)})


def test_every_port_is_for_somebody() -> None:
    nodes = [HEAD, slot_ports("gpu01-0", *BASES), slot_ports("gpu01-1", *BASES)]
    assert ranges(nodes, "dashboard") == ["8275"]
    assert ranges(nodes, "metrics") == ["8490", "8500", "8501", "12004", "12005"]
    assert ranges(nodes, "cluster") == [
        *("6390", "12000", "12001", "12002", "12003", "12008-12099"),
        *("12100", "12101", "12102", "12103", "12108-12199"),
        *("12200", "12201", "12202", "12203", "12208-12299"),
        *("20190", "52690", "52700", "52701"),
    ]


def test_what_overlaps_is_named() -> None:
    with pytest.raises(BerthError, match=r"workers of head have ports 12008-12099.*node manager of gpu01-0"):
        fixed({"head": HEAD, "gpu01-0": slot_ports("gpu01-0", 52700, 8500, 12050, 100)})


@pytest.mark.parametrize(("base", "count"), [(12000, 8), (65500, 100), (80, 100)])
def test_a_block_that_cannot_be_is_refused(base: int, count: int) -> None:
    with pytest.raises(BerthError, match=f"{count} ports from {base} on"):
        uses(NodePorts(1, 2, base, count))


def test_a_slot_without_a_number_has_no_ports() -> None:
    with pytest.raises(BerthError, match="has no number"):
        slot_ports("gpu", *BASES)
