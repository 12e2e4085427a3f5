"""Fixtures of every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parents[1] / ".berth" / "runtime" / "current" / "bin" / "python"


@pytest.fixture
def runtime_python() -> str:
    """The interpreter of the runtime environment (Ray, vLLM); tests that use it are marked ``runtime``."""
    python = os.environ.get("BERTH_RUNTIME_PYTHON") or (str(RUNTIME) if RUNTIME.exists() else "")
    if not python:
        pytest.skip("no runtime environment with Ray yet; mend: make up, or make e2e")
    return python
