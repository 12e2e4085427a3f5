"""The app list: what is refused before anything starts, and what becomes of autoscaling in a plan."""

from __future__ import annotations

from typing import Any

import pytest

from berth.errors import BerthError
from berth.plan.apps import load_apps, parallel_sizes
from berth.plan.footprints import read_source
from berth.plan.planner import make_plan
from tests.unit.plan.helpers import slot
from tests.unit.ray.builders import spec as app_spec

APP = {"name": "chat", "engine": "llm", "model": "org/chat", "replicas": 1, "vram_mib": 4000}


def app(replicas: int = 1, **scaling: Any) -> dict[str, Any]:
    return {"name": "chat", "engine": "light", "replicas": replicas, "vram_mib": 10_000, "autoscaling": scaling}


@pytest.mark.parametrize(
    ("replicas", "scaling", "says"),
    [
        (2, {"max_replicas": 2}, r"max_replicas leaves nothing to scale; found: 2; allowed: > replicas \(2\)"),
        (0, {"max_replicas": 1, "target_ongoing_requests": 65}, r"<= max_ongoing_requests \(64\)"),
        (0, {"max_replicas": 1, "target_ongoing_requests": 0}, "target_ongoing_requests is never reached"),
        (0, {"max_replicas": 1, "downscale_delay_s": -1}, "downscale_delay_s is no time"),
        (0, {"max_replicas": 1, "look_back_period_s": 0}, "look_back_period_s is no time"),
        (0, {"max_replicas": 1, "min_replicas": 0}, "min_replicas"),
        (0, {}, "max_replicas"),
    ],
)
def test_what_cannot_scale_is_refused(replicas: int, scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(BerthError, match=says):
        load_apps([app(replicas, **scaling)])


@pytest.mark.parametrize("least", [-1, 3])
def test_no_more_can_be_kept_up_than_there_are(least: int) -> None:
    entry = {"name": "chat", "engine": "light", "replicas": 2, "vram_mib": 10_000, "min_available": least}
    with pytest.raises(BerthError, match=rf"min_available is more than it has; found: {least}; allowed: 0 to replicas"):
        load_apps([entry])


@pytest.mark.parametrize("replicas", [0, 1, 3])
def test_all_that_may_come_has_its_room_in_the_plan(replicas: int) -> None:
    (spec,) = load_apps([app(replicas, max_replicas=5)])
    plan = make_plan([slot("a-0"), slot("a-1")], [spec.deployment()], "pack")
    assert sum(berth.replicas for berth in plan.berths) == replicas
    assert sum(berth.replicas + berth.reserved for berth in plan.berths) == 5
    for place in plan.slots:
        here = [berth for berth in plan.berths if berth.slot == place.name]
        assert sum((berth.replicas + berth.reserved) * berth.vram_mib for berth in here) <= place.vram_mib


def test_room_that_there_is_not_is_said() -> None:
    (spec,) = load_apps([app(1, max_replicas=5)])
    plan = make_plan([slot("a-0")], [spec.deployment()], "pack")
    (left,) = plan.unplaced
    assert left.room >= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "embedding", "fallback": "transformers"}, ["only engine llm has a fallback", "embedding"]),
        (
            {"fallback": "transformers", "gpus_per_replica": 2},
            ["does not split a model over GPUs", "set gpus_per_replica"],
        ),
        ({"engine": "transformers", "gpus_per_replica": 2}, ["does not split a model over GPUs"]),
        ({"engine": "transformers", "engine_args": {"enable_lora": True}}, ["enable_lora", "max_model_len"]),
        ({"engine": "transformers", "adapters": {"sql": "/sql"}}, ["takes no adapters"]),
        ({"fallback": "llama.cpp"}, ["fallback", "transformers"]),
    ],
)
def test_what_the_transformers_engine_cannot_do_is_refused_before_anything_starts(
    changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BerthError) as refused:
        load_apps([{**APP, **changes}])
    assert all(word in str(refused.value) for word in words), refused.value


