"""A plan as text for a terminal: the answer first, then what is missing, then the map and the reasons."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from berth.plan.reasons import gib, short_product
from berth.plan.types import Solution
from berth.report.fleet_view import Bar, FleetView, HostView, fleet_view, headline

WIDTH = 100
BAR = 24
DETAILED_GPUS = 64
"""Up to here every GPU has a line and every berth its reason; larger fleets are shown host by host."""
SHOWN_HOSTS = 200
LEVELS = "·▁▂▃▄▅▆▇█"
_WHO = {"replicas": "{}", "reserved": "(room {})", "foreign": "strangers"}
_SIGNS = {"replicas": ("█", "green"), "reserved": ("▒", "yellow"), "foreign": ("▓", "magenta")}


def fleet_table(solution: Solution, width: int = WIDTH, color: bool = False, notes: Sequence[str] = ()) -> str:
    """The plan ``width`` columns wide; with ANSI colours when ``color``."""
    view = fleet_view(solution.plan)
    small = view.bars <= DETAILED_GPUS
    parts: list[RenderableType] = [Text(headline(solution), "bold"), Text()]
    for item in view.unplaced:
        head = f"NOT PLACED {item.deployment}: {item.replicas + item.room}"
        parts += [Text(head, "bold red"), Padding(Text(item.reason), (0, 0, 1, 2))]
    parts += [_gpus(view) if small else _hosts(view), Text(), _legend(small), Text()]
    if small:
        for berth in solution.plan.berths:
            parts += [Text(berth.name, "bold"), Padding(Text(berth.reason), (0, 0, 0, 2))]
    else:
        parts.append(Text("the reason of every replica: --format json or --format html", "bright_black"))
    parts += [Text(f"note: {note}", "yellow") for note in notes]
    return print_text(Group(*parts), width, color)


def print_text(view: RenderableType, width: int, color: bool) -> str:
    """``view`` as text that does not depend on the terminal or the environment of the caller."""
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=color, color_system="standard" if color else None, _environ={}
    )
    console.print(view)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def simple_table(*columns: str, right: Sequence[str] = (), wrap: str = "") -> Table:
    """A table without lines; the columns in ``right`` are numbers, ``wrap`` is the one that may break."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name != wrap)
    return table


def _gpus(view: FleetView) -> Table:
    table = simple_table(
        "host", "GPU", "product", "VRAM", "taken", "of", "replicas", right=("taken", "of"), wrap="replicas"
    )
    for host in view.hosts:
        for number, bar in enumerate(host.bars):
            table.add_row(
                host.name if number == 0 else "",
                bar.label,
                short_product(bar.slot.product),
                _bar(bar),
                gib(bar.taken_mib),
                gib(bar.slot.vram_mib),
                _who(bar),
            )
    return table


def _bar(bar: Bar) -> Text:
    text = Text()
    for block in bar.blocks:
        sign, style = _SIGNS[block.kind]
        room = BAR - len(text)
        text.append(sign * min(room, max(1, round(BAR * block.mib / max(1, bar.slot.vram_mib)))), style)
    return text.append("·" * (BAR - len(text)), "bright_black")


def _who(bar: Bar) -> Text:
    told = []
    for block in bar.blocks:
        times = f" x{block.count}" if block.count > 1 else ""
        told.append(_WHO[block.kind].format(f"{block.deployment}{times}"))
    text = Text(", ".join(told))
    return text.append(" cordoned", "yellow") if bar.slot.cordoned else text


def _hosts(view: FleetView) -> RenderableType:
    table = simple_table(
        "host", "where", "product", "GPUs", "taken", "of", "replicas", right=("taken", "of", "replicas")
    )
    for host in view.hosts[:SHOWN_HOSTS]:
        table.add_row(*_host_cells(host))
    left = len(view.hosts) - SHOWN_HOSTS
    return Group(table, Text(f"and {left} more hosts: --format json, svg or html")) if left > 0 else table


def _host_cells(host: HostView) -> list[str | Text]:
    levels = Text("".join(_level(bar) for bar in host.bars), "green")
    width = [len(bar.slot.gpu_uuids) for bar in host.bars]
    taken = sum(bar.taken_mib * gpus for bar, gpus in zip(host.bars, width, strict=True))
    whole = sum(bar.slot.vram_mib * gpus for bar, gpus in zip(host.bars, width, strict=True))
    replicas = sum(block.count for bar in host.bars for block in bar.blocks if block.kind == "replicas")
    products = ", ".join(short_product(product) for product in host.products)
    return [host.name, host.place, products, levels, gib(taken), gib(whole), str(replicas)]


def _level(bar: Bar) -> str:
    """One sign per GPU of the bar, the higher the fuller; anything that is there at all is seen."""
    share = bar.taken_mib / max(1, bar.slot.vram_mib)
    level = 0 if bar.taken_mib == 0 else max(1, min(len(LEVELS) - 1, round(share * (len(LEVELS) - 1))))
    return LEVELS[level] * len(bar.slot.gpu_uuids)


def _legend(small: bool) -> Text:
    text = Text()
    if not small:
        return text.append("one sign per GPU, · empty to █ full   (GiB)", "bright_black")
    for kind, meaning in (("replicas", "promised"), ("reserved", "kept for growth"), ("foreign", "held by strangers")):
        sign, style = _SIGNS[kind]
        text.append(sign * 2, style).append(f" {meaning}   ")
    return text.append("·· free   (GiB)", "bright_black")
