"""A pool on a real Ray Serve of several nodes: Serve scales it within its slots, and restarts it, while it answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from berth.gpu.sim import build
from berth.plan.apps import Autoscaling
from berth.plan.planner import make_plan
from berth.plan.pools import pools_of
from berth.plan.types import Plan, Slot
from berth.ray.deploy import lives
from berth.ray.rollout import Wanted, next_step
from berth.ray.serve_config import GATEWAY, ServeOptions, berth_apps, fewest
from berth.ray.state import parse_state
from berth.verify.compare import Finding, verify
from tests.conftest import find_runtime
from tests.unit.engines.pool_cluster import VRAM_MIB
from tests.unit.engines.test_gateway import PROFILE, ROOT, Cluster
from tests.unit.engines.test_gateway import errors as complaints
from tests.unit.plan.helpers import slot
from tests.unit.ray.builders import spec

PORT = 23791
OPTIONS = ServeOptions("127.0.0.1", PORT, drain_s=30.0)
NAMES = ("a-0", "a-1", "a-2")
WAIT_S = 90
WITHOUT_VLLM = 'import sys\n\nsys.modules["vllm"] = None\n'
SCALING = Autoscaling(
    max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0.5, downscale_delay_s=300, look_back_period_s=1
)
CHAT = spec(
    "chat",
    engine="light",
    model="",
    replicas=0,
    vram_mib=150,
    num_cpus=0.01,
    placement="pool",
    autoscaling=SCALING,
    engine_args={"hold_mib": 20, "tokens": 3, "token_s": 0.1},
    max_ongoing_requests=4,
)

pytestmark = pytest.mark.runtime


def slots(*closed: str) -> tuple[Slot, ...]:
    """The cluster's slots; nothing new goes to ``closed`` ones."""
    made = [
        replace(slot(name, VRAM_MIB, total=10_000), gpu_uuids=(f"GPU-{number}",)) for number, name in enumerate(NAMES)
    ]
    return tuple(replace(item, cordoned=item.name in closed) for item in made)


def planned(app: Any, *closed: str) -> Plan:
    return make_plan(slots(*closed), [app.deployment()], "spread")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    python = find_runtime()
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("the simulated driver is built on the spot and there is no C compiler")
    sim = tmp_path_factory.mktemp("sim")
    build.install(sim, {**PROFILE, "gpus": PROFILE["gpus"] * len(NAMES)}, seed="pool")  # type: ignore[operator]
    temp_dir = Path(f"/tmp/berth-pool-{os.getpid()}")
    temp_dir.mkdir()
    # Ray's cluster_utils writes an address file that a Ray elsewhere on this machine must not read.
    ray = {"RAY_TMPDIR": str(temp_dir), "RAY_USAGE_STATS_ENABLED": "0"}
    # A runtime without vLLM, as in the lab: its classes take every process that sees a request ten CPU seconds.
    (without := tmp_path_factory.mktemp("without")).joinpath("sitecustomize.py").write_text(WITHOUT_VLLM)
    env = {**os.environ, **build.environment(sim), "PYTHONPATH": f"{without}:{ROOT}", **ray}
    process = subprocess.Popen(
        [python, "-m", "tests.unit.engines.pool_cluster", str(PORT), *NAMES],
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(sim / "stderr").open("w"),
        text=True,
    )
    try:
        yield Cluster(process)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        assert process.stdin
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for member in (*family, process):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        print(complaints(temp_dir / "ray"))  # shown by pytest beside what failed
        shutil.rmtree(temp_dir, ignore_errors=True)


