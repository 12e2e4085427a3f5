"""A wheelhouse built by the real pip from tiny wheels: once, whole, and refused when it is not the lock's."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from berth.errors import BerthError
from berth.host.wheelhouse import Target, build, check, main, packed_lock, platform_tags
from tests.wheels import write_wheel


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    write_wheel(tmp_path / "index", "tiny", "1.0")
    write_wheel(tmp_path / "index", "tiny", "1.1")
    write_wheel(tmp_path / "index", "other_one", "2.0")
    path = tmp_path / "small.txt"
    path.write_text("tiny==1.0\nother-one==2.0\n")
    return path


def test_it_is_built_once_and_says_what_it_holds(lock: Path, tmp_path: Path) -> None:
    house = tmp_path / "house"
    assert build(house, [lock], Target()) == [f"small.txt: 2 wheels, 0 MiB, for Python {Target()}"]
    assert check(house) == []
    with tarfile.open(house / "small.tar") as tar:
        assert tar.getnames() == ["other_one-2.0-py3-none-any.whl", "tiny-1.0-py3-none-any.whl"]
    before = (house / "small.tar").read_bytes(), (house / "manifest.json").stat().st_mtime_ns
    assert build(house, [lock], Target()) == []
    assert ((house / "small.tar").read_bytes(), (house / "manifest.json").stat().st_mtime_ns) == before


def test_another_lock_of_that_name_is_fetched_and_others_stay(lock: Path, tmp_path: Path) -> None:
    house, second = tmp_path / "house", tmp_path / "second.txt"
    second.write_text("tiny==1.1\n")
    build(house, [lock, second], Target())
    lock.write_text("tiny==1.1\n")
    assert len(build(house, [lock, second], Target())) == 1
    assert set(json.loads((house / "manifest.json").read_text())["locks"]) == {"small.txt", "second.txt"}
    assert check(house) == []


def test_the_same_wheels_give_the_same_tar(lock: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, [lock], Target())
    assert (tmp_path / "one/small.tar").read_bytes() == (tmp_path / "two/small.tar").read_bytes()


@pytest.mark.parametrize("name", ["small.tar", "wheels/tiny-1.0-py3-none-any.whl"])
def test_a_lost_file_is_had_again_and_a_changed_one_is_named(lock: Path, tmp_path: Path, name: str) -> None:
    house = tmp_path / "house"
    build(house, [lock], Target())
    (house / name).unlink()
    assert check(house) == [f"{name} is missing"]
    build(house, [lock], Target())
    assert check(house) == []
    (house / name).write_bytes(b"other")
    assert check(house) == [f"{name} is not as it was built"]


def test_what_cannot_be_had_fails_and_leaves_the_manifest(
    lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    house = tmp_path / "house"
    build(house, [lock], Target())
    before = (house / "manifest.json").read_text()
    lock.write_text("tiny==9.9\n")
    assert main([str(house), str(lock)]) == 2
    assert "the wheels of small.txt cannot be had" in capsys.readouterr().err
    assert (house / "manifest.json").read_text() == before
    assert main([str(house), "--check"]) == 0


def test_a_wheel_for_another_python_is_asked_for_by_name(lock: Path, tmp_path: Path) -> None:
    lines = build(tmp_path / "house", [lock], Target("3.12", ("manylinux_2_28_x86_64",)))
    assert lines == ["small.txt: 2 wheels, 0 MiB, for Python 3.12 manylinux_2_28_x86_64"]


def test_a_newer_glibc_takes_wheels_for_every_older_one() -> None:
    tags = platform_tags("manylinux_2_31_x86_64")
    assert tags[0] == "manylinux_2_31_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} < set(tags)
    assert "manylinux_2_32_x86_64" not in tags
    assert platform_tags("macosx_14_0_arm64") == ["macosx_14_0_arm64"]


def test_a_role_gets_the_tar_of_its_very_lock(lock: Path, tmp_path: Path) -> None:
    house = tmp_path / "house"
    build(house, [lock], Target())
    manifest = (house / "manifest.json").read_text()
    # As a template reads a file: without the last newline.
    assert packed_lock(manifest, "small.txt", lock.read_text().rstrip("\n"), str(house)).tar
    for text, name, said in (
        (manifest, "none.txt", "lacks none.txt; found: small.txt; mend: make wheelhouse"),
        ("", "small.txt", f"there is no wheelhouse at {house} on the controller; mend: make wheelhouse"),
        ("{", "small.txt", "is not a manifest"),
    ):
        with pytest.raises(BerthError, match=said):
            packed_lock(text, name, lock.read_text(), str(house))
    with pytest.raises(BerthError, match="was built from another"):
        packed_lock(manifest, "small.txt", "tiny==1.1\n", str(house))
