"""The load that the serving benchmarks make, against a server of a few lines; what they make of stacks; gpu.sh."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import bench_gpu, bench_serving
from bench.load import Answer, Summary, Target, ask, chats, closed, open_loop, percentile, summary
from bench.stacks import kind, shares

ROOT = Path(__file__).resolve().parents[3]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An answer of 64 tokens, as vLLM's streams are."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for text in ('data: {"choices": []}\n\n', 'data: {"usage":{"completion_tokens":64}}\n\n', "data: [DONE]\n\n"):
        writer.write(chunk(text))
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk('data: {"choices": []}\n\n'))
    await writer.drain()
    writer.close()


async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 13\r\n\r\n{"error": {}}')
    await writer.drain()
    writer.close()


def against(handler: Handler, what: Callable[[Target], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        async with server:
            return await what(Target(server.sockets[0].getsockname()[1], "/v1/chat/completions"))

    return asyncio.run(run())


def bodies() -> Iterator[bytes]:
    return chats("chat", 8, 64, 0)


def test_a_whole_answer_is_told_with_its_tokens() -> None:
    found = against(whole, lambda target: ask(target, next(bodies())))
    assert (found.error, found.tokens) == ("", 64)
    assert found.due <= found.first <= found.ended


@pytest.mark.parametrize(
    ("handler", "said"), [(broken, "the stream ended without [DONE]"), (refusing, 'status 429: "error": {}}')]
)
def test_what_is_no_whole_answer_is_an_error_and_counts_for_nothing(handler: Handler, said: str) -> None:
    found: Summary = against(handler, lambda target: closed(target, bodies(), 2, 0.05))
    assert (found.answered, found.requests_per_s, found.errors) == (0, 0.0, (said,))
    assert found.failed == found.asked > 0


def test_nobody_there_is_an_error_too() -> None:
    found = asyncio.run(ask(Target(9, "/"), b"{}"))
    assert found.error == "ConnectionRefusedError"


def test_an_open_loop_asks_as_often_as_its_seed_says_whatever_the_answers() -> None:
    found = [against(handler, lambda target: open_loop(target, bodies(), 200, 0.2, 3)) for handler in (whole, refusing)]
    assert found[0].asked == found[1].asked > 20
    assert (found[0].failed, found[1].answered) == (0, 0)


def test_prompts_are_the_same_for_the_same_seed_and_no_other() -> None:
    first, again, other = (next(chats("chat", 8, 64, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert json.loads(first)["max_tokens"] == 64
    assert len(json.loads(first)["messages"][0]["content"].split()) == 8


def test_latency_counts_from_when_a_request_was_due() -> None:
    answers = [Answer(due=float(n), first=n + 0.5, ended=n + 1.0 + n / 10, tokens=4, error="") for n in range(10)]
    found = summary([*answers, Answer(0, 9, 9, 0, "broken")], begun=0.0, window_s=20.0)
    assert (found.asked, found.answered, found.failed) == (11, 10, 1)
    assert (found.requests_per_s, found.tokens_per_s) == (0.5, 2.0)
    assert summary(answers, 0.0, 1.0).requests_per_s == round(10 / 10.9, 3), "until the last answer"
    assert (found.latency_p50_s, found.latency_p95_s, found.latency_p99_s, found.first_p99_s) == (1.4, 1.9, 1.9, 0.5)


def test_percentiles_are_by_nearest_rank() -> None:
    assert [percentile([1, 2, 3, 4], share) for share in (0.0, 0.25, 0.26, 0.5, 1.0)] == [1, 1, 2, 2, 4]
    assert math.isnan(percentile([], 0.5))


def test_a_stack_is_of_the_kind_of_its_innermost_frame_that_tells() -> None:
    stack = ["run (asyncio/base_events.py:1)", "call (ray/serve/_private/replica.py:2)", "dumps (cloudpickle/x.py:3)"]
    assert kind(stack) == "pickling"
    assert kind(stack[:2]) == "Serve: proxy and replica"
    assert kind(["main (x.py:1)"]) == "other"
    assert shares([";".join(stack) + " 3", "main (x.py:1) 1"]) == {"pickling": 75.0, "other": 25.0, "samples": 4.0}


def test_ratios_are_of_the_same_round() -> None:
    def rounds(*tokens_per_s: float) -> list[bench_serving.Round]:
        cpu_ms = {"gateway": 3.0, "replica": 1.0, "client": 9.0}
        return [bench_serving.Round(Summary(1, 1, 0, 1.0, value, 1, 1, 1, 1, 1, 1), cpu_ms) for value in tokens_per_s]

    found = {bench_serving.BERTH: rounds(90, 50, 95), bench_serving.STOCK: rounds(100, 50, 100)}
    told = bench_serving.ratios(found)[f"{bench_serving.BERTH} / {bench_serving.STOCK}"]
    assert (told["throughput"], told["cpu"]) == (0.95, 1.0)
    assert bench_serving.host_ms(found[bench_serving.BERTH][0]) == 4.0


def test_of_a_simulated_gpu_no_speed_is_judged() -> None:
    answers = {"failed": 0, "requests_per_s": 1.0, "latency_p95_s": 9.0}
    found = {
        "both_loaded": {"small": answers, "large": answers},
        "batch": answers,
        "no_replica_restarted": True,
        "models": {"small": {"peak_mib": 90, "promised_mib": 100}, "large": {"peak_mib": 101, "promised_mib": 100}},
        "busy_percent_both": 10.0,
    }
    simulated = bench_gpu.promises(found, simulated=True)
    assert [item.met for item in simulated] == [True, True, False]
    assert [item.met for item in bench_gpu.promises(found, simulated=False)] == [True, True, False, False, False]


def test_vllms_lines_about_its_memory_are_read() -> None:
    log = (
        "INFO Model loading took 0.93 GiB memory and 1.2 seconds\n"
        "INFO [gpu_worker.py:1] Available KV cache memory: 2.5 GiB\n"
        "INFO Graph capturing finished in 3 secs, took 0.41 GiB\n"
    )
    found = [next(key for key in ("weights", "kv_cache", "cuda_graphs") if m[key]) for m in bench_gpu.GIB.finditer(log)]
    assert found == ["weights", "kv_cache", "cuda_graphs"]


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="an NVIDIA driver is loaded here")
def test_gpu_sh_says_in_its_json_that_it_was_skipped_and_why(tmp_path: Path) -> None:
    command = ["bench/gpu.sh", str(tmp_path), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told == json.loads(done.stdout)
    assert (told["skipped"], told["simulated"]) == (True, False)
    assert "/proc/driver/nvidia/version" in told["reason"]
