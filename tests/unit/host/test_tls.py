"""The certificate authority and the hosts' certificates: made once, made anew in time, never replaced unasked."""

from __future__ import annotations

import datetime as dt
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from berth.codec import dump, replace
from berth.errors import BerthError
from berth.host import tls
from berth.host.tls_seen import ask, nodes_of
from tests.unit.ray.test_start import HEAD, SLOT

NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
TERMS = tls.Terms(authority=3650 * DAY, host=365 * DAY, renew_before=60 * DAY)
HOSTS = {"gpu01": ["192.0.2.21", "fd00::21"], "gpu02": ["192.0.2.22"]}


def make(
    directory: Path,
    now: dt.datetime = NOW,
    hosts: dict[str, list[str]] | None = None,
    renew: tuple[str, ...] = (),
    terms: tls.Terms = TERMS,
) -> dict[str, str]:
    changes = tls.plan(directory, "lab", HOSTS if hosts is None else hosts, terms, now, renew)
    tls.write(directory, changes)
    return {change.name: change.reason for change in changes}


def test_everything_is_made_once(tmp_path: Path) -> None:
    assert make(tmp_path / "tls") == dict.fromkeys(("ca", "gpu01", "gpu02"), "there is none")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "tls").iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"ca.key", "gpu01.key", "gpu02.key"}
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700
    assert make(tmp_path / "tls") == {}


def test_planning_writes_nothing(tmp_path: Path) -> None:
    assert tls.plan(tmp_path / "tls", "lab", HOSTS, TERMS, NOW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (dt.timedelta(0), ""),
        (304 * DAY, ""),
        (305 * DAY, "it ends on 2027-11-21"),
        (365 * DAY, "it ended on 2027-11-21"),
        (400 * DAY, "it ended on 2027-11-21"),
    ],
)
def test_a_certificate_is_renewed_before_it_ends(tmp_path: Path, age: dt.timedelta, reason: str) -> None:
    make(tmp_path)
    assert set(make(tmp_path, NOW + age).values()) == ({reason} if reason else set())
    assert make(tmp_path, NOW + age) == {}, "one renewal is enough"


def test_another_address_makes_another_certificate(tmp_path: Path) -> None:
    make(tmp_path)
    moved = {**HOSTS, "gpu02": ["192.0.2.99"]}
    assert make(tmp_path, hosts=moved) == {"gpu02": "it is not good for 192.0.2.99"}
    assert make(tmp_path, hosts={**moved, "gpu03": ["192.0.2.23"]}) == {"gpu03": "there is none"}


def test_broken_and_foreign_pairs_are_replaced(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path / "other")
    (tmp_path / "gpu01.key").write_text((tmp_path / "gpu02.key").read_text())
    for end in ("crt", "key"):
        (tmp_path / f"gpu02.{end}").write_text((tmp_path / "other" / f"gpu02.{end}").read_text())
    assert make(tmp_path) == {"gpu01": "the key is another certificate's", "gpu02": "another authority signed it"}
    (tmp_path / "gpu01.crt").write_text("nothing")
    (tmp_path / "gpu02.crt").unlink()
    assert make(tmp_path) == {"gpu01": "it cannot be read", "gpu02": "there is none"}


