"""Modules that run in the controller's own process answer as modules do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.preflight.builders import ROOT

PLUGINS = ROOT / "action_plugins"
NAMES = sorted(path.name for path in PLUGINS.iterdir() if path.is_symlink())


def play(tmp_path: Path, *tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the tasks, in order; what fails ends nothing."""
    book = tmp_path / "play.yml"
    book.write_text(
        json.dumps(
            [
                {
                    "hosts": "localhost",
                    "gather_facts": False,
                    "connection": "local",
                    "tasks": [{"ignore_errors": True, **task} for task in tasks],
                }
            ]
        )
    )
    empty = tmp_path / "ansible.cfg"
    empty.write_text("")
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(empty),
        "ANSIBLE_LIBRARY": str(ROOT / "library"),
        "ANSIBLE_ACTION_PLUGINS": str(PLUGINS),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", str(book)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return [task["hosts"]["localhost"] for task in json.loads(done.stdout)["plays"][0]["tasks"]]


def test_every_link_has_a_module() -> None:
    assert NAMES
    assert all((ROOT / "library" / name).is_file() for name in NAMES)
    assert all((PLUGINS / name).readlink() == Path("run_lock.py") for name in NAMES)


def test_results_errors_and_check_mode(tmp_path: Path) -> None:
    lock, missing = tmp_path / "lock", tmp_path / "plan.json"
    taken, refused, checked, failed = play(
        tmp_path,
        {"run_lock": {"path": str(lock), "what": "a test"}},
        {"run_lock": {"path": str(lock), "no_such_option": 1}},
        {
            "placement_plan": {"hosts": [], "apps": [], "cluster": "a", "path": str(missing)},
            "check_mode": True,
        },
        {"placement_measured": {"apps": [], "plan_path": str(missing), "rows": [], "hosts": {}}},
    )
    assert taken["changed"] is False
    assert json.loads(lock.read_text())["what"] == "a test"
    assert "Unsupported parameters for (run_lock) module: no_such_option" in refused["msg"]
    assert checked["plan"]["berths"] == []
    assert not missing.exists()
    assert failed["failed"]
    assert "there is no plan at" in failed["msg"]


@pytest.mark.parametrize("holder", ["a process that is gone"])
def test_warnings_are_shown(tmp_path: Path, holder: str) -> None:
    lock = tmp_path / "lock"
    (first,) = play(tmp_path, {"run_lock": {"path": str(lock), "what": holder}})
    assert not first.get("warnings")
    (second,) = play(tmp_path, {"run_lock": {"path": str(lock), "what": "a test"}})
    assert any(holder in str(warning) for warning in second["warnings"])
