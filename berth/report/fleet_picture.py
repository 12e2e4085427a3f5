"""A plan as one SVG: a card per host, a bar per GPU, a block per deployment on it; legible from 4 to 8,000 GPUs.

Colour never stands alone: every block has a name, or the number it has in the legend, or a pattern, and a tooltip.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from berth.codec import replace
from berth.plan.reasons import gib, short_product
from berth.plan.types import Solution
from berth.report.fleet_view import Bar, Block, FleetView, HostView, ModelView, filled, fleet_view, headline, missing_of

WIDTH = 1280
MARGIN = 24
GAP = 12
FONT = "system-ui, 'DejaVu Sans', 'Liberation Sans', sans-serif"
GLYPH = 0.6
"""Width of a character as a share of its size, on the wide side: a label is left out rather than cut."""
COLORS = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#b5b5b5")
"""Okabe and Ito's palette, which people who see no red or no green can tell apart, and a grey for its black."""
DARK = frozenset({"#0072b2", "#009e73", "#d55e00"})
PATTERNS = ("", "stripes", "dots", "grid")
INK, FAINT, PAPER, EMPTY, RED = "#1f2328", "#59636e", "#ffffff", "#eef0f2", "#b3261e"
MANY_MODELS = 48
SHOWN_UNPLACED = 8


@dataclass(frozen=True)
class Scale:
    """How large things are drawn: cards per row, a bar's height, and the sizes of text (0: none)."""

    columns: int
    bar: int
    text: int
    host: int

    @property
    def card(self) -> float:
        """Width of a card."""
        return (WIDTH - 2 * MARGIN - (self.columns - 1) * GAP) / self.columns


SCALES = (
    (8, Scale(1, 28, 13, 14)),
    (32, Scale(2, 24, 12, 13)),
    (128, Scale(4, 18, 10, 12)),
    (1024, Scale(8, 12, 8, 10)),
)
"""Up to so many bars, drawn like this."""
SMALLEST = Scale(20, 5, 0, 7)


def fleet_svg(solution: Solution, title: str = "Berth plan", alone: bool = True) -> str:
    """The plan as an SVG document; ``alone`` False leaves out what the page around it says already."""
    view = fleet_view(solution.plan)
    canvas = Canvas()
    if alone:
        canvas.text(MARGIN, 32, title, 20, weight="bold")
        canvas.y = 36
        canvas.paragraph(headline(solution), 13, FAINT)
        draw_unplaced(canvas, view)
    draw_fleet(canvas, view)
    return canvas.svg(title, headline(solution))


