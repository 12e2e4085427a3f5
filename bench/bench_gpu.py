"""Two models packed on one GPU by site.yml, under full load: ``bench/gpu.sh WHEELS``

What was predicted for each, term by term, what was promised and what the driver showed at the peak; prompts per second
in batch; how busy the GPU was; how soon a replica that was killed answers again. The weights are made up
(bench.gpu_models), so that the machine and its wheels are all it needs; answers are nonsense, their cost is not.
``--simulated``: the same on simulated GPUs with tiny models, without a word on speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pynvml
import requests
import yaml

from bench.load import Summary, Target, ask, chats, closed
from bench.record import Target as Promise
from bench.record import finish, show
from bench.serve_cluster import MIB, ROOT, family
from berth.gpu import sim

BIN = Path(sys.executable).parent
STATE = ROOT / ".berth/bench-gpu"
PORT_BASE = 29_000
MODELS = ("small", "large")
LEAST_PROMPTS_PER_S, MOST_P95_S, LEAST_BUSY_PERCENT = 10.0, 3.0, 70.0
GIB = re.compile(
    r"(?P<weights>Model loading took) (?P<a>[\d.]+) GiB|(?P<kv_cache>Available KV cache memory): (?P<b>[\d.]+) GiB|"
    r"(?P<cuda_graphs>Graph capturing finished in [\d.]+ secs, took) (?P<c>[\d.]+) GiB"
)
"""What vLLM 0.29 prints of its memory, by the name of our term."""


@dataclass
class Peaks:
    """What NVML showed while a load ran: MiB at the peak, and how busy the GPU was, in percent, sample by sample."""

    used_mib: int = 0
    by_pid_mib: dict[int, int] = field(default_factory=dict)
    busy_percent: list[int] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the results; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=STATE)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once to each model")
    options = parser.parse_args(arguments)
    site(options.simulated, "site.yml", "--tags", "driver,runtime")
    models = STATE / "models"
    runtime = ROOT / ".berth/runtime/current/bin/python"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    tiny = ["--tiny"] if options.simulated else []
    call([str(runtime), "-m", "bench.gpu_models", str(models), *tiny], env)
    try:
        begun = time.monotonic()
        site(options.simulated, "site.yml", "-e", "strategy=pack")
        up_s = time.monotonic() - begun
        if options.simulated:
            sim.enter(STATE / "gpu-sim")
        found = measure(options)
    finally:
        site(options.simulated, "playbooks/teardown.yml")
    figures = {"simulated": options.simulated, "skipped": False, "site_yml_s": round(up_s, 1), **found}
    told = [] if arguments is None else list(arguments)
    return finish("gpu", told or sys.argv[1:], figures, promises(found, options.simulated), options.results)


def variables(simulated: bool) -> dict[str, Any]:
    """A cluster of its own beside any other: name, state and ports."""
    engine_args = {"load_format": "dummy", "max_model_len": 2048, "max_num_seqs": 16 if simulated else 64}
    engine_args |= {"enforce_eager": True} if simulated else {}
    apps = [
        {
            "name": name,
            "engine": "llm",
            "model": str(STATE / "models" / name),
            "replicas": 1,
            "concurrency": 8 if simulated else 32,
            "max_ongoing_requests": 256,
            "engine_args": engine_args,
        }
        for name in MODELS
    ]
    return {
        "berth_cluster": "bench-gpu",
        "berth_state_dir": str(STATE),
        "berth_agent_root": str(ROOT / ".berth/agent"),
        "ray_runtime_root": str(ROOT / ".berth/runtime"),
        "nvidia_driver_simulate": "true" if simulated else "false",
        "serve_apps_list": apps,
        "serve_apps_tiny_models": False,
        "serve_apps_env": {"HF_HUB_OFFLINE": "1"},
        "ray_head_gcs_port": PORT_BASE,
        "ray_head_dashboard_port": PORT_BASE + 1,
        "ray_head_client_port": PORT_BASE + 2,
        "ray_head_dashboard_agent_port": PORT_BASE + 3,
        "ray_head_metrics_port": PORT_BASE + 4,
        "serve_apps_http_port": PORT_BASE + 5,
        "ray_slot_dashboard_agent_port_base": PORT_BASE + 20,
        "ray_slot_metrics_port_base": PORT_BASE + 40,
        "ray_head_node_port_base": PORT_BASE + 100,
        "ray_slot_node_port_base": PORT_BASE + 200,
    }


def site(simulated: bool, playbook: str, *words: str) -> None:
    print(f"{playbook} {' '.join(words)}", flush=True)
    command = [str(BIN / "ansible-playbook"), playbook, "-e", json.dumps(variables(simulated)), *words]
    call(command, {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"})


def call(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Run a command; its output.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return done.stdout


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both models loaded at once, then the small one alone, then a replica killed."""
    plan = json.loads((STATE / "controller/plan.json").read_text(encoding="utf-8"))
    slots = {berth["slot"] for berth in plan["berths"]}
    if len(slots) != 1:
        sys.exit(f"pack put the two models on {', '.join(sorted(slots))}; they must fit one GPU")
    slot = next(item for item in plan["slots"] if item["name"] in slots)
    promised = {berth["deployment"]: berth["vram_mib"] for berth in plan["berths"]}
    before = replicas()
    targets = {name: Target(PORT_BASE + 5, "/v1/chat/completions") for name in MODELS}
    with watched(slot["gpu_uuids"][0]) as both_peaks:
        both = asyncio.run(together(targets, options.concurrency, options.seconds))
    with watched(slot["gpu_uuids"][0]) as alone_peaks:
        bodies = chats("small", 32, 64, 1)
        alone = asyncio.run(closed(targets["small"], bodies, options.concurrency, options.seconds))
    kept = replicas() == before
    models = {
        name: {
            "promised_mib": promised[name],
            "peak_mib": sum(both_peaks.by_pid_mib.get(item.pid, 0) for item in family([before[name]])),
            "terms": terms(name, slot, before[name], options.simulated),
        }
        for name in MODELS
    }
    rows = [(name, item["promised_mib"], item["peak_mib"]) for name, item in models.items()]
    show("MiB of one replica", ("model", "promised", "NVML's peak"), rows)
    return {
        "gpu": slot["product"],
        "gpu_total_mib": slot["total_mib"],
        "peak_mib": both_peaks.used_mib,
        "models": models,
        "both_loaded": {name: asdict(item) for name, item in both.items()},
        "batch": asdict(alone),
        "busy_percent_both": busy(both_peaks),
        "busy_percent_batch": busy(alone_peaks),
        "no_replica_restarted": kept,
        "replica_again_s": again(before["small"], targets["small"]),
    }


