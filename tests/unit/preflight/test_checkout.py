"""The wheel of a checkout, against its sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from berth.preflight.checkout import STAMP, stale_wheel


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "berth/a.py", "berth/gpu/b.c", "berth/__pycache__/a.pyc", STAMP):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (100, 100))
    os.utime(tmp_path / STAMP, (200, 200))
    return tmp_path


def test_a_wheel_of_these_sources_is_right(checkout: Path) -> None:
    os.utime(checkout / "berth/__pycache__/a.pyc", (300, 300))
    assert list(stale_wheel(checkout)) == []


def test_newer_sources_are_named(checkout: Path) -> None:
    os.utime(checkout / "berth/gpu/b.c", (300, 300))
    (problem,) = stale_wheel(checkout)
    assert (problem.severity, problem.mend) == ("error", "make setup")
    assert "berth/gpu/b.c" in problem.found


def test_no_wheel_at_all(checkout: Path) -> None:
    (checkout / STAMP).unlink()
    (problem,) = stale_wheel(checkout)
    assert "not built yet" in problem.what
