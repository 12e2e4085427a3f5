"""Sleep: an engine that nobody asks gives its GPU's memory back, keeps its weights in the host's, and wakes when asked.

The plan goes on reserving its memory, so that it can be woken at any time (docs/decisions/0029).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from berth.engines.errors import ApiError
from berth.engines.gpu_lock import gpu_locks

LEVEL = 1
"""vLLM's: weights go to the host's memory and the KV cache is dropped. Beyond it, weights are read from disk anew."""
LOOK_S = 1.0
"""How often it looks at least whether somebody still asks."""


class Sleeper:
    """Sends the engine of ``server`` to sleep (``server.sleep``) once nobody has asked for ``after_s`` seconds, and
    wakes it (``server.wake``) before the next request is answered. ``tell`` hears of each change.

    Both happen behind the GPU's lock: an engine that starts beside it measures what is free (berth.engines.gpu_lock).
    """

    def __init__(self, model: str, server: Any, after_s: float, tell: Callable[[bool], None] = lambda _asleep: None):
        self.asleep = False
        self._model, self._server, self._after_s, self._tell = model, server, after_s, tell
        self._asking = 0
        self._since = time.monotonic()
        self._turn = asyncio.Lock()
        self._failed = ""
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching

    def check(self) -> None:
        """
        Raises:
            RuntimeError: it does not wake, or did not fall asleep; only a new start helps.
        """
        if self._failed:
            raise RuntimeError(self._failed)

    async def during(self, ask: Callable[[], Awaitable[Any]]) -> AsyncGenerator[Any]:
        """The parts of what ``ask`` gives, from an engine that is awake until the last has come.

        Raises:
            ApiError: 503, it does not wake.
        """
        self._asking += 1
        try:
            await self._awake()
            async with aclosing(await ask()) as parts:
                async for part in parts:
                    yield part
        finally:
            self._asking -= 1
            self._since = time.monotonic()

    async def _awake(self) -> None:
        if self.asleep or self._turn.locked():
            # Who hangs up meanwhile leaves it to wake for the others.
            self._waking = asyncio.create_task(self._wake())
            await asyncio.shield(self._waking)
        if self._failed:
            message = f"The model `{self._model}` was asleep and does not wake."
            raise ApiError(503, message, code="unavailable")

    async def _wake(self) -> None:
        async with self._turn:
            if self.asleep and not self._failed:
                async with gpu_locks():
                    await self._change(self._server.wake, asleep=False)

    async def _watch(self) -> None:
        while not self._failed:
            if (left := self._left_s()) > 0:
                await asyncio.sleep(min(left, LOOK_S))
                continue
            # The lock first: it may be long in coming, and until then it is awake for whoever asks.
            async with gpu_locks(), self._turn:
                if self._left_s() <= 0:
                    await self._change(self._server.sleep, asleep=True)

    def _left_s(self) -> float:
        """How long it stays awake if nobody asks."""
        if self._asking or self.asleep:
            return self._after_s
        return self._since + self._after_s - time.monotonic()

    async def _change(self, how: Callable[[], Awaitable[None]], *, asleep: bool) -> None:
        begun, word = time.monotonic(), "asleep" if asleep else "awake"
        try:
            await how()
        except Exception as error:
            self._failed = f"{self._model} should be {word}, and its engine says: {error}"
            logging.getLogger("ray.serve").exception(self._failed)
            return
        self.asleep = asleep
        self._tell(asleep)
        logging.getLogger("ray.serve").info(f"{self._model} is {word} after {time.monotonic() - begun:.2f} s")
