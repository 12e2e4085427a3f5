"""Berth's planner as a contender: the same case in, the same kind of placements out."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bench.cases import Case
from bench.checker import Placement
from berth.codec import replace
from berth.plan.planner import Options, solve
from berth.plan.types import Plan, Solution


@dataclass(frozen=True)
class Answer:
    """What the planner said, where the replicas stand in it, and how long it thought.

    ``seconds`` is the time that passed, ``cpu_seconds`` what the process computed: more than that passes where the
    machine has other work.
    """

    solution: Solution
    placements: tuple[Placement, ...]
    seconds: float
    cpu_seconds: float


def plan(case: Case, strategy: str = "pack", previous: Plan | None = None, exact_gpus: int | None = None) -> Answer:
    """Berth's answer to ``case``. ``exact_gpus=0`` keeps the exact solver out (None: the planner's default)."""
    options = Options(regroup=any(item.gpus_per_replica > 1 for item in case.deployments))
    if exact_gpus is not None:
        options = replace(options, exact_gpus=exact_gpus)
    begun, computed = time.perf_counter(), time.process_time()
    solution = solve(case.slots, case.deployments, strategy, previous, options=options)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - computed
    return Answer(solution, placements_of(solution.plan), seconds, cpu_seconds)


def placements_of(plan: Plan) -> tuple[Placement, ...]:
    """One placement per replica of ``plan``."""
    gpus = {slot.name: slot.gpu_uuids for slot in plan.slots}
    return tuple(Placement(berth.deployment, gpus[berth.slot]) for berth in plan.berths for _ in range(berth.replicas))
