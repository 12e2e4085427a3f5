"""From what Ansible brought to one list: the edge where dictionaries become the types of berth.preflight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from berth.codec import load
from berth.errors import BerthError
from berth.plan.store import read_plan
from berth.plan.types import Plan
from berth.preflight.facts import Answer, Expectation, HostFacts, OsRelease
from berth.preflight.fleet import check_hosts
from berth.preflight.problem import Problem, arrange, headline, lines


@dataclass(frozen=True)
class PreflightReport:
    """The one list over inventory and hosts; ``text`` is for people."""

    problems: tuple[Problem, ...]
    errors: int
    headline: str
    text: tuple[str, ...]


def make_report(
    problems: object,
    wanted: object,
    answers: Mapping[str, Any],
    accept: Sequence[str] = (),
    plan_path: str = "",
) -> PreflightReport:
    """Judge what was read; parameters are those of library/preflight_report.py.

    Raises:
        BerthError: what was brought is not what preflight_inventory and preflight_facts return.
    """
    expected = load(dict[str, Expectation], wanted, "wanted")
    known = {name: read_answer(raw, name) for name, raw in sorted(answers.items())}
    plan, broken = _plan(plan_path)
    found = [*load(tuple[Problem, ...], problems, "problems"), *broken, *check_hosts(known, expected, plan)]
    whole = arrange(found, accept)
    looked_at = f"the inventory and {len(known)} of {len(expected)} hosts" if known else "the inventory"
    errors = sum(item.severity == "error" for item in whole)
    return PreflightReport(whole, errors, headline(whole), tuple(lines(whole, looked_at)))


def read_answer(raw: Mapping[str, Any], host: str) -> Answer:
    """What Ansible registered for one host: facts, or a failed or unreachable result.

    Raises:
        BerthError: the facts are not those of library/preflight_facts.py.
    """
    facts = raw.get("preflight")
    if isinstance(facts, dict):
        read = load(HostFacts, facts, f"facts of {host}")
        return Answer(read, before=float(raw.get("before", 0)), after=float(raw.get("after", 0)))
    return Answer(failed=str(raw.get("why_not", "")), os=os_release(str(raw.get("os_release", ""))))


def os_release(text: str) -> OsRelease:
    """Read an os-release(5) file."""
    pairs = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    words = {key: value.strip().strip("\"'") for key, value in pairs.items()}
    return OsRelease(words.get("ID", ""), words.get("VERSION_ID", ""), words.get("PRETTY_NAME", ""))


def _plan(path: str) -> tuple[Plan | None, list[Problem]]:
    if not path:
        return None, []
    try:
        return read_plan(Path(path)), []
    except BerthError as error:
        mend = error.mend or "restore plan.previous.json beside it, or move it away (every replica may then move)"
        return None, [Problem("plan", "error", ("controller",), error.what, str(error.found or ""), "", mend)]
