"""Token and TLS on real Ray: two nodes started by berth.ray.launch, a client that may and clients that may not."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from berth.codec import dump
from berth.host import tls
from berth.host.tls_seen import shown
from berth.ray.client import RayClient, TokenRefused
from berth.ray.start import NodeConfig, environment, node_ports

ROOT = Path(__file__).resolve().parents[3]
# Loopback addresses that Ray takes as they are: 127.0.0.1 it replaces by the host's own.
HEAD_IP, SLOT_IP = "127.0.0.2", "127.0.0.3"
PORTS = 23000
DAY = dt.timedelta(days=1)
WAIT_S = 120
"""A cluster starts in 10 s on an idle machine."""

pytestmark = pytest.mark.runtime


@dataclass
class Secured:
    """A running cluster; ``base`` holds certificates, token and logs."""

    base: Path
    python: str
    head: NodeConfig
    slot: NodeConfig

    def client(self, *command: str, env: dict[str, str] | None = None, **changes: str) -> subprocess.CompletedProcess:
        """Run ``command`` on the head's host as one who has what the head has, but for ``changes``."""
        own = {**(environment(self.head, ()) if env is None else env), "PYTHONPATH": str(ROOT), **changes}
        return subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=60)

    def knock(self, **changes: str) -> str:
        """gRPC's status of a call to the GCS."""
        script = str(Path(__file__).with_name("knock.py"))
        done = self.client(self.python, script, self.head.gcs_address, **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def logs(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in self.base.glob("*.log"))


def write(base: Path, node: NodeConfig) -> Path:
    path = base / f"{'head' if node.kind == 'head' else f'slot-{node.name}'}.json"
    path.write_text(json.dumps({node.name: dump(node)}))
    return path


def node(base: Path, python: str, **own: Any) -> NodeConfig:
    common = {
        "cluster": "secured-test",
        "ray": str(Path(python).with_name("ray")),
        "gcs_address": f"{HEAD_IP}:{PORTS}",
        "token_file": str(base / "token"),
        "tls_dir": str(base / own["name"]),
        "node_port_count": 60,
        "memory_bytes": 2**30,
        "object_store_bytes": 2**27,
    }
    return NodeConfig(**{**common, **own})


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, runtime: str) -> Iterator[Secured]:
    # Ray puts sockets below it, whose paths are 107 bytes at most.
    base = tmp_path_factory.mktemp("s")
    hosts = {"head": [HEAD_IP], "gpu01-0": [SLOT_IP], "stranger": [HEAD_IP]}
    terms = tls.Terms(authority=3650 * DAY, host=365 * DAY, renew_before=60 * DAY)
    made = tls.plan(base / "made", "test", hosts, terms, dt.datetime.now(dt.UTC))
    tls.write(base / "made", made)
    tls.write(base / "other", tls.plan(base / "other", "other", hosts, terms, dt.datetime.now(dt.UTC)))
    for name, source in (("head", "made"), ("gpu01-0", "made"), ("stranger", "other")):
        (base / name).mkdir()
        host = "head" if name == "stranger" else name
        for end in ("crt", "key"):
            (base / name / f"node.{end}").symlink_to(base / source / f"{host}.{end}")
        (base / name / "ca.crt").symlink_to(base / source / "ca.crt")
    for name, character in (("token", "a"), ("wrong", "b")):
        (base / name).write_text(character * 64)
    head = node(
        base,
        runtime,
        kind="head",
        name="head",
        node_ip=HEAD_IP,
        temp_dir=f"/tmp/berth-test-{os.getpid()}/h",
        dashboard_agent_port=PORTS + 1,
        metrics_port=PORTS + 2,
        dashboard_port=PORTS + 3,
        client_port=PORTS + 4,
        node_port_base=PORTS + 100,
        num_cpus=0,
    )
    slot = node(
        base,
        runtime,
        kind="slot",
        name="gpu01-0",
        node_ip=SLOT_IP,
        temp_dir=f"/tmp/berth-test-{os.getpid()}/s",
        dashboard_agent_port=PORTS + 5,
        metrics_port=PORTS + 6,
        node_port_base=PORTS + 200,
        num_cpus=2,
        log_monitor=False,
    )
    cluster = Secured(base, runtime, head, slot)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for item in (head, slot):
            with (base / f"{item.name}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [runtime, "-m", "berth.ray.launch", str(write(base, item)), item.name],
                        env={**os.environ, "PYTHONPATH": str(ROOT)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        # A group of its own, to be stopped whole.
                        start_new_session=True,
                    )
                )
        wait_for_both(cluster)
        yield cluster
    finally:
        for process in reversed(started):
            stop(process)
        subprocess.run(["rm", "-rf", f"/tmp/berth-test-{os.getpid()}"], check=True)


