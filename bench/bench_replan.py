"""A fleet of 1,000 hosts loses one: only the replicas of that host may move.

The peer is planning anew without the previous plan, on the same fleet in the same run: how many replicas that moves.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cases import Case, large_case
from bench.checker import Placement, check
from bench.ours import Answer, plan
from bench.record import RESULTS, Target, finish, show
from berth.codec import replace


@dataclass(frozen=True)
class Figures:
    """One lost host.

    ``lost`` replicas stood there, ``moved`` replicas of other hosts changed their GPUs, ``unplaced`` ones found no
    place any more; ``moved_anew`` is what planning without the previous plan would move besides.
    """

    host: str
    lost: int
    moved: int
    unplaced: int
    unplaced_before: int
    wrong: int
    seconds: float
    cpu_seconds: float
    moved_anew: int
    seconds_anew: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Lose each host in turn. Returns 1 when a target is missed."""
    options = _parser().parse_args(arguments)
    case = large_case(options.hosts * 8, options.seed)
    before = plan(case)
    found = [measure(case, before, host) for host in _victims(case, before, options.losses, options.seed)]
    show(
        f"One host of {options.hosts:,} lost (peer: planning anew)",
        ("host", "its replicas", "others moved", "unplaced", "seconds", "others moved anew", "moved, Berth/anew"),
        [
            (
                f.host,
                f.lost,
                f.moved,
                f.unplaced - f.unplaced_before,
                f.seconds,
                f.moved_anew,
                f.moved / f.moved_anew if f.moved_anew else "-",
            )
            for f in found
        ],
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    figures = {"hosts": options.hosts, "replicas": case.replicas, "losses": [asdict(item) for item in found]}
    return finish("replan", given, figures, _targets(found), options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_replan", description=__doc__)
    parser.add_argument("--hosts", type=int, default=1000, help="hosts of 8 GPUs")
    parser.add_argument("--losses", type=int, default=3, help="how many hosts to lose, one at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    return parser


def _victims(case: Case, before: Answer, count: int, seed: int) -> list[str]:
    """Hosts that hold replicas, the same ones for the same seed."""
    used = {uuid for item in before.placements for uuid in item.gpus}
    hosts = sorted({slot.host for slot in case.slots if slot.gpu_uuids[0] in used})
    return random.Random(f"losses {seed}").sample(hosts, min(count, len(hosts)))


def measure(case: Case, before: Answer, host: str) -> Figures:
    """Take ``host`` away from ``case`` and count who moves, with the previous plan and without."""
    rest = replace(case, slots=tuple(slot for slot in case.slots if slot.host != host))
    gone = {uuid for slot in case.slots if slot.host == host for uuid in slot.gpu_uuids}
    standing = [item for item in before.placements if not gone.intersection(item.gpus)]
    after = plan(rest, previous=before.solution.plan)
    anew = plan(rest)
    verdict = check(rest, after.placements)
    return Figures(
        host=host,
        lost=len(before.placements) - len(standing),
        moved=moved(standing, after.placements),
        unplaced=verdict.unplaced,
        unplaced_before=case.replicas - len(before.placements),
        wrong=verdict.oversold_gpus + verdict.broken,
        seconds=round(after.seconds, 3),
        cpu_seconds=round(after.cpu_seconds, 3),
        moved_anew=moved(standing, anew.placements),
        seconds_anew=round(anew.seconds, 3),
    )


def moved(standing: Iterable[Placement], after: Iterable[Placement]) -> int:
    """How many of the ``standing`` replicas no longer stand on their GPUs ``after``."""
    left = Counter((item.deployment, frozenset(item.gpus)) for item in standing)
    left.subtract(Counter((item.deployment, frozenset(item.gpus)) for item in after))
    return sum(count for count in left.values() if count > 0)


def _targets(found: Sequence[Figures]) -> list[Target]:
    others = sum(item.moved for item in found)
    wrong = sum(item.wrong for item in found)
    short = sum(item.unplaced - item.unplaced_before for item in found)
    return [
        Target("only the replicas of the lost host move", f"{others} others moved", others == 0),
        Target("every replica of the lost host finds a place", f"{short} unplaced", short <= 0),
        Target("nothing oversold or broken", str(wrong), wrong == 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
