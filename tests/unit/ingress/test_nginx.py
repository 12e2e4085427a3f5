"""A real nginx with the configuration that the role writes, before proxies that count what reaches them."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import requests

from tests.unit.ingress.fake_proxy import FakeProxy
from tests.unit.ingress.site import HOSTS, NGINX, Site, free_port

pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx (apt-get install nginx)")

GIVEN = "given-key-of-nobody-but-this-test-0123456789"
KEYS = [
    {"name": "usual"},
    {"name": "slow", "requests_per_minute": 6, "burst": 2},
    {"name": "few", "key": GIVEN, "connections": 2},
]
LIMITS = {"ingress_requests_per_minute": 60000, "ingress_burst": 1000, "ingress_keys": KEYS}
TIMES = {
    "ingress_header_timeout_s": 1,
    "ingress_body_timeout_s": 1,
    "ingress_read_timeout_s": 2,
    "ingress_long_paths": ["/v1/jobs/"],
    "ingress_host_pause_s": 1,
}
HOST_REQUESTS = 6
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def proxies() -> Iterator[dict[str, FakeProxy]]:
    port = free_port()
    found = {host: FakeProxy(address, port) for host, address in HOSTS.items()}
    yield found
    for proxy in found.values():
        proxy.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, proxies: dict[str, FakeProxy]) -> Iterator[Site]:
    base = tmp_path_factory.mktemp("ingress")
    base.chmod(0o755)
    options = {**LIMITS, **TIMES, "ingress_max_body_mib": 1, "ingress_host_requests": HOST_REQUESTS}
    found = Site(base, proxies["gpu01"].port, {"ingress_tls": "none", **options})
    assert found.ok() > 0
    found.start()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def nothing_stays_open(site: Site, proxies: dict[str, FakeProxy]) -> Iterator[None]:
    """After every test: as many open connections, on both sides, as before it."""
    yield
    eventually(lambda: site.connections() == 0)
    eventually(lambda: sum(proxy.open for proxy in proxies.values()) == 0)


def eventually(true: Callable[[], bool], timeout_s: float = 8.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(site: Site, path: str, key: str = "usual", method: str = "POST", **more: Any) -> requests.Response:
    text = GIVEN if key == "few" else site.key(key)
    headers = {"Authorization": f"Bearer {text}", "Connection": "close", **more.pop("headers", {})}
    return requests.request(method, f"http://127.0.0.1:{site.port}{path}", headers=headers, timeout=20, **more)


def asked(proxies: dict[str, FakeProxy], path: str) -> int:
    return sum(proxy.asked[path] for proxy in proxies.values())


def error(response: requests.Response) -> dict[str, Any]:
    """The answer's error; every answer of the ingress's own is OpenAI's shape."""
    assert response.headers["Content-Type"] == "application/json"
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [None, "Bearer wrong", "Bearer ", GIVEN, f"Basic {GIVEN}", f"Bearer {GIVEN[:-1]}"])
def test_without_a_good_key_nothing_reaches_a_proxy(site: Site, proxies: dict[str, FakeProxy], sent: str) -> None:
    before = asked(proxies, "/v1/models")
    headers = {"Authorization": sent} if sent is not None else {}
    response = requests.get(f"http://127.0.0.1:{site.port}/v1/models", headers=headers, timeout=5)
    assert (response.status_code, error(response)["code"]) == (401, "invalid_api_key")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert asked(proxies, "/v1/models") == before


def test_a_proxy_hears_who_asks_from_where_and_no_key(site: Site) -> None:
    response = ask(site, "/v1/chat/completions?x=1", json={"model": "chat"})
    assert response.status_code == 200
    heard = response.json()["headers"]
    assert "authorization" not in heard
    assert heard["x-forwarded-for"] == "127.0.0.1"
    assert heard["x-request-id"] == response.headers["X-Request-Id"]
    assert response.json()["bytes"] == len('{"model": "chat"}')


def test_a_key_that_was_given_works_as_one_that_was_made(site: Site) -> None:
    assert ask(site, "/v1/models", key="few", method="GET").status_code == 200


def test_health_needs_no_key_and_names_no_model(site: Site, proxies: dict[str, FakeProxy]) -> None:
    url = f"http://127.0.0.1:{site.port}/healthz"
    good = requests.get(url, timeout=5)
    assert (good.status_code, good.json()) == (200, {"status": "ok"})
    for proxy in proxies.values():
        proxy.healthy = False
    try:
        bad = requests.get(url, timeout=5)
    finally:
        for proxy in proxies.values():
            proxy.healthy = True
    assert (bad.status_code, error(bad)["code"]) == (503, "overloaded")
    assert bad.headers["Retry-After"] == "5"


