"""Fixtures of every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The gate judges a change, so it draws the same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))

RUNTIME = Path(__file__).resolve().parents[1] / ".berth" / "runtime" / "current" / "bin" / "python"


def find_runtime() -> str:
    """The interpreter of the runtime environment (Ray, vLLM); skips the test where there is none."""
    python = os.environ.get("BERTH_RUNTIME_PYTHON") or (str(RUNTIME) if RUNTIME.exists() else "")
    if not python:
        pytest.skip("no runtime environment with Ray yet; mend: make up, or make e2e")
    return python


@pytest.fixture
def runtime_python() -> str:
    """See find_runtime; tests that use it are marked ``runtime``."""
    return find_runtime()
