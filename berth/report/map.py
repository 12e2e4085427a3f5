"""Maps for people: which GPU is promised to whom, and what is really there. Terminal text and SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from berth.plan.reasons import gib, short_product
from berth.plan.types import Berth, Plan
from berth.verify.compare import Finding, Report, Row

WIDTH = 100
BAR = 20

# Each part has its own sign as well as its colour: the map is read in logs and by people who see no red.
_HELD, _PROMISED, _BEYOND, _FREE = "█", "▒", "▓", "·"
_STYLES = {_HELD: "green", _PROMISED: "yellow", _BEYOND: "red", _FREE: "bright_black"}
_SEVERITIES = {"drift": ("DRIFT", "bold red"), "unknown": ("UNKNOWN", "bold yellow"), "note": ("NOTE", "cyan")}


def terminal_map(report: Report, width: int = WIDTH, color: bool = False) -> str:
    """The GPUs of ``report`` as a table ``width`` columns wide; with ANSI colours when ``color``."""
    return _print(_report_view(report), width, color)


def svg_map(report: Report, width: int = WIDTH, title: str = "Berth") -> str:
    """The same table and its findings as one SVG image."""
    return _svg(Group(_report_view(report), Text(), _findings_view(report)), width, title)


def plan_map(plan: Plan, width: int = WIDTH, color: bool = False) -> str:
    """A plan alone: what each slot is promised to, and the reason of every berth."""
    return _print(_plan_view(plan), width, color)


def plan_svg(plan: Plan, width: int = WIDTH, title: str = "Berth plan") -> str:
    """``plan_map`` as one SVG image."""
    return _svg(_plan_view(plan), width, title)


def findings_text(report: Report, width: int = WIDTH, color: bool = False) -> str:
    """Every finding with what was found, what was wanted and what mends it; worst first."""
    return _print(_findings_view(report), width, color)


def _print(view: RenderableType, width: int, color: bool) -> str:
    out = io.StringIO()
    # Colours, width and the rest must not depend on the terminal or the environment of the caller.
    console = Console(
        file=out, width=width, force_terminal=color, color_system="standard" if color else None, _environ={}
    )
    console.print(view)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _svg(view: RenderableType, width: int, title: str) -> str:
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=True, _environ={})
    console.print(view)
    return console.export_svg(title=title)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in columns:
        number = name in ("GPU", "plan", "Ray", "NVML", "of", "foreign")
        table.add_column(name, justify="right" if number else "left", no_wrap=name not in ("replicas", "berths"))
    return table


def _report_view(report: Report) -> Group:
    table = _table("slot", "GPU", "product", "VRAM", "plan", "Ray", "NVML", "of", "replicas")
    marked = {finding.gpu_uuid for finding in report.findings if finding.severity == "drift"}
    for row in report.rows:
        table.add_row(*_cells(row, row.uuid in marked))
    signs = [(_HELD, "promised and held"), (_PROMISED, "promised, not held"), (_BEYOND, "held, not promised")]
    return Group(table, Text(), _legend([*signs, (_FREE, "free")]), _verdict(report))


def _cells(row: Row, drifts: bool) -> list[Text]:
    name = Text(row.slot or f"({row.host})", "bold red" if drifts else "" if row.slot else "bright_black")
    numbers = [_gib(row.planned_mib), _gib(row.ray_mib), _gib(row.nvml_mib), _gib(row.total_mib)]
    bar = _bar(row.planned_mib, row.nvml_mib, row.total_mib)
    return [name, Text(str(row.index)), Text(short_product(row.product)), bar, *numbers, _who(row)]


def _gib(mib: int | None) -> Text:
    return Text("?", "yellow") if mib is None else Text(gib(mib))


def _who(row: Row) -> Text:
    told: dict[str, int] = {}
    for item in row.replicas:
        # The slot stands in the first column: the model's name alone is what is new here, unless it is a stranger's.
        model, _, slot = item.berth.partition("@")
        name = model if slot == row.slot else item.berth
        label = name if item.state == "RUNNING" else f"{name} {item.state}"
        told[label] = told.get(label, 0) + 1
    return Text(", ".join(label if number == 1 else f"{label} x{number}" for label, number in sorted(told.items())))


def _bar(planned: int, held: int | None, total: int) -> Text:
    """``BAR`` signs for ``total``; anything that is there at all is seen."""
    both = min(planned, held or 0)
    beyond = max(0, (held or 0) - planned)
    parts = [(_HELD, both), (_PROMISED, planned - both), (_BEYOND, beyond)]
    text = Text()
    for sign, mib in parts:
        room = BAR - len(text)
        text.append(sign * min(room, _signs(mib, total)), _STYLES[sign])
    return text.append(_FREE * (BAR - len(text)), _STYLES[_FREE])


def _signs(mib: int, total: int) -> int:
    # Less than half a percent is the driver's own; a sign for it would be read as a process.
    return 0 if total <= 0 or mib * 200 < total else max(1, round(BAR * mib / total))


def _legend(signs: Sequence[tuple[str, str]]) -> Text:
    text = Text()
    for sign, meaning in signs:
        text.append(sign * 2, _STYLES[sign]).append(f" {meaning}   ")
    return text.append("(GiB)", "bright_black")


def _verdict(report: Report) -> Text:
    if report.ok:
        return Text("as wanted: plan, Ray and driver agree", "bold green")
    counts = {name: sum(1 for item in report.findings if item.severity == name) for name in ("drift", "unknown")}
    word, style = ("drift", "bold red") if counts["drift"] else ("could not tell", "bold yellow")
    return Text(f"{word}: {counts['drift']} differences, {counts['unknown']} unknown", style)


def _findings_view(report: Report) -> Group:
    if not report.findings:
        return Group(Text("no findings"))
    return Group(*(_finding(item) for item in report.findings))


def _finding(item: Finding) -> Group:
    word, style = _SEVERITIES[item.severity]
    head = Text().append(f"{word:<7} ", style).append(item.kind, "bold").append(f"  {item.object}")
    facts = Table.grid(padding=(0, 1, 0, 0))
    for label, value in (("GPU", item.gpu_uuid), ("found", item.found), ("wanted", item.wanted), ("mend", item.mend)):
        if value and not (label == "mend" and item.severity == "note"):
            facts.add_row(Text(f"{label:<6}", "bright_black"), Text(value))
    return Group(head, Padding(facts, (0, 0, 0, 8)))


def _plan_view(plan: Plan) -> Group:
    table = _table("slot", "GPU", "product", "VRAM", "plan", "foreign", "of", "berths")
    for slot in plan.slots:
        here = [berth for berth in plan.berths if berth.slot == slot.name]
        planned = sum((berth.replicas + berth.reserved) * berth.vram_mib for berth in here)
        names = [_words(berth) for berth in here]
        table.add_row(
            slot.name,
            ",".join(map(str, slot.gpu_indices)),
            short_product(slot.product),
            _plan_bar(planned, slot.foreign_mib, slot.vram_mib),
            gib(planned),
            gib(slot.foreign_mib),
            gib(slot.vram_mib),
            ", ".join(names),
        )
    legend = _legend([(_HELD, "promised"), (_BEYOND, "held by strangers"), (_FREE, "free")])
    return Group(table, Text(), legend, Text(), *_reasons(plan))


def _words(berth: Berth) -> str:
    if berth.pool:
        return f"{berth.deployment} (pool, up to {berth.replicas + berth.reserved})"
    if berth.team:
        return f"{berth.deployment} part {berth.team.index(berth.slot) + 1} of {len(berth.team)}"
    return f"{berth.deployment} x{berth.replicas}" if berth.replicas > 1 else berth.deployment


def _plan_bar(planned: int, foreign: int, usable: int) -> Text:
    text = Text(_HELD * min(BAR, _signs(planned, usable)), _STYLES[_HELD])
    text.append(_BEYOND * min(BAR - len(text), _signs(foreign, usable)), _STYLES[_BEYOND])
    return text.append(_FREE * (BAR - len(text)), _STYLES[_FREE])


def _reasons(plan: Plan) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for berth in plan.berths:
        lines += [Text(berth.name, "bold"), Padding(Text(berth.reason), (0, 0, 0, 2))]
    for item in plan.unplaced:
        lines += [Text(f"{item.deployment} UNPLACED", "bold red"), Padding(Text(item.reason), (0, 0, 0, 2))]
    return lines or [Text("no deployment is asked for")]