def test_serve_scales_a_pool_within_its_slots_and_restarts_it_while_it_answers(cluster: Cluster) -> None:
    first, second = planned(CHAT, "a-2"), planned(CHAT, "a-0")
    assert [pool.slots for plan in (first, second) for pool in pools_of(plan).values()] == [NAMES[:2], NAMES[1:]]
    roll_out(cluster, first, CHAT)
    assert health()["asleep"] == ["chat@pool"]
    assert ask() == "200", "the first request waits for the start"
    assert health()["asleep"] == []
    loads = [Load() for _ in range(4)]
    with ExitStack() as all_at_once:
        for load in loads:
            all_at_once.enter_context(load)
        wait(lambda: sum(places(cluster).values()) == 2)
        assert places(cluster) == {"a-0": 1, "a-1": 1}, "as many on each as are reserved, and on no other"
        wait(lambda: drift(cluster, first) == [])
        assert {item.kind for item in drift(cluster, second)} == {"replica_wrong_slot"}
        # a-0 is drained: it leaves the pool, and a-2 takes its place.
        assert roll_out(cluster, second, CHAT) == ["roll chat@pool", "make chat@pool"]
        assert set(places(cluster)) == {"a-1", "a-2"}
        wait(lambda: drift(cluster, second) == [])
        for load in loads:
            load.goes_on()
        berths = replace(CHAT, placement="berths")
        third = planned(berths, "a-0")
        steps = roll_out(cluster, third, berths)
        assert (steps[0], steps[-1]) == ("make chat@a-1, chat@a-2", "break chat@pool")
        for load in loads:
            load.goes_on()
        wait(lambda: drift(cluster, third) == [])
    assert [load.failures for load in loads] == [[]] * 4


def roll_out(cluster: Cluster, plan: Plan, app: Any) -> list[str]:
    """The rollout's own steps until it is done: what it said of each but of switches of the table."""
    wanted = Wanted(berth_apps(plan, [app], OPTIONS), ["chat"], dict.fromkeys(NAMES, VRAM_MIB), OPTIONS)
    told: list[str] = []
    until = time.monotonic() + 2 * WAIT_S
    while True:
        found = cluster.tell(details=True)
        slot_of = {node.node_id: node.slot for node in parse_state(found["nodes"], {}).nodes if node.slot}
        live = lives(found["serve"], slot_of)
        if told:
            # What it said at its first step of who is down: nobody, and so it was.
            assert any(item.running or (item.config and not fewest(item.config)) for item in berths_of(live).values())
        step = next_step(live, wanted)
        if step.kind == "done":
            return [text for text in told if "switch" not in text]
        if step.kind == "put":
            assert not step.down, (step.why, step.down)
            told.append(step.why)
            cluster.tell(put=list(step.apps))
        assert time.monotonic() < until, (step.why, told)
        time.sleep(0.3)


def berths_of(live: Any) -> dict[str, Any]:
    return {name: item for name, item in live.items() if name != GATEWAY}


def places(cluster: Cluster) -> Counter[str]:
    """How many replicas of the pool run on each slot."""
    found = cluster.tell(details=True)
    state = parse_state(found["nodes"], found["serve"])
    slot_of = {node.node_id: node.slot or "none" for node in state.nodes}
    return Counter(
        slot_of[str(replica.node_id)]
        for app in state.apps
        if app.name == "chat@pool"
        for deployment in app.deployments
        for replica in deployment.replicas
        if replica.state == "RUNNING"
    )


def drift(cluster: Cluster, plan: Plan) -> list[Finding]:
    found = cluster.tell(details=True)
    report = verify(plan, parse_state(found["nodes"], found["serve"]), {}, "pool")
    return [item for item in report.findings if item.severity == "drift"]


def ask() -> str:
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    try:
        answer = requests.post(f"http://127.0.0.1:{PORT}/v1/chat/completions", json=body, timeout=WAIT_S)
    except OSError as error:
        return str(error)
    return "200" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"


def health() -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"http://127.0.0.1:{PORT}/healthz", timeout=WAIT_S).json()
    return found


def wait(what: Callable[[], Any]) -> None:
    until = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until, f"it is not so after {WAIT_S} s: {health()}"
        time.sleep(0.2)


class Load:
    """Requests one after the other until the block ends; keeps what went wrong."""

    def __init__(self) -> None:
        self.answered, self.failures = 0, list[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def goes_on(self) -> None:
        """Two more are answered from here on."""
        before = self.answered
        wait(lambda: self.answered > before + 1)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            if (said := ask()) == "200":
                self.answered += 1
            else:
                self.failures.append(said)