@pytest.fixture(scope="module")
def runtime() -> str:
    """``runtime_python`` of tests/conftest.py, for fixtures that live longer than a test."""
    from tests.conftest import find_runtime

    return find_runtime()


def wait_for_both(cluster: Secured) -> None:
    client = RayClient(f"http://127.0.0.1:{cluster.head.dashboard_port}", "a" * 64, timeout_s=5)
    until = time.monotonic() + WAIT_S
    found: list[dict[str, Any]] = []
    while time.monotonic() < until:
        try:
            found = [item for item in client.nodes() if item["state"] == "ALIVE"]
        except Exception:
            found = []
        if len(found) == 2:
            return
        time.sleep(0.5)
    pytest.fail(f"the two nodes did not meet: {found}\n{cluster.logs()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group at once: nothing of this cluster is to be kept."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_serve_works_across_nodes(secured: Secured) -> None:
    script = str(Path(__file__).with_name("secured_app.py"))
    done = secured.client(secured.python, script, secured.head.gcs_address, HEAD_IP, str(PORTS + 10))
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}\n{secured.logs()}"
    assert json.loads(done.stdout.splitlines()[-1]) == {"replica": SLOT_IP, "object": 20_000_000}


def test_only_who_has_certificate_and_token_comes_in(secured: Secured) -> None:
    other = {
        "RAY_TLS_SERVER_CERT": str(secured.base / "stranger/node.crt"),
        "RAY_TLS_SERVER_KEY": str(secured.base / "stranger/node.key"),
    }
    assert secured.knock() == "OK"
    assert secured.knock(RAY_USE_TLS="0") == "UNAVAILABLE", "a client without a certificate"
    assert secured.knock(**other) == "UNAVAILABLE", "a client with another authority's certificate"
    wrong = str(secured.base / "wrong")
    assert secured.knock(RAY_AUTH_TOKEN_PATH=wrong) == "UNAUTHENTICATED", "a client with the wrong token"


def test_every_grpc_port_demands_a_certificate(secured: Secured) -> None:
    with_one, without = context(secured.base / "head", True), context(secured.base / "head", False)
    for item in (secured.head, secured.slot):
        ports = node_ports(item)
        for port in filter(None, (ports.gcs_port, ports.node_manager, ports.object_manager, ports.agent_grpc)):
            assert greeting(with_one, item.node_ip, port), f"port {port} does not greet a peer"
            assert not greeting(without, item.node_ip, port), f"port {port} greets anybody"


def context(directory: Path, certificate: bool) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    made.set_alpn_protocols(["h2"])
    if certificate:
        made.load_cert_chain(directory / "node.crt", directory / "node.key")
    return made


def greeting(made: ssl.SSLContext, address: str, port: int) -> bytes:
    """What a gRPC server says first (its HTTP/2 settings), b"" when it hangs up instead."""
    plain = socket.create_connection((address, port), 10)
    try:
        with made.wrap_socket(plain, server_hostname=address) as secure:
            return secure.recv(9)
    except (ssl.SSLError, ConnectionResetError):
        return b""


def test_what_tls_does_not_cover_wants_the_token_or_is_open(secured: Secured) -> None:
    """docs/security.md says what each port does: this is its witness."""
    with pytest.raises(TokenRefused):
        RayClient(f"http://127.0.0.1:{secured.head.dashboard_port}", "b" * 64).serve()
    ports = node_ports(secured.slot)
    for port in (ports.dashboard_agent_port, ports.runtime_env_agent):
        assert requests.get(f"http://{SLOT_IP}:{port}/", timeout=5).status_code == 401
    assert requests.get(f"http://{SLOT_IP}:{ports.metrics_port}/metrics", timeout=5).status_code == 200


def test_the_nodes_show_the_certificates_they_started_with(secured: Secured) -> None:
    found = shown([secured.head, secured.slot])
    assert [(item.node, item.problem) for item in found] == [("head", ""), ("gpu01-0", "")]
    assert {item.ends for item in found} == {
        tls.end((secured.base / "made" / f"{name}.crt").read_text()) for name in ("head", "gpu01-0")
    }


def test_the_token_is_in_no_command_line_and_no_log(secured: Secured) -> None:
    token = "a" * 64
    started = [process for process in psutil.process_iter() if _of_the_test(process)]
    assert len(started) >= 6
    assert not [process for process in started if token in " ".join(process.cmdline())]
    assert not [process for process in started if token in process.environ().values()]
    logs = [path for node in (secured.head, secured.slot) for path in Path(node.temp_dir).glob("session_*/logs/**/*")]
    assert logs
    assert not [path for path in logs if path.is_file() and token in path.read_text(errors="replace")]
    assert token not in secured.logs()


def _of_the_test(process: psutil.Process) -> bool:
    try:
        return any(f"berth-test-{os.getpid()}" in word for word in process.cmdline())
    except psutil.Error:
        return False
