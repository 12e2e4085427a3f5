"""This side of serve_driver.py: a Ray with Serve for a benchmark, its apps and its processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from berth.plan.types import Slot

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / ".berth/runtime/current/bin/python"
SLOT = Slot("bench-0", "bench", ("GPU-bench",), (0,), "bench", 60_000, 64_000)
"""The one slot there is, as serve_driver labels it."""
MIB = 1 << 20


@dataclass(frozen=True)
class ServeCluster:
    """``process`` is the driver's; every process of the cluster descends from it."""

    process: subprocess.Popen[str]

    def deploy(self, apps: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
        """Set Serve's apps; when they run, the pids of replicas by app and deployment.

        Raises:
            SystemExit: they do not come up, with what Serve says.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"apps": apps}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                if "error" in found:
                    sys.exit(f"Serve's apps do not come up: {json.dumps(found['error'])[:6000]}")
                pids: dict[str, dict[str, list[int]]] = found["pids"]
                return pids
        sys.exit(f"the cluster ended with {self.process.wait()}")

    def titled(self, beginning: str) -> list[psutil.Process]:
        """Ray's workers by what they call themselves: ``ray::ProxyActor``."""
        return [item for item in family([self.process.pid]) if title(item).startswith(beginning)]


@contextmanager
def serve_cluster(
    python: str, port: int, env: Mapping[str, str], work: Path, wait_s: float = 600.0
) -> Iterator[ServeCluster]:
    """A cluster whose proxy listens on ``port`` of loopback; ``work`` keeps its log. Ended with all its processes."""
    temp_dir = f"/tmp/berth-bench-{os.getpid()}-{port}"
    driver = str(Path(__file__).with_name("serve_driver.py"))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "BERTH_"))}
    with (work / "driver.log").open("w") as log:
        process = subprocess.Popen(
            [python, driver, str(port), temp_dir, str(wait_s)],
            env={**clean, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield ServeCluster(process)
    finally:
        members = family([process.pid])
        assert process.stdin
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        end(members)
        shutil.rmtree(temp_dir, ignore_errors=True)


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes and all that descends from them."""
    found = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(pid)
            found |= {item.pid: item for item in (first, *first.children(recursive=True))}
    return list(found.values())


def title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def process_name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def end(members: Iterable[psutil.Process]) -> None:
    """Kill what is left of them."""
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(list(members), timeout=10)


def cpu_s(members: Iterable[psutil.Process]) -> float:
    """CPU seconds that they have used so far; those that are gone count nothing."""
    total = 0.0
    for member in members:
        with suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def runtime_python(given: str) -> str:
    """The runtime's interpreter.

    Raises:
        SystemExit: there is none.
    """
    if not Path(given).exists():
        sys.exit(f"no runtime environment with Ray at {given}; mend: make up, or set BERTH_RUNTIME_PYTHON")
    return given
