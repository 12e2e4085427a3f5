"""One playbook run at a time on a state directory. The holder is a process, so a killed run leaves no lock behind."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from berth.codec import load, write_json
from berth.errors import BerthError


@dataclass(frozen=True)
class Holder:
    """The run that has the lock: told apart from a later process of the same pid by its start time (epoch seconds)."""

    pid: int
    started: float
    user: str
    since: str
    what: str

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # psutil's create time moves a little when the clock is stepped.
            return abs(process.create_time() - self.started) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def playbook_process() -> psutil.Process:
    """The outermost ``ansible-playbook`` above this process, or this process's parent when there is none."""
    parents = psutil.Process().parents()
    runs = [parent for parent in parents if any("ansible-playbook" in part for part in _cmdline(parent)[:3])]
    return runs[-1] if runs else parents[0]


def acquire(path: Path, holder: psutil.Process, what: str) -> Holder | None:
    """Take the lock for ``holder``; returns the dead holder whose stale lock was taken over, if there was one.

    Raises:
        BerthError: another run that lives holds it.
    """
    with _guard(path):
        present = read(path)
        refuse_beside(present, holder)
        mine = Holder(holder.pid, holder.create_time(), getpass.getuser(), time.strftime("%Y-%m-%d %H:%M:%S"), what)
        write_json(path, asdict(mine))
        return present if present and present.pid != holder.pid else None


def refuse_beside(present: Holder | None, holder: psutil.Process) -> None:
    """Raise BerthError when ``present`` is a run that lives and is not ``holder``."""
    if present and present.alive() and present.pid != holder.pid:
        raise BerthError(
            f"another run is at work here: pid {present.pid} ({present.what}), {present.user}'s, since {present.since}",
            mend=f"wait for it, or end it: kill {present.pid}",
        )


def release(path: Path, holder: psutil.Process) -> bool:
    """Give the lock back if ``holder`` has it; tells whether it had."""
    with _guard(path):
        present = read(path)
        if present is None or present.pid != holder.pid:
            return False
        path.unlink()
        return True


def read(path: Path) -> Holder | None:
    """The holder written in the lock; None when there is no lock or it is unreadable (then it protects nobody)."""
    try:
        return load(Holder, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (FileNotFoundError, json.JSONDecodeError, BerthError):
        return None


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        # On the directory, so that no second file is left behind.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
