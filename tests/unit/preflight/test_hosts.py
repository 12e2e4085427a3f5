"""One host judged by what it said of itself: each fault is one problem, a good host has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.preflight.facts import (
    Address,
    Answer,
    FileSystem,
    Interpreter,
    Listener,
    Nvidia,
    OsRelease,
)
from berth.preflight.hosts import check_host, clock_offset, slot_count
from berth.preflight.problem import Problem
from tests.unit.preflight.builders import CACHE, RUN, STATE, answer, facts, only, probe, wanted

ALMA8 = OsRelease("almalinux", "8.10", "AlmaLinux 8.10 (Cerulean Leopard)")
SHM = "/dev/shm"


def spoiled(**changes: Any) -> Problem:
    return only(check_host(answer(**changes), wanted()))


def disks(path: str, **changes: Any) -> dict[str, FileSystem]:
    good = facts().filesystems
    return {**good, path: replace(good[path], **changes)}


def test_a_good_host_has_no_problem() -> None:
    assert check_host(answer(), wanted()) == []


@pytest.mark.parametrize(
    ("system", "version"),
    [("ubuntu", "22.04"), ("debian", "12"), ("debian", "13"), ("rhel", "9.4"), ("rocky", "10.0")],
)
def test_supported_systems(system: str, version: str) -> None:
    assert check_host(answer(os=OsRelease(system, version, "it")), wanted()) == []


@pytest.mark.parametrize(
    ("changes", "kind", "severity", "words"),
    [
        ({"system": "Darwin"}, "os", "error", "does not run Linux"),
        ({"os": OsRelease("ubuntu", "20.04", "Ubuntu 20.04")}, "os", "error", "driver packages"),
        ({"os": OsRelease("debian", "120", "?")}, "os", "error", "driver packages"),
        ({"os": ALMA8}, "os", "error", "no Python that today's Ansible can use"),
        ({"kernel": "5.4.0-200-generic"}, "kernel", "warning", "older"),
        ({"architecture": "aarch64"}, "architecture", "error", "locks"),
        ({"python": "3.8.10"}, "python", "error", "too old for its modules"),
        ({"interpreters": {"python3.12": Interpreter("", False, "not there")}}, "python", "error", "does not run"),
        ({"interpreters": {"python3.12": Interpreter("3.10.12", True)}}, "python", "error", "too old"),
        ({"interpreters": {"python3.12": Interpreter("3.12.3", False)}}, "python", "error", "virtual environments"),
        ({"commands": {"gcc": False, "ls": True}}, "command", "error", "it lacks gcc"),
        ({"euid": 1000}, "root", "error", "systemd units need root"),
        ({"memory_mib": 60_000}, "memory", "error", "more memory than the host has"),
        ({"nr_open": 1024}, "nofile", "error", "fs.nr_open"),
        ({"time_start": 1030.0, "time_end": 1030.4}, "clock", "error", "clock differs"),
        ({"clock_synchronised": False, "time_daemons": ()}, "time_sync", "warning", "nothing keeps its clock"),
        ({"addresses": {"gpu1": Address("", False)}}, "address", "error", "cannot be resolved"),
        ({"addresses": {"10.0.0.1": Address("10.0.0.1", False)}}, "address", "error", "none of its interfaces"),
        ({"nvidia": Nvidia("", (), 0)}, "gpu", "error", "no NVIDIA GPU on its PCI bus"),
    ],
)
def test_each_fault_is_one_problem(changes: dict[str, Any], kind: str, severity: str, words: str) -> None:
    problem = spoiled(**changes)
    assert (problem.kind, problem.severity, problem.objects) == (kind, severity, ("gpu1",))
    assert words in problem.what
    assert problem.mend


@pytest.mark.parametrize(
    ("path", "changes", "kind", "words"),
    [
        (STATE, {"free_mib": 900}, "disk", "has 900 MiB free, the runtime needs 20480"),
        (STATE, {"options": ("ro",)}, "disk", "read-only"),
        (CACHE, {"options": ("rw", "noexec")}, "noexec", "no library or compiled kernel"),
        ("/tmp", {"inodes_free": 12}, "inodes", "too few inodes"),
        (RUN, {"error": "Permission denied"}, "disk", "cannot be read"),
        (SHM, {"mount": "/", "type": "overlay"}, "shm", "not a file system of its own"),
        (SHM, {"total_mib": 64}, "shm", "smaller than the object stores"),
        (SHM, {"options": ("rw", "noexec")}, "noexec", "noexec"),
    ],
)
def test_file_systems(path: str, changes: dict[str, Any], kind: str, words: str) -> None:
    problem = spoiled(filesystems=disks(path, **changes))
    assert problem.kind == kind
    assert words in f"{problem.what} {problem.found}"


def test_a_disk_that_has_the_runtime_already_may_be_full() -> None:
    full = answer(filesystems=disks(STATE, free_mib=900), exists={f"{STATE}/runtime/current": True})
    assert check_host(full, wanted()) == []


def test_a_file_system_without_a_number_of_inodes_has_enough() -> None:
    assert check_host(answer(filesystems=disks("/tmp", inodes=0, inodes_free=0)), wanted()) == []


def test_on_a_simulated_host_any_system_will_do() -> None:
    told = check_host(answer(os=OsRelease("arch", "", "Arch Linux"), nvidia=Nvidia()), wanted(simulate="auto"))
    assert [(item.kind, item.severity) for item in told] == [("os", "warning")]


def test_gpus_decide_what_memory_is_offered() -> None:
    assert slot_count(facts(), wanted()) == 4
    assert slot_count(facts(), wanted(shapes=(2,))) == 3
    assert slot_count(facts(), wanted(slots=False)) == 0
    assert slot_count(facts(nvidia=Nvidia("", (), 8)), wanted()) == 8
    assert slot_count(facts(), wanted(simulate="true")) == 0


def test_under_supervisord_the_units_inherit_the_users_limit() -> None:
    told = check_host(answer(nofile_hard=4096, euid=1000), wanted(systemd=False))
    assert [(item.kind, item.severity, item.found) for item in told] == [("nofile", "warning", "4096")]
    assert check_host(answer(nofile_hard=-1, euid=1000), wanted(systemd=False)) == [], "-1 is without a limit"


def test_ports_are_free_or_ours() -> None:
    ours = (Listener(8000, 7, "ray::ProxyActor", "c-1"),)
    assert check_host(answer(listeners=ours), wanted()) == []
    strangers = (Listener(8000, 7, "nginx", None), Listener(8501, None, None, None), Listener(8501, 9, "ray", "other"))
    told = [item.what for item in check_host(answer(listeners=strangers), wanted())]
    assert told == [
        "serve_apps_http_port=8000 is taken by pid 7 (nginx)",
        "ray_slot_metrics_port_base + 1=8501 is taken by another process",
        "ray_slot_metrics_port_base + 1=8501 is taken by pid 9 (ray)",
    ]


def test_a_peer_that_refuses_is_there_and_one_that_is_silent_is_not() -> None:
    reached = (probe("gpu2", 22, "refused"), probe("gpu2", 10002, "refused"))
    assert check_host(answer(peers=reached), wanted()) == []
    silent = (probe("gpu2", 22, "timeout"), probe("gpu2", 10002, "unreachable"))
    problem = spoiled(peers=silent)
    assert (problem.kind, problem.severity) == ("peer", "error")
    assert problem.found == "10.0.0.2:22 timeout, 10.0.0.2:10002 unreachable"
    dropped = (probe("gpu2", 22, "open"), probe("gpu2", 10002, "timeout"))
    problem = spoiled(peers=dropped)
    assert (problem.kind, problem.severity) == ("firewall", "warning")
    assert "port 10002" in problem.what


def test_named_gpus_that_are_gone() -> None:
    named = {"placement_slot_shapes": ("GPU-gpu1-0", "GPU-gone"), "placement_cordoned_gpus": ()}
    problem = only(check_host(answer(), wanted(named_gpus=named)))
    assert (problem.kind, problem.severity) == ("gpu", "warning")
    assert problem.what == "placement_slot_shapes names GPU GPU-gone, which its driver does not show"


@pytest.mark.parametrize(
    ("silent", "kind", "words"),
    [
        (Answer(failed="ssh: connect to host 10.0.0.1 port 22: Connection timed out"), "unreachable", "timed out"),
        (Answer(failed="Missing sudo password"), "root", "Missing sudo password"),
        (Answer(failed="SyntaxError", os=ALMA8), "os", "AlmaLinux 8.10"),
        (Answer(failed="python3: not found", os=OsRelease("debian", "12", "Debian 12")), "unreachable", "not found"),
    ],
)
def test_a_host_that_could_not_be_looked_at_is_one_problem(silent: Answer, kind: str, words: str) -> None:
    problem = only(check_host(silent, wanted()))
    assert (problem.kind, problem.severity) == (kind, "error")
    assert words in problem.found


seconds = st.floats(0, 30, allow_nan=False)


@given(st.floats(-1000, 1000), seconds, seconds, seconds)
def test_the_true_offset_lies_within_the_bounds(offset: float, connect: float, look: float, back: float) -> None:
    before = 5000.0
    start, end = before + connect + offset, before + connect + look + offset
    low, high = clock_offset(before, before + connect + look + back, start, end)
    assert low - 1e-6 <= offset <= high + 1e-6


@given(st.floats(-4.9, 4.9), seconds, seconds, seconds)
def test_a_slow_connection_alone_is_no_wrong_clock(offset: float, connect: float, look: float, back: float) -> None:
    slow = Answer(
        facts(time_start=5000 + connect + offset, time_end=5000 + connect + look + offset),
        before=5000,
        after=5000 + connect + look + back,
    )
    assert check_host(slow, wanted()) == []
