"""What goes wrong at 3 a.m., on real raylets with light replicas: found, named, and healed by site.yml.

The tests stand in order; each leaves the cluster as it found it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from berth.host.supervisor import Daemon
from tests.e2e.cluster import ROOT, Cluster

pytestmark = pytest.mark.e2e
STRATEGY = "spread"
MAY_START = Path(tempfile.gettempdir()) / f"berth-may-start-{os.getpid()}"
APPS: list[dict[str, Any]] = [
    {"name": "alpha", "engine": "light", "replicas": 2, "vram_mib": 12000},
    {"name": "beta", "engine": "light", "replicas": 1, "vram_mib": 8000},
    # Its start waits for leave, so that a killed one is still gone when the verification looks.
    {
        "name": "slow",
        "engine": "light",
        "replicas": 1,
        "vram_mib": 4000,
        "engine_args": {"start_after": str(MAY_START)},
    },
    {"name": "asleep", "engine": "light", "replicas": 0, "vram_mib": 8000},
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    extra: dict[str, Any] = {"serve_apps_list": APPS, "serve_apps_tiny_models": False}
    # Light replicas need no engine, and vLLM's classes take every process that sees a request ten CPU seconds.
    extra |= {"ray_runtime_lock": "runtime-light.txt", "ray_runtime_root": str(ROOT / ".berth" / "runtime-light")}
    # Two GPUs: each one more is a node, an agent and a proxy to start, in every test that starts them anew.
    profile = yaml.safe_load((ROOT / "tests/e2e/l40s-x6.yml").read_text())
    (gpu,) = profile["gpus"]
    (two := tmp_path_factory.mktemp("profile") / "two.yml").write_text(
        yaml.safe_dump({**profile, "gpus": [{**gpu, "repeat": 2}]})
    )
    extra |= {"nvidia_driver_sim_profile": str(two)}
    MAY_START.touch()
    made = Cluster("faults", tmp_path_factory.mktemp("faults") / "state", 26000, extra)
    made.site(STRATEGY).ok()
    yield made
    made.teardown()
    MAY_START.unlink()


@contextmanager
def supervisor_paused(cluster: Cluster) -> Iterator[None]:
    """Nothing is restarted meanwhile, as when a unit has run out of tries."""
    pid = cluster.supervisord()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def kinds(report: dict[str, Any]) -> set[str]:
    return {item["kind"] for item in report["failures"]}


def healed(cluster: Cluster) -> None:
    """What every ``mend`` says, typed as it stands: no strategy, so the one in force must be kept.

    site.yml ends with the verification: it went through only if the three witnesses agree.
    """
    assert "as wanted: plan, Ray and driver agree" in cluster.ansible("site.yml").ok().output
    assert cluster.plan()["strategy"] == STRATEGY


def berth_on(cluster: Cluster, model: str) -> dict[str, Any]:
    return next(berth for berth in cluster.plan()["berths"] if berth["deployment"] == model)


def gpu_of(cluster: Cluster, slot: str) -> str:
    return str(next(item["gpu_uuids"][0] for item in cluster.plan()["slots"] if item["name"] == slot))


def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(1)


def test_as_wanted_and_zero_replicas_are_right(cluster: Cluster) -> None:
    report = cluster.verify()
    assert (report["rc"], report["failures"]) == (0, [])
    assert "asleep" in cluster.plan()["deployments"]
    assert cluster.api("/v1/completions", {"model": "asleep", "prompt": "hi"}).status_code == 503
    answer = cluster.api("/v1/chat/completions", {"model": "alpha", "messages": [{"role": "user", "content": "hi"}]})
    assert "alpha" in answer.json()["choices"][0]["message"]["content"]


def test_a_killed_replica(cluster: Cluster) -> None:
    slot = berth_on(cluster, "slow")["slot"]
    (pid,) = cluster.replicas()[f"slow@{slot}"].values()
    MAY_START.unlink()
    os.kill(pid, signal.SIGKILL)
    report = cluster.verify()
    MAY_START.touch()
    assert report["rc"] == 1
    drifts = [item for item in report["failures"] if item["object"].startswith(f"slow@{slot}")]
    assert drifts, report["failures"]
    assert {item["gpu_uuid"] for item in drifts} == {gpu_of(cluster, slot)}
    healed(cluster)
    assert list(cluster.replicas()[f"slow@{slot}"].values()) != [pid]


def test_a_killed_raylet(cluster: Cluster) -> None:
    slot = berth_on(cluster, "beta")["slot"]
    with supervisor_paused(cluster):
        cluster.kill(f"slot@{slot}")
        # Ray gives a node that went without a word five missed health checks before it calls it dead.
        eventually(lambda: "slot_missing" in kinds(cluster.verify()))
        report = cluster.verify()
        assert report["rc"] == 1
        missing = [item for item in report["failures"] if item["kind"] == "slot_missing"]
        assert [item["object"] for item in missing] == [slot]
        assert missing[0]["gpu_uuid"] == gpu_of(cluster, slot)
    healed(cluster)


def test_a_killed_launcher_leaves_no_second_node(cluster: Cluster) -> None:
    """Nothing but the launcher's next start ends the raylet that it left, ports and GPU in hand."""
    unit = f"slot@{berth_on(cluster, 'beta')['slot']}"

    def raylets() -> set[int]:
        return {item.pid for item in cluster.processes(unit) if item.command == "raylet"}

    (old,) = raylets()
    os.kill(psutil.Process(old).ppid(), signal.SIGKILL)
    eventually(lambda: len(raylets() - {old}) == 1)
    assert old not in raylets()
    healed(cluster)


