"""An engine that sleeps and wakes, without an engine."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from berth.engines.errors import ApiError
from berth.engines.sleep import Sleeper

AFTER_S = 0.05


class Server:
    """Notes what is asked of it; answers only awake. ``slow`` is what falling asleep and waking wait for."""

    def __init__(self) -> None:
        self.awake = True
        self.said: list[str] = []
        self.slow = asyncio.Event()
        self.slow.set()
        self.broken = ""

    async def sleep(self) -> None:
        await self._become(False, "sleep")

    async def wake(self) -> None:
        await self._become(True, "wake")

    async def _become(self, awake: bool, word: str) -> None:
        await self.slow.wait()
        if self.broken == word:
            raise MemoryError("no room")
        assert self.awake is not awake, f"told twice to {word}"
        self.awake = awake
        self.said.append(word)

    async def chat(self, parts: int = 1, each_s: float = 0) -> AsyncIterator[str]:
        return self._answer(parts, each_s)

    async def _answer(self, parts: int, each_s: float) -> AsyncIterator[str]:
        for _ in range(parts):
            assert self.awake, "it was asked asleep"
            yield "word"
            await asyncio.sleep(each_s)


def scene(play: Callable[[Server, Sleeper], Awaitable[None]], after_s: float = AFTER_S) -> None:
    async def run() -> None:
        server = Server()
        sleeper = Sleeper("chat", server, after_s, server_told.append)
        try:
            await play(server, sleeper)
        finally:
            await sleeper.stop()

    server_told: list[bool] = []
    asyncio.run(run())


async def answer(server: Server, sleeper: Sleeper, *how: Any) -> list[str]:
    return [part async for part in sleeper.during(lambda: server.chat(*how))]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.005)


def test_it_sleeps_when_nobody_asks_and_wakes_once_for_all_who_do() -> None:
    async def play(server: Server, sleeper: Sleeper) -> None:
        for _ in range(2):
            await until(lambda: sleeper.asleep)
            assert await asyncio.gather(*(answer(server, sleeper) for _ in range(5))) == [["word"]] * 5
        assert server.said == ["sleep", "wake"] * 2

    scene(play)


def test_it_stays_awake_while_an_answer_is_given_and_a_while_after() -> None:
    async def play(server: Server, sleeper: Sleeper) -> None:
        await answer(server, sleeper, 10, AFTER_S)
        assert server.said == []
        await until(lambda: sleeper.asleep)

    scene(play, after_s=2 * AFTER_S)


def test_who_comes_while_it_falls_asleep_waits_and_is_answered() -> None:
    async def play(server: Server, sleeper: Sleeper) -> None:
        server.slow.clear()
        await until(sleeper._turn.locked)
        asked = asyncio.create_task(answer(server, sleeper))
        await asyncio.sleep(0)
        assert not asked.done()
        server.slow.set()
        assert await asked == ["word"]
        assert server.said[:2] == ["sleep", "wake"]

    scene(play)


def test_one_that_waits_for_its_neighbours_start_is_awake_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERTH_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("BERTH_GPU_UUIDS", "GPU-a")

    async def play(server: Server, sleeper: Sleeper) -> None:
        for _ in range(3):
            await asyncio.sleep(2 * AFTER_S)
            assert await answer(server, sleeper) == ["word"]
        assert server.said == []
        fcntl.flock(starting, fcntl.LOCK_UN)
        await until(lambda: sleeper.asleep)
        assert await answer(server, sleeper) == ["word"]

    with (tmp_path / "GPU-a.lock").open("a") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        scene(play)


def test_who_hangs_up_while_it_wakes_leaves_it_awake_for_the_others() -> None:
    async def play(server: Server, sleeper: Sleeper) -> None:
        await until(lambda: sleeper.asleep)
        server.slow.clear()
        first, second = (asyncio.create_task(answer(server, sleeper)) for _ in range(2))
        await until(sleeper._turn.locked)
        first.cancel()
        await asyncio.wait([first])
        server.slow.set()
        assert await second == ["word"]
        assert server.said[:2] == ["sleep", "wake"]

    scene(play)


@pytest.mark.parametrize("what", ["sleep", "wake"])
def test_one_that_does_not_obey_is_unhealthy_and_says_why(what: str) -> None:
    async def play(server: Server, sleeper: Sleeper) -> None:
        server.broken = what
        await until(lambda: sleeper.asleep or bool(sleeper._failed))
        with pytest.raises(ApiError) as refused:
            await answer(server, sleeper)
        assert refused.value.status == 503
        with pytest.raises(RuntimeError, match=r"chat should be .*no room"):
            sleeper.check()

    scene(play)
