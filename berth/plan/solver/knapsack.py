"""What the best load of a bin is worth, for every capacity at once: bounded knapsack by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Pattern = tuple[tuple[int, int], ...]
"""(item, how many), in the order of items."""


@dataclass(frozen=True)
class Knapsack:
    """``worth[c]`` is the most that fits into c units; ``taken`` and ``steps`` tell what that load is."""

    worth: Ints
    steps: tuple[tuple[int, int, int], ...]
    taken: tuple[NDArray[np.bool_], ...]

    def load(self, units: int) -> Pattern:
        """A load of ``units`` that is worth ``worth[units]``."""
        counts: dict[int, int] = {}
        for (item, copies, size), taken in zip(reversed(self.steps), reversed(self.taken), strict=True):
            if taken[units]:
                counts[item] = counts.get(item, 0) + copies
                units -= size
        return tuple(sorted(counts.items()))


def fill(sizes: Sequence[int], copies: Sequence[int], prices: Sequence[int], units: int, trace: bool) -> Knapsack:
    """Solve for bins of 0 to ``units`` units. Items of size 0 may not be here. ``trace`` keeps what ``load`` needs."""
    worth: Ints = np.zeros(units + 1, dtype=np.int64)
    steps: list[tuple[int, int, int]] = []
    taken: list[NDArray[np.bool_]] = []
    for item in _useful(sizes, copies, prices, units):
        size, price = sizes[item], prices[item]
        left, chunk = min(copies[item], units // size), 1
        while left > 0:
            count = min(chunk, left)
            left, chunk = left - count, chunk * 2
            shift = size * count
            other = worth[:-shift] + price * count
            if trace:
                better = np.empty(units + 1, dtype=np.bool_)
                better[:shift] = False
                np.greater(other, worth[shift:], out=better[shift:])
                steps.append((item, count, shift))
                taken.append(better)
            np.maximum(other, worth[shift:], out=worth[shift:])
    return Knapsack(worth, tuple(steps), tuple(taken))


def _useful(sizes: Sequence[int], copies: Sequence[int], prices: Sequence[int], units: int) -> list[int]:
    """The items that may be in a best load: fitting, and not dearer elsewhere for no more room, however many."""
    order = sorted(
        (i for i, size in enumerate(sizes) if 0 < size <= units and prices[i] > 0), key=lambda i: (sizes[i], -prices[i])
    )
    best, found = 0, []
    for item in order:
        if prices[item] > best:
            found.append(item)
            if copies[item] >= units // sizes[item]:
                best = prices[item]
    return found
