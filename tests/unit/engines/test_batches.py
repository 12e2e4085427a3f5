"""A stream's events in few parts, none of them late at the beginning, none lost at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest

from berth.engines.batches import Batches

LONG_S = 30.0
"""Longer than any test takes: what comes within it was not waited for."""


def parts(events: AsyncIterator[str], interval_s: float = LONG_S) -> list[list[str]]:
    async def run() -> list[list[str]]:
        return [part async for part in Batches(interval_s).of(events)]

    return asyncio.run(asyncio.wait_for(run(), LONG_S / 2))


async def stream(*events: str, error: Exception | None = None) -> AsyncGenerator[str]:
    for event in events:
        yield event
    if error:
        raise error


def test_what_is_there_at_once_goes_at_once_and_whole() -> None:
    """vLLM gives the role and the first token one right after the other."""
    assert parts(stream("role", "first")) == [["role", "first"]]
    assert parts(stream()) == []


def test_what_comes_within_an_interval_goes_together() -> None:
    gate = asyncio.Event()

    async def events() -> AsyncGenerator[str]:
        yield "first"
        await gate.wait()
        for event in "abc":
            yield event
            await asyncio.sleep(0)

    async def run() -> list[list[str]]:
        found = []
        async for part in Batches(LONG_S).of(events()):
            found.append(part)
            gate.set()
        return found

    assert asyncio.run(asyncio.wait_for(run(), LONG_S / 2)) == [["first"], ["a", "b", "c"]]


def test_a_part_goes_when_its_interval_is_over_though_the_stream_goes_on() -> None:
    """Each event is made only when the one before it was received: waiting for more would be waiting for ever."""
    taken = asyncio.Event()

    async def events() -> AsyncGenerator[str]:
        for event in "abc":
            yield event
            await taken.wait()
            taken.clear()

    async def run() -> list[list[str]]:
        found = []
        async for part in Batches(0.001).of(events()):
            found.append(part)
            taken.set()
        return found

    assert asyncio.run(asyncio.wait_for(run(), LONG_S / 2)) == [["a"], ["b"], ["c"]]


def test_an_error_comes_after_what_came_before_it() -> None:
    async def run() -> None:
        found = Batches(LONG_S).of(stream("a", "b", error=RuntimeError("the engine died")))
        assert await anext(found) == ["a", "b"]
        with pytest.raises(RuntimeError, match="the engine died"):
            await anext(found)

    asyncio.run(run())


def test_an_error_before_anything_came_is_raised() -> None:
    with pytest.raises(ValueError, match="no such"):
        parts(stream(error=ValueError("no such")))


def test_who_hangs_up_ends_the_stream_behind_it() -> None:
    ended = asyncio.Event()

    async def events() -> AsyncGenerator[str]:
        try:
            yield "first"
            await asyncio.sleep(LONG_S)
        finally:
            ended.set()

    async def run() -> None:
        async with aclosing(Batches(LONG_S).of(events())) as found:
            assert await anext(found) == ["first"]
        await asyncio.wait_for(ended.wait(), LONG_S / 2)

    asyncio.run(run())


def test_the_more_streams_there_are_the_less_often_each_sends() -> None:
    made = Batches(0.05, parts_per_s=200)
    assert made.interval_s == 0.05

    async def run() -> None:
        open_ones = [made.of(stream("a")) for _ in range(64)]
        for one in open_ones:
            await anext(one)
        assert (made.streams, made.interval_s) == (64, 0.32)
        for one in open_ones:
            await one.aclose()
        assert (made.streams, made.interval_s) == (0, 0.05)

    asyncio.run(run())
