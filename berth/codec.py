"""Frozen dataclasses in and out of JSON: parsed once at the edge, strictly, with errors for people."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from berth.errors import BerthError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid")
"""Set as ``__pydantic_config__`` on dataclasses whose unknown keys must be refused."""


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))


def load(kind: type[T], data: object, what: str, mend: str | None = None) -> T:
    """Build ``kind`` (a dataclass or a generic of them) from plain JSON/YAML data.

    Raises:
        BerthError: naming every place that does not fit, the value found there and what is allowed.
    """
    try:
        return cast(T, _adapter(cast(Hashable, kind)).validate_python(data))
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            where = ".".join(str(part) for part in item["loc"]) or "(top)"
            found = item.get("input")
            if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                problems.append(f"{where}: unknown key")
            else:
                problems.append(f"{where}: {item['msg']} (found {_short(found)})")
        raise BerthError(f"{what}: " + "; ".join(problems), mend=mend) from None


def dump(value: Any) -> Any:
    """The plain data of a dataclass: dicts, lists, strings and numbers only."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def write_json(path: Path, data: Any, mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` atomically: readers see the old file or the new one, never a part."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n", mode)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write ``text`` to ``path`` atomically (temporary file in the same directory, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def replace(value: T, **changes: Any) -> T:
    """``dataclasses.replace`` with the type kept."""
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