@pytest.mark.parametrize("path", ["/-/routes", "/-/healthz", "/%2d/routes", "//-/routes", "/-/error/413", "/-/models"])
def test_serves_own_addresses_are_not_for_clients(site: Site, proxies: dict[str, FakeProxy], path: str) -> None:
    before = sum(proxy.asked.total() for proxy in proxies.values())
    response = ask(site, path, method="GET")
    assert (response.status_code, error(response)["code"]) == (404, "not_found")
    assert sum(proxy.asked.total() for proxy in proxies.values()) == before


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_above_its_rate_a_key_is_told_when_to_come_again_and_others_go_on(site: Site) -> None:
    found = [ask(site, "/v1/models", key="slow", method="GET") for _ in range(5)]
    assert [response.status_code for response in found] == [200, 200, 200, 429, 429]
    assert error(found[-1])["type"] == "rate_limit_error"
    assert found[-1].headers["Retry-After"] == "5"
    assert all(ask(site, "/v1/models", method="GET").status_code == 200 for _ in range(20))


def test_a_key_has_so_many_requests_at_once_and_no_more(site: Site) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ask(site, "/v1/slow", key="few").status_code, range(4)))
    assert sorted(found) == [200, 200, 429, 429]


def test_when_every_host_has_its_fill_the_answer_is_503_at_once(site: Site, proxies: dict[str, FakeProxy]) -> None:
    room = HOST_REQUESTS * len(HOSTS)
    before, started = asked(proxies, "/v1/slow"), time.monotonic()
    with ThreadPoolExecutor(room + 6) as pool:
        found = list(pool.map(lambda _: (ask(site, "/v1/slow"), time.monotonic() - started), range(room + 6)))
    refused = [(response, after) for response, after in found if response.status_code != 200]
    assert len(refused) == 6
    assert asked(proxies, "/v1/slow") == before + room, "nothing that was refused was begun"
    for response, _after in refused:
        assert (response.status_code, error(response)["code"]) == (503, "overloaded")
        assert response.headers["Retry-After"] == "5"
    assert min(after for _response, after in refused) < 1.4, "no queue"


def test_a_503_of_serves_own_gets_its_retry_after(site: Site) -> None:
    response = ask(site, "/v1/busy")
    assert (response.status_code, response.json()) == (503, {"error": {"message": "from Serve"}})
    assert response.headers["Retry-After"] == "5"


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_a_body_of_100_mb_is_refused_and_reaches_no_proxy(site: Site, proxies: dict[str, FakeProxy]) -> None:
    before = asked(proxies, "/v1/big")
    response = ask(site, "/v1/big", data=b"x" * (100 * MIB))
    assert (response.status_code, error(response)["code"]) == (413, "request_too_large")
    assert "1 MiB" in error(response)["message"]
    assert ask(site, "/v1/big", data=iter([b"x" * MIB, b"x"])).status_code == 413, "nor without a length"
    assert asked(proxies, "/v1/big") == before
    assert ask(site, "/v1/big", data=b"x" * MIB).status_code == 200


