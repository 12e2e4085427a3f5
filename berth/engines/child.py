"""A child process of a replica that ends with it, whatever way the replica ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
TAIL_CHARACTERS = 2000


class Child:
    """One process in a group of its own: what it started can be ended even when it no longer can end it."""

    def __init__(self, log: Path) -> None:
        """``log`` gets what it prints."""
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Run ``words``, with ``env`` beside the replica's own environment."""
        parent = os.getpid()

        def die_with_the_replica() -> None:
            # A replica that is killed cannot stop its child; the kernel does.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        with self._log.open("wb") as out:
            self._process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=die_with_the_replica,
            )

    @property
    def returncode(self) -> int | None:
        """None while it runs, and before it was started."""
        return self._process.returncode if self._process else None

    @property
    def pid(self) -> int | None:
        """None before it was started."""
        return self._process.pid if self._process else None

    async def wait(self) -> int:
        """Until it ends; its exit code."""
        assert self._process is not None
        return await self._process.wait()

    def tail(self) -> str:
        """The end of what it said."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:]

    def text(self) -> str:
        """All that it said."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    async def stop(self, patience_s: float) -> None:
        """End it kindly, after ``patience_s`` seconds with force; and its whole group."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), patience_s)
        self.kill()

    def kill(self) -> None:
        """End its whole group at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
