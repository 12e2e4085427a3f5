"""Simulations in a temporary directory, and processes that see them through the library's own boundary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from berth.gpu.sim import build
from berth.gpu.sim.profile import read_yaml, shipped

ROOT = Path(__file__).parents[3]
SMALL = {
    "driver_version": "580.95.05",
    "context_mib": 100,
    "vram_scale": 2.0,
    "gpus": [
        {"product": "NVIDIA L4", "memory_mib": 10000, "reserved_mib": 500, "compute_capability": "8.9", "repeat": 3}
    ],
}


@dataclass(frozen=True)
class Simulation:
    dir: Path

    def env(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        return {**kept, **build.environment(self.dir), "PYTHONPATH": str(ROOT), **more}

    def python(self, code: str, **env: str) -> Any:
        """What ``code`` prints (JSON), run in a process of its own under the simulation."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=self.env(**env),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def nvml(self, code: str, **env: str) -> Any:
        """The value of ``out`` after ``code``, with NVML initialised as ``n`` and ``h(i)`` the handle of GPU i."""
        prelude = "import json, pynvml as n\nn.nvmlInit()\nh = n.nvmlDeviceGetHandleByIndex\nout = None\n"
        prelude += "def err(f, *a):\n    try: f(*a)\n    except n.NVMLError as e: return type(e).__name__\n"
        return self.python(prelude + textwrap.dedent(code) + "\nprint(json.dumps(out))", **env)

    def hold(self, mib: int, device: int = 0, **env: str) -> subprocess.Popen[str]:
        """A process that holds memory, once it does; the caller ends it."""
        command = [sys.executable, "-m", "berth.gpu.sim", "hold", "--mib", str(mib), "--device", str(device)]
        process = subprocess.Popen(
            [*command, "--seconds", "60"], env=self.env(**env), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert "holds" in process.stdout.readline()
        return process

    def inject(self, *words: str) -> None:
        command = [sys.executable, "-m", "berth.gpu.sim", "inject", "--dir", str(self.dir), *words]
        done = subprocess.run(command, env=self.env(), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def built_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("library")
    (directory / "lib").mkdir()
    assert build.build_library(directory)
    return directory / "lib"


@pytest.fixture
def simulate(tmp_path: Path, built_library: Path) -> Any:
    def make(profile: dict[str, Any] | str = "small", seed: str = "host1", name: str = "sim") -> Simulation:
        data = profile if isinstance(profile, dict) else SMALL if profile == "small" else read_yaml(shipped()[profile])
        directory = tmp_path / name
        # One compilation for all tests; install() finds it current.
        shutil.copytree(built_library, directory / "lib")
        assert "library" not in build.install(directory, data, seed).reasons
        return Simulation(directory)

    return make
