"""The module directories, run as Ansible runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULE = Path(__file__).resolve().parents[3] / "library/directories.py"


def run(directories: list[dict[str, str]], check: bool = False) -> dict[str, Any]:
    arguments = {"ANSIBLE_MODULE_ARGS": {"directories": directories, "_ansible_check_mode": check}}
    done = subprocess.run(
        [sys.executable, str(MODULE)], input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_made_once_and_then_left_alone(tmp_path: Path) -> None:
    wanted = [{"path": f"{tmp_path}/a", "mode": "0750"}, {"path": f"{tmp_path}/a/b", "mode": "0700"}]
    told = run(wanted, check=True)
    assert told["changed"]
    assert not (tmp_path / "a").exists()
    made = run(wanted)
    assert made["changes"] == told["changes"] == [f"{tmp_path}/a: made", f"{tmp_path}/a/b: made"]
    assert oct((tmp_path / "a").stat().st_mode)[-3:] == "750"
    assert not run(wanted)["changed"]


def test_a_mode_changed_by_hand_is_put_back(tmp_path: Path) -> None:
    wanted = [{"path": str(tmp_path / "a"), "mode": "0700"}]
    run(wanted)
    (tmp_path / "a").chmod(0o777)
    assert run(wanted, check=True)["changes"] == [f"{tmp_path}/a: mode or owner changed"]
    assert run(wanted)["changed"]
    assert oct((tmp_path / "a").stat().st_mode)[-3:] == "700"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    told = run([{"path": str(tmp_path / "a"), "mode": "0700"}])
    assert told["failed"]
    assert "no directory" in told["msg"]
    assert (tmp_path / "a").read_text() == "mine"
