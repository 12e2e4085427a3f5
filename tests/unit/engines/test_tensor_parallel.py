"""An engine of two ranks in a slot of two GPUs: where the stock way waits for ever, and ours does not (ray #59064)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from berth.gpu.sim import build
from tests.conftest import find_runtime

ROOT = Path(__file__).parents[3]
MODELS = ROOT / ".berth" / "models"
"""Where the local inventory has its tiny models; what is missing is built."""
PROFILE = {
    "driver_version": "580.95.05",
    "context_mib": 10,
    "gpus": [
        {
            "product": "NVIDIA L4",
            "memory_mib": 10000,
            "reserved_mib": 500,
            "compute_capability": "8.9",
            "repeat": 2,
        }
    ],
}

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both ways tried on one node whose GPUs an outer placement group holds."""
    python, base = find_runtime(), tmp_path_factory.mktemp("conflict")
    build.install(base / "sim", PROFILE, "conflict-test")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("BERTH_", "RAY_", "CUDA_"))}
    env |= build.environment(base / "sim")
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([python, "-m", "berth.engines.tiny_models", str(MODELS)], env=env, check=True)
    temp = Path(f"/tmp/berth-conflict-{os.getpid()}")
    command = [python, "-m", "tests.unit.engines.stock_conflict", str(MODELS / "chat"), str(temp)]
    try:
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        logs = "\n".join(file.read_text(errors="replace")[-3000:] for file in temp.glob("session_*/logs/worker-*.err"))
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith('{"free_gpus"')), None)
    assert line, done.stdout[-3000:] + done.stderr[-3000:] + logs
    answer: dict[str, Any] = json.loads(line)
    return answer


def test_the_stock_way_waits_for_gpus_that_the_replica_itself_holds(found: dict[str, Any]) -> None:
    assert found["free_gpus"] == 0
    stock = found["stock"]
    assert stock["states"] == ["PENDING"], "Ray gave the inner group its GPUs: the conflict is gone"
    assert stock["polls"] > 3
    (error,) = stock["error"]
    assert "Cannot provide a placement group requiring 2" in error


def test_a_start_that_fails_says_which_term_was_wrong(found: dict[str, Any]) -> None:
    """What vLLM's engine printed in a process of its own reaches the replica, and the replica's error."""
    why = found["why"]
    assert why.startswith("BerthError: app small, slot gpu01-0: the engine does not start: term kv_cache: "), why
    assert "one request of max_model_len 256 tokens" in why
    assert "engine_args.max_model_len: 128 or less" in why


def test_ours_runs_over_the_slots_gpus_with_none_free_in_ray(found: dict[str, Any]) -> None:
    ours = found["ours"]
    assert ours["tokens"] == [3]
    (one,), (other,) = ours["held"]
    assert len({one, other, ours["pid"]}) == 3, "two workers, neither of them the replica itself"
