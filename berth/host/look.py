"""What of a host is as it must be already: one look at all of it, so that a run that changes nothing asks once."""

from __future__ import annotations

import hashlib
import pwd
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MOST_BYTES = 1024 * 1024
"""Files beyond are not read; none that Berth writes as text comes near."""


@dataclass(frozen=True)
class Seen:
    """A path as it is: ``mode`` octal as Ansible writes it (``0644``), ``sha1`` of a file's content, "" if not read."""

    kind: Literal["file", "directory", "other"]
    mode: str
    owner: str
    sha1: str = ""


def look(paths: Iterable[str]) -> dict[str, Seen | None]:
    """What is at each path, links followed; None where nothing is, or nothing that this user may ask for."""
    return {path: _seen(Path(path)) for path in paths}


def _seen(path: Path) -> Seen | None:
    try:
        found = path.stat()
        kind: Literal["file", "directory", "other"] = "other"
        sha1 = ""
        if stat.S_ISDIR(found.st_mode):
            kind = "directory"
        elif stat.S_ISREG(found.st_mode):
            kind = "file"
            if found.st_size <= MOST_BYTES:
                sha1 = hashlib.sha1(path.read_bytes()).hexdigest()
    except OSError:
        return None
    return Seen(kind, f"{stat.S_IMODE(found.st_mode):04o}", _name(found.st_uid), sha1)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def user(name: str) -> dict[str, str] | None:
    """A user's ``home`` and ``shell``; None when there is none of that name."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return None
    return {"home": found.pw_dir, "shell": found.pw_shell}


def unlike(wanted: Iterable[Mapping[str, Any]], seen: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The paths among ``wanted`` that are not seen to be right already; what was not looked at is not.

    ``wanted``: ``path`` and ``mode``, ``owner`` (None or left out: anybody), ``content`` (left out: a directory).
    ``seen``: path to a Seen as plain data, as module host_look returns it.
    """
    return [str(item["path"]) for item in wanted if not _alike(item, seen.get(str(item["path"])))]


def _alike(wanted: Mapping[str, Any], seen: Mapping[str, Any] | None) -> bool:
    if not seen or seen["mode"] != str(wanted["mode"]):
        return False
    if wanted.get("owner") is not None and seen["owner"] != str(wanted["owner"]):
        return False
    if "content" not in wanted:
        return bool(seen["kind"] == "directory")
    sha1 = hashlib.sha1(str(wanted["content"]).encode()).hexdigest()
    return bool(seen["kind"] == "file" and seen["sha1"] == sha1)