class Canvas:
    """SVG elements from top to bottom; ``y`` is where the next part begins."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = 0.0

    def rect(self, x: float, y: float, width: float, height: float, fill: str, more: str = "", title: str = "") -> None:
        """A rectangle; ``title`` is its tooltip."""
        inside = f"><title>{escape(title)}</title></rect>" if title else "/>"
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" fill="{fill}"'
            f"{more}{inside}"
        )

    def text(
        self, x: float, y: float, words: str, size: float, fill: str = INK, weight: str = "", anchor: str = ""
    ) -> None:
        """One line of text; ``y`` is its base line."""
        more = (f' font-weight="{weight}"' if weight else "") + (f' text-anchor="{anchor}"' if anchor else "")
        where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"'
        self.parts.append(f'<text {where} fill="{fill}"{more}>{escape(words)}</text>')

    def paragraph(self, words: str, size: float, fill: str = INK, indent: float = 0.0) -> None:
        """Text broken into lines, below what is there."""
        room = int((WIDTH - 2 * MARGIN - indent) / (size * GLYPH * 0.9))
        for line in textwrap.wrap(words, room) or [""]:
            self.y += size * 1.4
            self.text(MARGIN + indent, self.y, line, size, fill)

    def svg(self, title: str, told: str) -> str:
        """The document."""
        height = self.y + MARGIN
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img" font-family="{FONT}">\n<title>{escape(title)}</title>\n'
            f"<desc>{escape(told)}</desc>\n{_DEFS}\n"
            f'<rect width="100%" height="100%" fill="{PAPER}"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


_DEFS = (
    '<defs><pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="2" height="6" fill="#000" fill-opacity=".28"/></pattern>'
    '<pattern id="dots" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<circle cx="2" cy="2" r="1.1" fill="#000" fill-opacity=".38"/></pattern>'
    '<pattern id="grid" width="6" height="6" patternUnits="userSpaceOnUse">'
    '<path d="M0 0H6M0 0V6" stroke="#000" stroke-opacity=".38" stroke-width="1.4"/></pattern>'
    '<pattern id="strangers" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">'
    '<rect width="5" height="5" fill="#d0d4d9"/><rect width="2" height="5" fill="#7d8590"/></pattern></defs>'
)


def draw_fleet(canvas: Canvas, view: FleetView) -> None:
    """The legend and the map, below what is there."""
    many = len(view.models) > MANY_MODELS
    if not many:
        _draw_legend(canvas, view)
    _draw_hosts(canvas, view)
    if many:
        _draw_legend(canvas, view)


def draw_unplaced(canvas: Canvas, view: FleetView) -> None:
    """What is not placed and the way out, in a red box."""
    if not view.unplaced:
        return
    canvas.y += 8
    begun = len(canvas.parts)
    top = canvas.y
    told = missing_of(sum(item.replicas for item in view.unplaced), sum(item.room for item in view.unplaced))
    canvas.y += 22
    canvas.text(MARGIN + 12, canvas.y, f"NOT PLACED: {told}", 14, RED, "bold")
    for item in view.unplaced[:SHOWN_UNPLACED]:
        canvas.paragraph(f"{item.deployment}: {item.reason}", 12, INK, 12)
    if len(view.unplaced) > SHOWN_UNPLACED:
        canvas.paragraph(f"and {len(view.unplaced) - SHOWN_UNPLACED} more deployments", 12, FAINT, 12)
    canvas.y += 12
    box = Canvas()
    box.rect(MARGIN, top, WIDTH - 2 * MARGIN, canvas.y - top, "#fdeceb", f' stroke="{RED}" rx="6"')
    canvas.parts[begun:begun] = box.parts


# --- Legend -----------------------------------------------------------------------------------------------------------


def _draw_legend(canvas: Canvas, view: FleetView) -> None:
    columns = 4
    width = (WIDTH - 2 * MARGIN) / columns
    canvas.y += 14
    entries = list(view.models.values())
    rows = -(-len(entries) // columns)
    for place, model in enumerate(entries):
        x, y = MARGIN + width * (place // rows), canvas.y + 18 * (place % rows)
        _swatch(canvas, x, y, 26, 14, model, str(model.number))
        short = "" if model.placed == model.asked else " NOT ALL PLACED"
        count = f"{model.placed} of {model.asked}{short}, {gib(model.mib)} GiB"
        room = int((width - 40) / (12 * GLYPH)) - len(count) - 2
        canvas.text(x + 32, y + 11, f"{_shortened(model.name, room)}  {count}", 12, RED if short else INK)
    canvas.y += 18 * rows + 2
    x = float(MARGIN)
    for fill, more, words in (
        ("url(#strangers)", "", "held by strangers"),
        ("none", f' stroke="{FAINT}" stroke-dasharray="3 2"', "kept for growth"),
        (EMPTY, f' stroke="{FAINT}"', "free"),
    ):
        canvas.rect(x, canvas.y, 26, 14, fill, more)
        canvas.text(x + 32, canvas.y + 11, words, 12, FAINT)
        x += 180
    canvas.text(x, canvas.y + 11, "⊘ cordoned; numbers are those of this legend; bars are to scale, in GiB", 12, FAINT)
    canvas.y += 20


def _look(model: ModelView) -> tuple[str, str]:
    """The colour and the pattern over it."""
    number = model.number - 1
    return COLORS[number % len(COLORS)], PATTERNS[number // len(COLORS) % len(PATTERNS)]


def _swatch(
    canvas: Canvas, x: float, y: float, width: float, height: float, model: ModelView, label: str, title: str = ""
) -> None:
    color, pattern = _look(model)
    edge = f' stroke="{PAPER}" stroke-width="0.8"'
    canvas.rect(x, y, width, height, color, edge, "" if pattern else title)
    if pattern:
        canvas.rect(x, y, width, height, f"url(#{pattern})", edge, title)
    if not label:
        return
    size = min(12.0, height * 0.72)
    if pattern:
        # On a pattern, text needs a ground of its own.
        ground = len(label) * size * GLYPH + 4
        canvas.rect(x + (width - ground) / 2, y + 1, ground, height - 2, color, ' rx="2"')
    ink = PAPER if color in DARK else INK
    canvas.text(x + width / 2, y + height / 2 + size * 0.36, label, round(size, 1), ink, anchor="middle")


# --- The map ----------------------------------------------------------------------------------------------------------


def scale_for(view: FleetView) -> Scale:
    """The largest scale at which the fleet is no poster."""
    for bars, scale in SCALES:
        # One host of 8 GPUs may have the whole width; two cards of half of it are better read side by side.
        if view.bars <= bars and (scale.columns > 1 or len(view.hosts) == 1):
            return scale
    return SMALLEST


def _draw_hosts(canvas: Canvas, view: FleetView) -> None:
    scale = scale_for(view)
    largest = max((bar.slot.vram_mib for host in view.hosts for bar in host.bars), default=1)
    place: str | None = None
    row: list[HostView] = []
    for host in view.hosts:
        if host.place != place or len(row) == scale.columns:
            _draw_row(canvas, row, scale, view, largest)
            row = []
        if host.place != place and host.place:
            canvas.y += scale.host + 10
            canvas.text(MARGIN, canvas.y, host.place, scale.host + 1, FAINT, "bold")
        place = host.place
        row.append(host)
    _draw_row(canvas, row, scale, view, largest)


def _draw_row(canvas: Canvas, row: Sequence[HostView], scale: Scale, view: FleetView, largest: int) -> None:
    if not row:
        return
    top, pitch = canvas.y + GAP / 2, scale.bar + max(1, scale.bar // 6)
    for column, host in enumerate(row):
        x = MARGIN + column * (scale.card + GAP)
        products = ", ".join(short_product(product) for product in host.products)
        room = int(scale.card / (scale.host * GLYPH))
        canvas.text(
            x,
            top + scale.host,
            _shortened(f"{host.name}  {products}" if scale.text else host.name, room),
            scale.host,
            INK,
            "bold",
        )
        y = top + scale.host + 5
        for bar in host.bars:
            # A slot of several GPUs is as high as they are.
            tall = replace(scale, bar=pitch * len(bar.slot.gpu_uuids) - (pitch - scale.bar))
            _draw_bar(canvas, x, y, tall, bar, view, largest)
            y += pitch * len(bar.slot.gpu_uuids)
    canvas.y = top + scale.host + 5 + pitch * max(_gpus(host) for host in row)


def _gpus(host: HostView) -> int:
    return sum(len(bar.slot.gpu_uuids) for bar in host.bars)


def _shortened(words: str, room: int) -> str:
    return words if len(words) <= room else words[: max(1, room - 1)].rstrip() + "…"


def _draw_bar(canvas: Canvas, x: float, y: float, scale: Scale, bar: Bar, view: FleetView, largest: int) -> None:
    label = ("⊘" if bar.slot.cordoned else "") + bar.label
    left = scale.text * 3.4 if scale.text else 0.0
    numbers = filled(bar) if scale.columns <= 4 else ""
    right = scale.text * GLYPH * 14 if numbers else 0.0
    if scale.text:
        canvas.text(x + left - 5, y + scale.bar / 2 + scale.text * 0.36, label, scale.text, FAINT, anchor="end")
    unit = (scale.card - left - right) / max(1, largest)
    x += left
    edge = f' stroke="{FAINT}" stroke-width="0.7"' + (' stroke-dasharray="4 2"' if bar.slot.cordoned else "")
    told = f"{bar.slot.name} ({short_product(bar.slot.product)}): {filled(bar)} GiB taken"
    canvas.rect(x, y, bar.slot.vram_mib * unit, scale.bar, EMPTY, edge, told)
    end = x + bar.slot.vram_mib * unit
    at = x
    for block in bar.blocks:
        width = min(block.mib * unit, max(0.0, end - at))
        _draw_block(canvas, at, y, width, scale, block, bar, view)
        at += width
    if numbers:
        canvas.text(end + 6, y + scale.bar / 2 + scale.text * 0.36, numbers, scale.text, FAINT)


def _draw_block(
    canvas: Canvas, x: float, y: float, width: float, scale: Scale, block: Block, bar: Bar, view: FleetView
) -> None:
    times = f" x{block.count}" if block.count > 1 else ""
    told = f"{block.deployment or 'strangers'}{times}: {gib(block.mib)} GiB on {bar.slot.name}"
    if block.kind == "foreign":
        canvas.rect(x, y, width, scale.bar, "url(#strangers)", "", told)
        return
    model = view.models[block.deployment]
    names = [f"{block.deployment}{times}", f"{model.number}{times}", str(model.number)]
    size = min(12.0, max(scale.text, scale.bar * 0.5), scale.bar * 0.72)
    if block.kind == "reserved":
        names.insert(0, f"room: {names[0]}")
    label = next((name for name in names if len(name) * size * GLYPH + 4 <= width), "") if scale.text else ""
    if block.kind == "reserved":
        edge = f' stroke="{FAINT}" stroke-dasharray="3 2" fill-opacity=".28"'
        canvas.rect(x, y, width, scale.bar, _look(model)[0], edge, f"room kept for {told}")
        if label:
            canvas.text(x + width / 2, y + scale.bar / 2 + size * 0.36, label, round(size, 1), INK, anchor="middle")
        return
    _swatch(canvas, x, y, width, scale.bar, model, label, told)
