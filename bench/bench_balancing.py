"""The gateway's choice between berths against Serve's own between replicas: ``python -m bench.bench_balancing``

The same number of light replicas twice in one cluster, behind the same gateway: as berths of one replica each, among
which the gateway chooses, and as one deployment with all of them, whose router is Serve's (power of two choices).
A replica works on few requests at once, so that a bad choice waits. Answers are of very different lengths. Needs a
runtime environment (make up, or BERTH_RUNTIME_PYTHON) and a C compiler for the simulated driver.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.bench_serving import Level, median, rotated
from bench.load import Summary, Target, chats, closed, open_loop
from bench.record import RESULTS, finish, show
from bench.record import Target as Promise
from bench.serve_cluster import RUNTIME, SLOT, runtime_python, serve_cluster
from berth.gpu.sim import build
from berth.plan.apps import AppSpec
from berth.plan.types import Berth
from berth.ray.serve_config import ServeOptions, berth_app, gateway_app, gateway_table

PORT = 27810
BERTHS, SERVE = "gateway over berths", "Serve's router"
MODELS = {BERTHS: "berths", SERVE: "replicas"}
TOKEN_S, MOST_TOKENS, AT_ONCE = 0.01, 60, 2
LEAST_THROUGHPUT, MOST_P95 = 0.95, 1.05
PROFILE = {
    "driver_version": "580.95.05",
    "context_mib": 10,
    "gpus": [{"product": "NVIDIA L4", "memory_mib": 20000, "reserved_mib": 500, "compute_capability": "8.9"}],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the results; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime-python", default=os.environ.get("BERTH_RUNTIME_PYTHON", str(RUNTIME)))
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    python = runtime_python(options.runtime_python)
    places = options.replicas * AT_ONCE
    mean_s = TOKEN_S * (1 + MOST_TOKENS) / 2
    levels = [Level("closed", places), Level("closed", 2 * places), Level("open", round(0.7 * places / mean_s, 1))]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build.install(work / "sim", PROFILE, seed="balancing")
        with serve_cluster(python, PORT, build.environment(work / "sim"), work, 180.0) as cluster:
            cluster.deploy(apps(options.replicas))
            for name in MODELS:
                run(Level("closed", places), name, 2.0, 0)
            found = {level: measure(level, options) for level in levels}
    rows = [(level.name, name, *figures(items)) for level, rounds in found.items() for name, items in rounds.items()]
    show("Medians of the rounds", ("load", "who chooses", "requests/s", "p50 s", "p95 s", "p99 s", "failed"), rows)
    targets = []
    for level, rounds in found.items():
        ours, theirs = (figures(rounds[name]) for name in (BERTHS, SERVE))
        throughput, p95 = ours[0] / theirs[0], ours[2] / theirs[2]
        what = f"{level.name}: throughput at least {LEAST_THROUGHPUT} x, p95 at most {MOST_P95} x Serve's router"
        kept = throughput >= LEAST_THROUGHPUT and p95 <= MOST_P95
        targets.append(Promise(what, f"{throughput:.2f} x, {p95:.2f} x", kept))
    failed = sum(item.failed for rounds in found.values() for items in rounds.values() for item in items)
    targets.append(Promise("every request is answered whole", f"{failed} were not", failed == 0))
    data = {
        "replicas": options.replicas,
        "requests_at_once_per_replica": AT_ONCE,
        "token_s": TOKEN_S,
        "answer_tokens": f"1 to {MOST_TOKENS}, each as likely",
        "window_s": options.seconds,
        "levels": [
            {
                "kind": level.kind,
                "value": level.value,
                "ways": {name: [asdict(item) for item in items] for name, items in rounds.items()},
            }
            for level, rounds in found.items()
        ],
    }
    told = [] if arguments is None else list(arguments)
    return finish("balancing", told or sys.argv[1:], data, targets, options.results)


def apps(replicas: int) -> list[dict[str, Any]]:
    """``replicas`` berths of one replica, one berth of ``replicas``, and the gateway over both models."""
    options = ServeOptions("127.0.0.1", PORT)
    made = []
    for name, count, number in [(BERTHS, 1, replicas), (SERVE, replicas, 1)]:
        spec = AppSpec(
            MODELS[name],
            "light",
            replicas,
            num_cpus=0.01,
            max_ongoing_requests=AT_ONCE,
            max_queued_requests=1000,
            engine_args={"tokens": MOST_TOKENS, "token_s": TOKEN_S, "hold_mib": 20},
        )
        for place in range(number):
            app = berth_app(spec, Berth(spec.name, SLOT.name, count, 100, "bench"), SLOT, options)
            made.append({**app, "name": f"{spec.name}@{place}"})
    return [*made, gateway_app(gateway_table(MODELS.values(), made), options)]


def run(level: Level, name: str, seconds: float, seed: int) -> Summary:
    def tokens(rng: random.Random) -> int:
        return rng.randint(1, MOST_TOKENS)

    target, bodies = Target(PORT, "/v1/chat/completions"), chats(MODELS[name], 4, tokens, seed)
    if level.kind == "closed":
        return asyncio.run(closed(target, bodies, int(level.value), seconds))
    return asyncio.run(open_loop(target, bodies, level.value, seconds, seed))


def measure(level: Level, options: argparse.Namespace) -> dict[str, list[Summary]]:
    """Each way once a round, with the same prompts, lengths and arrivals."""
    found: dict[str, list[Summary]] = {name: [] for name in MODELS}
    for number in range(options.rounds):
        for name in rotated(list(MODELS), number):
            found[name].append(run(level, name, options.seconds, number))
    return found


def figures(items: Sequence[Summary]) -> tuple[float, float, float, float, int]:
    """Medians of the rounds: requests/s, p50, p95, p99; and how many failed in all."""
    if not items:
        return math.nan, math.nan, math.nan, math.nan, 0
    fields = ("requests_per_s", "latency_p50_s", "latency_p95_s", "latency_p99_s")
    a, b, c, d = (median([getattr(item, key) for item in items]) for key in fields)
    return a, b, c, d, sum(item.failed for item in items)


if __name__ == "__main__":
    sys.exit(main())
