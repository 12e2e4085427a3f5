"""Footprints against the shared start-up logs: the promises hold, and the constants are the fitted ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from bench.bench_footprint_cases import CASES, facts_of, fit, main, read_cases
from berth.footprint.runtime_coefficients import COEFFICIENTS


def test_every_promise_is_kept_with_each_model_left_out(tmp_path: Path) -> None:
    assert main(["--results", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "footprint_cases.json").read_text(encoding="utf-8"))["figures"]
    summary = figures["summary"]
    assert summary["weights"]["cases"] >= 70
    assert summary["kv_tokens"]["cases"] >= 60
    assert summary["judged_totals"] >= 27
    assert summary["total"]["median"] < summary["peer_total"]["median"] / 2


def test_the_constants_are_what_the_fit_gives() -> None:
    assert fit(facts_of(read_cases(CASES))) == COEFFICIENTS


def test_a_model_is_never_judged_by_its_own_logs() -> None:
    facts = facts_of(read_cases(CASES))
    model = "Qwen/Qwen2.5-7B-Instruct"
    others = [item for item in facts if item.case.model != model]
    spoilt = [
        dataclasses.replace(item, case=dataclasses.replace(item.case, graphs_mib=1e6))
        if item.case.model == model
        else item
        for item in facts
    ]
    assert fit(spoilt) != fit(facts)
    assert fit([item for item in spoilt if item.case.model != model]) == fit(others)
