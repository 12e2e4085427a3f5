"""Every variable of every role as one document, from the argument specs: ``python -m berth.report.variables``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.preflight.options import Option, Role, read_roles

DOCUMENT = Path("docs/VARIABLES.md")
HEAD = """\
# Variables

Every variable that an inventory may set, by role. Set them in `group_vars` of the group `berth` (or `all`), in
`host_vars` where hosts differ, or with `-e` for one run. A name that no role takes is refused with the one that was
probably meant: `ansible-playbook playbooks/preflight.yml` looks at the whole inventory and changes nothing.

Made from `roles/*/meta/argument_specs.yml` by `make docs`; a test compares both. In a default, `{{ … }}` is Ansible's
template: it follows the variables that it names. Memory is in MiB, times in seconds where the name ends in `_s`.
"""
COLUMNS = ("variable", "type", "default", "allowed", "what for")


def document(roles: Sequence[Role]) -> str:
    """The Markdown document: one table per role, one more per list of dictionaries."""
    listed = [role for role in roles if role.options]
    contents = " · ".join(f"[{role.name}](#{role.name})" for role in listed)
    sections = [_section(role) for role in listed]
    return "\n".join([HEAD, contents, "", *sections]).rstrip() + "\n"


def _section(role: Role) -> str:
    tables = [f"## {role.name}\n\n{role.short_description}.\n\n{_table(role.options)}"]
    for option in role.options:
        if option.options:
            told = f"Keys of each entry of `{option.name}`:"
            tables.append(f"{told}\n\n{_table(option.options, 'key')}")
    return "\n".join(tables)


def _table(options: Sequence[Option], first: str = COLUMNS[0]) -> str:
    head = (first, *COLUMNS[1:])
    rows = [head, tuple("---" for _ in head), *(_row(option) for option in options)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(option: Option) -> tuple[str, ...]:
    kind = f"{option.type} of {option.elements}" if option.elements else option.type
    default = "needed" if option.required else _default(option.default)
    allowed = ", ".join(f"`{choice}`" for choice in option.choices) or ("`true`, `false`" if kind == "bool" else "")
    return tuple(_cell(text) for text in (f"`{option.name}`", kind, default, allowed, option.description))


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"`{' '.join(value.split())}`" if value else "empty"
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    """A bar would end the cell, in code as well."""
    return text.replace("|", "\\|")


def main(root: Path | None = None) -> int:
    """Write the document below ``root`` (the checkout); says whether it changed."""
    root = root or Path(__file__).resolve().parents[2]
    path, text = root / DOCUMENT, document(read_roles(root))
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        print(f"{DOCUMENT} is up to date")
    else:
        path.write_text(text, encoding="utf-8")
        print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
