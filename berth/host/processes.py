"""Processes of a Berth cluster on this host, told by marks they inherit from the unit that started them, never by name.

Two marks, because neither is enough. The environment (``BERTH_CLUSTER``, ``BERTH_UNIT``, ``BERTH_SLOT``) is overwritten
in processes that set their own title, as Ray's workers do. The working directory holds a mark file that cannot be
overwritten, but a person's shell may stand in it too; it counts only where the environment was overwritten.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

CLUSTER_VARIABLE = "BERTH_CLUSTER"
MARK_FILE = ".berth-unit.json"
HEAD_STATE_COMMAND = "gcs_server"


@dataclass(frozen=True)
class Mark:
    """Whose a process is: the cluster's id, the unit (``head``, ``slot@gpu01-0``, "" for the supervisor), the slot."""

    cluster: str
    unit: str = ""
    slot: str | None = None


@dataclass(frozen=True)
class OwnProcess:
    """A process of the cluster; ``unit`` is the service it belongs to ("" for the supervisor)."""

    pid: int
    unit: str
    command: str


def write_mark(directory: Path, mark: Mark) -> None:
    """Mark ``directory`` as the working directory of a unit."""
    (directory / MARK_FILE).write_text(json.dumps(asdict(mark)), encoding="utf-8")


def mark_of(pid: int) -> Mark | None:
    """The mark of a process; None when it is not Berth's, is gone, or is not ours to read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
        env = dict(item.split("=", 1) for item in raw.decode(errors="replace").split("\0") if "=" in item)
        if CLUSTER_VARIABLE in env:
            return Mark(env[CLUSTER_VARIABLE], env.get("BERTH_UNIT", ""), env.get("BERTH_SLOT"))
        if b"=" in raw.split(b"\0", 1)[0]:
            return None
        return Mark(**json.loads(Path(f"/proc/{pid}/cwd", MARK_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def cluster_of(pid: int) -> str | None:
    """The id of the cluster a process belongs to, None for strangers."""
    mark = mark_of(pid)
    return mark.cluster if mark else None


def own_processes(cluster: str) -> list[OwnProcess]:
    """Every live process of the cluster that this user may see, by pid, without the caller's own ancestry.

    The caller may carry the variable itself (a play that sets it for its tasks).
    """
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    found = []
    for process in psutil.process_iter(["pid", "status", "name"]):
        if process.pid in spared or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        mark = mark_of(process.pid)
        if mark and mark.cluster == cluster:
            found.append(OwnProcess(process.pid, mark.unit, process.info["name"] or ""))
    return sorted(found, key=lambda item: item.pid)


def terminate(cluster: str, grace_s: float = 20.0, units: frozenset[str] | None = None) -> list[OwnProcess]:
    """End the cluster's processes (only those of ``units``, when given): SIGTERM, then SIGKILL after ``grace_s``.

    The process that keeps the head's state goes first and without warning: asked to stop beside its nodes, it writes
    down their goodbyes and not the end of their actors, and a head restarted on that state waits for ever for a Serve
    controller on a node it knows to be gone (docs/decisions/0012).

    Returns what was there. Processes are asked for their mark again before each signal, so a pid that the kernel gave
    to somebody else meanwhile is not touched.
    """

    def mine() -> list[OwnProcess]:
        return [item for item in own_processes(cluster) if units is None or item.unit in units]

    first = mine()
    _signal([item for item in first if item.command == HEAD_STATE_COMMAND], signal.SIGKILL)
    _signal([item for item in first if item.command != HEAD_STATE_COMMAND], signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while mine() and time.monotonic() < deadline:
        time.sleep(0.2)
    for _ in range(50):
        rest = mine()
        if not rest:
            break
        _signal(rest, signal.SIGKILL)
        time.sleep(0.1)
    return first


def _signal(processes: list[OwnProcess], number: signal.Signals) -> None:
    for item in processes:
        try:
            psutil.Process(item.pid).send_signal(number)
        except psutil.Error:
            continue