def connect(site: Site, text: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", site.port), timeout=10)
    client.sendall(text.encode())
    return client


def test_slow_loris_clients_are_let_go_while_others_are_answered(site: Site, proxies: dict[str, FakeProxy]) -> None:
    before = sum(proxy.asked.total() for proxy in proxies.values())
    headers = [connect(site, f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-{n}: ") for n in range(30)]
    line = f"POST /v1/big HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.key('usual')}\r\n"
    bodies = [connect(site, f"{line}Content-Length: 1000\r\n\r\nx") for _ in range(30)]
    assert site.connections() == 60
    assert ask(site, "/v1/models", method="GET").status_code == 200
    started = time.monotonic()
    for client in (*headers, *bodies):
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
        client.close()
    assert time.monotonic() - started < 4
    assert sum(proxy.asked.total() for proxy in proxies.values()) == before + 1, "no proxy heard of them"


@pytest.mark.parametrize(
    ("text", "status"),
    [("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400), (f"GET / HTTP/1.1\r\nHost: x\r\nX: {'x' * 40000}\r\n\r\n", 400)],
)
def test_what_cannot_be_read_is_refused_in_openais_shape(site: Site, text: str, status: int) -> None:
    with connect(site, text) as client:
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.split()[1] == str(status)
    assert json.loads(body)["error"]["code"] == "bad_request"


# --- Streams, long jobs, clients that leave ---------------------------------------------------------------------------


def test_a_stream_comes_as_it_is_made(site: Site) -> None:
    started = time.monotonic()
    with ask(site, "/v1/stream", stream=True) as response:
        times = [time.monotonic() - started for line in response.iter_lines() if line]
    assert len(times) == 10
    assert times[0] < 0.5
    assert times[-1] - times[0] > 1.5


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/silent", "/v1/jobs/silent"])
def test_the_proxy_is_left_when_the_client_leaves(site: Site, proxies: dict[str, FakeProxy], path: str) -> None:
    name = "/v1/stream" if path == "/v1/stream" else "/v1/silent"
    before = sum(proxy.left[name] for proxy in proxies.values())
    line = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.key('usual')}\r\nContent-Length: 2\r\n\r\n"
    client = connect(site, f"{line}{{}}")
    eventually(lambda: sum(proxy.open for proxy in proxies.values()) == 1)
    if path == "/v1/stream":
        assert b"200 OK" in client.recv(100)
    client.close()
    eventually(lambda: sum(proxy.left[name] for proxy in proxies.values()) == before + 1, 1.5)


def test_a_silent_proxy_is_given_up_but_not_where_jobs_run_long(site: Site) -> None:
    given_up = ask(site, "/v1/silent")
    assert (given_up.status_code, error(given_up)["code"]) == (504, "timeout")
    assert ask(site, "/v1/jobs/silent").status_code == 200


def test_a_web_socket_goes_through(site: Site) -> None:
    headers = f"Authorization: Bearer {site.key('usual')}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    with connect(site, f"GET /v1/socket HTTP/1.1\r\nHost: x\r\n{headers}\r\n") as client:
        found = b""
        while b"\r\n\r\n" not in found:
            found += client.recv(1000)
        assert b" 101 " in found
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"


# --- Proxies that die -------------------------------------------------------------------------------------------------


def test_the_head_is_asked_when_no_other_host_answers(site: Site, proxies: dict[str, FakeProxy]) -> None:
    body = {"json": {"model": "chat"}}
    before = proxies["head01"].asked["/v1/which"]
    assert {ask(site, "/v1/which", **body).json()["host"] for _ in range(20)} == {HOSTS["gpu01"], HOSTS["gpu02"]}
    assert proxies["head01"].asked["/v1/which"] == before
    try:
        proxies["gpu01"].stop()
        assert {ask(site, "/v1/which", **body).json()["host"] for _ in range(20)} == {HOSTS["gpu02"]}
        proxies["gpu02"].stop()
        assert {ask(site, "/v1/which", **body).json()["host"] for _ in range(20)} == {HOSTS["head01"]}
        proxies["head01"].stop()
        nobody = ask(site, "/v1/which", **body)
        assert (nobody.status_code, error(nobody)["code"]) == (503, "overloaded")
        assert nobody.headers["Retry-After"] == "5"
    finally:
        for proxy in proxies.values():
            proxy.stop()
            proxy.start()
    eventually(lambda: ask(site, "/v1/which", **body).json().get("host") == HOSTS["gpu01"])


def test_a_host_that_dies_under_load_loses_only_what_it_had_begun(site: Site, proxies: dict[str, FakeProxy]) -> None:
    """New requests go elsewhere: none fails that began after the kill."""
    found: list[int] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            found.append(ask(site, "/v1/load", json={}).status_code)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    proxies["gpu01"].stop()
    time.sleep(2.5)
    proxies["gpu01"].start()
    time.sleep(1)
    ended.set()
    for thread in threads:
        thread.join()
    broken = [status for status in found if status != 200]
    assert len(found) > 100
    # 503: a machine that is busy enough fails an answer of the other hosts too, and for a moment none is left to ask.
    assert set(broken) <= {502, 503}
    assert len(broken) <= 4, "at most what was under way"


def test_what_may_have_been_done_is_not_done_twice(site: Site, proxies: dict[str, FakeProxy]) -> None:
    before = asked(proxies, "/v1/break")
    broken = ask(site, "/v1/break", json={})
    assert (broken.status_code, error(broken)["code"]) == (502, "bad_gateway")
    assert asked(proxies, "/v1/break") == before + 1
    eventually(lambda: ask(site, "/v1/which").status_code == 200)


# --- The log, the files, a reload -------------------------------------------------------------------------------------


def test_the_log_says_who_and_how_long_and_never_what(site: Site) -> None:
    secret = "a prompt that nobody logs"
    ask(site, "/v1/logged?token=in-the-query", json={"prompt": secret})
    requests.get(f"http://127.0.0.1:{site.port}/v1/logged", headers={"Authorization": "Bearer wrong-key"}, timeout=5)
    eventually(lambda: site.log.read_text().count("/v1/logged") == 2)
    text = site.log.read_text() + (site.base / "error.log").read_text()
    for hidden in (secret, "in-the-query", "wrong-key", GIVEN, site.key("usual"), site.key("slow")):
        assert hidden not in text
    lines = [json.loads(line) for line in site.log.read_text().splitlines()]
    good, wrong = [line for line in lines if line["path"] == "/v1/logged"]
    assert (good["key"], good["status"], good["proxy_status"]) == ("usual", 200, "200")
    assert good["bytes_in"] > len(secret)
    assert (wrong["key"], wrong["status"], wrong["proxy"]) == ("", 401, "")
    assert any(line["status"] == 429 and line["path"] == "/v1/models" for line in lines), "the path that was asked for"


def test_secrets_are_for_root_alone_and_ansible_says_none(site: Site) -> None:
    made = site.base / "controller/secrets/ingress-keys"
    files = [made / "usual", made / "slow", site.etc / "keys.conf"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert not (made / "few").exists(), "a key of a vault leaves no file on the controller"
    assert GIVEN not in (site.etc / "nginx.conf").read_text()
    other = "another-" + GIVEN
    code, said = site.run("--check", ingress_keys=[*KEYS[:2], {"name": "few", "key": other}])
    assert code == 0, said
    assert "changed=0" not in said
    for hidden in (other, GIVEN, site.key("usual")):
        assert hidden not in said


def test_a_second_run_changes_nothing(site: Site) -> None:
    assert site.ok() == 0
    assert site.ok("--check") == 0


def test_a_lost_key_is_explained_and_not_made_anew(site: Site) -> None:
    path = site.base / "controller/secrets/ingress-keys/slow"
    key = path.read_text()
    path.unlink()
    try:
        code, said = site.run()
        assert code != 0
        assert "the controller has lost the key of slow" in " ".join(said.replace("\\n", " ").split())
        assert not path.exists()
    finally:
        path.write_text(key)
        path.chmod(0o600)


def test_a_configuration_that_nginx_refuses_does_not_replace_the_good_one(site: Site) -> None:
    before = (site.etc / "nginx.conf").read_text()
    code, said = site.run(ingress_address="256.0.0.1")
    assert code != 0
    assert "host not found in" in said
    assert (site.etc / "nginx.conf").read_text() == before


def test_it_tells_which_configuration_it_runs_with_and_a_reload_drops_nothing(site: Site) -> None:
    before = site.status("/config")
    assert f"Configuration {before}" in (site.etc / "nginx.conf").read_text()
    with ask(site, "/v1/stream", stream=True) as response:
        lines = response.iter_lines()
        next(lines)
        assert site.ok(ingress_retry_after_s=7) == 1
        site.reload()
        eventually(lambda: site.status("/config") != before)
        assert len([line for line in lines if line]) == 9
    assert ask(site, "/v1/busy").headers["Retry-After"] == "7"
    assert site.ok() == 1
    site.reload()
    eventually(lambda: site.status("/config") == before)


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, proxies: dict[str, FakeProxy]) -> Iterator[Site]:
    base = tmp_path_factory.mktemp("secured")
    base.chmod(0o755)
    found = Site(base, proxies["gpu01"].port, {**LIMITS, "ingress_tls_names": ["api.example.org"]})
    assert found.ok() > 0
    found.start()
    yield found
    found.stop()


def test_its_certificate_is_of_its_own_authority(secured: Site) -> None:
    source = secured.base / "controller/secrets/ingress-tls"
    headers = {"Authorization": f"Bearer {secured.key('usual')}"}
    url = f"https://127.0.0.1:{secured.port}/v1/models"
    assert requests.get(url, headers=headers, verify=str(source / "ca.crt"), timeout=5).status_code == 200
    context = ssl.create_default_context(cafile=str(source / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", secured.port)) as plain,
        context.wrap_socket(plain, server_hostname="api.example.org"),
    ):
        pass
    assert (secured.etc / "tls.key").stat().st_mode & 0o777 == 0o600
    assert secured.ok() == 0


def test_plain_http_is_told_what_is_wrong(secured: Site) -> None:
    response = requests.get(f"http://127.0.0.1:{secured.port}/v1/models", timeout=5)
    assert (response.status_code, error(response)["code"]) == (400, "bad_request")


def test_systemd_reads_the_unit(site: Site) -> None:
    unit = site.base / "berth-ingress.service"
    analyze = subprocess.run(["which", "systemd-analyze"], capture_output=True, text=True, check=False).stdout.strip()
    if not analyze:
        pytest.skip("systemd-analyze is not installed here")
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert not [line for line in done.stderr.splitlines() if unit.name in line], done.stderr
