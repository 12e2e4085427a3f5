"""The maps: every fact in plain text, no colour without asking, nothing cut at 100 columns."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from berth.plan.planner import make_plan
from berth.report.map import BAR, findings_text, plan_map, plan_svg, svg_map, terminal_map
from tests.unit.plan.helpers import model, slot
from tests.unit.verify.scene import A1, Lab


def line(text: str, start: str) -> str:
    return next(item for item in text.splitlines() if item.startswith(start))


def test_a_quiet_map():
    text = terminal_map(Lab().report())
    row = line(text, "a-0").split()
    assert row[:3] == ["a-0", "0", "L40S"]
    assert row[4:8] == ["21.1", "21.1", "20.9", "44.5"]
    assert line(text, "a-0").endswith("chat x2, embed")
    assert "█" * 9 in line(text, "a-0")
    assert line(text, "a-1").split()[3] == "·" * BAR
    assert "as wanted: plan, Ray and driver agree" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_not_held_and_what_is_not_promised_look_different():
    lab = Lab()
    lab.gpu("GPU-b-0-0", processes=(), used_mib=0)
    lab.gpu(A1, used_mib=30_000)
    text = terminal_map(lab.report())
    assert "▒▒▒▒" in line(text, "b-0")
    assert "█" not in line(text, "b-0")
    assert "▓" * 13 in line(text, "a-1")
    assert "drift: 2 differences, 0 unknown" in text


def test_silent_witnesses_are_question_marks():
    lab = Lab()
    lab.hosts["b"] = "no route"
    text = terminal_map(lab.report())
    assert line(text, "b-0").split()[4:8] == ["9.6", "9.6", "?", "43.9"]
    assert "could not tell: 0 differences, 1 unknown" in text


def test_colour_only_on_demand_and_whatever_the_terminal_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    plain = terminal_map(Lab().report())
    assert "\x1b" not in plain
    colored = terminal_map(Lab().report(), color=True)
    assert "\x1b[32m" in colored
    assert terminal_map(Lab().report(), color=True) == colored


def test_findings_say_found_wanted_and_mend():
    lab = Lab()
    lab.nodes.pop("a-1")
    text = findings_text(lab.report(), width=200)
    assert text.startswith("DRIFT   slot_missing  a-1\n        GPU    GPU-a-1-0\n        found  no alive Ray node\n")
    assert "mend   ansible-playbook site.yml (docs/GPU_PLACEMENT_PLAYBOOK.md#slot_missing)" in text
    assert findings_text(Lab().report()) == "no findings\n"


@pytest.mark.parametrize("view", ["report", "plan"])
def test_svg_is_well_formed_and_stable(view):
    def draw() -> str:
        return svg_map(Lab().report(), title="lab") if view == "report" else plan_svg(Lab().plan, title="lab")

    assert ET.fromstring(draw()).tag.endswith("svg")
    assert "lab" in draw()
    assert draw() == draw()


def test_a_plan_alone():
    slots = [slot("gpu01-0", foreign=5_120), slot("gpu01-1")]
    plan = make_plan(slots, [model("chat", 2, 9_828), model("moe", 1, 60_000)], "pack")
    text = plan_map(plan, width=200)
    row = line(text, "gpu01-0")
    assert row.split()[-5:] == ["19.2", "5.0", "43.0", "chat", "x2"]
    assert "█" * 9 + "▓▓" in row
    assert "chat@gpu01-0\n  pack: 2 of 2 replicas alone on L40S gpu01-0" in text
    assert "moe UNPLACED\n  1 of 1 replicas fit nowhere: moe is larger than any GPU here" in text
    assert "no deployment is asked for" in plan_map(make_plan([], [], "pack"))
