"""What the real driver shows after the main job on a real GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not Path("/proc/driver/nvidia/version").exists(), reason="no NVIDIA driver is loaded here"),
]


def test_the_witnesses_agree() -> None:
    command = [str(Path(sys.executable).parent / "berth"), "verify", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    report = json.loads(done.stdout)
    assert (done.returncode, report["failures"]) == (0, [])


def test_the_driver_is_no_simulation() -> None:
    import pynvml

    pynvml.nvmlInit()
    try:
        assert pynvml.nvmlSystemGetDriverVersion() in Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        assert pynvml.nvmlDeviceGetCount() > 0
    finally:
        pynvml.nvmlShutdown()


def test_replicas_hold_what_they_were_promised_at_most() -> None:
    import pynvml

    plan = json.loads((ROOT / ".berth/controller/plan.json").read_text(encoding="utf-8"))
    promised: dict[str, int] = {}
    for slot in plan["slots"]:
        total = sum(item["vram_mib"] * item["replicas"] for item in plan["berths"] if item["slot"] == slot["name"])
        promised |= dict.fromkeys(slot["gpu_uuids"], total)
    pynvml.nvmlInit()
    try:
        for uuid, most in promised.items():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            held = sum(process.usedGpuMemory or 0 for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
            assert held <= most * 1048576
    finally:
        pynvml.nvmlShutdown()
