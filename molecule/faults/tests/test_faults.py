"""What goes wrong between hosts. The tests stand in order; each leaves the cluster as it found it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab import Lab, container, docker, on

pytestmark = pytest.mark.usefixtures("whole")
SIM = "/var/lib/berth/gpu-sim"
TWIN = """
driver_version: "580.95.05"
gpus:
  - product: NVIDIA L40S
    memory_mib: 46068
    compute_capability: "8.9"
    uuid: GPU-00000000-1111-2222-3333-444444444444
"""


@pytest.fixture
def whole(lab: Lab) -> Iterator[None]:
    """Every test ends with a cluster that one run of site.yml put right."""
    yield
    lab.site().ok()
    report = lab.verify()
    assert (report["rc"], report["failures"]) == (0, [])


def kinds(report: dict[str, Any]) -> set[str]:
    return {item["kind"] for item in report["failures"]}


def sim(host: str, verb: str, *args: str) -> None:
    """The command line of the host's simulated driver."""
    python = on(host, "sh", "-c", "ls -d /var/lib/berth/agent/*/bin/python | tail -1").strip()
    on(host, python, "-m", "berth.gpu.sim", verb, "--dir", SIM, *args)


def inject(host: str, *fault: str) -> None:
    sim(host, "inject", *fault)


def starts(*hosts: str) -> dict[str, str]:
    """When each unit of the hosts was started: what was left alone keeps its time."""
    found = {}
    for host in hosts:
        shown = on(host, "systemctl", "show", "--property=Id,ActiveEnterTimestampMonotonic", "berth-ray-*")
        for block in shown.strip().split("\n\n"):
            values = dict(line.split("=", 1) for line in block.splitlines())
            found[f"{host} {values['Id']}"] = values["ActiveEnterTimestampMonotonic"]
    return found


@contextmanager
def locked_out(host: str) -> Iterator[None]:
    """The operator's key is not let in any more, and no connection of before is open."""
    on(host, "mv", "/etc/ssh/ops_keys", "/etc/ssh/ops_keys.away")
    try:
        # Fails where there is none, which is right as well.
        on(host, "sh", "-c", "pkill --uid ops --full sshd || true")
        yield
    finally:
        on(host, "mv", "/etc/ssh/ops_keys.away", "/etc/ssh/ops_keys")


def test_a_key_that_fails_on_one_host(lab: Lab) -> None:
    before = starts("gpu01", "gpu02", "head01")
    with locked_out("gpu02"):
        run = lab.site()
        assert run.rc != 0
        assert "gpu02" in run.output
        assert "Permission denied" in run.output
        report = lab.verify()
        assert report["rc"] == 2, "what could not be asked is not drift"
        assert ("host_unreachable", "gpu02") in {(item["kind"], item["object"]) for item in report["findings"]}
        assert lab.chat("gpu01") == 200
    assert starts("gpu01", "gpu02", "head01") == before


def test_a_host_that_dies_in_the_middle_of_a_run(lab: Lab) -> None:
    strategy = lab.plan["strategy"]
    before = starts("head01", "gpu01")
    run = lab.start("site.yml", "-e", "strategy=spread")
    run.wait_for("Ask the driver for the host's GPUs")
    docker("kill", container("gpu02"))
    assert run.rc != 0
    assert starts("head01", "gpu01") == before
    lab.boot("gpu02")
    lab.site("-e", f"strategy={strategy}").ok()


def test_ctrl_c_in_the_middle(lab: Lab) -> None:
    lab.site("-e", "strategy=pack").ok()
    before = len({berth["slot"] for berth in lab.plan["berths"]})
    run = lab.start("site.yml", "-e", "strategy=spread")
    run.wait_for("Deploy the plan's berths")
    time.sleep(2)
    run.interrupt()
    assert run.rc != 0
    lab.site("-e", "strategy=pack").ok()
    assert len({berth["slot"] for berth in lab.plan["berths"]}) == before


def test_two_operators_at_once(lab: Lab) -> None:
    first = lab.start("site.yml")
    first.wait_for("TASK [berth_agent")
    with first.held():
        second = lab.site()
    assert second.rc != 0
    assert "another run" in second.output
    assert "site.yml" in second.output
    first.ok()


