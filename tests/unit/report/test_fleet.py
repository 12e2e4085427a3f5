"""Pictures of plans: everything that is promised is drawn, to scale, named, and nothing comes from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import pytest

from berth.codec import replace
from berth.plan.planner import Options, solve
from berth.plan.simulate import load_fleet, simulate
from berth.plan.types import Solution
from berth.report.fleet import fleet_html, fleet_svg, fleet_table
from berth.report.fleet_picture import COLORS, DARK, INK, PAPER, WIDTH
from berth.report.fleet_simulation import simulation_html, simulation_svg, simulation_table
from berth.report.fleet_text import DETAILED_GPUS
from berth.report.fleet_view import fleet_view
from tests.unit.plan.helpers import grid, model, slot

SVG = "{http://www.w3.org/2000/svg}"


def solved(hosts: int = 2, replicas: int = 3) -> Solution:
    slots = [
        replace(item, rack=f"r{number // 4}", foreign_mib=4_000 if number == 1 else 0, cordoned=number == 2)
        for number, item in enumerate(grid(hosts, 4))
    ]
    apps = [
        replace(model("chat", replicas, 20_000, strategy="spread"), max_replicas=replicas + 1),
        model("embed <small> & fast", 4, 3_000),
        model("wide", 1, 30_000, gpus=2),
    ]
    return solve(slots, apps, "pack", options=Options(regroup=True, exact_gpus=0))


def blocks(svg: str) -> Counter[str]:
    """Tooltips of the picture and how often each is there."""
    return Counter(item.text or "" for item in ET.fromstring(svg).iter(f"{SVG}title"))


@pytest.mark.parametrize("hosts", [1, 4, 30, 200, 300])
def test_every_promise_is_drawn_at_every_scale_and_within_the_page(hosts: int):
    solution = solved(hosts, replicas=hosts)
    svg = fleet_svg(solution)
    told = blocks(svg)
    for berth in solution.plan.berths:
        times = f" x{berth.replicas}" if berth.replicas > 1 else ""
        gib = f"{berth.replicas * berth.vram_mib / 1024:.1f}"
        if berth.replicas:
            assert told[f"{berth.deployment}{times}: {gib} GiB on {berth.slot}"] == 1
    rights = []
    for item in ET.fromstring(svg).iter(f"{SVG}rect"):
        if item.get("x"):
            rights.append(float(item.attrib["x"]) + float(item.attrib["width"]))
    assert max(rights) <= WIDTH
    assert svg == fleet_svg(solution)


def test_bars_are_to_scale():
    solution = solve([slot("a-0", 40_000), slot("b-0", 20_000)], [model("chat", 2, 10_000)], "spread")
    widths = {
        "".join(item.itertext()): float(item.attrib["width"])
        for item in ET.fromstring(fleet_svg(solution)).iter(f"{SVG}rect")
        if item.find(f"{SVG}title") is not None
    }
    large, small = (next(w for title, w in widths.items() if title.startswith(name)) for name in ("a-0", "b-0"))
    on_large, on_small = (widths[f"chat: 9.8 GiB on {name}"] for name in ("a-0", "b-0"))
    assert large == pytest.approx(2 * small, rel=0.01)
    assert on_large == pytest.approx(on_small, rel=0.01)
    assert on_large == pytest.approx(large / 4, rel=0.01)


def test_a_slot_of_two_gpus_is_twice_as_high():
    solution = solved()
    rects = [
        item for item in ET.fromstring(fleet_svg(solution)).iter(f"{SVG}rect") if item.find(f"{SVG}title") is not None
    ]
    heights = {"".join(item.itertext()).split(" ")[0]: float(item.attrib["height"]) for item in rects}
    wide = next(name for name in heights if "+" in name)
    single = next(name for name in heights if name.startswith("gpu") and "+" not in name)
    assert heights[wide] > 2 * heights[single]


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", COLORS)
def test_labels_can_be_read_on_their_colour(color: str):
    ink = PAPER if color in DARK else INK
    light, dark = sorted((luminance(color), luminance(ink)), reverse=True)
    # WCAG's least for large text and graphics; every label is in the legend as plain text too.
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_what_is_missing_comes_first_and_names_the_way_out():
    solution = solved(hosts=1, replicas=9)
    missing = solution.plan.unplaced[0]
    page = fleet_html(solution)
    assert page.index("Not placed") < page.index("<svg") < page.index('id="reasons"')
    assert "way out" in missing.reason
    for text in (page, fleet_table(solution, width=4000), fleet_svg(solution)):
        assert "way out" in re.sub(r"</text>\s*<text[^>]*>", " ", text)
    assert fleet_table(solution).splitlines()[3].startswith("NOT PLACED chat")
    svg = fleet_svg(solution)
    assert svg.index("NOT PLACED:") < svg.index("gpu00-0")


class Page(HTMLParser):
    """What a page asks of elsewhere, and its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.rows = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.rows += tag == "tr"
        if tag not in ("meta", "input", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_room_that_is_missing_is_told_where_every_replica_has_its_place():
    growing = replace(model("chat", 1, 30_000), max_replicas=3)
    solution = solve([slot("a-0"), slot("b-0")], [growing], "pack")
    assert "NOT PLACED: room for 1 more<" in fleet_svg(solution)
    assert "chat: room for 1 more" in fleet_html(solution)


def test_a_page_is_whole_by_itself_and_lists_every_berth():
    solution = solved()
    text = fleet_html(solution, notes=["a <note>"], changes=["start chat@a-0"])
    page = Page()
    page.feed(text)
    assert page.links == []
    assert "url(http" not in text
    assert "@import" not in text
    assert page.rows == 1 + len(solution.plan.berths)
    assert 'id="filter"' in text
    assert "embed &lt;small&gt; &amp; fast" in text
    assert "a &lt;note&gt;" in text
    assert "<small>" not in text
    assert "start chat@a-0" in text


def test_the_table_has_every_gpu_of_a_small_fleet_and_every_host_of_a_large_one():
    small = fleet_table(solved())
    assert "(room chat)" in small
    assert "strangers" in small
    assert "cordoned" in small
    assert "wide" in small
    assert max(map(len, small.splitlines())) <= 100
    hosts = DETAILED_GPUS // 4 + 1
    large = fleet_table(solved(hosts))
    assert sum(line.startswith("gpu") for line in large.splitlines()) == hosts
    assert "\x1b" not in large
    assert "\x1b[" in fleet_table(solved(), color=True)


def test_the_headline_is_what_the_plan_says():
    solution = solved()
    used = {
        uuid
        for berth in solution.plan.berths
        for item in solution.plan.slots
        if item.name == berth.slot
        for uuid in item.gpu_uuids
    }
    first = fleet_table(solution, width=400).splitlines()[0]
    assert first.startswith(f"pack: 8 of 8 replicas placed on {len(used)} of 8 GPUs")
    assert f"no plan can use fewer than {solution.summary.lower_bound_gpus} GPUs" in first


def test_the_view_adds_up():
    solution = solved(3, 5)
    view = fleet_view(solution.plan)
    drawn = sum(
        block.mib for host in view.hosts for bar in host.bars for block in bar.blocks if block.kind == "replicas"
    )
    assert drawn == sum(berth.replicas * berth.vram_mib for berth in solution.plan.berths)
    assert sum(len(bar.slot.gpu_uuids) for host in view.hosts for bar in host.bars) == 12
    assert view.models["chat"].placed == view.models["chat"].asked == 5
    assert [len(bar.slot.gpu_uuids) for host in view.hosts for bar in host.bars if "+" in bar.label] == [2]


def test_a_simulation_in_every_form():
    fleet = {
        "hosts": [{"name": "h", "count": 2, "gpus": 2, "product": "L40S", "memory_mib": 44_000}],
        "deployments": [{"name": "chat", "replicas": 4, "footprint_mib": 22_000}],
    }
    found = simulate(load_fleet(fleet))
    table = simulation_table(found)
    assert table.startswith("all fits up to x2 of the load; at x2.")
    assert "host h01" in table
    svg = simulation_svg(found)
    assert "full at x2." in svg
    assert ET.fromstring(svg).tag == f"{SVG}svg"
    page = Page()
    page.feed(simulation_html(found))
    assert page.links == []
    full = simulate(load_fleet({**fleet, "deployments": [{"name": "chat", "replicas": 9, "footprint_mib": 22_000}]}))
    assert simulation_table(full).startswith("the fleet is too small for the load of today; all would fit up to x0.88")