def test_an_engine_that_captures_no_graphs_has_none_in_its_footprint(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    made = [app_spec("chat", engine=engine, model=str(tmp_path), vram_mib=None) for engine in ("llm", "transformers")]
    assert [read_source(app).engine.enforce_eager for app in made] == [False, True]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"strategy": "spread"}, "strategy is not for a model over 2 slots; found: spread; allowed: not set, pack"),
        ({"engine": "embedding"}, "engine is not for a model over 2 slots; found: embedding; allowed: llm, light"),
        ({"fallback": "transformers"}, "fallback is not for a model over 2 slots"),
        ({"autoscaling": {"max_replicas": 3}}, "autoscaling is not for a model over 2 slots"),
        ({"engine_args": {"nnodes": 2}}, "engine_args.nnodes would break the placement's promise"),
        ({"slots_per_replica": 0}, "slots_per_replica is too small"),
    ],
)
def test_what_a_model_over_several_slots_cannot_have(more: dict[str, Any], says: str) -> None:
    app = {"name": "big", "engine": "llm", "model": "org/big", "replicas": 1, "vram_mib": 100, "slots_per_replica": 2}
    with pytest.raises(BerthError, match=says):
        load_apps([app | more])


def test_how_a_model_is_spread_over_its_slots() -> None:
    assert parallel_sizes(1, 1) == {}
    assert parallel_sizes(2, 1) == {"tensor_parallel_size": 2}
    assert parallel_sizes(8, 2) == {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}
    assert parallel_sizes(8, 2, "data") == {"tensor_parallel_size": 8, "data_parallel_size": 2}
    assert parallel_sizes(8, 2, "tensor") == {"tensor_parallel_size": 16}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"slots_per_replica": 2},
            "slots_per_replica is not for a pool: .*; found: 2; allowed: 1, or placement: berths",
        ),
        ({"gpus_per_replica": 2}, "gpus_per_replica is not for a pool: .*; found: 2; allowed: 1"),
        ({"prefix_affinity": 8}, "prefix_affinity is not for a pool: inside a pool Serve chooses the replica"),
        ({"placement": "pools"}, "placement"),
    ],
)
def test_what_a_pool_cannot_have(more: dict[str, Any], says: str) -> None:
    app = {"name": "chat", "engine": "llm", "model": "org/chat", "replicas": 4, "vram_mib": 100, "placement": "pool"}
    with pytest.raises(BerthError, match=says):
        load_apps([app | more])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sleep": {"after_s": 0}}, "sleep.after_s is no time; found: 0.0; allowed: > 0"),
        ({"sleep": {}}, "after_s"),
        ({"engine": "vllm_server"}, "engine is not for a model that sleeps: it has no sleep mode; found: vllm_server"),
        ({"fallback": "transformers"}, "fallback is not for a model that sleeps"),
        ({"slots_per_replica": 2}, "slots_per_replica is not for a model that sleeps: .*; allowed: 1, or no sleep"),
        ({"prefill": {}}, "prefill is not for a model that sleeps: .*KV cache; found: set"),
    ],
)
def test_what_cannot_sleep(more: dict[str, Any], says: str) -> None:
    assert load_apps([APP | {"sleep": {"after_s": 60}}])[0].sleep
    with pytest.raises(BerthError, match=says):
        load_apps([APP | {"sleep": {"after_s": 60}} | more])


