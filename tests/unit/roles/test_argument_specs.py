"""Every role says what it takes, once: defaults and argument specs agree by value, and lists come from berth/."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from berth.plan.apps import DERIVED_KEYS, AppSpec, Engine
from berth.plan.types import STRATEGIES
from berth.preflight.options import read_roles

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
CALLERS = [ROOT / "site.yml", *(ROOT / "playbooks").glob("*.yml"), *(ROOT / "roles").glob("*/tasks/*.yml")]
TYPES = {"str", "int", "float", "bool", "list", "dict", "path", "raw"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def entries(role: str) -> dict[str, dict[str, Any]]:
    specs: dict[str, dict[str, Any]] = read(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    return specs


def options(role: str) -> dict[str, dict[str, Any]]:
    """The role's public options: of its entry points, those that a caller need not give."""
    return {
        name: option
        for entry in entries(role).values()
        for name, option in entry.get("options", {}).items()
        if not option.get("required")
    }


def every_option(found: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    nested = [pair for option in found.values() for pair in every_option(option.get("options", {}))]
    return [*found.items(), *nested]


def same(left: object, right: object) -> bool:
    """By value and type: true is not 1. A template may be broken into lines."""
    if isinstance(left, str) and isinstance(right, str):
        return left.split() == right.split()
    return left == right and isinstance(left, bool) == isinstance(right, bool)


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_specs_agree(role: str) -> None:
    defaults = read(ROOT / "roles" / role / "defaults/main.yml") or {}
    specs = options(role)
    assert set(defaults) == set(specs)
    differ = {name: (value, specs[name].get("default")) for name, value in defaults.items()}
    assert not {name: pair for name, pair in differ.items() if not same(*pair)}


@pytest.mark.parametrize("role", ROLES)
def test_every_option_is_typed_and_told(role: str) -> None:
    for name, option in every_option({k: v for entry in entries(role).values() for k, v in _options(entry)}):
        assert option.get("type") in TYPES, f"{name} has no type"
        assert option.get("description"), f"{name} has no description"
        assert option["type"] != "list" or "elements" in option, f"{name} does not say what it lists"


def _options(entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(entry.get("options", {}).items())


@pytest.mark.parametrize("role", ROLES)
def test_variables_carry_the_roles_name(role: str) -> None:
    defaults = read(ROOT / "roles" / role / "defaults/main.yml") or {}
    derived = read(ROOT / "roles" / role / "vars/main.yml") or {}
    assert not [name for name in defaults if not name.startswith(f"{role}_")]
    assert not [name for name in derived if not re.match(rf"_{{0,2}}{role}_", name)]
    assert not set(defaults) & set(derived), "a derived variable hides the option of that name"


def test_every_entry_point_in_use_is_told() -> None:
    used: set[tuple[str, str]] = set()
    for path in CALLERS:
        for task in _tasks(read(path)):
            for key in ("ansible.builtin.import_role", "ansible.builtin.include_role"):
                if key in task:
                    used.add((task[key]["name"], task[key].get("tasks_from", "main")))
    told = {(role, entry) for role in ROLES for entry in entries(role)}
    assert used <= told
    assert all((ROOT / "roles" / role / "tasks" / f"{entry}.yml").is_file() for role, entry in told)


def _tasks(node: object) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [task for item in node for task in _tasks(item)]
    if isinstance(node, dict):
        return [node, *(task for key in ("tasks", "block", "rescue", "always") for task in _tasks(node.get(key)))]
    return []


def test_preflight_reads_every_option_of_every_role() -> None:
    read_by_preflight = {role.name: {option.name for option in role.options} for role in read_roles(ROOT)}
    assert read_by_preflight == {role: set(options(role)) for role in ROLES}
    assert {role.name: role.spec for role in read_roles(ROOT)} == {role: options(role) for role in ROLES}


def test_the_app_list_is_the_one_that_berth_reads() -> None:
    keys = options("serve_apps")["serve_apps_list"]["options"]
    fields = {field.name: field for field in dataclasses.fields(AppSpec) if field.name not in DERIVED_KEYS}
    assert set(keys) == set(fields), "berth.plan.apps.AppSpec and roles/serve_apps/meta/argument_specs.yml differ"
    for name, field in fields.items():
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        required = made is dataclasses.MISSING
        assert bool(keys[name].get("required")) == required, name
        if not required and made is not None:
            assert keys[name]["default"] == (list(made) if isinstance(made, tuple) else made), name
    assert keys["engine"]["choices"] == list(get_args(Engine))
    assert keys["strategy"]["choices"] == list(STRATEGIES)


def test_the_strategies_are_the_planners() -> None:
    assert options("placement")["placement_strategy"]["choices"] == list(STRATEGIES)
