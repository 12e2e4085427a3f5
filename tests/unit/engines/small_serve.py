"""A small Ray Serve of a test's own: a process of the runtime's interpreter that obeys (gateway_cluster.py), on
simulated GPUs, and what the tests on it share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import requests

from berth.gpu.sim import build
from berth.ray.start import NO_IDLE_WORKERS
from berth.ray.state import parse_state
from tests.conftest import find_runtime

ROOT = Path(__file__).parents[3]
GPU = {"product": "NVIDIA L4", "memory_mib": 10000, "reserved_mib": 500, "compute_capability": "8.9"}
WAIT_S = 90


class Cluster:
    """The driver's end of gateway_cluster.py."""

    def __init__(self, process: subprocess.Popen[str], sim: Path) -> None:
        self._process, self._sim = process, sim
        assert self._answer() == {"ready": True}

    def tell(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def used_mib(self) -> int:
        """What the driver says is in use, on all GPUs, asked through pynvml in a process of its own."""
        code = (
            "import pynvml as n; n.nvmlInit()\n"
            "gpus = map(n.nvmlDeviceGetHandleByIndex, range(n.nvmlDeviceGetCount()))\n"
            "print(sum(n.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus) >> 20)"
        )
        env = {**os.environ, **build.environment(self._sim)}
        return int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)

    def places(self, app: str) -> Counter[str]:
        """How many replicas of ``app`` run on each slot."""
        found = self.tell(details=True)
        state = parse_state(found["nodes"], found["serve"])
        slot_of = {node.node_id: node.slot or "none" for node in state.nodes}
        return Counter(
            slot_of[str(replica.node_id)]
            for item in state.apps
            if item.name == app
            for deployment in item.deployments
            for replica in deployment.replicas
            if replica.state == "RUNNING"
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                assert "error" not in found, found
                return found
        raise AssertionError("the cluster ended")


C = TypeVar("C", bound=Cluster)


@contextmanager
def running(
    kind: type[C],
    sim: Path,
    name: str,
    words: list[str],
    gpus: int = 1,
    pythonpath: str = "",
    more: dict[str, str] | None = None,
) -> Iterator[C]:
    """The cluster that the runtime's interpreter makes of ``words``, where ``{temp}`` is its temporary directory, with
    a simulated driver in ``sim``; prints what it complained of when it ends, for pytest to show beside what failed."""
    python = find_runtime()
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("the simulated driver is built on the spot and there is no C compiler")
    build.install(sim, {"driver_version": "580.95.05", "context_mib": 10, "gpus": [GPU] * gpus}, seed=name)
    temp = Path(f"/tmp/berth-{name}-{os.getpid()}")
    temp.mkdir()
    env = {**os.environ, **build.environment(sim), **NO_IDLE_WORKERS, "RAY_USAGE_STATS_ENABLED": "0", **(more or {})}
    # Ray's cluster_utils writes an address file that a Ray elsewhere on this machine must not read.
    env |= {"PYTHONPATH": f"{pythonpath}:{ROOT}".lstrip(":"), "RAY_TMPDIR": str(temp)}
    process = subprocess.Popen(
        [python, *(word.replace("{temp}", str(temp / "ray")) for word in words)],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(sim / "stderr").open("w"),
        text=True,
    )
    try:
        yield kind(process, sim)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        assert process.stdin
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for member in (*family, process):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        print((sim / "stderr").read_text()[-3000:])
        print(_complaints(temp / "ray"))
        shutil.rmtree(temp, ignore_errors=True)


def _complaints(temp: Path) -> str:
    """What Serve's own processes, the replicas and their engines complained of."""
    found = []
    logs = sorted(temp.glob("session_latest/logs/serve/*.log"))
    for log in [*logs, *sorted(temp.glob("session_latest/logs/worker-*.err"))]:
        lines = [line for line in log.read_text().splitlines() if "Error" in line or "ERROR" in line]
        found += [f"--- {log.name}", *lines[-20:]] if lines else []
    return "\n".join(found)


def wait(what: Callable[[], Any], seconds: float = WAIT_S, found: Callable[[], Any] = lambda: "") -> None:
    """Until ``what`` holds; ``found`` tells what there is instead."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"{what} is not so after {seconds} s: {found()}"
        time.sleep(0.1)


class Load:
    """Requests one after the other until the block ends; keeps what went wrong."""

    def __init__(self, ask: Callable[[], requests.Response]) -> None:
        self.answered, self.failures = 0, list[str]()
        self._ask, self._stop = ask, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def goes_on(self) -> None:
        """Two more are answered from here on, however slow the machine."""
        before = self.answered
        wait(lambda: self.answered > before + 1)

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            try:
                answer = self._ask()
            except OSError as error:
                self.failures.append(str(error))
                continue
            if answer.status_code == 200:
                self.answered += 1
            else:
                self.failures.append(f"{answer.status_code} {answer.text[:200]}")
