"""What must be done to systemd's units: from what is wanted and what is there, nothing more and nothing twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.host.systemd import Found, Step, Wanted, differences, parse

SLOT = Wanted("berth-ray-slot@gpu01-0", "c0", "u0")
UP = Found(SLOT.name, "active", True, "running", 41, "c0", "u0")


def verbs(steps: list[Step]) -> list[tuple[str, str]]:
    return [(step.unit, step.verb) for step in steps]


def test_a_unit_as_wanted_is_left_alone() -> None:
    assert differences([SLOT], [UP]) == []


@pytest.mark.parametrize(
    ("found", "verb", "why"),
    [
        (replace(UP, config_sha1="c9"), "restarted", "configuration changed"),
        (replace(UP, unit_sha1="u9"), "restarted", "unit changed"),
        (replace(UP, sub="auto-restart", active="activating", pid=0), "restarted", "waits to try again"),
        (replace(UP, active="failed", pid=0), "started", "it is failed"),
        (replace(UP, active="inactive", pid=0), "started", "it is inactive"),
        (replace(UP, enabled=False), "enabled", "after a boot"),
    ],
)
def test_what_differs_is_mended(found: Found, verb: str, why: str) -> None:
    (step,) = differences([SLOT], [found])
    assert (step.unit, step.verb) == (SLOT.name, verb)
    assert why in str(step)


def test_a_unit_that_just_starts_is_waited_for_and_not_restarted() -> None:
    starting = replace(UP, active="activating", sub="start-pre", pid=0, config_sha1="", unit_sha1="")
    assert differences([SLOT], [starting]) == []


def test_units_that_are_not_wanted_go_first() -> None:
    gone = [Found("berth-ray-slot@gpu01-7", "active", True), Found("berth-ray-slot@gpu01-8", "inactive", True)]
    steps = differences([SLOT], gone)
    assert verbs(steps) == [(gone[0].name, "removed"), (gone[1].name, "removed"), (SLOT.name, "started")]
    assert differences([], [Found("berth-ray-slot@gpu01-9", "inactive", False)]) == []


NAMES = st.sampled_from([f"berth-ray-slot@gpu01-{n}" for n in range(4)])
FOUND = st.builds(
    Found,
    NAMES,
    st.sampled_from(["active", "activating", "failed", "inactive"]),
    st.booleans(),
    st.sampled_from(["running", "auto-restart", "dead"]),
    st.integers(0, 2),
    st.sampled_from(["c0", "c1", ""]),
    st.sampled_from(["u0", "u1", ""]),
)


@given(
    wanted=st.lists(NAMES, unique=True).map(lambda names: [Wanted(name, "c0", "u0") for name in names]),
    found=st.lists(FOUND, unique_by=lambda unit: unit.name),
)
def test_done_once_nothing_is_left_to_do(wanted: list[Wanted], found: list[Found]) -> None:
    steps = differences(wanted, found)
    assert len({step.unit for step in steps}) == len(steps)
    removed = {step.unit for step in steps if step.verb == "removed"}
    assert not removed & {unit.name for unit in wanted}
    touched = {step.unit: step.verb for step in steps}
    after = [unit for unit in found if unit.name not in touched]
    after += [
        Found(name, "active", True, "running", 7, "c0", "u0") for name, verb in touched.items() if verb != "removed"
    ]
    assert differences(wanted, after) == []
    assert differences(list(reversed(wanted)), list(reversed(found))) == steps


def test_systemctls_words_are_read() -> None:
    shown = """Id=berth-ray-head.service
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=enabled
MainPID=812

Id=berth-ray-slot@gpu01-0.service
LoadState=not-found
ActiveState=inactive
SubState=dead
UnitFileState=
MainPID=0
"""
    environ = {812: {"BERTH_CONFIG_SHA1": "c0", "BERTH_UNIT_SHA1": "u0", "HOME": "/"}}
    assert parse(shown, environ) == [
        Found("berth-ray-head", "active", True, "running", 812, "c0", "u0"),
        Found("berth-ray-slot@gpu01-0", "inactive", False, "dead"),
    ]
