"""One problem as people read it, and the list of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["error", "warning"]
WIDTH = 110
NO_HOSTS = ("controller", "inventory")
"""Objects that are no host: told first, since every host may follow from them."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, with which ``objects`` (hosts, or "inventory"), what was found and allowed, and what mends it.

    ``kind`` is what ``preflight_accept`` names to make an error a warning. ``found`` and ``allowed`` may be empty.
    """

    kind: str
    severity: Severity
    objects: tuple[str, ...]
    what: str
    found: str = ""
    allowed: str = ""
    mend: str = ""


def arrange(problems: Iterable[Problem], accept: Collection[str] = ()) -> tuple[Problem, ...]:
    """Errors first, then by object and kind; one entry where several objects have the same problem.

    Errors of the kinds in ``accept`` become warnings.
    """
    merged: dict[Problem, set[str]] = {}
    for item in problems:
        severity: Severity = "warning" if item.kind in accept else item.severity
        merged.setdefault(replace(item, objects=(), severity=severity), set()).update(item.objects)
    whole = [replace(item, objects=tuple(sorted(objects))) for item, objects in merged.items()]
    return tuple(sorted(whole, key=_order))


def _order(item: Problem) -> tuple[object, ...]:
    of_hosts = not set(item.objects) & set(NO_HOSTS)
    return (item.severity, of_hosts, item.objects, item.kind, item.what, item.found)


def headline(problems: Sequence[Problem]) -> str:
    """How many errors and warnings, and where: one line."""
    errors = [item for item in problems if item.severity == "error"]
    warnings = len(problems) - len(errors)
    counts = [_count(len(errors), "error"), *([_count(warnings, "warning")] if warnings else [])]
    where = sorted({thing for item in errors for thing in item.objects})
    return " and ".join(counts) + (f" ({', '.join(where)})" if where else "")


def lines(problems: Sequence[Problem], looked_at: str) -> list[str]:
    """The list for people; ``looked_at`` says what was checked, for the line that says that all is well."""
    if not problems:
        return [f"Preflight: {looked_at}: nothing to mend"]
    text = [f"Preflight: {looked_at}: {headline(problems)}"]
    for item in problems:
        text += ["", *_entry(item)]
    return text


def _entry(item: Problem) -> list[str]:
    head = _wrapped(f"{item.severity.upper()}  {', '.join(item.objects)}: {item.what}", "  ", "    ")
    parts = [("found", item.found), ("allowed", item.allowed), ("mend", item.mend)]
    body = [line for name, text in parts if text for line in _wrapped(text, f"    {name:9}", " " * 13)]
    accept = f"    {'kind':9}{item.kind}"
    return [*head, *body, accept]


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
