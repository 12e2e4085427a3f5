"""An upgrade under requests: host by host, its replicas elsewhere meanwhile; then back by the rollback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab import Lab, on

HOSTS = ("gpu01", "gpu02")


@contextmanager
def asked(host: str) -> Iterator[Counter[str]]:
    """Ask for ``chat`` on ``host`` all the while; how often each status came is there afterwards."""
    found: Counter[str] = Counter()
    ask = (
        "while sleep 0.2; do curl -s -o /dev/null -m 10 -w '%{http_code}\\n' -H 'Content-Type: application/json' "
        '-d \'{"model": "chat", "messages": []}\' http://127.0.0.1:8000/v1/chat/completions; done >/run/lab-asked'
    )
    on(host, "systemd-run", "--unit=lab-asker", "--collect", "sh", "-c", ask)
    try:
        yield found
    finally:
        on(host, "systemctl", "stop", "lab-asker")
        found.update(on(host, "cat", "/run/lab-asked").split())


def started(host: str) -> list[int]:
    """When the host's slots were started, in microseconds of the machine's monotonic clock, which all hosts share."""
    shown = on(host, "systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", "berth-ray-slot@*")
    return sorted(int(value) for value in shown.split())


def packages(host: str) -> str:
    return on(host, "sh", "-c", "ls -d /var/lib/berth/runtime/current/lib/python3*/site-packages/idna-*.dist-info")


def test_the_upgrade_goes_host_by_host_and_loses_no_request(lab: Lab) -> None:
    before = {host: started(host) for host in HOSTS}
    assert all("idna-3.19" in packages(host) for host in HOSTS)
    with asked("head01") as answers:
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
    with asked("head01") as answers:
        lab.start("playbooks/rollback.yml").ok()
    assert set(answers) == {"200"}, answers
    assert all("idna-3.19" in packages(host) for host in HOSTS)
    assert lab.verify()["rc"] == 0


def test_a_drained_host_stays_empty_until_it_is_undrained(lab: Lab) -> None:
    with asked("head01") as answers:
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
