"""The documents agree with the code: a runbook entry per finding, every key of the app list, no dead link."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from berth.plan.apps import DERIVED_KEYS, OWNED_ENGINE_ARGS, AppSpec
from berth.plan.types import STRATEGIES
from berth.verify import compare

ROOT = Path(__file__).resolve().parents[3]
PLAYBOOK = ROOT / compare.RUNBOOK
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMPARE = ast.parse(Path(compare.__file__).read_text(encoding="utf-8"))


def strings(expression: ast.expr) -> set[str]:
    """Every value that a literal, or a choice between literals, can have."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return {expression.value}
    if isinstance(expression, ast.IfExp):
        return strings(expression.body) | strings(expression.orelse)
    return set()


def emitted_kinds() -> set[str]:
    """The first argument of every call of ``_finding``: a literal, or a local name assigned from literals."""
    kinds = set()
    for function in (node for node in ast.walk(COMPARE) if isinstance(node, ast.FunctionDef)):
        names = {
            target.id: strings(node.value)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_finding":
                first = node.args[0]
                found = names.get(first.id, set()) if isinstance(first, ast.Name) else strings(first)
                assert found, f"compare.py:{node.lineno}: cannot see which kind this finding has"
                kinds |= found
    return kinds


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_finding_has_its_section_and_no_section_is_of_nothing() -> None:
    kinds = emitted_kinds()
    assert {"slot_missing", "replica_extra", "pids_hidden"} <= kinds
    text = PLAYBOOK.read_text(encoding="utf-8")
    assert set(re.findall(r"^### (\S+)$", text, flags=re.MULTILINE)) == kinds
    assert set(compare._MENDS) <= kinds


@pytest.mark.parametrize("kind", sorted(emitted_kinds()))
def test_a_section_says_what_it_means_how_to_look_what_mends_and_what_not_to_do(kind: str) -> None:
    text = PLAYBOOK.read_text(encoding="utf-8")
    section = re.split(r"^##", text.split(f"\n### {kind}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    for part in ("Means", "Look", "Mend", "Do not"):
        assert re.search(rf"^\*\*{part}\*\* \S", section, flags=re.MULTILINE), f"{kind}: no {part}"


def test_the_critical_xids_are_those_of_the_code() -> None:
    section = PLAYBOOK.read_text(encoding="utf-8").split("### gpu_xid", 1)[1].split("**Look**", 1)[0]
    listed = re.search(r"\(([\d, ]+)\)", section)
    assert listed is not None
    assert [int(number) for number in listed[1].split(",")] == sorted(compare.CRITICAL_XIDS)


WRITTEN = [field for field in dataclasses.fields(AppSpec) if field.name not in DERIVED_KEYS]


@pytest.mark.parametrize("field", WRITTEN, ids=lambda field: field.name)
def test_every_key_of_the_app_list_is_told_with_its_default(field: dataclasses.Field[object]) -> None:
    row = re.search(rf"^\| `{field.name}` \|.*\| (.+?) \|$", PLAYBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert row is not None, f"the app list's table has no row for {field.name}"
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    assert row[1].startswith("needed") == needed
    if isinstance(field.default, int | float):
        assert row[1] == str(field.default)


def test_engine_arguments_and_strategies_are_told() -> None:
    text = PLAYBOOK.read_text(encoding="utf-8")
    assert [name for name in (*OWNED_ENGINE_ARGS, *STRATEGIES) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(document: Path) -> None:
    text = without_code(document.read_text(encoding="utf-8"))
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []
