"""Is a port free for us? Asked before anything is started, answered with who has it."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

import psutil

from berth.host.processes import cluster_of


@dataclass(frozen=True)
class PortInUse:
    """``pid`` and ``command`` are None when the kernel does not tell us (another user's process)."""

    name: str
    port: int
    pid: int | None
    command: str | None


def ports_in_use(ports: dict[str, int], cluster: str) -> list[PortInUse]:
    """Which of ``ports`` (variable name -> port) somebody else listens on; listeners of ``cluster`` are fine."""
    owners: dict[int, set[int | None]] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            owners.setdefault(connection.laddr.port, set()).add(connection.pid)
    found = []
    for name, port in sorted(ports.items(), key=lambda item: (item[1], item[0])):
        pids = owners.get(port, set())
        strangers = sorted((pid for pid in pids if pid is not None and cluster_of(pid) != cluster), key=int)
        if strangers:
            found.append(PortInUse(name, port, strangers[0], _command(strangers[0])))
        elif pids == {None} or (not pids and not _can_bind(port)):
            found.append(PortInUse(name, port, None, None))
    return found


def _can_bind(port: int) -> bool:
    """Catches listeners that the process table does not show to us (other users, other namespaces' proxies)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def _command(pid: int) -> str | None:
    try:
        return " ".join(psutil.Process(pid).cmdline()).strip()[:120] or psutil.Process(pid).name()
    except psutil.Error:
        return None