def test_a_full_disk(lab: Lab) -> None:
    """A new agent environment has no room on one host: it says so, and what runs stays."""
    before = starts("gpu01", "gpu02", "head01")
    on("gpu01", "mkdir", "/small")
    on("gpu01", "mount", "-t", "tmpfs", "-o", "size=20m,mode=0755", "tmpfs", "/small")
    try:
        run = lab.site("-e", "berth_agent_root=/small")
        assert run.rc != 0
        assert "no space left on device" in run.output
        for host in ("gpu02", "head01"):
            assert f"{host}: the packages of agent.txt could not be installed" in run.output
        assert "another host failed, and this one was stopped" in run.output
        assert on("gpu01", "ls", "/small").split() == [], "what was half installed is gone"
    finally:
        on("gpu01", "umount", "/small")
        for host in ("gpu01", "gpu02", "head01"):
            on(host, "rm", "-rf", "/small")
    assert starts("gpu01", "gpu02", "head01") == before
    assert lab.chat("gpu01") == 200


def test_a_gpu_that_vanished_since_the_plan(lab: Lab) -> None:
    # gpu02-1 holds what an L40S can hold as well; gpu02-0 has the model that fits an H100 only.
    victim = next(
        slot
        for slot in lab.slots_of("gpu02")
        if not any(berth["deployment"] == "large" for berth in lab.berths_on(slot["name"]))
    )
    uuid = victim["gpu_uuids"][0]
    moved = {berth["deployment"] for berth in lab.berths_on(victim["name"])}
    assert moved
    inject("gpu02", "lose", uuid)
    try:
        report = lab.verify()
        assert report["rc"] == 1
        assert uuid in {
            item.get("gpu_uuid") for item in report["failures"] if item["kind"] in ("gpu_lost", "gpu_missing")
        }
        lab.site().ok()
        assert not lab.berths_on(victim["name"])
        assert moved <= {berth["deployment"] for berth in lab.plan["berths"]}
        assert lab.verify()["rc"] == 0
    finally:
        inject("gpu02", "restore")


def test_cards_renumbered_by_a_reboot(lab: Lab) -> None:
    before = {slot["name"]: slot["gpu_uuids"] for slot in lab.plan["slots"]}
    inject("gpu02", "renumber", "1,0")
    lab.reboot("gpu02")
    lab.wait_until_verified()
    lab.site().ok()
    assert {slot["name"]: slot["gpu_uuids"] for slot in lab.plan["slots"]} == before
    inject("gpu02", "restore")
    lab.reboot("gpu02")
    lab.wait_until_verified()


def test_two_hosts_that_report_the_same_gpu(lab: Lab) -> None:
    """Beside the running cluster, whose own simulation is left alone."""
    for host in ("gpu01", "gpu02"):
        on(host, "sh", "-c", f"cat >/twin.yml <<'EOF'{TWIN}EOF")
    twin = ["-e", "nvidia_driver_sim_profile=/twin.yml", "-e", "nvidia_driver_sim_dir=/twin", "--tags", "driver,plan"]
    plan = lab.plan
    run = lab.site(*twin)
    assert run.rc != 0
    assert "GPU-00000000-1111-2222-3333-444444444444" in run.output
    assert "gpu01" in run.output
    assert "gpu02" in run.output
    assert lab.plan == plan
    for host in ("gpu01", "gpu02"):
        on(host, "rm", "-rf", "/twin", "/twin.yml")


def test_another_driver_version_on_one_host(lab: Lab) -> None:
    other = on("gpu01", "sed", "s/^driver_version:.*/driver_version: 570.86.15/", f"{SIM}/profile.yml")
    on("gpu01", "sh", "-c", f"cat >/other.yml <<'EOF'\n{other}EOF")
    sim("gpu01", "install", "--profile", "/other.yml", "--seed", "gpu01")
    on("gpu01", "rm", "/other.yml")
    report = lab.verify()
    assert (report["rc"], report["failures"]) == (0, []), "hosts may differ while they are upgraded one by one"
    (note,) = [item for item in report["findings"] if item["kind"] == "driver_mismatch"]
    assert "570.86.15" in note["found"]
    assert "gpu01" in note["found"]
