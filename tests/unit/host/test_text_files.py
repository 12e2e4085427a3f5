"""The module text_files, run as Ansible runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULE = Path(__file__).resolve().parents[3] / "library/text_files.py"


def run(files: list[dict[str, str]], check: bool = False) -> dict[str, Any]:
    arguments = {"ANSIBLE_MODULE_ARGS": {"files": files, "_ansible_check_mode": check, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, str(MODULE)], input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_written_once_and_then_left_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    second.write_text("old\n")
    wanted = [
        {"path": str(first), "content": "ä new\n", "mode": "0640"},
        {"path": str(second), "content": "new\n", "mode": "0600"},
    ]
    told = run(wanted, check=True)
    assert not first.exists()
    assert second.read_text() == "old\n"
    made = run(wanted)
    assert made["changes"] == told["changes"] == [f"{first}: written", f"{second}: written"]
    assert made["diff"] == told["diff"]
    assert [(item["before"], item["after"]) for item in told["diff"]] == [("", "ä new\n"), ("old\n", "new\n")]
    assert [oct(path.stat().st_mode)[-3:] for path in (first, second)] == ["640", "600"]
    assert first.read_text(encoding="utf-8") == "ä new\n"
    assert not run(wanted)["changed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "nothing is left beside them"


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    wanted = [{"path": str(tmp_path / name), "content": f"{name}\n", "mode": "0644"} for name in "ab"]
    run(wanted)
    inode = (tmp_path / "a").stat().st_ino
    (tmp_path / "b").write_text("by hand\n")
    assert run(wanted)["changes"] == [f"{tmp_path}/b: written"]
    assert (tmp_path / "a").stat().st_ino == inode


def test_a_mode_changed_by_hand_is_put_back(tmp_path: Path) -> None:
    wanted = [{"path": str(tmp_path / "a"), "content": "text", "mode": "0600"}]
    run(wanted)
    (tmp_path / "a").chmod(0o666)
    assert run(wanted, check=True)["changes"] == [f"{tmp_path}/a: mode or owner changed"]
    assert run(wanted)["changed"]
    assert oct((tmp_path / "a").stat().st_mode)[-3:] == "600"


def test_line_ends_are_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\r\n")
    wanted = [{"path": str(tmp_path / "a"), "content": "one\n", "mode": "0644"}]
    assert run(wanted)["changed"]
    assert (tmp_path / "a").read_bytes() == b"one\n"


def test_what_cannot_be_written_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    told = run([{"path": str(tmp_path / "a"), "content": "", "mode": "0644"}])
    assert told["failed"]
    assert "is a directory" in told["msg"]
    gone = run([{"path": str(tmp_path / "no/such"), "content": "", "mode": "0644"}])
    assert gone["failed"]
    assert "cannot be written" in gone["msg"]
