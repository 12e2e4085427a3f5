"""Every public variable of every role, read from the roles' argument specs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Option:
    """One variable, or one key of a list of dictionaries; ``default`` is None where there is none (``required``)."""

    role: str
    name: str
    type: str
    description: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    elements: str = ""
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Role:
    """A role's public options, in the order of its spec, and the names that it makes itself."""

    name: str
    short_description: str
    options: tuple[Option, ...]
    derived: frozenset[str]
    made: frozenset[str]
    spec: dict[str, Any]
    """Its options as Ansible's validator takes them."""


def read_roles(root: Path) -> tuple[Role, ...]:
    """The roles of the checkout at ``root``, by name.

    ``derived`` are the variables of ``vars/main.yml``, which hide what an inventory sets; ``made`` are facts and
    registered results. An option that a caller must give (``required``) is not public: no inventory sets it.
    """
    return tuple(_role(path) for path in sorted((root / "roles").iterdir()) if (path / "meta").is_dir())


def _role(path: Path) -> Role:
    entries: dict[str, dict[str, Any]] = _yaml(path / "meta/argument_specs.yml")["argument_specs"]
    spec = {
        name: option
        for entry in entries.values()
        for name, option in entry.get("options", {}).items()
        if not option.get("required")
    }
    given = {name for entry in entries.values() for name in entry.get("options", {})} - set(spec)
    tasks = [task for file in sorted(path.glob("tasks/*.yml")) for task in _tasks(_yaml(file))]
    return Role(
        name=path.name,
        short_description=next((entry["short_description"] for entry in entries.values()), ""),
        options=tuple(_option(path.name, name, option) for name, option in spec.items()),
        derived=frozenset(_yaml(path / "vars/main.yml") or {}),
        made=frozenset(given | {name for task in tasks for name in _makes(task)}),
        spec=spec,
    )


def _option(role: str, name: str, raw: dict[str, Any]) -> Option:
    told = raw["description"]
    return Option(
        role=role,
        name=name,
        type=raw["type"],
        description=" ".join(" ".join(told if isinstance(told, list) else [told]).split()),
        default=raw.get("default"),
        required=bool(raw.get("required")),
        choices=tuple(map(str, raw.get("choices", ()))),
        elements=raw.get("elements", ""),
        options=tuple(_option(role, key, value) for key, value in raw.get("options", {}).items()),
    )


def _tasks(node: object) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [task for item in node for task in _tasks(item)]
    if isinstance(node, dict):
        return [node, *(task for key in ("block", "rescue", "always") for task in _tasks(node.get(key)))]
    return []


def _makes(task: dict[str, Any]) -> set[str]:
    names = set(task.get("ansible.builtin.set_fact", {})) | set(task.get("vars", {}))
    return names | ({task["register"]} if "register" in task else set())


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
