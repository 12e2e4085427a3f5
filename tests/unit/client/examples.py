"""The examples of docs/api.md, run from top to bottom as one program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "api.md"


def run(url: str) -> str:
    """Run them against ``url`` in a process of their own; what they print."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    env = {"BERTH_BASE_URL": url, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OPENAI_API_KEY": "of-another"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def expected(printed: str) -> None:
    """What light engines make of them."""
    for line in (
        "light replica of chat 5",
        "3/3",
        "['light replica of chat', 'light replica of chat']",
        "light 0",
        "1 1.0 a lazy dog",
        "name='light' people=0",
    ):
        assert line in printed, printed
    assert printed.count("light replica of chat") >= 5
