"""The fact reader as it runs on a fresh host: any Python from 3.9, the standard library, no berth."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from berth.codec import load
from berth.host.processes import CLUSTER_VARIABLE, MARK_FILE, Mark, cluster_of, write_mark
from berth.preflight.facts import HostFacts
from tests.titles import OVERWRITE_ENVIRONMENT
from tests.unit.preflight.builders import ROOT

MODULE = ROOT / "library/preflight_facts.py"
TREE = ast.parse(MODULE.read_text(encoding="utf-8"), feature_version=(3, 9))
CLUSTER = f"preflight-{os.getpid()}"
WAIT = "print(flush=True); input()"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight_facts", MODULE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def ask(**changes: Any) -> dict[str, Any]:
    lists = ("paths", "exists", "sha1", "commands", "interpreters", "addresses", "peers", "ports")
    return {**{name: [] for name in lists}, **changes}


def test_it_imports_the_standard_library_alone() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(TREE)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"ansible"}


def test_what_it_tells_is_what_is_judged(module: ModuleType, tmp_path: Path) -> None:
    found = load(HostFacts, module.look(ask(paths=[str(tmp_path / "not" / "there"), "/dev/shm"])), "facts")
    assert found.system == "Linux"
    assert found.hostname == socket.gethostname()
    assert found.memory_mib == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    assert found.euid == os.geteuid()
    assert found.time_start <= found.time_end
    told = found.filesystems[str(tmp_path / "not" / "there")]
    assert told.at == str(tmp_path.resolve())
    assert abs(told.total_mib - shutil.disk_usage(tmp_path).total // 2**20) <= 1
    assert os.path.ismount(told.mount)
    assert {"rw", "ro"} & set(told.options)


def test_interpreters_commands_and_paths(module: ModuleType) -> None:
    found = module.look(
        ask(interpreters=[sys.executable, "no-such-python", "false"], commands=["sh", "no-such"], exists=["/", "/no"])
    )
    assert found["interpreters"][sys.executable]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["interpreters"]["no-such-python"] == {"version": "", "venv": False, "error": "not there"}
    assert found["interpreters"]["false"]["version"] == ""
    assert found["commands"] == {"sh": True, "no-such": False}
    assert found["exists"] == {"/": True, "/no": False}


def test_digests_of_files(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mark").write_bytes(b"wheel")
    paths = [str(tmp_path / name) for name in ("mark", "none")]
    found = module.look(ask(sha1=paths))["sha1"]
    assert found == dict(zip(paths, [hashlib.sha1(b"wheel").hexdigest(), ""], strict=True))


def test_addresses(module: ModuleType) -> None:
    found = module.look(ask(addresses=["127.0.0.1", "203.0.113.1", "no-such-host.invalid"]))["addresses"]
    assert (found["127.0.0.1"]["here"], found["127.0.0.1"]["interface"]) == (True, "lo")
    assert found["127.0.0.1"]["mtu"] == int(Path("/sys/class/net/lo/mtu").read_text())
    assert (found["203.0.113.1"]["here"], found["203.0.113.1"]["mtu"]) == (False, None)
    assert found["no-such-host.invalid"]["ip"] == ""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found


def test_peers_that_listen_refuse_or_have_no_name(module: ModuleType, listener: socket.socket) -> None:
    here = listener.getsockname()[1]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = unused.getsockname()[1]
        peers = [
            {"host": "a", "address": "127.0.0.1", "ports": [here, closed]},
            {"host": "b", "address": "no-such-host.invalid", "ports": [1]},
        ]
        found = module.look(ask(peers=peers))["peers"]
    states = {(item["host"], item["port"]): item["state"] for item in found}
    assert states == {("a", here): "open", ("a", closed): "refused", ("b", 1): "unresolved"}
    assert found[0]["mtu"] > 1000


def test_listeners_and_whose_they_are(module: ModuleType, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    (found,) = module.look(ask(ports=[port, 1]))["listeners"]
    assert (found["port"], found["pid"], found["cluster"]) == (port, os.getpid(), None)
    assert "python" in found["command"]


@pytest.mark.parametrize("overwritten", [False, True])
def test_it_knows_berths_processes_as_berth_does(module: ModuleType, tmp_path: Path, overwritten: bool) -> None:
    assert module.CLUSTER_VARIABLE.decode() == f"{CLUSTER_VARIABLE}="
    assert module.MARK_FILE == MARK_FILE
    write_mark(tmp_path, Mark(CLUSTER, "slot@a-0", "a-0"))
    command = [sys.executable, "-c", (OVERWRITE_ENVIRONMENT if overwritten else "") + WAIT]
    environment = {**os.environ} if overwritten else {**os.environ, "BERTH_CLUSTER": CLUSTER}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=environment
    ) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert module._cluster_of(child.pid) == cluster_of(child.pid) == CLUSTER
        finally:
            child.kill()


def older_pythons() -> list[str]:
    """Interpreters of this machine that are as old as a host's may be."""
    names = [f"python3.{minor}" for minor in (9, 10)]
    found = [path for name in names if (path := shutil.which(name))]
    return [path for path in found if subprocess.run([path, "-V"], capture_output=True, check=False).returncode == 0]


@pytest.mark.parametrize("python", older_pythons() or [sys.executable])
def test_it_runs_under_the_oldest_python_here(python: str, tmp_path: Path) -> None:
    import ansible

    arguments = {"ANSIBLE_MODULE_ARGS": {"ask": {"paths": ["/tmp"], "ports": [1], "addresses": ["127.0.0.1"]}}}
    (tmp_path / "args").write_text(json.dumps(arguments))
    # As Ansible ships it: the module utilities, and nothing else that is installed here.
    site = tmp_path / "site"
    site.mkdir()
    (site / "ansible").symlink_to(Path(ansible.__file__).parent)
    done = subprocess.run(
        [python, "-S", str(MODULE), str(tmp_path / "args")],
        env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = load(HostFacts, json.loads(done.stdout)["preflight"], "facts")
    assert facts.addresses["127.0.0.1"].here
