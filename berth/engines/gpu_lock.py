"""One engine start at a time on each GPU, across processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO


@asynccontextmanager
async def gpu_locks() -> AsyncIterator[None]:
    """Hold the lock of every GPU of this slot (``BERTH_GPU_UUIDS``) in ``BERTH_LOCK_DIR``.

    The kernel drops the lock when the process ends, so a killed start leaves nothing behind. Always taken in the
    order of the UUIDs, so that two slots sharing a MIG parent cannot deadlock.
    """
    directory = os.environ.get("BERTH_LOCK_DIR")
    uuids = sorted(filter(None, os.environ.get("BERTH_GPU_UUIDS", "").split(",")))
    if not directory or not uuids:
        yield
        return
    with ExitStack() as held:
        for uuid in uuids:
            path = Path(directory) / f"{uuid}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a"))
            await asyncio.get_running_loop().run_in_executor(None, _lock, file)
        yield


def _lock(file: IO[str]) -> None:
    fcntl.flock(file, fcntl.LOCK_EX)
