"""A file of ``berth``'s commands, JSON or YAML as its content tells; no key may stand twice in one object."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from berth.errors import BerthError

DEEPEST = 100


class _UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which a key that stands twice is an error and not a silent choice of the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        _refuse_twice(keys)
        return super().construct_mapping(node, deep)


def _too_deep(text: str) -> bool:
    """Whether YAML might nest deeper than libyaml survives: it recurses in C and takes the process with it."""
    if re.search(rf"^[ \t?-]{{{4 * DEEPEST}}}", text, re.MULTILINE):
        return True
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        if depth > DEEPEST:
            return True
    return False


def _refuse_twice(keys: Sequence[str]) -> None:
    if len(set(keys)) < len(keys):
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(f"a key stands twice: {', '.join(twice)}")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


def read_data(path: Path, what: str) -> Any:
    """The plain data of a JSON or YAML file; which of the two, its content tells.

    Raises:
        BerthError: when the file cannot be read, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BerthError(f"{what} {path} cannot be read", found=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise BerthError(f"{what} {path} is not text", found=str(error), allowed="JSON or YAML in UTF-8") from None
    try:
        # Much faster than YAML, which JSON of 8,000 GPUs would be as well.
        return json.loads(text, object_pairs_hook=_unique_pairs)
    except ValueError as error:
        wrong_json = str(error)
    except RecursionError:
        raise BerthError(f"{what} {path} is nested too deep", allowed=f"{DEEPEST} levels") from None
    if _too_deep(text):
        raise BerthError(f"{what} {path} is nested too deep", allowed=f"{DEEPEST} levels")
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        looks_json = text.lstrip()[:1] in ("{", "[")
        told = wrong_json if looks_json else " ".join(str(error).split())
        raise BerthError(f"{what} {path} is neither JSON nor YAML", found=told) from None
