"""The same model and load through plain vLLM, stock ray.serve.llm and Berth: ``python -m bench.bench_serving``

All three are up, with the same engine arguments and environment; stock and Berth share one Ray and its proxy, so that
nothing but their own classes differs. One is loaded at a time, and for each level of load they take turns, round after
round: what else the machine does then falls on all alike, while one system up at a time would compare minutes that lie
far apart. What the idle ones take is in the results (plain vLLM a fifth of a core). What each level is: bench.load.

Needs the CPU runtime and its tiny models (make up, or BERTH_RUNTIME_PYTHON). ``--profile`` also samples the processes
at the highest concurrency with py-spy (in the runtime) and says where their time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from bench.load import Summary, Target, chats, closed, open_loop
from bench.record import RESULTS, finish, show
from bench.record import Target as Promise
from bench.serve_cluster import (
    MIB,
    ROOT,
    RUNTIME,
    SLOT,
    ServeCluster,
    cpu_s,
    end,
    family,
    process_name,
    runtime_python,
    serve_cluster,
)
from bench.stacks import innermost, profile, shares
from berth.plan.apps import AppSpec
from berth.plan.types import Berth
from berth.ray.serve_config import GATEWAY, ServeOptions, berth_app, gateway_app, gateway_table

PLAIN, STOCK, BERTH = "vllm serve", "ray.serve.llm", "berth"
SYSTEMS = (PLAIN, STOCK, BERTH)
PLAIN_PORT, RAY_PORT = 27800, 27801
PATH = "/v1/chat/completions"
VRAM_MIB = 16_000
ENGINE_ARGS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * MIB,
}
UTILIZATION = VRAM_MIB / SLOT.total_mib
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Ray gives its actors one thread; plain vLLM would take all cores, and bind to them.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
PROMPT_WORDS, ANSWER_TOKENS = 32, 64
LEAST_OF_STOCK = 0.95


@dataclass(frozen=True)
class Level:
    """A level of load: ``kind`` is ``closed`` (``value`` clients) or ``open`` (``value`` requests per second)."""

    kind: str
    value: float

    @property
    def name(self) -> str:
        return f"{self.value:g} at once" if self.kind == "closed" else f"{self.value:g} per s"


@dataclass(frozen=True)
class Running:
    """A system that is up: where to ask, and its processes by what they do."""

    target: Target
    parts: Mapping[str, tuple[psutil.Process, ...]]

    def cpu_s(self) -> dict[str, float]:
        return {name: cpu_s(members) for name, members in self.parts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the results; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime-python", default=os.environ.get("BERTH_RUNTIME_PYTHON", str(RUNTIME)))
    parser.add_argument("--models", type=Path, default=ROOT / ".berth/models", help="directory with the tiny models")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 2.0, 4.0], help="requests per second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    parser.add_argument("--profile", action="store_true", help="sample the processes at the highest concurrency")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    python = runtime_python(options.runtime_python)
    levels = [Level("closed", value) for value in sorted(options.concurrency)]
    levels += [Level("open", value) for value in sorted(options.rates)]
    with tempfile.TemporaryDirectory() as work, systems(python, options, Path(work)) as running:
        idle = idle_cpu(running)
        found = {level: measure(level, running, options) for level in levels}
        top = max((level for level in levels if level.kind == "closed"), key=lambda level: level.value)
        sampled = profiles(python, top, running, options, Path(work)) if options.profile else {}
    cpu = {name: cpu_medians(rounds) for name, rounds in found[top].items()}
    tables(found, cpu)
    figures = {
        "engine_args": ENGINE_ARGS | {"gpu_memory_utilization": UTILIZATION},
        "env": ENV,
        "prompt_words": PROMPT_WORDS,
        "answer_tokens": ANSWER_TOKENS,
        "window_s": options.seconds,
        "idle_cpu_percent": idle,
        "levels": [
            {
                "kind": level.kind,
                "value": level.value,
                "systems": {name: [asdict(item) for item in rounds] for name, rounds in systems_.items()},
                "ratios": ratios(systems_),
            }
            for level, systems_ in found.items()
        ],
        "cpu_ms_per_request": cpu,
        **({"profile": sampled} if sampled else {}),
    }
    told = [] if arguments is None else list(arguments)
    return finish("serving", told or sys.argv[1:], figures, promises(found, top), options.results)


def promises(found: Mapping[Level, Mapping[str, list[Round]]], top: Level) -> list[Promise]:
    failed = sum(item.seen.failed for systems_ in found.values() for rounds in systems_.values() for item in rounds)
    made = [Promise("every request is answered whole", f"{failed} were not", failed == 0)]
    if (ratio := ratios(found[top]).get(f"{BERTH} / {STOCK}")) is not None:
        value = ratio["throughput"]
        what = f"throughput at least {LEAST_OF_STOCK} x stock ray.serve.llm with {top.name}"
        made.append(Promise(what, f"{value:.2f} x", value >= LEAST_OF_STOCK))
    return made


@contextmanager
def systems(python: str, options: argparse.Namespace, work: Path) -> Iterator[dict[str, Running]]:
    """All that was asked for, up and warm."""
    model = str(options.models / "chat")
    plain = start_plain(python, model, work) if PLAIN in options.systems else None
    try:
        with serve_cluster(python, RAY_PORT, ENV, work) as cluster:
            running = {}
            if apps := [app for name in options.systems if name != PLAIN for app in APPS[name](model)]:
                pids = cluster.deploy(apps)
                running |= {name: ray_system(name, cluster, pids) for name in options.systems if name != PLAIN}
            if plain:
                wait_for_plain(plain, work)
                parts = split(plain.pid, "server")
                running[PLAIN] = Running(Target(PLAIN_PORT, PATH), parts)
            for item in running.values():
                asyncio.run(closed(item.target, bodies(0), 4, 3.0))
            yield {name: running[name] for name in SYSTEMS if name in running}
    finally:
        if plain:
            end(family([plain.pid]))


def start_plain(python: str, model: str, work: Path) -> subprocess.Popen[bytes]:
    """``vllm serve``, by its module: the CPU build has no command of that name that works."""
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "chat"]
    words += ["--host", "127.0.0.1", "--port", str(PLAIN_PORT), "--gpu-memory-utilization", str(UTILIZATION)]
    for name, value in ENGINE_ARGS.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with (work / "plain.log").open("wb") as log:
        return subprocess.Popen(
            words, cwd=work, env={**os.environ, **ENV}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def wait_for_plain(plain: subprocess.Popen[bytes], work: Path, wait_s: float = 300.0) -> None:
    until = time.monotonic() + wait_s
    while True:
        try:
            if requests.get(f"http://127.0.0.1:{PLAIN_PORT}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        if plain.poll() is not None or time.monotonic() > until:
            sys.exit(f"plain vLLM does not come up:\n{(work / 'plain.log').read_text(errors='replace')[-4000:]}")
        time.sleep(1)


def stock_apps(model: str) -> list[dict[str, Any]]:
    """ray.serve.llm as its documentation sets it up, its gateway and its server."""
    config = {
        "model_loading_config": {"model_id": "chat", "model_source": model},
        "accelerator_config": {"kind": "cpu"},
        "engine_kwargs": ENGINE_ARGS | {"gpu_memory_utilization": UTILIZATION},
        "deployment_config": {"num_replicas": 1},
    }
    return [
        {
            "name": "stock",
            "route_prefix": "/stock",
            "import_path": "ray.serve.llm:build_openai_app",
            "args": {"llm_configs": [config]},
        }
    ]


def berth_apps(model: str) -> list[dict[str, Any]]:
    """What site.yml would deploy: one berth and the gateway."""
    options = ServeOptions("127.0.0.1", RAY_PORT)
    spec = AppSpec("chat", "llm", 1, model=model, engine_args=ENGINE_ARGS)
    berth = berth_app(spec, Berth("chat", SLOT.name, 1, VRAM_MIB, "the only place"), SLOT, options)
    return [berth, gateway_app(gateway_table(["chat"], [berth]), options)]


APPS: dict[str, Callable[[str], list[dict[str, Any]]]] = {STOCK: stock_apps, BERTH: berth_apps}
PLACES = {
    STOCK: ("/stock" + PATH, ("stock", "OpenAiIngress"), ("stock", "LLMServer:chat")),
    BERTH: (PATH, (GATEWAY, "gateway"), (f"chat@{SLOT.name}", "chat")),
}
"""Path, and (app, deployment) of gateway and replica."""


def ray_system(name: str, cluster: ServeCluster, pids: Mapping[str, Mapping[str, Sequence[int]]]) -> Running:
    path, gateway, replica = PLACES[name]
    nodes = [item for item in family([cluster.process.pid]) if process_name(item) in ("raylet", "gcs_server")]
    return Running(
        Target(RAY_PORT, path),
        {
            "proxy": tuple(cluster.titled("ray::ProxyActor")),
            "gateway": tuple(map(psutil.Process, pids[gateway[0]][gateway[1]])),
            **split(pids[replica[0]][replica[1]][0], "replica"),
            "raylet and GCS": tuple(nodes),
        },
    )


def split(pid: int, part: str) -> dict[str, tuple[psutil.Process, ...]]:
    """An API server or replica, and vLLM's engine below it."""
    first, *below = family([pid])
    return {part: (first,), "engine": tuple(below)}


