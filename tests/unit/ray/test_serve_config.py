"""What Berth asks of Serve. Serve drops keys that it does not know without a word, so they are checked here."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.plan.apps import Autoscaling, Sleep
from berth.plan.types import Berth
from berth.ray.serve_config import (
    GATEWAY,
    MAX_BODY_VARIABLE,
    ServeOptions,
    berth_app,
    berth_apps,
    fewest,
    gateway_app,
    gateway_table,
    is_pool,
    most,
    needs,
    pool_app,
    slots_of,
)
from tests.unit.ray.builders import OPTIONS, app, plan, pool, pooled, slot, spec

# ray/serve/schema.py of Ray 2.60: those keys of ServeApplicationSchema, DeploymentSchema and RayActorOptionsSchema
# that a config of ours may use.
APP_KEYS = {"name", "route_prefix", "import_path", "args", "runtime_env", "deployments"}
DEPLOYMENT_KEYS = {
    "name",
    "num_replicas",
    "autoscaling_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "backpressure_config",
    "graceful_shutdown_timeout_s",
    "max_replicas_per_node",
    "user_config",
    "ray_actor_options",
}
ACTOR_KEYS = {"num_cpus", "num_gpus", "resources", "label_selector"}
FULL_OPTIONS = ServeOptions("127.0.0.1", 8000, gateway_replicas=2, drain_s=30.0, env={"A": "1"})


def berth(count: int = 1, vram: int = 2_000, gpus: int = 1, **changes: Any) -> dict[str, Any]:
    place = slot("gpu01-0", 45_000, gpus, total=46_068)
    return berth_app(spec("chat", **changes), Berth("chat", "gpu01-0", count, vram, "test"), place, OPTIONS)


def actor(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config["deployments"][0]["ray_actor_options"])


def test_a_replica_over_several_slots_is_one_app_with_a_deployment_on_each() -> None:
    berths = [("big", "gpu01-0", 1, 2_000), ("big", "gpu02-0", 1, 2_000)]
    made = plan([slot("gpu01-0", total=8_600), slot("gpu02-0", total=8_500)], berths)
    team = ("gpu01-0", "gpu02-0")
    made = replace(made, berths=tuple(replace(item, team=team) for item in made.berths))
    apps = berth_apps(made, [spec("big", slots_per_replica=2)], OPTIONS)
    assert list(apps) == ["big@gpu01-0"]
    config = apps["big@gpu01-0"]
    assert config["args"]["team"] == ["gpu01-0", "gpu02-0"]
    assert config["args"]["across_slots"] == "pipeline"
    assert config["args"]["gpu_memory_utilization"] == math.floor(10_000 * 2_000 / 8_600) / 10_000
    assert [item["name"] for item in config["deployments"]] == ["big", "big~gpu02-0"]
    assert slots_of(config["name"], [item["name"] for item in config["deployments"]]) == team
    assert needs(config) == {name: {"VRAM_MB": 2_000, "GPU": 0.01, "CPU": 0.5} for name in team}
    for item in config["deployments"]:
        assert item.keys() <= DEPLOYMENT_KEYS
        assert item["ray_actor_options"].keys() <= ACTOR_KEYS
    leader, node = config["deployments"]
    assert node["graceful_shutdown_timeout_s"] > leader["graceful_shutdown_timeout_s"]


def test_a_berth_on_a_shared_slot() -> None:
    config = berth(count=3)
    assert config["name"] == "chat@gpu01-0"
    assert config["route_prefix"] is None
    assert config["deployments"][0]["name"] == "chat"
    assert config["deployments"][0]["num_replicas"] == 3
    assert actor(config) == {
        "num_cpus": 0.5,
        "num_gpus": 0.01,
        "resources": {"VRAM_MB": 2_000},
        "label_selector": {"berth.slot": "gpu01-0"},
    }
    assert config["args"]["gpus"] == 1


def test_a_berth_on_a_slot_of_two_gpus_takes_both_whole() -> None:
    config = berth(vram=40_000, gpus=2)
    assert actor(config)["num_gpus"] == 2
    assert actor(config)["resources"] == {"VRAM_MB": 80_000}
    assert (config["args"]["gpus"], config["args"]["vram_mib"]) == (2, 40_000)


@given(st.integers(1, 200_000), st.integers(0, 10_000))
def test_the_engine_never_takes_more_than_its_share(vram: int, beside: int) -> None:
    place = slot("gpu01-0", vram + beside, total=vram + beside)
    config = berth_app(spec("chat"), Berth("chat", "gpu01-0", 1, vram, "test"), place, OPTIONS)
    share = config["args"]["gpu_memory_utilization"]
    assert share * place.total_mib <= vram * (1 + 1e-12)
    assert vram / place.total_mib - share <= 1e-4
    assert share <= 1


def test_a_change_of_count_changes_nothing_that_restarts_replicas() -> None:
    one, three = berth(count=1), berth(count=3)
    for config in (one, three):
        # Both "lightweight" in Ray 2.60, serve/_private/config.py.
        del config["deployments"][0]["num_replicas"], config["deployments"][0]["max_queued_requests"]
    assert one == three


def test_the_environment_is_the_fleets_under_the_models() -> None:
    config = berth_app(
        spec("chat", env={"A": "model", "B": "model"}),
        Berth("chat", "gpu01-0", 1, 2_000, "test"),
        slot("gpu01-0"),
        ServeOptions("127.0.0.1", 8000, env={"A": "fleet", "C": "fleet"}),
    )
    assert config["runtime_env"] == {"env_vars": {"A": "model", "B": "model", "C": "fleet"}}
    assert berth()["runtime_env"] == {}


def test_the_gateway_has_its_table_where_a_change_restarts_nothing() -> None:
    table = gateway_table(["chat", "rerank"], [app("chat", "gpu01-1", 2), app("chat", "gpu01-0")])
    assert table == {
        "models": {
            "chat": {
                "berths": [
                    {"app": "chat@gpu01-0", "replicas": 1, "limit": 64 + 64},
                    {"app": "chat@gpu01-1", "replicas": 2, "limit": 2 * 64 + 64},
                ]
            },
            "rerank": {"berths": []},
        }
    }
    config = gateway_app(table, OPTIONS)
    assert (config["name"], config["route_prefix"], config["args"]) == (GATEWAY, "/", {})
    assert config["deployments"][0]["user_config"] == table
    assert actor(config) == {"num_cpus": 0.1, "label_selector": {"berth.role": "slot"}}


def test_the_gateway_is_told_its_largest_body() -> None:
    config = gateway_app({}, replace(OPTIONS, max_body_mib=8))
    assert config["runtime_env"]["env_vars"][MAX_BODY_VARIABLE] == "8"


def test_a_berths_queue_has_an_end_for_serve_and_for_the_gateway() -> None:
    config = berth(count=3, max_ongoing_requests=10, max_queued_requests=5)
    assert config["deployments"][0]["max_ongoing_requests"] == 10
    assert config["deployments"][0]["max_queued_requests"] == 35
    (entry,) = gateway_table(["chat"], [config])["models"]["chat"]["berths"]
    assert entry == {"app": "chat@gpu01-0", "replicas": 3, "limit": 35}
    assert berth(count=0, max_queued_requests=0)["deployments"][0]["max_queued_requests"] == 1, "Serve refuses 0"


def test_a_berth_of_an_earlier_version_has_no_end_until_it_is_adjusted() -> None:
    config = berth()
    del config["deployments"][0]["max_queued_requests"]
    assert gateway_table([], [config])["models"]["chat"]["berths"] == [{"app": "chat@gpu01-0", "replicas": 1}]


def test_the_table_knows_adapters_and_prefixes() -> None:
    config = berth(adapters={"sql": "/models/sql", "legal": "/models/legal"}, engine_args={"enable_lora": True})
    table = gateway_table(["chat", "rerank"], [config], {"chat": 8.0, "rerank": 0.0, "gone": 8.0})
    assert config["args"]["adapters"] == {"sql": "/models/sql", "legal": "/models/legal"}
    assert table["models"]["chat"]["prefix_affinity"] == 8.0
    assert table["models"]["chat"]["berths"][0]["adapters"] == ["legal", "sql"]
    assert table["models"]["rerank"] == {"berths": []}
    assert "adapters" not in berth()["args"], "an app without any has the arguments it always had: no restart"


GROWS = Autoscaling(max_replicas=9, downscale_delay_s=60.0)


def growing(replicas: int, reserved: int, **changes: Any) -> dict[str, Any]:
    made = spec("chat", max_ongoing_requests=10, max_queued_requests=5, autoscaling=GROWS, **changes)
    return berth_app(made, Berth("chat", "gpu01-0", replicas, 2_000, "test", reserved), slot("gpu01-0"), OPTIONS)


def test_serve_scales_a_berth_within_the_room_that_the_plan_keeps_there() -> None:
    config = growing(1, 2)
    deployment = config["deployments"][0]
    assert "num_replicas" not in deployment, "Serve refuses both"
    assert deployment["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 5.0,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 60.0,
        "look_back_period_s": 30.0,
        "metrics_interval_s": 10.0,
    }
    assert deployment["max_queued_requests"] == 35
    (entry,) = gateway_table(["chat"], [config])["models"]["chat"]["berths"]
    assert entry == {"app": "chat@gpu01-0", "replicas": 3, "wake_above": 15.0, "sleeps": False, "limit": 35}
    assert (fewest(config), most(config)) == (1, 3)


def test_a_berth_that_is_nothing_but_room_sleeps_until_it_is_asked() -> None:
    config = growing(0, 2)
    assert (fewest(config), most(config)) == (0, 2)
    assert gateway_table(["chat"], [config])["models"]["chat"]["berths"][0]["sleeps"] is True


def test_a_berth_without_room_has_its_number() -> None:
    config = growing(2, 0)
    assert config["deployments"][0]["num_replicas"] == 2
    assert "autoscaling_config" not in config["deployments"][0]
    assert (fewest(config), most(config)) == (2, 2)


def test_a_pool_is_one_app_with_one_deployment_over_its_slots() -> None:
    slots = [slot("gpu01-0", total=8_600), slot("gpu01-2", total=8_500), slot("gpu01-10", total=8_500)]
    made = plan(slots, [])
    berths = tuple(reversed(pooled("chat", [item.name for item in slots], 4, each=2).berths))
    apps = berth_apps(replace(made, berths=berths), [spec("chat", placement="pool")], OPTIONS)
    assert list(apps) == ["chat@pool"]
    config = apps["chat@pool"]
    (deployment,) = config["deployments"]
    assert (deployment["name"], deployment["num_replicas"], deployment["max_replicas_per_node"]) == ("chat", 4, 2)
    assert actor(config) == {
        "num_cpus": 0.5,
        "num_gpus": 0.01,
        "resources": {"VRAM_MB": 2_000},
        "label_selector": {"berth.slot": "in(gpu01-0,gpu01-2,gpu01-10)"},
    }
    assert config["args"]["gpu_memory_utilization"] == math.floor(10_000 * 2_000 / 8_600) / 10_000
    assert needs(config) == {item.name: {"VRAM_MB": 4_000, "GPU": 0.02, "CPU": 1.0} for item in slots}
    assert is_pool(config)
    assert not is_pool(berth())
    (entry,) = gateway_table(["chat"], [config])["models"]["chat"]["berths"]
    assert entry == {"app": "chat@pool", "replicas": 4, "limit": 4 * 64 + 64}


def growing_pool(fewest: int) -> dict[str, Any]:
    made = spec("chat", placement="pool", max_ongoing_requests=10, max_queued_requests=5, autoscaling=GROWS)
    slots = ["gpu01-0", "gpu01-1", "gpu01-2"]
    return pool_app(made, pooled("chat", slots, fewest, each=3, most=9), [slot(name) for name in slots], OPTIONS)


def test_serve_scales_a_pool_between_its_bounds_and_to_nothing() -> None:
    config = growing_pool(2)
    deployment = config["deployments"][0]
    assert "num_replicas" not in deployment
    assert deployment["autoscaling_config"]["min_replicas"] == 2
    assert deployment["autoscaling_config"]["max_replicas"] == 9
    assert deployment["max_queued_requests"] == 95
    assert needs(config)["gpu01-1"]["VRAM_MB"] == 6_000
    (entry,) = gateway_table(["chat"], [config])["models"]["chat"]["berths"]
    assert entry == {"app": "chat@pool", "replicas": 9, "wake_above": 45.0, "sleeps": False, "limit": 95}
    (asleep,) = gateway_table(["chat"], [growing_pool(0)])["models"]["chat"]["berths"]
    assert asleep["sleeps"] is True


def test_a_pools_numbers_change_nothing_that_restarts_replicas() -> None:
    two, four = pool("chat", "gpu01-0", "gpu01-1", count=2, each=2), pool("chat", "gpu01-0", "gpu01-1", count=4, each=2)
    for config in (two, four):
        del config["deployments"][0]["num_replicas"], config["deployments"][0]["max_queued_requests"]
    assert two == four


def test_the_gateway_asks_those_that_may_run_another_engine_than_vllm() -> None:
    allowed, asked, plain = berth(fallback="transformers"), berth(engine="transformers"), berth()
    assert allowed["args"]["fallback"] == "transformers"
    assert "fallback" not in plain["args"], "an app without one has the arguments it always had: no restart"
    entries = [gateway_table([], [config])["models"]["chat"]["berths"][0] for config in (allowed, asked, plain)]
    assert [entry.get("may_differ") for entry in entries] == [True, True, None]


def test_a_model_that_sleeps_says_so_and_others_have_the_arguments_they_always_had() -> None:
    assert berth(sleep=Sleep(60))["args"]["sleep"] == {"after_s": 60}
    assert "sleep" not in berth()["args"]


def test_engines_that_read_json_are_asked_in_it() -> None:
    """One that may have a fallback in vLLM's place runs vLLM as a rule, which takes no JSON."""
    asked = [berth(engine=name) for name in ("light", "transformers", "vllm_server", "llm", "rerank")]
    entries = [gateway_table([], [config])["models"]["chat"]["berths"][0] for config in asked]
    assert [entry.get("plain") for entry in entries] == [True, True, True, None, None]
    (entry,) = gateway_table([], [berth(fallback="transformers")])["models"]["chat"]["berths"]
    assert "plain" not in entry


