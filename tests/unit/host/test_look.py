"""One look at a host, and what of the wanted is not right yet."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from berth.gpu.sim import build
from berth.gpu.sim.profile import named
from berth.host.look import MOST_BYTES, look, unlike, user

MODULE = Path(__file__).resolve().parents[3] / "library/host_look.py"
ME = pwd.getpwuid(os.getuid())


def seen(*paths: Path) -> dict[str, Any]:
    return {path: found and asdict(found) for path, found in look(map(str, paths)).items()}


def test_what_is_right_already_is_alike(tmp_path: Path) -> None:
    file, directory = tmp_path / "a", tmp_path / "b"
    file.write_text("text ä\n", encoding="utf-8")
    file.chmod(0o640)
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    wanted = [
        {"path": str(file), "mode": "0640", "content": "text ä\n", "owner": ME.pw_name},
        {"path": str(directory), "mode": "0755", "owner": None},
    ]
    assert unlike(wanted, seen(file, directory)) == []
    assert unlike(wanted, {}) == [str(file), str(directory)], "what was not looked at is asked for"


@pytest.mark.parametrize(
    "change", [{"mode": "0600"}, {"owner": "somebody-else"}, {"content": "text"}, {"path": "/no/such"}]
)
def test_any_difference_counts(tmp_path: Path, change: dict[str, str]) -> None:
    file = tmp_path / "a"
    file.write_text("text\n")
    file.chmod(0o644)
    wanted = {"path": str(file), "mode": "0644", "content": "text\n"} | change
    assert unlike([wanted], seen(file, Path("/no/such"))) == [wanted["path"]]


def test_kinds_are_not_confused(tmp_path: Path) -> None:
    file, directory = tmp_path / "a", tmp_path / "b"
    file.write_text("")
    file.chmod(0o755)
    directory.mkdir()
    directory.chmod(0o755)
    found = seen(file, directory)
    assert unlike([{"path": str(file), "mode": "0755"}], found) == [str(file)]
    assert unlike([{"path": str(directory), "mode": "0755", "content": ""}], found) == [str(directory)]


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * (MOST_BYTES + 1))
    found = look([str(file)])[str(file)]
    assert found is not None
    assert (found.kind, found.sha1) == ("file", "")


def test_the_mode_keeps_what_stands_before_the_permissions(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    found = look([str(tmp_path)])[str(tmp_path)]
    assert found is not None
    assert found.mode == "1777"


def test_a_user_or_none() -> None:
    assert user(ME.pw_name) == {"home": ME.pw_dir, "shell": ME.pw_shell}
    assert user("no-such-user-here") is None


def test_the_module_tells_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text\n")
    asked = {
        "paths": [str(tmp_path / "a"), str(tmp_path / "none")],
        "user": ME.pw_name,
        "environment": {"path": str(tmp_path / "env"), "lock": "ray==2.60.0\n"},
    }
    told = module_says(asked)
    assert told["changed"] is False
    assert told["paths"][str(tmp_path / "none")] is None
    assert told["paths"][str(tmp_path / "a")]["sha1"] == hashlib.sha1(b"text\n").hexdigest()
    assert told["user"]["home"] == ME.pw_dir
    assert told["environment"]["complete"] is False
    assert told["gpu_sim"] is False


def module_says(asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": asked}),
        capture_output=True,
        text=True,
        check=False,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler for the simulated driver")
def test_a_simulated_driver_as_wanted_needs_no_installation(tmp_path: Path) -> None:
    sim = {"directory": str(tmp_path / "sim"), "profile": "l40s-x2", "seed": "gpu01"}
    assert module_says({"paths": [], "gpu_sim": sim})["gpu_sim"] is False, "it is not there yet"
    build.install(tmp_path / "sim", named("l40s-x2")[0], "gpu01")
    assert module_says({"paths": [], "gpu_sim": sim})["gpu_sim"] is True
    for change in ({"seed": "gpu02"}, {"profile": "h100-x2"}, {"profile": "no-such-profile"}):
        assert module_says({"paths": [], "gpu_sim": sim | change})["gpu_sim"] is False
    (tmp_path / "sim" / build.LIBRARY).unlink()
    assert module_says({"paths": [], "gpu_sim": sim})["gpu_sim"] is False, "its library is gone"
