"""The checkout that the playbooks run from: whether what it brings to hosts is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from berth.preflight.problem import Problem

STAMP = ".berth/dist/.sources"
"""Written, or touched, by every run of setup.sh, beside the wheel."""


def stale_wheel(root: Path) -> Iterator[Problem]:
    """A problem where a source of Berth's is newer than the wheel in ``root``, or where there is no wheel."""
    stamp = root / STAMP
    built = stamp.stat().st_mtime_ns if stamp.is_file() else 0
    sources = [root / "pyproject.toml", *(root / "berth").rglob("*")]
    newer = sorted(
        str(path.relative_to(root))
        for path in sources
        if path.is_file() and "__pycache__" not in path.parts and path.stat().st_mtime_ns > built
    )
    if newer:
        yield Problem(
            "wheel",
            "error",
            ("controller",),
            "Berth's wheel, which the hosts get, is older than this checkout's sources"
            if built
            else "Berth's wheel, which the hosts get, was not built yet",
            f"{len(newer)} newer files: {', '.join(newer[:3])}{', ...' if len(newer) > 3 else ''}" if built else "",
            mend="make setup",
        )
