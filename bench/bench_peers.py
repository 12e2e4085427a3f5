"""Berth against its peers on the same fleets: GPUs used, replicas left out, GPUs oversold.

A peer's plan is whole on a case when it places as many replicas as Berth's, oversells no GPU and breaks no rule. Berth
must never use more GPUs (cost, where GPUs have one) than a whole plan.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cases import KINDS, Case, large_case, small_cases
from bench.checker import Placement, Verdict, check
from bench.ours import Answer, plan
from bench.peers import RULES, ray_slots, ray_whole_hosts, run_ray
from bench.record import RESULTS, Target, finish, show
from berth.codec import dump, write_json

RUNTIME = Path(__file__).resolve().parents[1] / ".berth" / "runtime" / "current" / "bin" / "python"

STRONGER = ("first-fit-decreasing, large GPUs first", "best-fit-decreasing")
"""Reported besides the peers that were promised: against them only "never more" is asked."""
TOLERANCE = 1e-6
SMALL, LARGE = "up to 64 GPUs", "larger fleets"


@dataclass(frozen=True)
class Match:
    """Berth and one peer on one case; ``bound`` is what Berth proves that every plan of as many replicas uses."""

    case: Case
    peer: str
    ours: Verdict
    theirs: Verdict
    bound: float

    @property
    def whole(self) -> bool:
        """Whether the peer's plan can be compared by the GPUs it uses."""
        return self.theirs.placed >= self.ours.placed and not self.theirs.oversold_gpus and not self.theirs.broken

    @property
    def our_use(self) -> float:
        return _use(self.case, self.ours)

    @property
    def their_use(self) -> float:
        return _use(self.case, self.theirs)

    @property
    def lost(self) -> bool:
        """Whether the peer places more, or the same with less."""
        return self.whole and (self.theirs.placed > self.ours.placed or self.our_use > self.their_use)

    @property
    def fewer(self) -> bool:
        """Whether Berth places the same with less."""
        return self.whole and not self.lost and self.our_use < self.their_use

    @property
    def room(self) -> bool:
        """Whether the peer's plan is whole and not at the proven bound: fewer may be possible at all."""
        return self.whole and self.their_use > self.bound + TOLERANCE

    @property
    def impossible(self) -> bool:
        """Whether the peer's plan needs less than Berth says is possible: then the bound is wrong."""
        return self.whole and self.their_use < self.bound - TOLERANCE


