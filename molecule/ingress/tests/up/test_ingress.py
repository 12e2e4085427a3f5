"""The ingress before real Serve proxies: what clients see while the head dies, a configuration changes, jobs run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.lab import ROOT, Lab, container, docker, on

INGRESSES = ("edge01", "head01")
SECRETS = ROOT / ".berth/lab-ingress/controller/secrets"
AUTHORITY = str(SECRETS / "ingress-tls/ca.crt")
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "a prompt that nobody logs"}]}
HEAD_DOWN_S = 20.0
THREADS = 4


@pytest.fixture(scope="module")
def addresses() -> dict[str, str]:
    return {host: Lab().address(host) for host in INGRESSES}


def key(name: str) -> str:
    return (SECRETS / "ingress-keys" / name).read_text().strip()


def ask(address: str, path: str, method: str = "POST", name: str = "load", **more: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key(name)}"}
    url = f"https://{address}:8443{path}"
    return requests.request(method, url, headers=headers, verify=AUTHORITY, timeout=40, **more)


@contextmanager
def load(addresses: dict[str, str]) -> Iterator[Counter[str]]:
    """Chat with every ingress all the while; how often each came (a status, or an exception's name)."""
    found: Counter[str] = Counter()
    ended = threading.Event()

    def chat(address: str) -> None:
        while not ended.is_set():
            try:
                found[str(ask(address, "/v1/chat/completions", json=CHAT).status_code)] += 1
            except requests.RequestException as error:
                found[type(error).__name__] += 1

    threads = [threading.Thread(target=chat, args=(address,)) for address in addresses.values() for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def eventually(true: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def connections(host: str) -> int:
    """Clients' open connections, the one that asks not counted."""
    status = on(host, "curl", "-s", "--unix-socket", "/run/berth-ingress/status.sock", "http://ingress/status")
    found = re.search(r"Active connections: (\d+)", status)
    assert found
    return int(found.group(1)) - 1


@pytest.mark.parametrize("host", INGRESSES)
def test_a_key_lets_in_and_nothing_else_does(host: str, addresses: dict[str, str]) -> None:
    good = ask(addresses[host], "/v1/chat/completions", json=CHAT)
    assert (good.status_code, good.json()["model"]) == (200, "chat")
    wrong = requests.get(f"https://{addresses[host]}:8443/v1/models", verify=AUTHORITY, timeout=10)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    health = requests.get(f"https://{addresses[host]}:8443/healthz", verify=AUTHORITY, timeout=10)
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    narrow = [ask(addresses[host], "/v1/models", "GET", "narrow") for _ in range(3)]
    assert [answer.status_code for answer in narrow] == [200, 200, 429]
    assert narrow[-1].headers["Retry-After"] == "5"


def test_the_head_dies_for_20_seconds_under_load_and_no_client_sees_it(addresses: dict[str, str], lab: Lab) -> None:
    with load(addresses) as found:
        time.sleep(5)
        on("head01", "systemctl", "kill", "--signal=KILL", "berth-ray-head")
        on("head01", "systemctl", "stop", "berth-ray-head")
        before = found.total()
        time.sleep(HEAD_DOWN_S)
        during = found.total() - before
        on("head01", "systemctl", "start", "berth-ray-head")
        time.sleep(30)
    print(f"answers: {dict(found)}, {during} while the head was down")
    assert set(found) == {"200"}, found
    assert during > 100
    eventually(lambda: lab.verify()["rc"] == 0, 180)


def test_another_configuration_is_taken_up_under_load(addresses: dict[str, str], lab: Lab) -> None:
    before = {host: on(host, "systemctl", "show", "--property=MainPID", "berth-ingress") for host in INGRESSES}
    with load(addresses) as found:
        lab.start("site.yml", "--tags", "ingress", "-e", "ingress_retry_after_s=7").ok()
        time.sleep(2)
    assert set(found) == {"200"}, found
    assert {host: on(host, "systemctl", "show", "--property=MainPID", "berth-ingress") for host in INGRESSES} == before
    narrow = [ask(addresses["edge01"], "/v1/models", "GET", "narrow") for _ in range(3)]
    assert narrow[-1].headers["Retry-After"] == "7"
    again = lab.start("site.yml", "--tags", "ingress", "-e", "ingress_retry_after_s=7").ok()
    assert "changed=0" in again.output


def test_what_nginx_does_not_take_up_is_told_and_the_old_goes_on(addresses: dict[str, str], lab: Lab) -> None:
    on("edge01", "systemd-run", "--unit=lab-other", "--collect", "python3", "-m", "http.server", "9443")
    eventually(lambda: ":9443" in on("edge01", "ss", "-Htln"))
    refused = lab.start("site.yml", "--tags", "ingress", "-e", "ingress_port=9443")
    assert refused.rc != 0
    assert "goes on with the configuration that it had" in " ".join(refused.output.split())
    assert ask(addresses["edge01"], "/v1/models", "GET").status_code == 200
    on("edge01", "systemctl", "stop", "lab-other")
    lab.start("site.yml", "--tags", "ingress").ok()
    assert ask(addresses["edge01"], "/v1/models", "GET").status_code == 200


# --- Long jobs, on a Serve app of somebody else's ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs(addresses: dict[str, str]) -> str:
    script = Path(__file__).resolve().parents[2] / "files/jobs.py"
    docker("cp", str(script), f"{container('head01')}:/var/lib/berth/jobs.py")
    run = (
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/etc/berth/ray-token TMPDIR=/run/berth/tmp"
        f" RAY_ADDRESS={addresses['head01']}:6390;"
        " exec runuser -u berth -- /var/lib/berth/runtime/current/bin/python /var/lib/berth/jobs.py"
    )
    done = subprocess.run(
        ["docker", "exec", container("head01"), "sh", "-c", run], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    eventually(lambda: ask(addresses["edge01"], "/jobs/state", "GET").status_code == 200)
    return addresses["edge01"]


def test_a_job_of_a_minute_and_a_half_streams_to_its_end(jobs: str) -> None:
    """Longer than the time that a proxy may be silent elsewhere (20 s), and silent for longer than that."""
    started, times = time.monotonic(), []
    with ask(jobs, "/jobs/run", json={"lines": 4, "pause_s": 30}, stream=True) as response:
        times = [time.monotonic() - started for line in response.iter_lines() if line]
    assert len(times) == 4
    assert times[0] < 5
    assert times[-1] > 85


def test_jobs_whose_clients_leave_are_cancelled_and_nothing_stays_open(jobs: str) -> None:
    before = ask(jobs, "/jobs/state", "GET").json()
    held = connections("edge01")
    clients = [ask(jobs, "/jobs/run", json={"lines": 1000, "pause_s": 0.5}, stream=True) for _ in range(8)]
    # An iterator that nobody keeps closes its response.
    streams = [client.iter_lines() for client in clients]
    assert {next(stream) for stream in streams} == {b"data: 0"}
    assert ask(jobs, "/jobs/state", "GET").json()["running"] == before["running"] + 8
    for client in clients:
        client.close()
    eventually(lambda: ask(jobs, "/jobs/state", "GET").json()["running"] == before["running"], 20)
    assert ask(jobs, "/jobs/state", "GET").json()["cancelled"] == before["cancelled"] + 8
    eventually(lambda: connections("edge01") <= held, 20)


# --- The host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", INGRESSES)
def test_the_unit_runs_comes_back_and_is_kept_within_bounds(host: str) -> None:
    shown = on(host, "systemctl", "show", "berth-ingress").splitlines()
    found = dict(line.split("=", 1) for line in shown if "=" in line)
    wanted = {
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "NRestarts": "0",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "PrivateDevices": "yes",
        "Restart": "always",
    }
    assert {name: found.get(name) for name in wanted} == wanted
    owners = [line.split() for line in on(host, "ps", "-eo", "user:20,args").splitlines() if "nginx: " in line]
    assert {owner[0] for owner in owners if "worker" in owner} == {"berth-ingress"}


@pytest.mark.parametrize("host", INGRESSES)
def test_the_packages_own_service_is_off(host: str) -> None:
    states = on(host, "systemctl", "show", "--property=ActiveState,UnitFileState", "nginx.service").split()
    assert set(states) == {"ActiveState=inactive", "UnitFileState=disabled"}
    assert not [line for line in on(host, "ss", "-Htln").splitlines() if line.split()[3].endswith(":80")]


def test_an_ingress_that_is_no_node_has_nothing_of_rays() -> None:
    assert on("edge01", "sh", "-c", "ls -d /etc/berth /var/lib/berth 2>/dev/null; true") == ""


@pytest.mark.parametrize("host", INGRESSES)
def test_the_journal_says_who_and_never_what(host: str) -> None:
    text = on(host, "journalctl", "--no-pager", "--output=cat", "--unit=berth-ingress")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    good = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert {line["key"] for line in good} == {"load"}
    assert all(line["proxy"] for line in good)
    for hidden in (CHAT["messages"][0]["content"], key("load"), key("narrow")):
        assert hidden not in text
    assert "[emerg]" not in text or host == "edge01", "there it was told that a port is taken"
    assert on(host, "stat", "--format=%a %U", "/etc/berth-ingress/keys.conf").strip() == "600 root"
    assert os.stat(SECRETS / "ingress-keys/load").st_mode & 0o777 == 0o600