def test_asked_for(tmp_path: Path) -> None:
    make(tmp_path)
    before = tls.read(tmp_path, "gpu01")
    assert make(tmp_path, renew=("gpu01",)) == {"gpu01": "asked for"}
    assert tls.read(tmp_path, "gpu01") != before
    reasons = make(tmp_path, renew=(tls.AUTHORITY,))
    assert reasons == {"ca": "asked for", **dict.fromkeys(HOSTS, "another authority signed it")}
    assert make(tmp_path) == {}


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt"])
def test_a_lost_authority_is_explained_and_not_made_anew(tmp_path: Path, lost: str) -> None:
    make(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(BerthError, match=r"lost in part.*gpu01\.crt.*mend: bring both files back.*rotate=authority"):
        make(tmp_path)
    assert tls.AUTHORITY in make(tmp_path, renew=(tls.AUTHORITY,))


def test_an_authority_that_ends_too_soon_does_not_sign(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(BerthError, match=r"ends before a certificate it would sign.*found: it ends on 2036-11-18"):
        make(tmp_path, NOW + 3300 * DAY)


def test_a_key_that_is_not_the_authoritys_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "ca.key").write_text((tmp_path / "gpu01.key").read_text())
    with pytest.raises(BerthError, match=r"ca\.key is not the key of"):
        make(tmp_path)


@pytest.mark.parametrize("days", [(365, 365, 60), (3650, 60, 60), (3650, 365, 0)])
def test_terms_that_cannot_be_kept_are_refused(days: tuple[int, int, int]) -> None:
    with pytest.raises(BerthError, match="0 < ray_head_tls_renew_days < ray_head_tls_days"):
        tls.Terms(*(day * DAY for day in days))


@contextmanager
def server(directory: Path, host: str, authority: Path) -> Iterator[int]:
    """A TLS server that demands a certificate, as Ray's do; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / f"{host}.crt", directory / f"{host}.key")
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(peer, server_side=True) as secure:
                        secure.sendall(secure.recv(16))
                except OSError:
                    peer.close()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def client(directory: Path, host: str, name: str, port: int) -> bytes:
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    if host:
        context.load_cert_chain(directory / f"{host}.crt", directory / f"{host}.key")
    plain = socket.create_connection(("127.0.0.1", port), 5)
    with context.wrap_socket(plain, server_hostname=name) as secure:
        secure.sendall(b"hello")
        return secure.recv(16)


def test_hosts_believe_each_other_and_nobody_else(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    make(tmp_path, now)
    make(tmp_path / "other", now)
    with server(tmp_path, "gpu01", tmp_path / "ca.crt") as port:
        for name in ("192.0.2.21", "fd00::21", "127.0.0.1", "::1", "localhost"):
            assert client(tmp_path, "gpu02", name, port) == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError, match=r"192\.0\.2\.22"):
            client(tmp_path, "gpu02", "192.0.2.22", port)
        with pytest.raises(ssl.SSLError):
            client(tmp_path, "", "192.0.2.21", port)
        with pytest.raises(ssl.SSLCertVerificationError):
            client(tmp_path / "other", "gpu02", "192.0.2.21", port)


def test_what_a_node_shows_is_read_without_a_certificate(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    make(tmp_path, now)
    with server(tmp_path, "gpu01", tmp_path / "ca.crt") as port:
        # The file is replaced; the process still shows what it started with.
        before = tls.read(tmp_path, "gpu01")
        assert before
        make(tmp_path, now + 100 * DAY, renew=("gpu01",))
        found = ask("gpu01-0", "127.0.0.1", port, str(tmp_path))
        assert found
        assert (found.ends, found.problem) == (tls.end(before.certificate), "")
        assert found.ends != tls.end((tmp_path / "gpu01.crt").read_text())


def test_the_nodes_of_a_host_are_read_as_the_units_read_them(tmp_path: Path) -> None:
    """One file per kind of unit, nodes by name."""
    assert nodes_of(tmp_path) == []
    other = replace(SLOT, name="gpu01-1")
    (tmp_path / "head.json").write_text(json.dumps({HEAD.name: dump(HEAD)}))
    (tmp_path / "slot.json").write_text(json.dumps({other.name: dump(other), SLOT.name: dump(SLOT)}))
    assert nodes_of(tmp_path) == [SLOT, other, HEAD]


def test_a_certificate_that_has_ended_and_a_foreign_one_are_told_apart(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    make(tmp_path, now - 400 * DAY)
    make(tmp_path / "other", now)
    with server(tmp_path, "gpu01", tmp_path / "ca.crt") as port:
        ended = ask("gpu01-0", "127.0.0.1", port, str(tmp_path))
        foreign = ask("gpu01-0", "127.0.0.1", port, str(tmp_path / "other"))
    assert ended
    assert ended.problem == "the certificate that it shows has ended"
    assert foreign
    assert "not believed" in foreign.problem
    assert ask("gpu01-0", "127.0.0.1", port, str(tmp_path)) is None, "a node that is down is another check's matter"


def test_a_port_that_speaks_no_tls_is_told(tmp_path: Path) -> None:
    make(tmp_path, dt.datetime.now(dt.UTC))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            peer, _ = listener.accept()
            peer.close()

        threading.Thread(target=hang_up, daemon=True).start()
        found = ask("gpu01-0", "127.0.0.1", listener.getsockname()[1], str(tmp_path))
    assert found
    assert "no TLS" in found.problem