@dataclass(frozen=True)
class Score:
    """One peer over the cases of one group.

    ``whole`` plans of the peer are ``fewer`` + ``equal`` + ``lost`` from Berth's side; ``ratio`` is the median of
    Berth's use over the peer's among them, ``total_ratio`` that of the sums of GPUs where all cost the same.
    ``room`` of them are above the bound, so that fewer is not ruled out. Of the others, ``short`` place less and
    ``oversold_cases`` oversell ``oversold_gpus`` GPUs.
    """

    group: str
    peer: str
    cases: int
    whole: int
    room: int
    fewer: int
    equal: int
    lost: int
    ratio: float | None
    total_ratio: float | None
    short: int
    oversold_cases: int
    oversold_gpus: int
    broken: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns 1 when a target is missed."""
    options = _parser().parse_args(arguments)
    large = [large_case(gpus, seed + 1) for gpus in options.large for seed in range(options.seeds)]
    cases = [*small_cases(options.cases), *large]
    answers = [plan(case) for case in cases]
    version, peers = _peers(cases, answers, options.runtime_python)
    ours = [check(case, answer.placements) for case, answer in zip(cases, answers, strict=True)]
    matches = [
        Match(case, peer, mine, check(case, found), _bound(case, answer))
        for peer, plans in peers.items()
        for case, answer, mine, found in zip(cases, answers, ours, plans, strict=True)
    ]
    scores = [
        _score(group, peer, mine)
        for group in (SMALL, LARGE)
        for peer in peers
        if (mine := [item for item in matches if item.peer == peer and _group(item.case) == group])
    ]
    _show(scores, ours)
    losses = [item for item in matches if item.lost]
    for item in losses:
        print(
            f"Berth does worse than {item.peer} on {item.case.name}: {_numbers(item.case, item.ours)}, "
            f"the peer {_numbers(item.case, item.theirs)}"
        )
    _keep(losses, options.keep_losses)
    given = list(sys.argv[1:] if arguments is None else arguments)
    figures = _figures(version, cases, answers, ours, scores, matches)
    return finish("peers", given, figures, _targets(ours, scores, matches, version), options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_peers", description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help=f"small cases, of {len(KINDS)} kinds in turn")
    parser.add_argument(
        "--large", type=int, nargs="*", default=[80, 160, 320, 640], metavar="GPUS", help="sizes of larger fleets"
    )
    parser.add_argument("--seeds", type=int, default=3, help="larger fleets of each size")
    parser.add_argument(
        "--runtime-python",
        default=os.environ.get("BERTH_RUNTIME_PYTHON") or str(RUNTIME),
        help="an interpreter that has Ray, for Ray Serve's scheduler; '' leaves it out, and its target is missed",
    )
    parser.add_argument("--keep-losses", type=Path, metavar="DIR", help="write each lost case there as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    return parser


def _peers(
    cases: Sequence[Case], answers: Sequence[Answer], python: str
) -> tuple[str, dict[str, list[Sequence[Placement]]]]:
    found: dict[str, list[Sequence[Placement]]] = {name: [rule(case) for case in cases] for name, rule in RULES.items()}
    if not python:
        return "", found
    version = ""
    hosts = [ray_whole_hosts(case) for case in cases]
    slots = [ray_slots(case, answer.solution.plan.slots) for case, answer in zip(cases, answers, strict=True)]
    for pack in (True, False):
        manner = "pack" if pack else "spread"
        for where, jobs, by_shape in (("whole hosts", hosts, False), ("a node per slot", slots, True)):
            version, placed = run_ray(jobs, python, pack=pack, by_shape=by_shape)
            found[f"Ray Serve {manner}, {where}"] = list(placed)
    return version, found


def _group(case: Case) -> str:
    return LARGE if case.name.startswith("large") else SMALL


def _use(case: Case, verdict: Verdict) -> float:
    return round(verdict.cost, 6) if case.priced else verdict.gpus_used


def _bound(case: Case, answer: Answer) -> float:
    summary = answer.solution.summary
    return summary.lower_bound_cost if case.priced else summary.lower_bound_gpus


def _numbers(case: Case, verdict: Verdict) -> str:
    return f"{verdict.placed} replicas with {_use(case, verdict):g} {'of cost' if case.priced else 'GPUs'}"


def _score(group: str, peer: str, matches: Sequence[Match]) -> Score:
    whole = [item for item in matches if item.whole]
    same_price = [item for item in whole if not item.case.priced]
    theirs = sum(item.theirs.gpus_used for item in same_price)
    fewer, lost = sum(item.fewer for item in whole), sum(item.lost for item in whole)
    return Score(
        group=group,
        peer=peer,
        cases=len(matches),
        whole=len(whole),
        room=sum(item.room for item in whole),
        fewer=fewer,
        equal=len(whole) - fewer - lost,
        lost=lost,
        ratio=round(statistics.median(item.our_use / item.their_use for item in whole), 4) if whole else None,
        total_ratio=round(sum(item.ours.gpus_used for item in same_price) / theirs, 4) if theirs else None,
        short=sum(item.theirs.placed < item.ours.placed for item in matches),
        oversold_cases=sum(item.theirs.oversold_gpus > 0 for item in matches),
        oversold_gpus=sum(item.theirs.oversold_gpus for item in matches),
        broken=sum(item.theirs.broken for item in matches),
    )


def _keep(losses: Sequence[Match], folder: Path | None) -> None:
    for case in {item.case.name: item.case for item in losses}.values():
        mine = {item.peer: _numbers(case, item.theirs) for item in losses if item.case is case}
        ours = next(_numbers(case, item.ours) for item in losses if item.case is case)
        if folder:
            write_json(folder / f"{case.name}.json", {"berth": ours, "better": mine, **dump(case)})


def _figures(
    version: str,
    cases: Sequence[Case],
    answers: Sequence[Answer],
    ours: Sequence[Verdict],
    scores: Sequence[Score],
    matches: Sequence[Match],
) -> dict[str, object]:
    return {
        "ray": version,
        "berth": {
            "oversold_gpus": sum(item.oversold_gpus for item in ours),
            "broken": sum(item.broken for item in ours),
            "seconds_max": round(max(answer.seconds for answer in answers), 3),
        },
        "scores": [asdict(score) for score in scores],
        "per_case": [
            {
                "case": case.name,
                "gpus": len(case.slots),
                "replicas": case.replicas,
                "by_cost": case.priced,
                "berth": _row(mine),
                "peers": {item.peer: _row(item.theirs) for item in matches if item.case is case},
            }
            for case, mine in zip(cases, ours, strict=True)
        ],
    }


def _row(verdict: Verdict) -> str:
    # One line a plan: the file is read by people, too.
    return (
        f"placed {verdict.placed}, GPUs {verdict.gpus_used}, cost {verdict.cost:.1f}, "
        f"oversold {verdict.oversold_gpus}, broken {verdict.broken}"
    )


COLUMNS = (
    "peer",
    "cases",
    "whole",
    "above bound",
    "Berth fewer",
    "equal",
    "Berth more",
    "median Berth/peer",
    "sum Berth/peer",
    "places less",
    "cases oversold",
    "GPUs oversold",
)


def _show(scores: Sequence[Score], ours: Sequence[Verdict]) -> None:
    for group in sorted({score.group for score in scores}, reverse=True):
        rows = [
            (
                item.peer,
                item.cases,
                item.whole,
                item.room,
                item.fewer,
                item.equal,
                item.lost,
                "-" if item.ratio is None else item.ratio,
                "-" if item.total_ratio is None else item.total_ratio,
                item.short,
                item.oversold_cases,
                item.oversold_gpus,
            )
            for item in scores
            if item.group == group
        ]
        show(
            f"Berth against each peer, {group}; GPUs (or cost) are compared where the peer's plan is whole",
            COLUMNS,
            rows,
        )


def _targets(ours: Sequence[Verdict], scores: Sequence[Score], matches: Sequence[Match], version: str) -> list[Target]:
    wrong = sum(item.oversold_gpus + item.broken for item in ours)
    lost = sum(item.lost for item in matches)
    impossible = sorted({item.case.name for item in matches if item.impossible})
    found = [
        Target("Berth oversells no GPU and breaks no rule", str(wrong), wrong == 0),
        Target("Berth is never worse than a whole plan", f"worse in {lost} of {len(matches)} matches", lost == 0),
        Target("no whole plan is below the proven bound", ", ".join(impossible) or "none", not impossible),
        Target("Ray Serve's own scheduler took part", version or "no", bool(version)),
    ]
    for score in scores:
        if score.peer not in STRONGER:
            found.append(
                Target(
                    f"{score.group}: fewer than {score.peer} on most cases in which that is not ruled out",
                    f"{score.fewer} of {score.room} ({score.whole} of {score.cases} plans are whole)",
                    2 * score.fewer > score.room or not score.room,
                )
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
