"""docs/compare.md: each "yes" of ours names a test, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| | ", "| --- ", "| **"))]
"""Of the one table: without its head, and without the rows that are headings."""


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def named() -> list[tuple[str, str]]:
    """(file, test) for everything in the document that looks like a test."""
    return sorted(set(re.findall(r"`([\w/.]+\.py)::(\w+)`", TEXT)))


def functions_of(file: str) -> set[str]:
    path = ROOT / file if file.startswith("molecule/") else ROOT / "tests" / file
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "name")}


def test_every_row_has_a_cell_for_each_peer_and_ours() -> None:
    (head,) = (line for line in TEXT.splitlines() if line.startswith("| | "))
    assert cells(head)[-1] == "Berth"
    assert len(ROWS) > 30
    assert [row for row in ROWS if len(cells(row)) != len(cells(head)) or "" in cells(row)] == []


def test_ours_is_a_yes_with_its_test_or_none_at_all() -> None:
    allowed = re.compile(r"yes: `[\w/.]+::test_\w+`(, `[\w/.]+::test_\w+`)*|no|part|not tried")
    assert [row for row in ROWS if not allowed.fullmatch(cells(row)[-1])] == []


def test_a_part_is_explained_below_the_table() -> None:
    below = TEXT[TEXT.index(ROWS[-1]) :].lower()
    parts = [cells(row)[0] for row in ROWS if cells(row)[-1] == "part"]
    assert parts
    assert [part for part in parts if f"- *{part.split(' inside')[0]}*".lower() not in below] == []


@pytest.mark.parametrize(("file", "test"), named())
def test_a_named_test_exists(file: str, test: str) -> None:
    assert test in functions_of(file)
