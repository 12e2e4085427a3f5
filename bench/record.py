"""What every benchmark does at its end: say whether its targets are met, and write the figures down."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import berth
from berth.codec import write_json

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Target:
    """A promise, the figure that was found, and whether it is kept."""

    what: str
    found: str
    met: bool


def finish(
    name: str, arguments: Sequence[str], figures: Mapping[str, Any], targets: Sequence[Target], results: Path = RESULTS
) -> int:
    """Print the targets, write ``results/NAME.json`` and return the exit code: 1 when a target is missed."""
    for target in targets:
        print(f"{'met   ' if target.met else 'MISSED'}  {target.what}: {target.found}")
    command = " ".join(["python", "-m", f"bench.bench_{name}", *arguments])
    data = {
        "command": command,
        "ok": all(target.met for target in targets),
        "targets": [{"what": item.what, "found": item.found, "met": item.met} for item in targets],
        "versions": versions(),
        "figures": figures,
    }
    write_json(results / f"{name}.json", data)
    return 0 if data["ok"] else 1


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {
        "berth": berth.__version__,
        "python": platform.python_version(),
        "ortools": importlib.metadata.version("ortools"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[1]:.1f} in the last 5 min",
    }


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, the first column to the left, figures to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)
