"""From 80 to 8,000 GPUs: how long a plan takes, how much memory, how near the proven lower bound.

Each plan is made in a process of its own, so that its peak memory is its own. Best-fit-decreasing, the strongest of the
simple rules, plans the same fleets in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cases import large_case
from bench.chart import Series, log_log
from bench.checker import check
from bench.ours import plan
from bench.peers import best_fit_decreasing
from bench.record import RESULTS, Target, finish, show
from berth.codec import load, write_text
from berth.errors import BerthError

PLOT = Path(__file__).resolve().parents[1] / "docs" / "images" / "plan_scale.svg"
SECONDS, MIB, GAP, EXPONENT = 10.0, 1024.0, 0.02, 1.2


@dataclass(frozen=True)
class Figures:
    """One fleet: ``rss_mib`` is the peak of the whole process, ``gap`` (used - bound) / bound as the planner states."""

    gpus: int
    seed: int
    replicas: int
    deployments: int
    seconds: float
    cpu_seconds: float
    rss_mib: float
    gpus_used: int
    lower_bound: int
    gap: float
    unplaced: int
    oversold: int
    method: str
    peer_gpus: int
    peer_unplaced: int
    peer_seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every size. Returns 1 when a target is missed."""
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(asdict(measure(*options.one))))
        return 0
    found = [_in_own_process(gpus, seed + 1) for gpus in sorted(options.gpus) for seed in range(options.seeds)]
    exponent = fit_exponent([(item.gpus, item.seconds) for item in found])
    _show(found)
    write_text(options.plot, _plot(found))
    given = list(sys.argv[1:] if arguments is None else arguments)
    figures = {"exponent": exponent, "fleets": [asdict(item) for item in found]}
    return finish("scale", given, figures, _targets(found, exponent), options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_scale", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[80, 240, 800, 2400, 8000], help="sizes of the fleets")
    parser.add_argument("--seeds", type=int, default=3, help="fleets of each size")
    parser.add_argument(
        "--one", type=int, nargs=2, metavar=("GPUS", "SEED"), help="measure this fleet here and print its figures"
    )
    parser.add_argument("--plot", type=Path, default=PLOT, help="where the SVG goes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    return parser


def measure(gpus: int, seed: int) -> Figures:
    """Plan one fleet and judge the plan. Peak memory is read before the peer and the checker run."""
    case = large_case(gpus, seed)
    # The solver's libraries load once in a controller's life: a tiny plan first keeps them out of the seconds.
    plan(large_case(8, seed))
    answer = plan(case)
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    verdict = check(case, answer.placements)
    begun = time.perf_counter()
    peer = best_fit_decreasing(case)
    peer_seconds = time.perf_counter() - begun
    other = check(case, peer)
    summary = answer.solution.summary
    return Figures(
        gpus=gpus,
        seed=seed,
        replicas=case.replicas,
        deployments=len(case.deployments),
        seconds=round(answer.seconds, 3),
        cpu_seconds=round(answer.cpu_seconds, 3),
        rss_mib=round(rss_mib, 1),
        gpus_used=verdict.gpus_used,
        lower_bound=summary.lower_bound_gpus,
        gap=round(verdict.gpus_used / max(1, summary.lower_bound_gpus) - 1, 5),
        unplaced=verdict.unplaced,
        oversold=verdict.oversold_gpus + verdict.broken,
        method=summary.method,
        peer_gpus=other.gpus_used,
        peer_unplaced=other.unplaced,
        peer_seconds=round(peer_seconds, 3),
    )


def _in_own_process(gpus: int, seed: int) -> Figures:
    command = [sys.executable, "-m", "bench.bench_scale", "--one", str(gpus), str(seed)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BerthError(f"planning {gpus} GPUs (seed {seed}) failed", found=done.stderr.strip()[-500:])
    return load(Figures, json.loads(done.stdout), f"figures of {gpus} GPUs")


def fit_exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The b of seconds = a * gpus ** b by least squares of the logarithms; None for fewer than two sizes."""
    if len({x for x, _ in points}) < 2:
        return None
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    rise = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return round(rise / sum((x - x_mean) ** 2 for x in xs), 3)


def _show(found: Sequence[Figures]) -> None:
    show(
        "Berth's pack from small to large (peer: best-fit-decreasing)",
        (
            "GPUs",
            "seed",
            "replicas",
            "seconds",
            "CPU seconds",
            "peak MiB",
            "GPUs used",
            "lower bound",
            "gap",
            "unplaced",
            "peer's GPUs",
            "GPUs, Berth/peer",
            "peer's seconds",
        ),
        [
            (
                f.gpus,
                f.seed,
                f.replicas,
                f.seconds,
                f.cpu_seconds,
                f"{f.rss_mib:.0f}",
                f.gpus_used,
                f.lower_bound,
                f"{f.gap:.2%}",
                f.unplaced,
                f.peer_gpus if not f.peer_unplaced else f"{f.peer_gpus} ({f.peer_unplaced} unplaced)",
                f.gpus_used / f.peer_gpus,
                f.peer_seconds,
            )
            for f in found
        ],
    )


def _targets(found: Sequence[Figures], exponent: float | None) -> list[Target]:
    slowest = max(item.seconds for item in found)
    largest = max(item.rss_mib for item in found)
    size = max(item.gpus for item in found)
    widest = max(item.gap for item in found if item.gpus == size)
    wrong = sum(item.oversold + item.unplaced for item in found)
    worse = [(item.gpus, item.seed) for item in found if not item.peer_unplaced and item.gpus_used > item.peer_gpus]
    return [
        Target(
            f"at most {SECONDS:.0f} s for every fleet",
            f"{slowest:.2f} s ({max(i.cpu_seconds for i in found):.2f} CPU s)",
            slowest <= SECONDS,
        ),
        Target(f"at most {MIB:.0f} MiB for every fleet", f"{largest:.0f} MiB", largest <= MIB),
        Target(
            f"gap to the lower bound at most {GAP:.0%} at {size:,} GPUs",
            f"{widest:.2%} (any size: {max(item.gap for item in found):.2%})",
            widest <= GAP,
        ),
        Target("nothing unplaced, oversold or broken", str(wrong), wrong == 0),
        Target("no more GPUs than best-fit-decreasing", f"worse at {worse or 'none'}", not worse),
        Target(
            f"near linear: exponent of seconds over GPUs at most {EXPONENT}",
            "one size only" if exponent is None else str(exponent),
            exponent is None or exponent <= EXPONENT,
        ),
    ]


def _plot(found: Sequence[Figures]) -> str:
    # The slowest and the largest of each size: a picture must not be kinder than the table.
    sizes = sorted({item.gpus for item in found})
    seconds = tuple((gpus, max(item.seconds for item in found if item.gpus == gpus)) for gpus in sizes)
    memory = tuple((gpus, max(item.rss_mib for item in found if item.gpus == gpus) / 1024) for gpus in sizes)
    linear = tuple((gpus, seconds[-1][1] * gpus / sizes[-1]) for gpus in sizes)
    series = (
        Series("seconds to plan", "#0550ae", "", seconds),
        Series("linear, for comparison", "#57606a", "5 4", linear),
        Series("peak memory, GiB", "#bc4c00", "", memory),
    )
    title = f"Planning {sizes[0]:,} to {sizes[-1]:,} GPUs, 2.5 replicas per GPU (slowest of each size)"
    return log_log(title, "GPUs in the fleet", "seconds, GiB", series)


if __name__ == "__main__":
    sys.exit(main())
