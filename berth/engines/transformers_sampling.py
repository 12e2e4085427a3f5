"""Sampling with a seed of its own for each request, inside transformers' ``generate``; needs torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TopKLogitsWarper, TopPLogitsWarper

from berth.engines.transformers_text import Limits


class Gumbel(LogitsProcessor):  # type: ignore[misc]
    """Scores whose largest is a sample: requests run beside each other, and torch's own generator is one for all."""

    def __init__(self, seed: int | None, device: Any) -> None:
        self._generator = torch.Generator(device=device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        uniform = torch.rand(scores.shape, generator=self._generator, device=scores.device).clamp_min(1e-20)
        return scores.float() - torch.log(-torch.log(uniform))


class Warmed(LogitsProcessor):  # type: ignore[misc]
    """Temperature, which decides what top_p keeps."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.float() / self._temperature


def sampler(limits: Limits, seed: int | None, device: Any) -> LogitsProcessorList:
    """Nothing for temperature 0: the largest is the answer."""
    if limits.temperature == 0:
        return LogitsProcessorList()
    steps: list[Any] = [Warmed(limits.temperature)]
    if limits.top_k > 0:
        steps.append(TopKLogitsWarper(limits.top_k))
    if limits.top_p < 1:
        steps.append(TopPLogitsWarper(limits.top_p))
    steps.append(Gumbel(limits.seed if limits.seed is not None else seed, device))
    return LogitsProcessorList(steps)


class Hook(StoppingCriteria):  # type: ignore[misc]
    """Hands on each token as it is made, and ends the work when nobody wants it any more."""

    def __init__(self, put: Callable[[int], None], over: threading.Event, ends: set[int]) -> None:
        self._put, self._over, self._ends = put, over, ends

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        token = int(input_ids[0, -1])
        if token not in self._ends:
            self._put(token)
        return torch.full((input_ids.shape[0],), self._over.is_set(), device=input_ids.device, dtype=torch.bool)
