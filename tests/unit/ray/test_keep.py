"""What stands for a slot's unit while its node runs, with a real child in the raylet's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from berth.ray import keep
from berth.ray.launch import PR_SET_CHILD_SUBREAPER

BECOME = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(int(sys.argv[3]), 1, 0, 0, 0)
child = subprocess.Popen(["sh", "-c", sys.argv[2]])
print(child.pid, flush=True)
os.execv(sys.executable, [sys.executable, "-I", "-S", sys.argv[1], str(child.pid), "gpu01-0"])
"""
WAIT_S = 20
Started = tuple[subprocess.Popen[str], int]


def start(child: str) -> Started:
    process = subprocess.Popen(
        [sys.executable, "-c", BECOME, str(keep.__file__), child, str(PR_SET_CHILD_SUBREAPER)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def ended(started: Started) -> tuple[int, str]:
    _, error = started[0].communicate(timeout=WAIT_S)
    return started[0].returncode, error


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def waits(process: psutil.Process) -> bool:
    """Whether it has become the keeper, which then catches SIGTERM."""
    if "-I" not in process.cmdline():
        return False
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda pid: os.kill(pid, signal.SIGKILL), "was ended by signal 9"),
        (lambda pid: os.kill(pid, signal.SIGUSR1), "ended with 3"),
        # Ray takes this one for graceful, and `ray start --block` would wait on beside a node that is gone.
        (lambda pid: os.kill(pid, signal.SIGTERM), "was ended by signal 15"),
    ],
)
def test_a_raylet_that_ends_ends_the_unit(end: Callable[[int], None], says: str) -> None:
    started = start("trap 'exit 3' USR1; echo ready >&2; while :; do sleep 0.05; done")
    process, raylet = started
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    end(raylet)
    code, error = ended(started)
    assert code == 1
    assert f"the raylet of slot gpu01-0 {says}" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_stops_the_raylet_and_waits_for_it(number: signal.Signals) -> None:
    started = start("trap 'sleep 0.2; exit 0' TERM; while :; do sleep 0.05; done")
    process, raylet = started
    until(lambda: waits(psutil.Process(process.pid)))
    process.send_signal(number)
    assert ended(started) == (0, "")
    assert not psutil.pid_exists(raylet)


def test_other_children_that_end_are_reaped_and_change_nothing() -> None:
    """An orphan of the node, given to the keeper: `sleep 0.1` outlives the shell that started it."""
    started = start("(sleep 0.1 &) ; exec sleep 60")
    process, raylet = started
    keeper = psutil.Process(process.pid)
    until(lambda: waits(keeper))
    until(lambda: [child.pid for child in keeper.children()] == [raylet])
    assert keeper.is_running()
    os.kill(raylet, signal.SIGKILL)
    assert ended(started)[0] == 1


def test_it_needs_little_memory() -> None:
    """The reason for it: all of Ray imported takes 90 MiB."""
    started = start("exec sleep 60")
    process, raylet = started
    keeper = psutil.Process(process.pid)
    until(lambda: waits(keeper))
    try:
        assert keeper.memory_full_info().pss < 20 * 2**20
    finally:
        os.kill(raylet, signal.SIGKILL)
        process.wait()