def promises(found: Mapping[str, Any], simulated: bool) -> list[Promise]:
    """What is judged; of speed nothing where the GPU is simulated."""
    failed = sum(item["failed"] for item in found["both_loaded"].values()) + found["batch"]["failed"]
    made = [
        Promise(
            "no replica died and no request failed", f"{failed} failed", failed == 0 and found["no_replica_restarted"]
        )
    ]
    for name, item in found["models"].items():
        text = f"{item['peak_mib']} of {item['promised_mib']} MiB"
        made.append(Promise(f"{name} stays within its footprint", text, 0 < item["peak_mib"] <= item["promised_mib"]))
    if not simulated:
        rate, p95 = found["batch"]["requests_per_s"], found["batch"]["latency_p95_s"]
        what = f"at least {LEAST_PROMPTS_PER_S:g} prompts/s in batch with p95 below {MOST_P95_S:g} s"
        made.append(Promise(what, f"{rate:.1f} per s, {p95:.2f} s", rate >= LEAST_PROMPTS_PER_S and p95 < MOST_P95_S))
        value = found["busy_percent_both"]
        made.append(Promise(f"GPU busy above {LEAST_BUSY_PERCENT:g} %", f"{value:.0f} %", value > LEAST_BUSY_PERCENT))
    return made


