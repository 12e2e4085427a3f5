"""An upgrade under requests: host by host, its replicas elsewhere meanwhile; then back by the rollback."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab import Lab, on

HOSTS = ("gpu01", "gpu02")
LOCK = Path(__file__).resolve().parents[1] / "files/runtime-older-ray.txt"


@contextmanager
def asked(lab: Lab) -> Iterator[Counter[str]]:
    """Ask for ``chat`` all the while; how often each status came is there afterwards.

    As clients do that know every proxy: a host whose units restart has none for a moment, so the next one is asked.
    """
    found: Counter[str] = Counter()
    proxies = " ".join(lab.address(host) for host in ("head01", *HOSTS))
    ask = (
        f"while sleep 0.2; do for proxy in {proxies}; do "
        "status=$(curl -s -o /dev/null -m 10 -w '%{http_code}' -H 'Content-Type: application/json' "
        '-d \'{"model": "chat", "messages": []}\' "http://$proxy:8000/v1/chat/completions"); '
        "[ $status = 200 ] && break; done; echo $status; done >/run/lab-asked"
    )
    on("head01", "sh", "-c", f"cat >/run/lab-ask <<'EOF'\n{ask}\nEOF")
    on("head01", "systemd-run", "--unit=lab-asker", "--collect", "sh", "/run/lab-ask")
    try:
        yield found
    finally:
        on("head01", "systemctl", "stop", "lab-asker")
        found.update(on("head01", "cat", "/run/lab-asked").split())


def started(host: str) -> list[int]:
    """When the host's slots were started, in microseconds of the machine's monotonic clock, which all hosts share."""
    shown = on(host, "systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", "berth-ray-slot@*")
    return sorted(int(value) for value in shown.split())


def ray_of(host: str) -> str:
    """The version of Ray that the host's head answers with."""
    told = on(
        host,
        "sh",
        "-c",
        'curl -sS -H "Authorization: Bearer $(cat /etc/berth/ray-token)" http://127.0.0.1:8275/api/version',
    )
    return str(json.loads(told)["ray_version"])


def packages(host: str) -> str:
    return on(host, "sh", "-c", "ls -d /var/lib/berth/runtime/current/lib/python3*/site-packages/idna-*.dist-info")


def test_the_upgrade_goes_host_by_host_and_loses_no_request(lab: Lab) -> None:
    before = {host: started(host) for host in HOSTS}
    assert all("idna-3.19" in packages(host) for host in HOSTS)
    with asked(lab) as answers:
        lab.site().ok()
    assert set(answers) == {"200"}, answers
    assert answers["200"] > 20
    assert not any("idna-3.19" in packages(host) for host in HOSTS)
    after = {host: started(host) for host in HOSTS}
    for host in HOSTS:
        assert min(after[host]) > max(before[host]), "every slot runs the new unit"
    first, second = sorted(HOSTS, key=lambda host: after[host][0])
    assert after[first][-1] < after[second][0], "one host after the other"
    assert lab.verify()["rc"] == 0
    assert lab.plan["drained"] == []


def test_a_second_run_restarts_nothing(lab: Lab) -> None:
    before = {host: started(host) for host in HOSTS}
    run = lab.site().ok()
    assert "changed=0" in run.output
    assert {host: started(host) for host in HOSTS} == before


def test_back_by_the_rollback(lab: Lab) -> None:
    with asked(lab) as answers:
        lab.start("playbooks/rollback.yml").ok()
    assert set(answers) == {"200"}, answers
    assert all("idna-3.19" in packages(host) for host in HOSTS)
    assert lab.verify()["rc"] == 0


def test_a_drained_host_stays_empty_until_it_is_undrained(lab: Lab) -> None:
    with asked(lab) as answers:
        # `large` fits an H100 only, which gpu02 alone has: gpu01 is what can be emptied.
        lab.start("playbooks/drain.yml", "-e", "target=gpu01").ok()
        assert not [berth for slot in lab.slots_of("gpu01") for berth in lab.berths_on(slot["name"])]
        lab.site().ok()
        assert lab.plan["drained"] == ["gpu01-0", "gpu01-1"]
        assert not [berth for slot in lab.slots_of("gpu01") for berth in lab.berths_on(slot["name"])]
    assert set(answers) == {"200"}, answers
    refused = lab.start("playbooks/drain.yml", "-e", "target=gpu02")
    assert refused.rc != 0
    assert "large" in refused.output
    lab.start("playbooks/undrain.yml", "-e", "target=gpu01").ok()
    assert lab.plan["drained"] == []


def test_another_ray_is_refused_until_an_outage_is_allowed(lab: Lab) -> None:
    """Nodes of two versions form no cluster, so it is one restart of everything, there and back.

    gpu02 is asked: what was drained from gpu01 stays where it went, and Serve has proxies where replicas are.
    """
    before = {host: started(host) for host in HOSTS}
    # Ray 2.59 has no store on disk for the head's state.
    older = [f"ray_runtime_lock={LOCK}", "ray_head_persist_state=false"]
    arguments = [word for item in older for word in ("-e", item)]
    refused = lab.site(*arguments)
    assert refused.rc != 0
    assert "ray_runtime_restart_cluster=true" in refused.output
    assert {host: started(host) for host in HOSTS} == before
    assert lab.verify()["rc"] == 0
    assert lab.chat("gpu02") == 200

    lab.site(*arguments, "-e", "ray_runtime_restart_cluster=true").ok()
    assert ray_of("head01") == "2.59.0"
    assert lab.chat("gpu02") == 200
    assert lab.verify()["rc"] == 0

    lab.site("-e", "ray_runtime_restart_cluster=true").ok()
    assert ray_of("head01") != "2.59.0"
    assert lab.chat("gpu02") == 200
    assert lab.verify()["rc"] == 0
