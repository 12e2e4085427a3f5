"""Load for an OpenAI API, from one process: HTTP/1.1 by hand, because on two cores a client library would be most of
what is measured.

**Closed loop**: so many clients, each of which asks again as soon as it is answered, until the window is over.
Throughput counts until the last of them has its answer: answers come in waves, and a window that cuts one would count
it or not by chance. **Open loop**: requests come when they come (Poisson), answered or not; their latency counts from
when they were due, so that a system that falls behind cannot hide it. **First token**: from there to the first event of
the answer. Every request has a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "world", "replicas", "slots", "gpus")
END_OF_CHUNKS = b"0\r\n\r\n"
TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True)
class Target:
    """Where to ask: ``path`` as in ``/v1/chat/completions``; ``key``: sent as a bearer token where there is one."""

    port: int
    path: str
    host: str = "127.0.0.1"
    key: str = ""


@dataclass(frozen=True)
class Answer:
    """Seconds of the monotonic clock; ``error`` says what was wrong, "" for a whole answer."""

    due: float
    first: float
    ended: float
    tokens: int
    error: str


@dataclass(frozen=True)
class Summary:
    """What a window showed. Latencies in seconds, of whole answers alone; ``errors``: the first few, told apart."""

    asked: int
    answered: int
    failed: int
    requests_per_s: float
    tokens_per_s: float
    latency_p50_s: float
    latency_p95_s: float
    latency_p99_s: float
    first_p50_s: float
    first_p95_s: float
    first_p99_s: float
    errors: tuple[str, ...] = ()


def chats(model: str, words: int, tokens: int | Callable[[random.Random], int], seed: int) -> Iterator[bytes]:
    """Bodies of streamed chats without end: ``words`` random words each, answers of exactly ``tokens`` tokens."""
    rng = random.Random(seed)
    while True:
        content = " ".join(rng.choice(WORDS) for _ in range(words))
        yield json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": tokens if isinstance(tokens, int) else tokens(rng),
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()


async def ask(target: Target, body: bytes, due: float | None = None) -> Answer:
    """One request to its end; what goes wrong is its ``error``, never raised."""
    due = time.monotonic() if due is None else due
    first, data, writer = 0.0, bytearray(), None
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        key = f"Authorization: Bearer {target.key}\r\n" if target.key else ""
        head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.host}\r\nContent-Type: application/json\r\n{key}"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        while not data.endswith(END_OF_CHUNKS) and (part := await reader.read(1 << 16)):
            data += part
            if not first and b"data: " in data:
                first = time.monotonic()
        error = _wrong(bytes(data))
    except OSError as raised:
        error = type(raised).__name__
    finally:
        if writer:
            writer.close()
    ended = time.monotonic()
    found = TOKENS.findall(bytes(data))
    return Answer(due, first or ended, ended, int(found[-1]) if found else 0, error)


def _wrong(data: bytes) -> str:
    status = data[9:12].decode(errors="replace")
    if status != "200":
        return f"status {status or 'none'}: {data.partition(b'{')[2][:120].decode(errors='replace')}"
    return "" if b"data: [DONE]" in data else "the stream ended without [DONE]"


async def closed(target: Target, bodies: Iterator[bytes], concurrency: int, seconds: float) -> Summary:
    """Closed loop of ``concurrency`` clients for ``seconds``; what they began is ended before this returns."""
    begun = time.monotonic()
    answers: list[Answer] = []

    async def one() -> None:
        while time.monotonic() < begun + seconds:
            answers.append(await ask(target, next(bodies)))

    await asyncio.gather(*(one() for _ in range(concurrency)))
    return summary(answers, begun, seconds)


async def open_loop(target: Target, bodies: Iterator[bytes], rate: float, seconds: float, seed: int) -> Summary:
    """Open loop of ``rate`` requests per second for ``seconds``; the same seed gives the same arrivals."""
    rng, tasks = random.Random(seed), []
    begun = due = time.monotonic()
    while (due := due + rng.expovariate(rate)) < begun + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(ask(target, next(bodies), due)))
    return summary(await asyncio.gather(*tasks), begun, seconds)


def summary(answers: Sequence[Answer], begun: float, window_s: float) -> Summary:
    """Figures of the whole answers among ``answers``; rates from ``begun`` to the last one, or to the window's end."""
    failed = [answer for answer in answers if answer.error]
    seconds = max([window_s, *(answer.ended - begun for answer in answers)])
    whole = [answer for answer in answers if not answer.error]
    latencies = sorted(answer.ended - answer.due for answer in whole)
    firsts = sorted(answer.first - answer.due for answer in whole)
    return Summary(
        len(answers),
        len(whole),
        len(failed),
        round(len(whole) / seconds, 3),
        round(sum(answer.tokens for answer in whole) / seconds, 1),
        *(round(percentile(values, share), 4) for values in (latencies, firsts) for share in (0.5, 0.95, 0.99)),
        errors=tuple(sorted({answer.error for answer in failed}))[:5],
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; not a number where there is nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