def bodies(seed: int) -> Iterator[bytes]:
    return chats("chat", PROMPT_WORDS, ANSWER_TOKENS, seed)


def run(level: Level, item: Running, seconds: float, seed: int) -> Summary:
    if level.kind == "closed":
        return asyncio.run(closed(item.target, bodies(seed), int(level.value), seconds))
    return asyncio.run(open_loop(item.target, bodies(seed), level.value, seconds, seed))


@dataclass(frozen=True)
class Round:
    """One window: what the client saw, and CPU ms per request of each part of the system and of the client."""

    seen: Summary
    cpu_ms: Mapping[str, float]


def measure(level: Level, running: Mapping[str, Running], options: argparse.Namespace) -> dict[str, list[Round]]:
    """Each system once a round, in another order each time, with the same prompts and arrivals."""
    found: dict[str, list[Round]] = {name: [] for name in running}
    for number in range(options.rounds):
        for name in rotated(list(running), number):
            item = running[name]
            before = item.cpu_s() | {"client": time.process_time()}
            seen = run(level, item, options.seconds, number)
            after = item.cpu_s() | {"client": time.process_time()}
            cpu_ms = {part: round(1000 * (after[part] - before[part]) / max(1, seen.asked), 2) for part in after}
            print(f"{level.name:>10}  round {number + 1}  {name:<14} {seen.tokens_per_s:8.1f} tokens/s", flush=True)
            found[name].append(Round(seen, cpu_ms))
    return found


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def ratios(rounds: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, float]]:
    """Berth over each other system: the median of the rounds' ratios, so that what slowed a round slowed both."""
    found = {}
    for name in (STOCK, PLAIN):
        if BERTH in rounds and name in rounds:
            pairs = [(ours.seen, theirs.seen) for ours, theirs in zip(rounds[BERTH], rounds[name], strict=True)]
            found[f"{BERTH} / {name}"] = {
                "throughput": median([ours.tokens_per_s / (theirs.tokens_per_s or math.nan) for ours, theirs in pairs]),
                "latency_p50": median([ours.latency_p50_s / theirs.latency_p50_s for ours, theirs in pairs]),
                "first_p50": median([ours.first_p50_s / theirs.first_p50_s for ours, theirs in pairs]),
                "cpu": median(
                    [host_ms(ours) / host_ms(theirs) for ours, theirs in zip(rounds[BERTH], rounds[name], strict=True)]
                ),
            }
    return found


