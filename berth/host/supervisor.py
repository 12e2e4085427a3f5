"""supervisord as the service manager where there is no systemd or no root: one per cluster and host, Berth's own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from berth.errors import BerthError
from berth.host.processes import CLUSTER_VARIABLE, own_processes, terminate

START_S = 60.0
UP = ("RUNNING", "STARTING", "BACKOFF")
VERBS = {"removed": "removed", "changed": "restarted", "added": "started", "down": "started"}
"""What ``apply`` does to a unit in each state of ``pending``."""


@dataclass(frozen=True)
class Daemon:
    """Where this cluster's supervisord lives: its binary, configuration, control socket, pid file."""

    binary: str
    config: str
    socket: str
    cluster: str

    def rpc(self) -> Any:
        """supervisord's XML-RPC interface over its socket."""
        return ServerProxy("http://127.0.0.1", SupervisorTransport(None, None, f"unix://{self.socket}")).supervisor

    def running(self) -> bool:
        """Whether the daemon answers on its socket."""
        try:
            return bool(self.rpc().getState()["statename"] == "RUNNING")
        except (OSError, Fault, ValueError):
            return False


def start(daemon: Daemon) -> bool:
    """Have the daemon running; tells whether it had to be started.

    What a daemon that was killed left behind is ended first: a second head beside an orphaned one would fight it for
    its ports.

    Raises:
        BerthError: it does not come up.
    """
    if daemon.running():
        return False
    terminate(daemon.cluster)
    env = {**os.environ, CLUSTER_VARIABLE: daemon.cluster}
    result = subprocess.run([daemon.binary, "-c", daemon.config], env=env, capture_output=True, text=True, check=False)
    if result.returncode == 0 and _until(daemon.running, START_S):
        return True
    raise BerthError(
        f"supervisord does not start with {daemon.config}",
        found=(result.stderr or result.stdout).strip() or "no answer",
    )


def stop(daemon: Daemon, grace_s: float = 30.0) -> bool:
    """Stop every unit and the daemon, and end whatever of the cluster is still there; tells whether anything was."""
    found = bool(own_processes(daemon.cluster))
    if daemon.running():
        daemon.rpc().shutdown()
        _until(lambda: not daemon.running(), grace_s)
    terminate(daemon.cluster)
    return found


def pending(daemon: Daemon) -> dict[str, list[str]]:
    """What ``apply`` would do to the daemon's units: ``added``, ``changed``, ``removed``, ``down`` (not running)."""
    rpc = daemon.rpc()
    added, changed, removed = rpc.reloadConfig()[0]
    down = [
        name
        for name, state in _states(daemon).items()
        if state not in UP and name not in changed and name not in removed
    ]
    return {"added": sorted(added), "changed": sorted(changed), "removed": sorted(removed), "down": sorted(down)}


def apply(daemon: Daemon) -> list[str]:
    """Make the units what the configuration says: only those that changed are restarted, those removed are stopped.

    Returns one line per unit touched.
    """
    rpc = daemon.rpc()
    todo = pending(daemon)
    for name in [*todo["removed"], *todo["changed"]]:
        rpc.stopProcessGroup(name, True)
        rpc.removeProcessGroup(name)
        terminate(daemon.cluster, units=frozenset({unit_of(name)}))
    for name in [*todo["changed"], *todo["added"]]:
        rpc.addProcessGroup(name)
    for name in todo["down"]:
        terminate(daemon.cluster, units=frozenset({unit_of(name)}))
        rpc.startProcess(name, False)
    lines = [f"{name}: {VERBS[state]}" for state in VERBS for name in todo[state]]
    if lines:
        _settle(daemon)
    return lines


def _settle(daemon: Daemon) -> None:
    """Wait until no unit is starting; raise BerthError with the end of its log when one cannot start."""
    _until(lambda: "STARTING" not in _states(daemon).values(), START_S)
    broken = sorted(name for name, state in _states(daemon).items() if state in ("BACKOFF", "FATAL"))
    if broken:
        raise BerthError(
            "; ".join(f"unit {name} does not start: {tail(daemon, name).strip()}" for name in broken),
            mend="put right what its log says, then: ansible-playbook site.yml",
        )


def unit_of(program: str) -> str:
    """BERTH_UNIT of a supervisord program: ``berth-ray-slot@gpu01-0`` -> ``slot@gpu01-0``."""
    return program.removeprefix("berth-ray-")


def tail(daemon: Daemon, program: str, limit: int = 2000) -> str:
    """The end of a unit's log."""
    try:
        return str(daemon.rpc().readProcessStdoutLog(program, -limit, 0))
    except (OSError, Fault):
        return ""


def _states(daemon: Daemon) -> dict[str, str]:
    return {str(info["name"]): str(info["statename"]) for info in daemon.rpc().getAllProcessInfo()}


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()
