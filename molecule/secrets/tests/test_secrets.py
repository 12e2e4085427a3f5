"""Secrets renewed on a running cluster, and the firewall before a stranger. The tests stand in order."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import time

import pytest

from tests.lab import Lab, on

HOSTS = ("head01", "gpu01", "gpu02")
GCS_PORT = 6390
READY_S = 180.0
SHOWN = """
import hashlib, socket, ssl, sys
context = ssl._create_unverified_context()
context.set_alpn_protocols(["h2"])
with context.wrap_socket(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)) as peer:
    print(hashlib.sha256(peer.getpeercert(True)).hexdigest())
"""


def shown(lab: Lab) -> str:
    """The certificate that the head's GCS shows to another host, as a digest."""
    return on("gpu01", "python3", "-c", SHOWN, lab.address("head01"), str(GCS_PORT)).strip()


def written(host: str) -> str:
    """The certificate that lies on the host, as a digest."""
    pem = on(host, "cat", "/etc/berth/tls/node.crt")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def authority(host: str) -> str:
    return on(host, "cat", "/etc/berth/tls/ca.crt")


def token(host: str) -> str:
    return on(host, "cat", "/etc/berth/ray-token").strip()


def started(host: str) -> list[int]:
    """When the host's nodes were started, in microseconds of the machine's monotonic clock, which all hosts share."""
    asked = on(host, "systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", "berth-ray-*")
    return sorted(int(value) for value in asked.split())


def dashboard(bearer: str) -> int:
    """The status that Ray's REST API answers a token with."""
    script = 'curl -s -o /dev/null -w "%{http_code}" -H "Authorization: Bearer $0" http://127.0.0.1:8275/api/version'
    return int(on("head01", "sh", "-c", script, bearer))


def settled(lab: Lab) -> None:
    """The three witnesses agree and a user gets an answer from each host."""
    report = lab.verify()
    assert (report["rc"], report["failures"]) == (0, [])
    assert [lab.chat(host) for host in HOSTS] == [200, 200, 200]


def test_the_cluster_is_encrypted(lab: Lab) -> None:
    assert shown(lab) == written("head01")
    assert len({written(host) for host in HOSTS}) == 3
    settled(lab)


def test_a_stranger_reaches_the_api_and_nothing_else(lab: Lab) -> None:
    address = lab.address("head01")
    with pytest.raises(TimeoutError):
        socket.create_connection((address, GCS_PORT), timeout=3)
    # From a host of the cluster the same port answers, so it is the firewall that was asked.
    assert shown(lab) == written("head01")
    assert lab.chat("head01") == 200


def test_nothing_rotates_unasked(lab: Lab) -> None:
    before = {host: (token(host), written(host), started(host)) for host in HOSTS}
    for arguments in ([], ["-e", "rotate=everything"], ["-e", "rotate=token", "--limit", "gpu01"]):
        run = lab.start("playbooks/rotate_secrets.yml", *arguments)
        assert run.rc != 0
        assert "nothing was changed" in run.output
    assert {host: (token(host), written(host), started(host)) for host in HOSTS} == before


def test_certificates_host_by_host(lab: Lab) -> None:
    before = {host: (written(host), started(host)) for host in HOSTS}
    kept = authority("head01")
    lab.start("playbooks/rotate_secrets.yml", "-e", "rotate=certificates").ok()
    for host in HOSTS:
        certificate, times = before[host]
        assert written(host) != certificate
        assert authority(host) == kept
        assert started(host)[0] > times[-1], "every node of the host shows the new certificate"
    assert started("gpu01")[-1] < started("gpu02")[0], "one host after the other"
    assert shown(lab) == written("head01")
    settled(lab)


def test_a_new_token(lab: Lab) -> None:
    old = token("head01")
    lab.start("playbooks/rotate_secrets.yml", "-e", "rotate=token").ok()
    assert token("head01") != old
    assert len({token(host) for host in HOSTS}) == 1
    assert (dashboard(old), dashboard(token("head01"))) == (403, 200)
    settled(lab)


def test_a_new_authority(lab: Lab) -> None:
    old = authority("head01")
    lab.start("playbooks/rotate_secrets.yml", "-e", "rotate=authority").ok()
    assert len({authority(host) for host in HOSTS}) == 1
    assert authority("head01") != old
    assert shown(lab) == written("head01")
    settled(lab)


def test_a_run_afterwards_changes_nothing(lab: Lab) -> None:
    before = {host: started(host) for host in HOSTS}
    assert "changed=0" in lab.site().ok().output
    assert {host: started(host) for host in HOSTS} == before


def test_the_firewall_stands_after_a_boot(lab: Lab) -> None:
    lab.reboot("gpu01")
    unit = on("gpu01", "systemctl", "show", "berth-firewall.service", "--property=ActiveState,Result")
    assert set(unit.split()) == {"ActiveState=active", "Result=success"}
    tables = json.loads(on("gpu01", "nft", "--json", "list", "tables"))["nftables"]
    assert {"inet berth"} <= {
        f"{item['table']['family']} {item['table']['name']}" for item in tables if "table" in item
    }
    lab.wait_until_verified(READY_S)
    deadline = time.monotonic() + READY_S
    while (status := lab.chat("gpu01")) != 200:
        assert time.monotonic() < deadline, status
        time.sleep(1)
    with pytest.raises(TimeoutError):
        socket.create_connection((lab.address("gpu01"), node_port("gpu01")), timeout=3)


def node_port(host: str) -> int:
    """A port that a node of the host listens on, other hosts' nodes being meant to reach it."""
    listening = on(host, "sh", "-c", "ss -Hltnp | grep raylet | grep -v 127.0.0.1")
    return int(listening.split()[3].rpartition(":")[2])
