"""A simulation for people: table, picture, page; and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from berth.codec import dump
from berth.plan.contract_answer import answer
from berth.plan.simulate import Loss, Point, Simulation
from berth.report.fleet_page import page, reasons_section, unplaced_section
from berth.report.fleet_picture import FAINT, INK, MARGIN, RED, WIDTH, Canvas, draw_fleet, draw_unplaced
from berth.report.fleet_text import WIDTH as COLUMNS
from berth.report.fleet_text import fleet_table, print_text, simple_table
from berth.report.fleet_view import fleet_view, headline

CHART_HEIGHT = 220
FITS, FULL = "#0072b2", RED
LOSSES_DRAWN = 12


def simulation_object(found: Simulation) -> dict[str, Any]:
    """Everything that was found, as the object of ``--format json``."""
    plan = answer(found.solution)
    return {
        "version": plan["version"],
        "strategy": plan["strategy"],
        "ok": plan["ok"],
        "full_at": found.full_at,
        "limit": found.limit,
        "growth": [dump(point) for point in found.points],
        "losses": [dump(loss) for loss in found.losses],
        "losses_skipped": found.skipped,
        "plan": plan,
    }


def verdict(found: Simulation) -> str:
    """When the fleet is full, in one sentence."""
    if found.solution.plan.unplaced:
        at = f"; all would fit up to x{found.full_at:g} of it" if found.full_at else ""
        return f"the fleet is too small for the load of today{at}"
    if found.limit is None or found.full_at is None:
        return f"all fits, up to x{found.full_at or 1:g} of the load (no further was asked)"
    first = next((point for point in found.points if point.factor == found.limit), None)
    told = f": the first to be refused is {first.refused}" if first and first.refused else ""
    return f"all fits up to x{found.full_at:g} of the load; at x{found.limit:g} the fleet is full{told}"


def loss_verdict(loss: Loss) -> str:
    """What the loss does, in one sentence."""
    others = f" (and {loss.alike} like it)" if loss.alike else ""
    room = (
        f"; {loss.moved} that stood elsewhere move{'s' if loss.moved == 1 else ''} to make room" if loss.moved else ""
    )
    if not loss.lost:
        all_of = "its one replica finds" if loss.replicas == 1 else f"all {loss.replicas} replicas find"
        return f"{loss.domain} {loss.name}{others}: {all_of} a new place{room}"
    lost = ", ".join(f"{item.replicas} of {item.deployment}" for item in loss.lost)
    found = f"{loss.again} of {loss.replicas} replicas find a new place, not {lost}"
    return f"{loss.domain} {loss.name}{others}: {found}{room}"


def simulation_table(found: Simulation, width: int = COLUMNS, color: bool = False) -> str:
    """The simulation as text."""
    style = "bold red" if found.solution.plan.unplaced else "bold"
    parts: list[RenderableType] = [Text(verdict(found), style), Text()]
    numbers = ("load", "replicas", "GPUs", "hosts", "refused")
    table = simple_table(*numbers, "first refused", right=numbers, wrap="first refused")
    for point in found.points:
        style = "red" if point.unplaced else ""
        cells = [f"x{point.factor:g}", *map(str, (point.replicas, point.gpus_used, point.hosts_used, point.unplaced))]
        table.add_row(*(Text(cell, style) for cell in (*cells, point.refused)))
    parts += [table, Text(), *_last_words(found.points), Text("what a loss does", "bold")]
    for loss in found.losses:
        parts.append(Text(f"  {loss_verdict(loss)}", "red" if loss.lost else "green"))
        parts += [Padding(Text(f"{item.deployment}: {item.why}", "bright_black"), (0, 0, 0, 4)) for item in loss.lost]
    if found.skipped:
        parts.append(Text(f"  {found.skipped} more, with fewer replicas, were not planned"))
    return print_text(Group(*parts), width, color) + "\n" + fleet_table(found.solution, width, color)


def _last_words(points: Sequence[Point]) -> list[RenderableType]:
    first = next((point for point in points if point.unplaced), None)
    if first is None:
        return []
    return [Text(f"refused at x{first.factor:g}", "bold"), Padding(Text(f"{first.refused}: {first.why}"), (0, 0, 1, 2))]


def simulation_svg(found: Simulation, title: str = "Berth simulation", alone: bool = True) -> str:
    """The simulation as one picture: growth, losses, and the fleet as it is today."""
    canvas = Canvas()
    view = fleet_view(found.solution.plan)
    if alone:
        canvas.text(MARGIN, 32, title, 20, weight="bold")
        canvas.y = 36
        canvas.paragraph(verdict(found), 14, INK)
        draw_unplaced(canvas, view)
    _draw_growth(canvas, found)
    _draw_losses(canvas, found)
    canvas.y += 30
    canvas.text(MARGIN, canvas.y, "The fleet with the load of today", 16, INK, "bold")
    canvas.paragraph(headline(found.solution), 13, FAINT)
    draw_fleet(canvas, view)
    return canvas.svg(title, verdict(found))


def _draw_growth(canvas: Canvas, found: Simulation) -> None:
    """GPUs in use over the load, a point per plan; full ones are crosses, and say so."""
    every = sum(len(slot.gpu_uuids) for slot in found.solution.plan.slots)
    canvas.y += 30
    canvas.text(MARGIN, canvas.y, "Growth: GPUs in use over the load", 16, INK, "bold")
    left, top, right = MARGIN + 60.0, canvas.y + 16, WIDTH - MARGIN - 120.0
    bottom = top + CHART_HEIGHT
    # Far beyond full there is nothing more to see.
    edge = 1.6 * (found.limit or found.full_at or 1.0)
    points = [point for point in found.points if point.factor <= max(edge, 1.0)]
    widest = max(max((point.factor for point in points), default=1.0), 1.0)

    def at(factor: float, gpus: float) -> tuple[float, float]:
        return left + (right - left) * factor / widest, bottom - (bottom - top) * gpus / max(1, every)

    for quarter in range(5):
        y = bottom - (bottom - top) * quarter / 4
        canvas.parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#d8dee4"/>')
        canvas.text(left - 8, y + 4, f"{every * quarter / 4:g}", 11, FAINT, anchor="end")
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(point.factor, point.gpus_used) for point in points))
    canvas.parts.append(f'<polyline points="{line}" fill="none" stroke="{FITS}" stroke-width="2"/>')
    if found.limit is not None:
        x = at(found.limit, 0)[0]
        canvas.parts.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{FULL}" stroke-dasharray="5 3"/>')
        canvas.text(x + 6, top + 12, f"full at x{found.limit:g}", 12, FULL, "bold")
    for point in points:
        _draw_point(canvas, *at(point.factor, point.gpus_used), point)
    for factor in _ticks(widest):
        canvas.text(at(factor, 0)[0], bottom + 16, f"x{factor:g}", 11, FAINT, anchor="middle")
    canvas.y = bottom + 24


def _ticks(widest: float) -> list[float]:
    step = next(step for step in (0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500) if widest / step <= 8)
    return [round(step * number, 3) for number in range(1, int(widest / step) + 1)]


def _draw_point(canvas: Canvas, x: float, y: float, point: Point) -> None:
    told = f"x{point.factor:g}: {point.replicas} replicas on {point.gpus_used} GPUs, {point.unplaced} refused"
    title = f"<title>{escape(told)}</title>"
    if point.unplaced:
        cross = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
        canvas.parts.append(f'<path d="{cross}" stroke="{FULL}" stroke-width="2" fill="none">{title}</path>')
    else:
        canvas.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{FITS}">{title}</circle>')


def _draw_losses(canvas: Canvas, found: Simulation) -> None:
    if not found.losses:
        return
    canvas.y += 30
    canvas.text(MARGIN, canvas.y, "What a loss does", 16, INK, "bold")
    worst = sorted(found.losses, key=lambda loss: -sum(item.replicas for item in loss.lost))
    for loss in worst[:LOSSES_DRAWN]:
        mark = "✗" if loss.lost else "✓"
        canvas.paragraph(f"{mark} {loss_verdict(loss)}", 13, RED if loss.lost else INK)
    left = len(worst) - LOSSES_DRAWN
    if left > 0:
        canvas.paragraph(f"and {left} more, none of which loses more: --format json", 12, FAINT)


def simulation_html(found: Simulation, title: str = "Berth simulation") -> str:
    """The simulation as a page."""
    rows = "".join(
        f"<tr><td>{escape(loss.domain)} {escape(loss.name)}</td><td>{escape(item.deployment)}</td>"
        f'<td class="n">{item.replicas}</td><td>{escape(item.why)}</td></tr>'
        for loss in found.losses
        for item in loss.lost
    )
    heads = '<th>lost</th><th>not placed again</th><th class="n">replicas</th><th>reason</th>'
    losses = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    first = next((point for point in found.points if point.unplaced), None)
    refused = f"<p>At x{first.factor:g} {escape(first.refused)}: {escape(first.why)}</p>" if first else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="told">{escape(verdict(found))}</p>',
        unplaced_section(found.solution.plan),
        refused,
        f"<section>{simulation_svg(found, title, alone=False)}</section>",
        *(["<h2>Losses that cannot be made good</h2>", losses] if losses else []),
        reasons_section(found.solution.plan),
    ]
    return page(title, body)