def test_what_sleeps_keeps_its_room_and_its_engine_is_made_for_it(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    app = {key: value for key, value in APP.items() if key != "vram_mib"} | {"model": str(tmp_path)}
    awake, asleep = (load_apps([app | more])[0] for more in ({}, {"sleep": {"after_s": 60}}))
    assert not read_source(awake).engine.enable_sleep_mode
    assert read_source(asleep).engine.enable_sleep_mode
    assert awake.deployment({"default": 4000}) == asleep.deployment({"default": 4000})


def test_a_pool_is_planned_as_one_with_room_for_the_most() -> None:
    app = {"name": "chat", "engine": "llm", "model": "org/chat", "replicas": 0, "vram_mib": 100, "placement": "pool"}
    (made,) = load_apps([app | {"autoscaling": {"max_replicas": 8}, "fallback": "transformers"}])
    assert (made.deployment().placement, made.deployment().max_replicas) == ("pool", 8)
    (berths,) = load_apps([{key: value for key, value in app.items() if key != "placement"}])
    assert berths.deployment().placement == "berths"


PAIR = {
    "name": "chat",
    "engine": "llm",
    "model": "org/chat",
    "replicas": 4,
    "vram_mib": 100,
    "min_available": 2,
    "pins": ["GPU-1"],
    "autoscaling": {"max_replicas": 8},
    "engine_args": {"max_model_len": 4096, "kv_cache_dtype": "fp8"},
    "env": {"A": "1"},
    "adapters": {},
    "prefix_affinity": 8,
}


def test_what_reads_the_prompts_is_an_app_of_its_own_like_the_model_but_for_what_it_says() -> None:
    own = {"gpus_per_replica": 2, "products": ["NVIDIA H100"], "engine_args": {"max_num_batched_tokens": 16384}}
    chat, reader = load_apps([PAIR | {"prefill": own}])
    assert (chat.name, reader.name, reader.prefill_of, reader.prefill) == ("chat", "chat-prefill", "chat", None)
    assert (reader.model, reader.engine, reader.vram_mib, reader.env) == ("org/chat", "llm", 100, {"A": "1"})
    assert (reader.replicas, reader.gpus_per_replica, reader.products) == (1, 2, ("NVIDIA H100",))
    assert reader.engine_args == {"max_model_len": 4096, "kv_cache_dtype": "fp8", "max_num_batched_tokens": 16384}
    assert (reader.pins, reader.autoscaling, reader.min_available, reader.prefix_affinity) == ((), None, None, 8)
    assert [app.deployment().name for app in (chat, reader)] == ["chat", "chat-prefill"]


def test_a_footprint_of_either_kind_replaces_the_other() -> None:
    predicted = {key: value for key, value in PAIR.items() if key != "vram_mib"} | {"concurrency": 8, "config": "/c"}
    (_, reader) = load_apps([predicted | {"prefill": {"vram_mib": 300}}])
    assert (reader.vram_mib, reader.concurrency, reader.config) == (300, None, "")
    (_, reader) = load_apps([PAIR | {"prefill": {"concurrency": 2}}])
    assert (reader.vram_mib, reader.concurrency) == (None, 2)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"prefill": {"engine": "light"}}, "prefill: unknown key; found: engine; allowed: replicas, vram_mib"),
        ({"prefill": {"replicas": "two"}}, "app chat: prefill: replicas: .*found 'two'"),
        ({"prefill": {"replicas": 0}}, "prefill.replicas is too small; found: 0"),
        ({"prefill": {}, "engine": "embedding"}, "engine is not for a model with prefill apart; found: embedding"),
        ({"prefill": {}, "fallback": "transformers"}, "fallback is not for a model with prefill apart"),
        ({"prefill": {}, "slots_per_replica": 2, "autoscaling": None}, "slots_per_replica is not for a model with"),
        ({"prefill": {"engine_args": {"kv_cache_dtype": "auto"}}}, "could not read its KV cache; found: auto; .*fp8"),
        ({"prefill": {"engine_args": {"tensor_parallel_size": 2}}}, "chat-prefill: engine_args.tensor_parallel_size"),
        ({"prefill_of": "chat"}, "prefill_of: unknown key"),
    ],
)
def test_what_a_model_with_prefill_apart_cannot_have(more: dict[str, Any], says: str) -> None:
    with pytest.raises(BerthError, match=says):
        load_apps([PAIR | more])


def test_an_app_that_has_the_name_already_is_told() -> None:
    with pytest.raises(BerthError, match="two apps have the same name; found: chat-prefill"):
        load_apps([PAIR | {"prefill": {}}, PAIR | {"name": "chat-prefill"}])