def test_a_killed_head(cluster: Cluster) -> None:
    before = {name: pids for name, pids in cluster.replicas().items() if "@" in name}
    with supervisor_paused(cluster):
        cluster.kill("head")
        report = cluster.verify()
        assert report["rc"] == 1
        assert "ray_unreachable" in kinds(report)
        ask = {"model": "alpha", "messages": [{"role": "user", "content": "hi"}]}
        assert cluster.api("/v1/chat/completions", ask).status_code == 200, "the API died with the head"
    healed(cluster)
    assert {name: pids for name, pids in cluster.replicas().items() if "@" in name} == before


def test_a_head_restarted_in_good_order(cluster: Cluster) -> None:
    """Stopped as an upgrade or a reboot stops it: its state must not know a dead node with a living controller."""
    before = {name: pids for name, pids in cluster.replicas().items() if "@" in name}
    rpc = Daemon("", "", str(cluster.run_dir / "supervisor.sock"), cluster.identity).rpc()
    rpc.stopProcess("berth-ray-head", True)
    eventually(lambda: not cluster.processes("head"))
    rpc.startProcess("berth-ray-head", True)
    healed(cluster)
    assert {name: pids for name, pids in cluster.replicas().items() if "@" in name} == before


def test_the_supervisor_killed_with_everything_running(cluster: Cluster) -> None:
    """Its orphans are ended and started anew, never doubled."""
    os.kill(cluster.supervisord(), signal.SIGKILL)
    healed(cluster)
    assert sum(item.command == "gcs_server" for item in cluster.processes()) == 1


