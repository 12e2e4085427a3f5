"""Every module documents exactly the options that it takes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted((ROOT / "library").glob("*.py"), key=lambda path: path.stem)
FACTS = ("type", "required", "default", "choices", "elements")
PLUGIN_ONLY = {
    "show_text": {"text": {"type": "raw", "required": True}},
    "preflight_inventory": {"group": {"type": "str", "default": "berth"}},
}
"""Modules that are only an action plugin; the options it reads."""


def documents(tree: ast.Module) -> dict[str, Any]:
    """The module's DOCUMENTATION, EXAMPLES and RETURN, parsed."""
    return {
        target.id: yaml.safe_load(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("DOCUMENTATION", "EXAMPLES", "RETURN")
    }


def argument_spec(tree: ast.Module) -> dict[str, dict[str, Any]] | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "argument_spec":
            found: dict[str, dict[str, Any]] = ast.literal_eval(node.value)
            return found
    return None


def facts(option: dict[str, Any]) -> dict[str, Any]:
    return {"type": "str", "required": False} | {key: option[key] for key in FACTS if key in option}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_options_and_documentation_agree(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told, taken = documents(tree), argument_spec(tree) or PLUGIN_ONLY[path.stem]
    assert told["DOCUMENTATION"]["module"] == path.stem
    assert {name: facts(option) for name, option in told["DOCUMENTATION"]["options"].items()} == {
        name: facts(option) for name, option in taken.items()
    }
    assert set(told) == {"DOCUMENTATION", "EXAMPLES", "RETURN"}
    assert set(told["DOCUMENTATION"]["attributes"]) == {"check_mode", "diff_mode"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_examples_use_options_that_exist(path: Path) -> None:
    told = documents(ast.parse(path.read_text(encoding="utf-8")))
    used = [task[path.stem] for task in told["EXAMPLES"] if path.stem in task]
    assert used
    for options in used:
        assert set(options) <= set(told["DOCUMENTATION"]["options"])


def test_ansible_doc_prints_every_module() -> None:
    command = [str(Path(sys.executable).with_name("ansible-doc")), "-t", "module", "-M", str(ROOT / "library"), "-j"]
    names = [path.stem for path in MODULES]
    done = subprocess.run([*command, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)) == set(names)
