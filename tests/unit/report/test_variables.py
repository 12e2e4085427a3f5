"""docs/VARIABLES.md is what the argument specs say, all of it."""

from __future__ import annotations

import re
from pathlib import Path

from berth.preflight.options import Option, Role, read_roles
from berth.report.variables import DOCUMENT, document, main

ROOT = Path(__file__).resolve().parents[3]
ROLES = read_roles(ROOT)
TEXT = (ROOT / DOCUMENT).read_text(encoding="utf-8")


def test_the_document_is_up_to_date() -> None:
    assert document(ROLES) == TEXT, "run `make docs`"


def test_every_variable_and_key_has_one_row_of_five_cells() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    names = [match[1] for line in rows if (match := re.match(r"\| `(\w+)` \|", line))]
    options = [option for role in ROLES for option in role.options]
    assert names == [item.name for role in ROLES for item in [*role.options, *_keys(role)]]
    assert len(options) > 60
    assert {len(re.split(r"(?<!\\)\|", line)) for line in rows} == {7}


def _keys(role: Role) -> list[Option]:
    return [key for option in role.options for key in option.options]


def test_a_table_survives_what_stands_in_a_default() -> None:
    tricky = Option("r", "r_x", "bool", "Why | how.", "{{ a | b }}", choices=("x", "y"))
    text = document([Role("r", "It", (tricky,), frozenset(), frozenset(), {})])
    assert "| `r_x` | bool | `{{ a \\| b }}` | `x`, `y` | Why \\| how. |" in text


def test_it_writes_only_what_changed(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "roles").symlink_to(ROOT / "roles")
    assert main(tmp_path) == 0
    written = (tmp_path / DOCUMENT).stat().st_mtime_ns
    assert (tmp_path / DOCUMENT).read_text(encoding="utf-8") == TEXT
    assert main(tmp_path) == 0
    assert (tmp_path / DOCUMENT).stat().st_mtime_ns == written