def test_memory_on_the_wrong_gpu(cluster: Cluster) -> None:
    """A replica that was started with another GPU's CUDA_VISIBLE_DEVICES."""
    home = berth_on(cluster, "beta")["slot"]
    other = next(slot for slot in cluster.plan()["slots"] if slot["name"] != home)
    wrong = {"CUDA_VISIBLE_DEVICES": str(other["gpu_indices"][0]), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    apps = [app | ({"env": wrong} if app["name"] == "beta" else {}) for app in APPS]
    cluster.site(STRATEGY, extra={"serve_apps_list": apps}).failed("process_wrong_gpu")
    report = cluster.verify()
    assert report["rc"] == 1
    drift = next(item for item in report["failures"] if item["kind"] == "process_wrong_gpu")
    assert other["gpu_uuids"][0] in (drift["gpu_uuid"] or "") + drift["found"]
    assert gpu_of(cluster, home) in (drift["gpu_uuid"] or "") + drift["wanted"]
    healed(cluster)


def test_leaked_memory(cluster: Cluster) -> None:
    uuid = gpu_of(cluster, berth_on(cluster, "beta")["slot"])
    cluster.inject("leak", uuid, "3000")
    report = cluster.verify()
    leak = [item for item in report["failures"] if item["kind"] == "vram_unaccounted"]
    assert (report["rc"], [item["gpu_uuid"] for item in leak]) == (1, [uuid])
    cluster.inject("restore", uuid)
    assert cluster.verify()["rc"] == 0


def test_hidden_pids_are_not_drift(cluster: Cluster) -> None:
    cluster.inject("hide-processes")
    report = cluster.verify()
    assert (report["rc"], report["failures"]) == (2, [])
    cluster.inject("show-processes")
    assert cluster.verify()["rc"] == 0


def test_a_lost_gpu(cluster: Cluster) -> None:
    slot = berth_on(cluster, "beta")["slot"]
    uuid = gpu_of(cluster, slot)
    cluster.inject("lose", uuid)
    report = cluster.verify()
    assert report["rc"] == 1
    assert uuid in {item["gpu_uuid"] for item in report["failures"] if item["kind"] in ("gpu_lost", "gpu_missing")}
    cluster.site(STRATEGY).ok()
    assert slot not in {item["name"] for item in cluster.plan()["slots"]}
    cluster.inject("restore", uuid)
    healed(cluster)
    assert gpu_of(cluster, slot) == uuid, "the GPU came back under another slot's name"


# A model larger than any GPU and duplicate names: tests/unit/plan/test_modules.py, through the module itself.
MANY = {"name": "many", "engine": "light", "replicas": 12, "vram_mib": 20000}


@pytest.mark.parametrize(
    ("strategy", "extra", "words"),
    [
        ("pakc", {}, ["unknown strategy", "pakc", "strict_spread"]),
        (STRATEGY, {"serve_apps_list": [*APPS, MANY]}, ["many", "nothing was written"]),
        (STRATEGY, {"serve_apps_list": [APPS[0] | {"replcias": 2}]}, ["replcias", "unknown key"]),
    ],
    ids=["unknown strategy", "demand above supply", "unknown key"],
)
def test_bad_input_changes_nothing(cluster: Cluster, strategy: str, extra: dict[str, Any], words: list[str]) -> None:
    before, plan = cluster.replicas(), cluster.plan()
    cluster.site(strategy, extra=extra).failed(*words)
    assert (cluster.replicas(), cluster.plan()) == (before, plan)


def test_a_malformed_profile_keeps_the_good_one(cluster: Cluster) -> None:
    bad = cluster.state / "bad.yml"
    bad.write_text("gpus:\n  - product: NVIDIA L40S\n    memory_mib: plenty\n")
    cluster.site(STRATEGY, extra={"nvidia_driver_sim_profile": str(bad)}).failed("memory_mib", "plenty")
    assert cluster.verify()["rc"] == 0


def test_a_port_in_use_is_named_before_anything_starts(cluster: Cluster) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        run = cluster.site(STRATEGY, extra={"serve_apps_http_port": port})
        run.failed(f"serve_apps_http_port={port} is taken by pid {os.getpid()}")
    assert cluster.verify()["rc"] == 0


def test_two_runs_at_once_and_the_lock_of_a_killed_one(cluster: Cluster) -> None:
    command = [str(sys.prefix) + "/bin/ansible-playbook", "site.yml", "-e", json.dumps(cluster.variables())]
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    lock = cluster.state / "controller" / "lock"
    eventually(lambda: lock.exists() and json.loads(lock.read_text())["pid"] == first.pid)
    cluster.site(STRATEGY).failed("another run is at work here", f"pid {first.pid}")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert lock.exists(), "the killed run left no stale lock to find"
    run = cluster.site(STRATEGY).ok()
    assert f"took over the lock of pid {first.pid}" in " ".join(run.output.split())


def test_a_start_that_fails_is_explained(cluster: Cluster) -> None:
    broken = APPS[1] | {"name": "broken", "engine_args": {"crash": "the checkpoint is torn"}}
    run = cluster.site(STRATEGY, extra={"serve_apps_list": [*APPS, broken]})
    run.failed("broken@", "the checkpoint is torn")
    healed(cluster)
    assert not any(name.startswith("broken") for name in cluster.replicas())
