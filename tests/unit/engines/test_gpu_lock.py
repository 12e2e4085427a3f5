"""The lock per GPU between processes, the kernel's clean-up included."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from berth.engines.gpu_lock import gpu_locks

HOLDER = """
import asyncio, sys
from berth.engines.gpu_lock import gpu_locks

async def hold():
    print("asks", flush=True)
    async with gpu_locks():
        print("holds", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    print("free", flush=True)

asyncio.run(hold())
"""


class Holder:
    """A process that takes the locks of its slot's GPUs and keeps them until told."""

    def __init__(self, directory: Path, uuids: str) -> None:
        env = {**os.environ, "BERTH_LOCK_DIR": str(directory), "BERTH_GPU_UUIDS": uuids}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "asks"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def has_said_something(self, within_s: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], within_s)[0])

    def release(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        if holder.process.poll() is None:
            holder.kill()
        for pipe in (holder.process.stdin, holder.process.stdout):
            if pipe is not None:
                pipe.close()


def start(holders: list[Holder], directory: Path, uuids: str) -> Holder:
    holders.append(Holder(directory, uuids))
    return holders[-1]


def test_the_second_waits_for_the_first(tmp_path: Path, holders: list[Holder]) -> None:
    first = start(holders, tmp_path, "GPU-a")
    assert first.line() == "holds"
    second = start(holders, tmp_path, "GPU-a")
    assert not second.has_said_something(0.5)
    first.release()
    assert first.line() == "free"
    assert second.line() == "holds"


def test_a_killed_holder_leaves_nothing_behind(tmp_path: Path, holders: list[Holder]) -> None:
    first = start(holders, tmp_path, "GPU-a")
    assert first.line() == "holds"
    second = start(holders, tmp_path, "GPU-a")
    assert not second.has_said_something(0.3)
    first.kill()
    assert second.line() == "holds"


def test_other_gpus_do_not_wait(tmp_path: Path, holders: list[Holder]) -> None:
    assert start(holders, tmp_path, "GPU-a").line() == "holds"
    assert start(holders, tmp_path, "GPU-b").line() == "holds"


def test_a_slot_of_two_gpus_waits_for_either_whatever_the_order(tmp_path: Path, holders: list[Holder]) -> None:
    both = start(holders, tmp_path, "GPU-b,GPU-a")
    assert both.line() == "holds"
    other = start(holders, tmp_path, "GPU-a,GPU-b")
    assert not other.has_said_something(0.3)
    both.release()
    assert other.line() == "holds"


def test_the_event_loop_runs_on_while_a_lock_is_waited_for(
    tmp_path: Path, holders: list[Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(holders, tmp_path, "GPU-a")
    assert first.line() == "holds"
    monkeypatch.setenv("BERTH_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("BERTH_GPU_UUIDS", "GPU-a")
    took = asyncio.run(_release_from_inside(first))
    assert took < 5


async def _release_from_inside(first: Holder) -> float:
    async def wait() -> float:
        begun = time.monotonic()
        async with gpu_locks():
            return time.monotonic() - begun

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    first.release()
    return await waiting


def test_without_a_directory_or_a_gpu_there_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def enter() -> None:
        async with gpu_locks():
            pass

    monkeypatch.delenv("BERTH_LOCK_DIR", raising=False)
    monkeypatch.setenv("BERTH_GPU_UUIDS", "GPU-a")
    asyncio.run(enter())
    monkeypatch.setenv("BERTH_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("BERTH_GPU_UUIDS", "")
    asyncio.run(enter())
    assert not (tmp_path / "locks").exists()
