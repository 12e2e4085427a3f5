"""Where a process's time goes: sampled by py-spy, shares by what the innermost frame that tells is about."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KINDS = (
    ("pickling", ("cloudpickle", "ray/_private/serialization", "_pickle", "reduce_ex")),
    ("logging", ("logging/__init__", "logging/handlers", "serve/_private/logging_utils")),
    ("metrics", ("ray/util/metrics", "opencensus", "opentelemetry", "prometheus_client", "fast_api_metrics")),
    ("middleware", ("starlette/middleware", "observability/metrics/middleware", "core/ingress/middleware")),
    ("JSON and validation", ("pydantic", "json/", "/protocol.py", "openai_api_models", "fastapi/", "serialize")),
    ("HTTP", ("uvicorn", "h11", "httptools", "starlette", "serve/_private/http_util", "anyio")),
    ("routing by Berth", ("berth/engines",)),
    ("Serve: router and handles", ("serve/_private/router", "request_router", "serve/handle", "replica_result")),
    ("Serve: proxy and replica", ("serve/_private", "serve/context", "serve/multiplex")),
    ("Ray's core", ("ray/_raylet", "ray/_private", "ray/actor", "ray/util", "_raylet.pyx")),
    ("ray.serve.llm", ("ray/llm",)),
    ("vLLM", ("vllm",)),
    (
        "event loops, threads, native code below them",
        ("asyncio", "uvloop", "selectors", "concurrent/futures", "threading"),
    ),
)
"""By the first kind that a frame's file matches, from the innermost frame outwards."""


@dataclass(frozen=True)
class Sampler:
    """py-spy at work."""

    process: subprocess.Popen[bytes]

    def wait_for(self, output: Path, timeout_s: float = 60.0) -> list[str]:
        """The lines of its raw output, ``frame;frame;... count``, outermost frame first.

        Raises:
            RuntimeError: py-spy failed, with what it said.
        """
        _, said = self.process.communicate(timeout=timeout_s)
        if self.process.returncode:
            raise RuntimeError(f"py-spy ended with {self.process.returncode}: {said.decode(errors='replace')[-1000:]}")
        return output.read_text(encoding="utf-8").splitlines()


def profile(python: str, pid: int, seconds: float, output: Path, rate: int = 200) -> Sampler:
    """Sample the threads of ``pid`` that use a CPU, ``rate`` times a second."""
    words = [str(Path(python).with_name("py-spy")), "record", "--format", "raw", "--full-filenames", "--nonblocking"]
    words += ["--pid", str(pid), "--duration", str(int(seconds)), "--rate", str(rate), "--output", str(output)]
    return Sampler(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Percent of the samples by kind, the largest first; ``samples``: how many there were."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        counts[kind(stack.split(";"))] += int(count)
    total = sum(counts.values())
    found = {name: round(100 * count / total, 1) for name, count in counts.most_common()}
    return {**found, "samples": float(total)}


def innermost(lines: Iterable[str], count: int = 15) -> dict[str, float]:
    """Percent of the samples by the function that was at work, the largest first."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, number = line.rpartition(" ")
        name, _, place = stack.rpartition(";")[2].partition(" (")
        counts[f"{name} ({'/'.join(place.rstrip(')').split(':')[0].split('/')[-3:])})"] += int(number)
    total = sum(counts.values())
    return {name: round(100 * number / total, 1) for name, number in counts.most_common(count)}


def kind(stack: list[str]) -> str:
    for frame in reversed(stack):
        for name, marks in KINDS:
            if any(mark in frame for mark in marks):
                return name
    return "other"
