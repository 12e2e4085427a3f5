"""What is in an environment, how it differs from its lock and from other hosts', and which ones may go."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.host.environment import (
    COMPLETE,
    Difference,
    Environment,
    Standing,
    differences,
    environments,
    linked,
    parse_lock,
    read_environment,
    record,
    remove,
    repair,
    rolled_back,
    superfluous,
    used,
)
from tests.wheels import write_wheel

LOCK = {"tiny": "1.0", "other-one": "2.0+cpu"}


def install(root: Path, name: str, version: str, extra: str = "", script: str = "") -> Path:
    """Unpack a wheel as pip would, with a script that names the environment's path."""
    site = root / "lib/python3.12/site-packages"
    site.mkdir(parents=True, exist_ok=True)
    wheel = write_wheel(root.parent / f"wheels-{root.name}", name, version, extra)
    zipfile.ZipFile(wheel).extractall(site)
    (root / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.3\n")
    with (site / f"{name}-{version}.dist-info/RECORD").open("a") as rows:
        rows.write(f"{name}/__pycache__/x.cpython-312.pyc,,\n")
        if script:
            (root / "bin").mkdir(exist_ok=True)
            (root / "bin" / name).write_text(f"#!{root}\n")
            rows.write(f"../../../bin/{name},sha256={script},{len(str(root)) + 3}\n")
    return site


@pytest.fixture
def root(tmp_path: Path) -> Path:
    install(tmp_path / "env", "tiny", "1.0", script="abc")
    install(tmp_path / "env", "other_one", "2.0+cpu")
    return tmp_path / "env"


def test_what_is_there_is_found_by_its_normalized_name(root: Path) -> None:
    found = read_environment(root)
    assert found.python == "3.12"
    assert {name: item.version for name, item in found.packages.items()} == {"tiny": "1.0", "other-one": "2.0+cpu"}
    assert (found.complete, found.recorded, found.damaged) == (False, None, {})
    assert repair(found, LOCK).reasons == []


def test_the_hash_is_of_what_is_installed_and_not_of_where(root: Path, tmp_path: Path) -> None:
    install(tmp_path / "longer-name", "tiny", "1.0", script="def")
    install(tmp_path / "longer-name", "other_one", "2.0+cpu")
    assert read_environment(root).hash == read_environment(tmp_path / "longer-name").hash
    install(tmp_path / "third", "tiny", "1.0", extra="# another build\n")
    install(tmp_path / "third", "other_one", "2.0+cpu")
    assert read_environment(root).hash != read_environment(tmp_path / "third").hash


def test_an_environment_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    assert read_environment(tmp_path / "none") == Environment(str(tmp_path / "none"), "", False)


@pytest.mark.parametrize("harm", ["gone", "cut", "no record"])
def test_a_damaged_package_is_named_with_its_file(root: Path, harm: str) -> None:
    site = root / "lib/python3.12/site-packages"
    file = site / ("tiny-1.0.dist-info/RECORD" if harm == "no record" else "tiny.py")
    file.write_text("") if harm == "cut" else file.unlink()
    found = read_environment(root)
    assert set(found.damaged) == {"tiny"}
    todo = repair(found, LOCK)
    assert todo.install == ["tiny==1.0"]
    assert str(file.relative_to(site)) in todo.reasons[0]


def test_a_lock_is_compared_package_by_package(root: Path) -> None:
    install(root, "stray", "3.0")
    todo = repair(read_environment(root), {"tiny": "1.1", "missing": "4.0", "other-one": "2.0+cpu"})
    assert todo.install == ["missing==4.0", "tiny==1.1"]
    assert todo.remove == ["stray"]
    assert todo.reasons == [
        "missing 4.0 is not installed",
        "tiny is 1.0, the lock says 1.1",
        "stray 3.0 is not in the lock",
    ]


def test_another_build_than_the_one_recorded_is_found(root: Path) -> None:
    (root / COMPLETE).write_text(record(read_environment(root)))
    assert repair(read_environment(root), LOCK).install == []
    install(root, "tiny", "1.0", extra="# patched by hand\n")
    assert repair(read_environment(root), LOCK).reasons == ["tiny 1.0 is another build than the one that was installed"]


def test_the_mark_of_an_earlier_berth_is_complete_without_a_record(root: Path) -> None:
    (root / COMPLETE).write_text("runtime-cpu.txt\n")
    found = read_environment(root)
    assert (found.complete, found.recorded) == (True, None)


def test_a_lock_pins_every_line() -> None:
    assert parse_lock("# why\nRay==2.60.0\n\npy_spy==0.4.3 # x\n") == {"ray": "2.60.0", "py-spy": "0.4.3"}
    with pytest.raises(BerthError, match="pins nothing; found: ray>=2"):
        parse_lock("ray>=2\n")


def host(version: str = "v", python: str = "3.12", **packages: str) -> dict[str, Any]:
    def split(text: str) -> dict[str, str]:
        number, _, build = text.partition("/")
        return {"version": number, "content": build or "same"}

    return {"version": version, "python": python, "packages": {n: split(v) for n, v in packages.items()}}


def test_equal_hosts_do_not_differ() -> None:
    assert differences({}) == []
    assert differences({"a": host(ray="1", x="1"), "b": host(ray="1", x="1")}) == []


def test_a_difference_names_host_package_and_both_versions() -> None:
    three = {"gpu01": host(ray="1", x="1.3"), "gpu02": host(ray="1", x="1.2"), "gpu03": host(ray="1", x="1.3")}
    assert list(map(str, differences(three))) == ["gpu02: x 1.2, the other hosts have 1.3"]


def test_missing_surplus_and_rebuilt_packages_differ() -> None:
    two = {"a": host(ray="1", x="1", z="1/p"), "b": host(ray="1", y="2", z="1/q")}
    assert differences(two) == [
        Difference("b", "x", "", "1"),
        Difference("b", "y", "2", ""),
        Difference("b", "z", "1 (build q)", "1 (build p)"),
    ]


def test_hosts_of_two_locks_must_agree_in_python_and_ray_alone() -> None:
    head = host("light", ray="1", x="1")
    assert differences({"head": head, "gpu": host("gpu", ray="1", x="2", vllm="9")}) == []
    found = differences({"head": head, "gpu1": host("gpu", "3.11", ray="2"), "gpu2": host("gpu", "3.11", ray="2")})
    assert [(item.host, item.what) for item in found] == [("head", "Python"), ("head", "ray")]


def test_berths_own_wheel_is_not_compared() -> None:
    assert differences({"a": host(ray="1", berth="1/a"), "b": host(ray="1", berth="1/b")}) == []


NAMES = st.sampled_from(["a" * 12, "b" * 12, "c" * 12, "d" * 12, "e" * 12])
STANDING = st.lists(st.builds(Standing, NAMES, st.integers(0, 9).map(float)), unique_by=lambda item: item.name)


@given(STANDING, st.lists(NAMES, max_size=2), st.integers(2, 6), st.lists(NAMES))
def test_what_goes_is_neither_spared_nor_used_and_the_rest_is_enough(
    found: list[Standing], spared: list[str], keep: int, in_use: list[str]
) -> None:
    gone = set(superfluous(found, spared, keep, in_use))
    names = {item.name for item in found}
    assert gone <= names - set(spared) - set(in_use)
    left = names - gone
    assert len(left) >= min(len(names), keep) or set(spared) - names
    # Nothing that stays without a reason is older than what goes.
    free = {item.name: item.completed_s for item in found if item.name not in set(spared) | set(in_use)}
    assert all(free[one] >= free[other] for one in left & set(free) for other in gone)


def test_too_few_to_go_back_is_refused() -> None:
    with pytest.raises(BerthError, match="found: 1; allowed: >= 2"):
        superfluous([], [], 1, [])


def test_only_environments_are_touched(tmp_path: Path) -> None:
    for name in ("0123456789ab", "ffffffffffff", "notes", "0123"):
        (tmp_path / name).mkdir()
    (tmp_path / "0123456789ab" / COMPLETE).touch()
    (tmp_path / "current").symlink_to(tmp_path / "0123456789ab")
    (tmp_path / "previous").symlink_to(tmp_path / "ffffffffffff")
    (tmp_path / "eeeeeeeeeeee").symlink_to(tmp_path / "notes")
    assert [item.name for item in environments(tmp_path)] == ["0123456789ab", "ffffffffffff"]
    assert (linked(tmp_path / "current"), linked(tmp_path / "previous")) == ("0123456789ab", "")
    assert linked(tmp_path / "none") == ""
    assert environments(tmp_path / "none") == []
    remove(tmp_path / "0123456789ab")
    assert linked(tmp_path / "current") == ""


def test_a_process_that_runs_from_an_environment_keeps_it(tmp_path: Path) -> None:
    environment = tmp_path / "0123456789ab/bin"
    environment.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)
    assert used(tmp_path) == frozenset()
    sleeper = subprocess.Popen([str(environment / "python"), "-c", "import time; print(flush=True); time.sleep(60)"])
    try:
        time.sleep(0.2)
        assert used(tmp_path) == {"0123456789ab"}
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_library_that_is_mapped_counts(tmp_path: Path) -> None:
    """A process whose command line says nothing: Ray's workers set their own title."""
    process = tmp_path / "proc/77"
    process.mkdir(parents=True)
    (process / "cmdline").write_bytes(b"ray::Replica\0")
    library = tmp_path / "root/0123456789ab/lib/x.so"
    (process / "maps").write_text(f"7f00-7f01 r--p 00000000 08:01 12 {library}\n")
    assert used(tmp_path / "root", tmp_path / "proc") == {"0123456789ab"}


def back(previous: str, lock_version: str = "new") -> dict[str, str]:
    return {"lock_version": lock_version, "previous": previous, "lock": f"lock of {previous}"}


def test_a_rollback_pins_the_previous_one_and_another_undoes_it() -> None:
    pins = rolled_back({}, {"a": back("old"), "b": back("old")})
    assert pins == {"new": {"version": "old", "lock": "lock of old"}}
    assert rolled_back(pins, {"a": back("new"), "b": back("new")}) == {}


def test_pins_of_other_locks_stay() -> None:
    earlier = {"light": {"version": "x", "lock": "y"}}
    assert rolled_back(earlier, {"a": back("old")}) == earlier | {"new": {"version": "old", "lock": "lock of old"}}


def test_a_rollback_to_nothing_or_to_two_places_is_refused() -> None:
    with pytest.raises(BerthError, match="no complete previous environment on b; mend:"):
        rolled_back({}, {"a": back("old"), "b": back("")})
    with pytest.raises(BerthError, match="b: older"):
        rolled_back({}, {"a": back("old"), "b": back("older")})
    assert len(rolled_back({}, {"head": back("x", "light"), "gpu": back("y", "gpu")})) == 2
