"""Many requests, a bounded number at a time; what fails is an outcome like any other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

CONCURRENCY = 16
"""Enough to keep a small cluster's engines busy; more than the berths' queues hold only comes back as 429."""
Progress = Callable[[int, int], None]
"""Called after each item with how many are done, and of how many."""


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of one item: its value, or the error."""

    value: Value | None = None
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def get(self) -> Value:
        """The value.

        Raises:
            Exception: the item's error.
        """
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # it is None only where the call gave None


async def abatch(
    call: Callable[[Item], Awaitable[Value]],
    items: Iterable[Item],
    *,
    concurrency: int = CONCURRENCY,
    progress: Progress | None = None,
) -> list[Outcome[Value]]:
    """``call`` of each item, ``concurrency`` at once, in the items' order.

    A call that goes to one of this package's clients waits as an overloaded cluster asks (Retry-After) and comes
    again. Cancelled, it cancels what runs.
    """
    todo = list(items)
    outcomes: list[Outcome[Value]] = [Outcome()] * len(todo)
    queue = iter(enumerate(todo))
    count = _Count(len(todo), progress)

    async def work() -> None:
        for index, item in queue:
            try:
                outcomes[index] = Outcome(await call(item))
            except Exception as error:
                outcomes[index] = Outcome(error=error)
            count.one()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(_checked(concurrency), len(todo))):
            group.create_task(work())
    return outcomes


def batch(
    call: Callable[[Item], Value],
    items: Iterable[Item],
    *,
    concurrency: int = CONCURRENCY,
    progress: Progress | None = None,
) -> list[Outcome[Value]]:
    """As ``abatch``, in threads."""
    todo = list(items)
    count = _Count(len(todo), progress)

    def one(item: Item) -> Outcome[Value]:
        try:
            return Outcome(call(item))
        except Exception as error:
            return Outcome(error=error)
        finally:
            count.one()

    with ThreadPoolExecutor(_checked(concurrency)) as pool:
        return list(pool.map(one, todo))


class _Count:
    """Calls ``progress`` with counts that only grow."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, Lock()

    def one(self) -> None:
        with self._lock:
            self._done += 1
            if self._progress:
                self._progress(self._done, self._total)


def _checked(concurrency: int) -> int:
    if concurrency < 1:
        raise ValueError(f"concurrency is too small; found: {concurrency}; allowed: >= 1")
    return concurrency
