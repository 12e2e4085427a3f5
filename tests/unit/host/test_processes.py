"""Whose a process is: by environment, by mark file where that was overwritten, never by name or place alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from berth.host.ports import ports_in_use
from berth.host.processes import Mark, mark_of, own_processes, terminate, write_mark
from tests.titles import OVERWRITE_ENVIRONMENT

CLUSTER = f"unit-{os.getpid()}"
WAIT = "print(flush=True); input()"

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[subprocess.Popen[bytes]] = []

    def run(code: str = WAIT, **options: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]
        child.stdout.readline()
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate()


def with_cluster(**more: str) -> dict[str, str]:
    # Never first: what stands first is what a title overwrites.
    return {**os.environ, "BERTH_CLUSTER": CLUSTER, **more}


def test_the_environment_tells(start: Start) -> None:
    child = start(env=with_cluster(BERTH_UNIT="slot@a-0", BERTH_SLOT="a-0"))
    assert mark_of(child.pid) == Mark(CLUSTER, "slot@a-0", "a-0")
    assert [item.pid for item in own_processes(CLUSTER)] == [child.pid]
    assert own_processes("another") == []


def test_the_mark_file_tells_where_the_environment_was_overwritten(start: Start, tmp_path: Path) -> None:
    mark = Mark(CLUSTER, "slot@a-0", "a-0")
    write_mark(tmp_path, mark)
    env = {"BERTH_CLUSTER": CLUSTER, "PADDING": "x" * 400}
    child = start(OVERWRITE_ENVIRONMENT + WAIT, env=env, cwd=tmp_path)
    assert b"BERTH_CLUSTER" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    assert mark_of(child.pid) == mark


def test_a_shell_that_stands_in_our_directory_is_not_ours(start: Start, tmp_path: Path) -> None:
    write_mark(tmp_path, Mark(CLUSTER, "slot@a-0", "a-0"))
    child = start(cwd=tmp_path)
    assert mark_of(child.pid) is None


def test_terminate_ends_ours_and_only_ours(start: Start) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAIT
    ours, deaf, stranger = start(env=with_cluster()), start(stubborn, env=with_cluster()), start()
    assert {item.pid for item in terminate(CLUSTER, grace_s=0.5)} == {ours.pid, deaf.pid}
    assert ours.wait(5) < 0
    assert deaf.wait(5) == -9
    assert stranger.poll() is None


def test_terminate_of_one_unit_spares_the_others(start: Start) -> None:
    one, two = start(env=with_cluster(BERTH_UNIT="slot@a-0")), start(env=with_cluster(BERTH_UNIT="slot@a-1"))
    terminate(CLUSTER, grace_s=2, units=frozenset({"slot@a-0"}))
    assert one.wait(5) < 0
    assert two.poll() is None


LISTEN = "import socket; s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen();" + WAIT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_stranger_on_a_port_is_named_and_ours_is_fine(start: Start) -> None:
    port = free_port()
    assert ports_in_use({"serve_apps_http_port": port}, CLUSTER) == []
    stranger = start(LISTEN.format(port=port))
    (found,) = ports_in_use({"serve_apps_http_port": port}, CLUSTER)
    assert (found.name, found.port, found.pid) == ("serve_apps_http_port", port, stranger.pid)
    assert "socket" in (found.command or "")
    other = free_port()
    start(LISTEN.format(port=other), env=with_cluster())
    assert ports_in_use({"serve_apps_http_port": other}, CLUSTER) == []
