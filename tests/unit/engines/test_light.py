"""The replica without a model, on a simulated GPU, in a process of its own as Ray would start it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from berth.engines.light import LightServer
from berth.errors import BerthError
from berth.gpu.sim import build

ROOT = Path(__file__).parents[3]
CONTEXT_MIB = 100
PROFILE = {
    "driver_version": "580.95.05",
    "context_mib": CONTEXT_MIB,
    "gpus": [
        {"product": "NVIDIA L4", "memory_mib": 10000, "reserved_mib": 500, "compute_capability": "8.9", "repeat": 2}
    ],
}
START = """
import asyncio, json, os, sys
from berth.engines.light import LightServer
from berth.gpu.nvml import read_host

async def run():
    server = LightServer(json.loads(sys.argv[1]))
    try:
        await server.start()
        await server.check_health()
    except (Exception, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    held = [sum(p.vram_mib for p in gpu.processes if p.pid == os.getpid()) for gpu in read_host("here").gpus]
    return {"held": held}

print(json.dumps(asyncio.run(run())))
"""


def config(**engine_args: Any) -> dict[str, Any]:
    return {"model": "chat", "gpus": 1, "vram_mib": 4_000, "engine_args": engine_args}


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("the simulated driver is built on the spot and there is no C compiler")
    where = tmp_path_factory.mktemp("sim")
    build.install(where, PROFILE, seed="light")
    return where


def start(simulation: Path, what: dict[str, Any], devices: str = "0,1") -> Any:
    env = {**os.environ, **build.environment(simulation), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": devices}
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(what)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_holds_less_than_its_footprint_unless_told(simulation: Path) -> None:
    (held, other) = start(simulation, config())["held"]
    assert (held, other) == (3_200 + CONTEXT_MIB, 0)
    assert held <= 4_000


def test_it_holds_what_it_is_told_on_the_gpu_that_it_sees(simulation: Path) -> None:
    assert start(simulation, config(hold_mib=1_500), devices="1")["held"] == [0, 1_500 + CONTEXT_MIB]


def test_it_holds_that_on_each_gpu_of_its_slot(simulation: Path) -> None:
    held = start(simulation, config(hold_mib=1_500) | {"gpus": 2})["held"]
    assert held == [1_500 + CONTEXT_MIB] * 2


def test_a_gpu_that_is_too_small_is_out_of_memory(simulation: Path) -> None:
    answer = start(simulation, config(hold_mib=20_000))
    assert answer["error"].startswith("SimulatedOutOfMemory: ")


def test_a_crash_that_was_asked_for(simulation: Path) -> None:
    assert (
        start(simulation, config(crash="no such layer"))["error"] == "BerthError: light engine of chat: no such layer"
    )


def test_on_a_real_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BERTH_GPU_SIM", raising=False)
    with pytest.raises(BerthError, match="simulated GPUs only; mend: use engine llm"):
        asyncio.run(LightServer(config()).start())