async def together(targets: Mapping[str, Target], concurrency: int, seconds: float) -> dict[str, Summary]:
    runs = (closed(target, chats(name, 32, 64, 0), concurrency, seconds) for name, target in targets.items())
    return dict(zip(targets, await asyncio.gather(*runs), strict=True))


@contextmanager
def watched(uuid: str, every_s: float = 0.1) -> Iterator[Peaks]:
    """NVML asked of one GPU from a thread of its own while the block runs."""
    peaks, stop = Peaks(), threading.Event()
    pynvml.nvmlInit()

    def look() -> None:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        while not stop.wait(every_s):
            peaks.used_mib = max(peaks.used_mib, pynvml.nvmlDeviceGetMemoryInfo(handle).used // MIB)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                mib = (process.usedGpuMemory or 0) // MIB
                peaks.by_pid_mib[process.pid] = max(mib, peaks.by_pid_mib.get(process.pid, 0))
            peaks.busy_percent.append(int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
        pynvml.nvmlShutdown()


def busy(peaks: Peaks) -> float:
    """The mean over the load, its first and last tenth left out: requests come and go there."""
    tenth = len(peaks.busy_percent) // 10
    middle = peaks.busy_percent[tenth : len(peaks.busy_percent) - tenth]
    return round(statistics.mean(middle), 1) if middle else 0.0


def terms(name: str, slot: Mapping[str, Any], pid: int, simulated: bool) -> dict[str, dict[str, float | None]]:
    """MiB of each term: predicted, its bound, and what vLLM printed of it, None where it prints nothing."""
    app = next(item for item in variables(simulated)["serve_apps_list"] if item["name"] == name)
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump({**app["engine_args"], "concurrency": app["concurrency"]}, file)
        file.flush()
        words = ["footprint", "--config", app["model"], "--engine", file.name, "--format", "json"]
        words += ["--gpu", slot["product"], "--gpu-memory-mib", str(slot["total_mib"])]
        told = json.loads(call([str(BIN / "berth"), *words], os.environ))
    printed = said(pid)
    return {
        term["name"]: {
            "predicted_mib": round(term["expected_mib"], 1),
            "bound_mib": round(term["safe_mib"], 1),
            "measured_mib": printed.get(term["name"]),
        }
        for term in told["terms"]
    }


def said(pid: int) -> dict[str, float]:
    """What vLLM printed in the logs of this replica, in MiB by term."""
    found: dict[str, float] = {}
    for log in run_dir().glob(f"*/session_latest/logs/worker-*-{pid}.*"):
        for match in GIB.finditer(log.read_text(errors="replace")):
            term = next(key for key in ("weights", "kv_cache", "cuda_graphs") if match[key])
            found[term] = round(1024 * float(match["a"] or match["b"] or match["c"]), 1)
    return found


def run_dir() -> Path:
    """Where the cluster runs, as role berth names it."""
    import hashlib

    return Path(f"/tmp/berth-bench-gpu-{hashlib.sha1(str(STATE).encode()).hexdigest()[:8]}")


def replicas() -> dict[str, int]:
    """The pid of each model's replica, asked of Ray."""
    token = (run_dir() / "etc/ray-token").read_text().strip()
    url = f"http://127.0.0.1:{PORT_BASE + 1}/api/serve/applications/"
    told = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30)
    told.raise_for_status()
    return {
        name.partition("@")[0]: replica["pid"]
        for name, app in told.json()["applications"].items()
        if "@" in name
        for deployment in app["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    }


def again(pid: int, target: Target, timeout_s: float = 600.0) -> float:
    """Seconds from the death of a replica until another one answers: Serve's notice, the engine's start, a warm-up."""
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    while time.monotonic() < begun + timeout_s:
        time.sleep(0.5)
        answer = asyncio.run(ask(target, next(chats("small", 4, 2, 0))))
        if not answer.error:
            return round(time.monotonic() - begun, 1)
    sys.exit(f"no replica of small answers {timeout_s:.0f} s after one was killed")


if __name__ == "__main__":
    sys.exit(main())
