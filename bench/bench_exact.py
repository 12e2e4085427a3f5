"""Up to 64 GPUs: how often the plan is proven optimal, how long that takes, and whether the heuristic ever wins.

The peer is Berth's own heuristic alone (``exact_gpus=0``) on the same cases in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cases import Case, small_cases
from bench.checker import Verdict, check
from bench.ours import plan
from bench.record import RESULTS, Target, finish, show

SECONDS, SHARE = 10.0, 0.95


@dataclass(frozen=True)
class Figures:
    """One case; ``worse`` when the heuristic alone reached a better plan, ``better`` when the exact search did."""

    case: str
    gpus: int
    replicas: int
    optimal: bool
    seconds: float
    cpu_seconds: float
    heuristic_seconds: float
    better: bool
    worse: bool
    wrong: int
    unplaced: int
    gpus_used: int
    heuristic_gpus: int
    lower_bound: int
    method: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case. Returns 1 when a target is missed."""
    options = _parser().parse_args(arguments)
    found = [measure(case) for case in small_cases(options.cases)]
    _show(found)
    for item in found:
        if not item.optimal or item.worse or item.seconds > SECONDS:
            print(f"look at {item}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    return finish("exact", given, _figures(found), _targets(found), options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_exact", description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="generated cases, of every kind in turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    return parser


def measure(case: Case) -> Figures:
    """Plan ``case`` with and without the exact solver and judge both."""
    exact = plan(case)
    alone = plan(case, exact_gpus=0)
    mine, other = check(case, exact.placements), check(case, alone.placements)
    summary = exact.solution.summary
    return Figures(
        case=case.name,
        gpus=len(case.slots),
        replicas=case.replicas,
        optimal=summary.optimal,
        seconds=round(exact.seconds, 3),
        cpu_seconds=round(exact.cpu_seconds, 3),
        heuristic_seconds=round(alone.seconds, 3),
        better=_objective(case, mine) < _objective(case, other),
        worse=_objective(case, mine) > _objective(case, other),
        wrong=mine.oversold_gpus + mine.broken,
        unplaced=mine.unplaced,
        gpus_used=mine.gpus_used,
        heuristic_gpus=other.gpus_used,
        lower_bound=summary.lower_bound_gpus,
        method=summary.method,
    )


def _objective(case: Case, verdict: Verdict) -> tuple[float, ...]:
    """What pack minimises, in its order: replicas left out, cost, GPUs, hosts."""
    cost = round(verdict.cost, 6) if case.priced else 0.0
    return verdict.unplaced, cost, verdict.gpus_used, verdict.hosts_used


def _share(found: Sequence[Figures]) -> float:
    return sum(item.optimal and item.seconds <= SECONDS for item in found) / len(found)


def _figures(found: Sequence[Figures]) -> dict[str, object]:
    return {
        "cases": len(found),
        "proven_within_limit": _share(found),
        "seconds_median": statistics.median(item.seconds for item in found),
        "seconds_max": max(item.seconds for item in found),
        "cpu_seconds_median": statistics.median(item.cpu_seconds for item in found),
        "cpu_seconds_max": max(item.cpu_seconds for item in found),
        "proven": sum(item.optimal for item in found),
        "heuristic_seconds_median": statistics.median(item.heuristic_seconds for item in found),
        "better_than_heuristic": sum(item.better for item in found),
        "per_case": [asdict(item) for item in found],
    }


def _show(found: Sequence[Figures]) -> None:
    kinds: dict[str, list[Figures]] = {}
    for item in found:
        kinds.setdefault(item.case.rsplit("-", 1)[0], []).append(item)
    show(
        "Exact search against the heuristic alone, by kind of case",
        ("kind", "cases", "proven", "s median", "s max", "CPU s max", "better", "worse", "GPUs, exact/heuristic"),
        [
            (
                kind,
                len(items),
                sum(item.optimal for item in items),
                statistics.median(item.seconds for item in items),
                max(item.seconds for item in items),
                max(item.cpu_seconds for item in items),
                sum(item.better for item in items),
                sum(item.worse for item in items),
                sum(item.gpus_used for item in items) / sum(item.heuristic_gpus for item in items),
            )
            for kind, items in [*kinds.items(), ("all", list(found))]
        ],
    )


def _targets(found: Sequence[Figures]) -> list[Target]:
    share = _share(found)
    worse = [item.case for item in found if item.worse]
    wrong = sum(item.wrong for item in found)
    return [
        Target(
            f"proven optimal within {SECONDS:.0f} s in {SHARE:.0%} of cases",
            f"{share:.1%} ({sum(i.optimal for i in found)} proven; "
            f"{max(i.cpu_seconds for i in found):.1f} CPU s at most)",
            share >= SHARE,
        ),
        Target("never worse than the heuristic", f"{', '.join(worse) or 'no case'} worse", not worse),
        Target("nothing oversold or broken", str(wrong), wrong == 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