def test_a_berth_of_a_model_that_is_no_longer_wanted_stays_in_the_table_until_it_goes() -> None:
    assert gateway_table([], [app("chat", "gpu01-0")])["models"]["chat"]["berths"][0]["app"] == "chat@gpu01-0"


def test_every_berth_of_the_plan_becomes_an_app() -> None:
    slots = [slot("gpu01-0"), slot("gpu01-1")]
    found = berth_apps(
        plan(slots, [("chat", "gpu01-0", 1, 2_000), ("chat", "gpu01-1", 2, 2_000)]), [spec("chat")], OPTIONS
    )
    assert list(found) == ["chat@gpu01-0", "chat@gpu01-1"]
    assert [actor(config)["label_selector"]["berth.slot"] for config in found.values()] == ["gpu01-0", "gpu01-1"]


def test_a_plan_older_than_the_app_list_is_refused() -> None:
    with pytest.raises(BerthError, match="places chat, which the app list does not have; allowed: rerank; mend: "):
        berth_apps(plan([slot("gpu01-0")], [("chat", "gpu01-0", 1, 2_000)]), [spec("rerank")], OPTIONS)


def everything() -> dict[str, Any]:
    """A config with every key that Berth ever writes."""
    berth_config = berth_app(
        spec("chat", env={"B": "2"}, engine_args={"max_model_len": 512}),
        Berth("chat", "gpu01-0", 2, 2_000, "test"),
        slot("gpu01-0"),
        FULL_OPTIONS,
    )
    grows = berth_app(
        spec("grows", autoscaling=GROWS), Berth("grows", "gpu01-1", 1, 2_000, "test", 1), slot("gpu01-1"), FULL_OPTIONS
    )
    pair = berth_app(spec("big"), Berth("big", "gpu02-0", 1, 6_000, "test"), slot("gpu02-0", gpus=2), FULL_OPTIONS)
    fleet = growing_pool(2)
    gateway = gateway_app(gateway_table(["chat", "big", "grows"], [berth_config, pair, grows, fleet]), FULL_OPTIONS)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [berth_config, pair, grows, fleet, gateway],
    }


