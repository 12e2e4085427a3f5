"""A small log-log line chart as SVG, in plain Python: what bench_scale draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 60, 60
INK, FAINT = "#24292f", "#d0d7de"


@dataclass(frozen=True)
class Series:
    """One line: its label, colour, dash pattern ("" for a solid line) and (x, y) points, all above zero."""

    label: str
    colour: str
    dash: str
    points: tuple[tuple[float, float], ...]


def log_log(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """The chart as an SVG document, decades as grid lines, a label at the end of each line."""
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points]
    axes = _Axes(
        _decade(min(xs), math.floor),
        _decade(max(xs), math.ceil),
        _decade(min(ys), math.floor),
        _decade(max(ys), math.ceil),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="600">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">'
        f"{escape(y_label)}</text>",
        *axes.grid(),
    ]
    for number, item in enumerate(series):
        parts += axes.line(item)
        x = LEFT + number * 220
        parts.append(
            f'<line x1="{x}" y1="44" x2="{x + 28}" y2="44" stroke="{item.colour}" stroke-width="2.5" '
            f'stroke-dasharray="{item.dash}"/><text x="{x + 34}" y="48">{escape(item.label)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _decade(value: float, rounding: Callable[[float], int]) -> int:
    return rounding(math.log10(value))


@dataclass(frozen=True)
class _Axes:
    """Powers of ten at the edges of the plot."""

    x_low: int
    x_high: int
    y_low: int
    y_high: int

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.x_low) / max(1, self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.y_low) / max(1, self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    def grid(self) -> list[str]:
        parts = []
        for power in range(self.x_low, self.x_high + 1):
            x = self.x(10**power)
            parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{HEIGHT - BOTTOM}" stroke="{FAINT}"/>')
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{10**power:,}</text>')
        for power in range(self.y_low, self.y_high + 1):
            y = self.y(10**power)
            parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="{FAINT}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
        return parts

    def line(self, series: Series) -> list[str]:
        spots = [(self.x(x), self.y(y)) for x, y in series.points]
        path = " ".join(f"{x},{y}" for x, y in spots)
        parts = [
            f'<polyline points="{path}" fill="none" stroke="{series.colour}" stroke-width="2.5" '
            f'stroke-dasharray="{series.dash}"/>'
        ]
        if not series.dash:
            for (x, y), (_, value) in zip(spots, series.points, strict=True):
                parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{series.colour}"/>')
                parts.append(f'<text x="{x}" y="{y - 9}" text-anchor="middle" font-size="11">{value:.2g}</text>')
        return parts