def host_ms(item: Round) -> float:
    """CPU of all parts but the client."""
    return sum(item.cpu_ms.values()) - item.cpu_ms["client"]


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def idle_cpu(running: Mapping[str, Running], seconds: float = 5.0) -> dict[str, float]:
    """Percent of a core that each system takes while nothing is asked of any."""
    before = {name: sum(item.cpu_s().values()) for name, item in running.items()}
    time.sleep(seconds)
    after = {name: sum(item.cpu_s().values()) for name, item in running.items()}
    return {name: round(100 * (after[name] - before[name]) / seconds, 1) for name in running}


def cpu_medians(rounds: Sequence[Round]) -> dict[str, float]:
    return {part: median([item.cpu_ms[part] for item in rounds]) for part in rounds[0].cpu_ms}


def profiles(
    python: str, level: Level, running: Mapping[str, Running], options: argparse.Namespace, work: Path
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Shares of the samples of each part of the systems on Ray, under the highest load."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name, item in running.items():
        found[name] = {}
        for part in ("proxy", "gateway", "replica", "server"):
            if part in item.parts:
                sampler = profile(python, item.parts[part][0].pid, options.seconds, work / "stacks")
                run(level, item, options.seconds + 2, 7)
                lines = sampler.wait_for(work / "stacks")
                found[name][part] = {"kinds": shares(lines), "innermost": innermost(lines)}
    return found


def tables(found: Mapping[Level, Mapping[str, Sequence[Round]]], cpu: Mapping[str, Mapping[str, float]]) -> None:
    rows = []
    for level, rounds in found.items():
        for name, items in rounds.items():
            fields = ("tokens_per_s", "latency_p50_s", "latency_p95_s", "latency_p99_s", "first_p50_s", "first_p95_s")
            rows.append((level.name, name, *(median([getattr(item.seen, key) for item in items]) for key in fields)))
    titles = ("load", "system", "tokens/s", "p50 s", "p95 s", "p99 s", "first p50 s", "first p95 s")
    show("Medians of the rounds", titles, rows)
    parts = list(dict.fromkeys(part for each in cpu.values() for part in each))
    show(
        "CPU ms per request, at the highest concurrency",
        ("system", *parts, "all but client"),
        [
            (name, *(each.get(part, "") for part in parts), sum(each.values()) - each["client"])
            for name, each in cpu.items()
        ],
    )
    for level, rounds in found.items():
        for pair, ratio in ratios(rounds).items():
            print(f"{level.name:>10}  {pair:<22} " + "  ".join(f"{key} {value:.2f} x" for key, value in ratio.items()))


if __name__ == "__main__":
    sys.exit(main())
