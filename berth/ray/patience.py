"""How long a rollout may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Patience:
    """When a rollout is given up: after ``timeout_s`` in all, or where Ray itself is waited for (its head to answer,
    slots to join) for ``slot_timeout_s`` at a stretch. A head too busy to answer once, late in a rollout, is no reason.
    """

    timeout_s: float
    slot_timeout_s: float
    _joining_since_s: float | None = None

    def is_out(self, elapsed_s: float, joining: bool) -> bool:
        """Told after each pass how long the rollout takes already and whether Ray is what the pass waits for."""
        if not joining:
            self._joining_since_s = None
            return elapsed_s > self.timeout_s
        if self._joining_since_s is None:
            self._joining_since_s = elapsed_s
        return elapsed_s > self.timeout_s or elapsed_s - self._joining_since_s > self.slot_timeout_s

    def left_s(self, elapsed_s: float) -> float:
        """How long may still be waited for what the last pass waited for."""
        left = self.timeout_s - elapsed_s
        if self._joining_since_s is not None:
            left = min(left, self.slot_timeout_s - (elapsed_s - self._joining_since_s))
        return max(0.0, left)
