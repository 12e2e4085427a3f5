"""Every test that docs/peers_bugs.md names exists, and every test written for a peer's bug is named there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "docs" / "peers_bugs.md"
HERE = "unit/plan/test_peer_bugs.py"
"""The file of the tests that are named without one."""


def named() -> list[tuple[str, str]]:
    """(file below tests/, test) for each test in the last cell of each row."""
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [row.split("|")[-2] for row in rows]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [(file or HERE, test) for file, _, test in (name.rpartition("::") for name in names)]


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_each_row_names_a_test() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| (?!peer |---)", line)]
    assert len(rows) > 25
    assert [row for row in rows if "`test_" not in row.split("|")[-2] and "::test_" not in row.split("|")[-2]] == []


@pytest.mark.parametrize(("file", "test"), sorted(set(named())))
def test_a_named_test_exists(file: str, test: str) -> None:
    assert test in functions_of(file)


@pytest.mark.parametrize("file", [HERE, "unit/roles/test_peer_bugs.py"])
def test_a_test_of_a_peers_bug_is_named(file: str) -> None:
    ours = {name for name in functions_of(file) if not name.startswith("test_the_pattern_of")}
    assert ours - {test for where, test in named() if where == file} == set()
