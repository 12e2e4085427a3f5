"""playbooks/scale_out.yml refuses what it cannot add before it touches anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))


def run(tmp_path: Path, *args: str) -> str:
    """What a failed run says, with every run of spaces and line ends as one space."""
    where = f"berth_controller_dir={tmp_path / 'controller'}"
    done = subprocess.run(
        [PLAYBOOK, "-i", "inventories/local", "playbooks/scale_out.yml", "-e", where, *args],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert "changed=0" in done.stdout
    assert list(tmp_path.iterdir()) == []
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "which host is new? found: host=(not given); allowed: hosts of the group ray_slots (localhost)"),
        (("-e", "host=gpu99"), "found: host=gpu99"),
        (("-e", "host=localhost,gpu99"), "found: host=localhost,gpu99"),
        (("-e", "host=localhost", "--limit", "localhost"), "found: --limit localhost"),
        (("-e", "host=localhost"), "nothing was placed here yet"),
    ],
)
def test_what_it_refuses(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    assert words in run(tmp_path, *args)
