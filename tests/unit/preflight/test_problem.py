"""The one list: errors first, the same problem of several hosts once, every word of it there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from berth.preflight.problem import Problem, arrange, headline, lines

words = st.text("abc ", min_size=1, max_size=12)
problems = st.lists(
    st.builds(
        Problem,
        kind=st.sampled_from(["disk", "port", "gpu"]),
        severity=st.sampled_from(["error", "warning"]),
        objects=st.sampled_from([("gpu1",), ("gpu2",), ("inventory",)]),
        what=words,
    ),
    max_size=12,
)


@given(problems, st.sets(st.sampled_from(["disk", "port"])))
def test_nothing_is_lost_and_nothing_is_told_twice(found: list[Problem], accept: set[str]) -> None:
    whole = arrange(found, accept)

    def flat(items: list[Problem]) -> set[tuple[str, str, str, str]]:
        return {
            (item.kind, "warning" if item.kind in accept else item.severity, thing, item.what)
            for item in items
            for thing in item.objects
        }

    assert flat(list(whole)) == flat(found)
    assert sum(len(item.objects) for item in whole) == len(flat(found))
    severities = [item.severity for item in whole]
    assert severities == sorted(severities)
    assert arrange(reversed(found), accept) == whole


def test_the_list_has_every_part() -> None:
    disk = Problem("disk", "error", ("gpu2",), "it is full", "0 MiB", "9 MiB", "make room")
    clock = Problem("time_sync", "warning", ("gpu1",), "nothing keeps its clock")
    whole = arrange([clock, disk, Problem("disk", "error", ("gpu1",), "it is full", "0 MiB", "9 MiB", "make room")])
    assert headline(whole) == "1 error and 1 warning (gpu1, gpu2)"
    assert lines(whole, "2 hosts") == [
        "Preflight: 2 hosts: 1 error and 1 warning (gpu1, gpu2)",
        "",
        "  ERROR gpu1, gpu2: it is full",
        "    found    0 MiB",
        "    allowed  9 MiB",
        "    mend     make room",
        "    kind     disk",
        "",
        "  WARNING gpu1: nothing keeps its clock",
        "    kind     time_sync",
    ]
    assert lines([], "2 hosts") == ["Preflight: 2 hosts: nothing to mend"]
