"""The run lock: one live holder, stale ones taken over, never an accident of the file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from berth.errors import BerthError
from berth.host.run_lock import Holder, acquire, read, refuse_beside, release


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """Another run: a process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(process.pid)
    process.kill()
    process.communicate()


def test_a_live_run_is_named_and_refused(tmp_path: Path, other: psutil.Process) -> None:
    lock = tmp_path / "deep" / "lock"
    assert acquire(lock, other, "site.yml") is None
    with pytest.raises(BerthError, match=rf"pid {other.pid} \(site.yml\).*kill {other.pid}"):
        acquire(lock, psutil.Process(), "site.yml")
    held = read(lock)
    assert held is not None
    assert held.pid == other.pid


def test_the_same_run_may_take_it_twice(tmp_path: Path) -> None:
    lock, me = tmp_path / "lock", psutil.Process()
    assert acquire(lock, me, "site.yml") is None
    assert acquire(lock, me, "site.yml") is None
    assert release(lock, me)
    assert not lock.exists()


def test_a_dead_run_is_taken_over(tmp_path: Path, other: psutil.Process) -> None:
    lock = tmp_path / "lock"
    acquire(lock, other, "site.yml")
    other.kill()
    other.wait()
    stale = acquire(lock, psutil.Process(), "site.yml")
    assert stale is not None
    assert stale.pid == other.pid


def test_a_pid_that_somebody_else_has_now_protects_nobody(tmp_path: Path, other: psutil.Process) -> None:
    """The kernel gave the killed run's pid to another process: told apart by its start time."""
    reused = Holder(other.pid, other.create_time() - 100, "ops", "yesterday", "site.yml")
    assert not reused.alive()
    refuse_beside(reused, psutil.Process())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "many"}'])
def test_a_torn_lock_file_protects_nobody(tmp_path: Path, text: str) -> None:
    lock = tmp_path / "lock"
    lock.write_text(text)
    assert read(lock) is None
    assert acquire(lock, psutil.Process(), "site.yml") is None


def test_only_the_holder_gives_it_back(tmp_path: Path, other: psutil.Process) -> None:
    lock = tmp_path / "lock"
    acquire(lock, other, "site.yml")
    assert not release(lock, psutil.Process())
    assert lock.exists()
    assert json.loads(lock.read_text()).keys() == asdict(Holder(1, 1.0, "", "", "")).keys()