def test_no_key_that_serve_would_drop() -> None:
    for config in everything()["applications"]:
        assert config.keys() <= APP_KEYS
        for deployment in config["deployments"]:
            assert deployment.keys() <= DEPLOYMENT_KEYS
            assert deployment["ray_actor_options"].keys() <= ACTOR_KEYS


ECHO = """
import json, sys
from ray.serve.schema import ServeDeploySchema
config = ServeDeploySchema.model_validate(json.load(sys.stdin))
print(json.dumps(config.model_dump(exclude_unset=True), default=str))
"""


@pytest.mark.runtime
def test_serve_itself_keeps_every_key_and_value(runtime_python: str) -> None:
    done = subprocess.run(
        [runtime_python, "-c", ECHO],
        input=json.dumps(everything()),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == everything()


def test_what_reads_prompts_is_in_the_table_for_its_model_alone() -> None:
    own, reader = berth(prefill={}, max_ongoing_requests=7), berth(prefill_of="other")
    assert (own["args"]["prefill"], reader["args"]["prefill_of"]) == ("chat-prefill", "other")
    assert not {"prefill", "prefill_of"} & berth()["args"].keys(), "no restart of what has none"
    table = gateway_table(["other"], [own, reader | {"name": "z@gpu01-0"}])["models"]
    assert table["other"] == {"berths": []}
    assert table["chat"]["prefill_of"] == "other"
    first, second = table["chat"]["berths"]
    assert (first["works_on"], "works_on" in second) == (7, False)
