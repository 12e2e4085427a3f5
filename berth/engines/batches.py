"""The events of streams in few parts: each costs the replica, the gateway and the proxy about a millisecond."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

T = TypeVar("T")

PARTS_PER_S = 200.0
"""Of all streams of a replica together; a gateway's process is full at some 700."""


class Batches:
    """What the streams of one replica send, each at most every ``least_s`` seconds, and less often the more they are.

    ray.serve.llm's own batcher waits out its interval before the first part too, which every client sees as time to
    first token, and keeps the interval however many streams there are (decision 22).
    """

    def __init__(self, least_s: float, parts_per_s: float = PARTS_PER_S) -> None:
        self._least_s, self._parts_per_s = least_s, parts_per_s
        self.streams = 0
        """That are open."""

    @property
    def interval_s(self) -> float:
        return max(self._least_s, self.streams / self._parts_per_s)

    async def of(self, events: AsyncIterator[T]) -> AsyncGenerator[list[T]]:
        """Lists of ``events``: the first as soon as there is anything, the last as soon as the stream ends.

        An error of ``events`` is raised after what came before it.
        """
        waiting: list[T] = []
        arrived = asyncio.Event()

        async def read() -> None:
            try:
                async for event in events:
                    waiting.append(event)
                    arrived.set()
            finally:
                arrived.set()

        reader = asyncio.create_task(read())
        self.streams += 1
        try:
            while True:
                await arrived.wait()
                ended = reader.done()
                arrived.clear()
                if waiting:
                    part, waiting[:] = waiting[:], []
                    yield part
                if ended:
                    await reader
                    return
                await asyncio.wait({reader}, timeout=self.interval_s)
        finally:
            self.streams -= 1
            # Who hangs up ends the reader, and with it the engine's request.
            reader.cancel()
