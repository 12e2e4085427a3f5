"""A pool on a real Ray Serve of several nodes: Serve scales it within its slots, and restarts it, while it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import requests

from berth.plan.apps import Autoscaling
from berth.plan.planner import make_plan
from berth.plan.pools import pools_of
from berth.plan.types import Plan, Slot
from berth.ray.deploy import lives
from berth.ray.rollout import Wanted, next_step
from berth.ray.serve_config import GATEWAY, ServeOptions, berth_apps, fewest
from berth.ray.state import parse_state
from berth.verify.compare import Finding, verify
from tests.unit.engines import small_serve
from tests.unit.engines.small_serve import WAIT_S, Cluster, Load, running
from tests.unit.plan.helpers import slot
from tests.unit.ray.builders import spec

PORT = 23791
OPTIONS = ServeOptions("127.0.0.1", PORT, drain_s=30.0)
VRAM_MIB = 1_000
NAMES = ("a-0", "a-1", "a-2")
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
    # A runtime without vLLM, as in the lab: its classes take every process that sees a request ten CPU seconds.
    (without := tmp_path_factory.mktemp("without")).joinpath("sitecustomize.py").write_text(WITHOUT_VLLM)
    words = ["-m", "tests.unit.engines.pool_cluster", str(PORT), str(VRAM_MIB), *NAMES]
    with running(Cluster, tmp_path_factory.mktemp("sim"), "pool", words, len(NAMES), str(without)) as made:
        yield made


def test_serve_scales_a_pool_within_its_slots_and_restarts_it_while_it_answers(cluster: Cluster) -> None:
    first, second = planned(CHAT, "a-2"), planned(CHAT, "a-0")
    assert [pool.slots for plan in (first, second) for pool in pools_of(plan).values()] == [NAMES[:2], NAMES[1:]]
    roll_out(cluster, first, CHAT)
    assert health()["asleep"] == ["chat@pool"]
    assert ask().status_code == 200, "the first request waits for the start"
    assert health()["asleep"] == []
    loads = [Load(ask) for _ in range(4)]
    with ExitStack() as all_at_once:
        for load in loads:
            all_at_once.enter_context(load)
        wait(lambda: sum(cluster.places("chat@pool").values()) == 2)
        assert cluster.places("chat@pool") == {"a-0": 1, "a-1": 1}, "as many on each as are reserved, and on no other"
        wait(lambda: drift(cluster, first) == [])
        assert {item.kind for item in drift(cluster, second)} == {"replica_wrong_slot"}
        # a-0 is drained: it leaves the pool, and a-2 takes its place.
        assert roll_out(cluster, second, CHAT) == ["roll chat@pool", "make chat@pool"]
        assert set(cluster.places("chat@pool")) == {"a-1", "a-2"}
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


def drift(cluster: Cluster, plan: Plan) -> list[Finding]:
    found = cluster.tell(details=True)
    report = verify(plan, parse_state(found["nodes"], found["serve"]), {}, "pool")
    return [item for item in report.findings if item.severity == "drift"]


def ask() -> requests.Response:
    body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    return requests.post(f"http://127.0.0.1:{PORT}/v1/chat/completions", json=body, timeout=WAIT_S)


def wait(what: Callable[[], Any]) -> None:
    small_serve.wait(what, found=health)


def health() -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"http://127.0.0.1:{PORT}/healthz", timeout=WAIT_S).json()
    return found
