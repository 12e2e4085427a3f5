"""The plan file: read strictly, written atomically, the one before it kept."""

from __future__ import annotations

import json
from pathlib import Path

from berth.codec import dump, load, write_json, write_text
from berth.errors import BerthError
from berth.plan.types import PLAN_VERSION, Plan


def previous_path(path: Path) -> Path:
    """Where the plan before the one at ``path`` is kept: ``plan.json`` -> ``plan.previous.json``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_plan(path: Path) -> Plan | None:
    """The plan at ``path``, or None when there is none yet.

    Raises:
        BerthError: when the file cannot be read, is no plan, or is of a version this Berth does not know.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BerthError(f"plan {path} cannot be read: {error}", mend=_mend(path)) from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BerthError(f"plan {path} is not JSON: {error}", mend=_mend(path)) from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != PLAN_VERSION:
        raise BerthError(f"plan {path} has an unknown version", found=version, allowed=PLAN_VERSION, mend=_mend(path))
    plan = load(Plan, data, f"plan {path}", _mend(path))
    known = {slot.name for slot in plan.slots}
    for berth in plan.berths:
        if berth.slot not in known:
            raise BerthError(f"plan {path}: berth {berth.name} is on no slot of the plan", mend=_mend(path))
    return plan


def berths_by_gpu(plan: Plan | None, host: str) -> dict[str, list[str]]:
    """The names of the berths on each GPU (UUID) of ``host``, sorted."""
    found: dict[str, list[str]] = {}
    for slot in plan.slots if plan else ():
        names = sorted(berth.name for berth in plan.berths if berth.slot == slot.name) if plan else []
        if slot.host == host and names:
            found |= dict.fromkeys(slot.gpu_uuids, names)
    return found


def write_plan(path: Path, plan: Plan) -> bool:
    """Write ``plan`` when it differs from what is there; True when it was written.

    The plan that stood there is kept beside it, provided that it could be read.

    Raises:
        BerthError: when the file cannot be written.
    """
    if not would_change(path, plan):
        return False
    try:
        if _is_good(path):
            write_text(previous_path(path), path.read_text(encoding="utf-8"))
        write_json(path, dump(plan))
    except OSError as error:
        raise BerthError(f"plan {path} cannot be written: {error}", mend="choose a path you may write to") from None
    return True


def would_change(path: Path, plan: Plan) -> bool:
    """Whether ``write_plan`` would write."""
    try:
        return read_plan(path) != plan
    except BerthError:
        return True


def _is_good(path: Path) -> bool:
    try:
        return read_plan(path) is not None
    except BerthError:
        return False


def _mend(path: Path) -> str:
    return f"restore it from {previous_path(path)}, or move it away and plan anew (every replica may then move)"
