"""What goes wrong in the systems that Berth replaces, as cases that it gets right.

Each case is the peer's own report, as far as it concerns a plan or a footprint; docs/peers_bugs.md lists them all, also
those whose tests are in other rooms.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from berth.codec import replace
from berth.errors import BerthError
from berth.footprint.architecture import read_model
from berth.footprint.engine_args import read_engine_args
from berth.footprint.kv_cache import kv_cache
from berth.footprint.predict import estimate, predict
from berth.footprint.products import product
from berth.footprint.types import EngineArgs
from berth.plan.apps import OWNED_ENGINE_ARGS, load_apps
from berth.plan.contract import Apps, load_deployments, load_gpus
from berth.plan.contract_answer import answer, as_previous, load_previous
from berth.plan.planner import Options, make_plan, solve
from berth.plan.types import Deployment, Plan, Slot
from tests.unit.footprint.test_kv_cache import QWEN3_30B, released
from tests.unit.footprint.test_predict import LLAMA_8B
from tests.unit.plan.helpers import A100, L40S, T4, grid, model, promised, slot, used_slots, where

RTX_4090, RTX_4080 = "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4080"
A5000, RTX_2080 = "NVIDIA RTX A5000", "NVIDIA RTX 2080 Ti"
FUSED = Options(regroup=True)


def held(plan: Plan) -> dict[str, int]:
    """MiB promised on each GPU by UUID, slots of several GPUs included."""
    by_name = {item.name: item for item in plan.slots}
    found = {uuid: 0 for item in plan.slots for uuid in item.gpu_uuids}
    for berth in plan.berths:
        for uuid in by_name[berth.slot].gpu_uuids:
            found[uuid] += berth.vram_mib * (berth.replicas + berth.reserved)
    return found


def oversold(plan: Plan, slots: tuple[Slot, ...] | list[Slot]) -> list[str]:
    free = {uuid: item.free_mib for item in slots for uuid in item.gpu_uuids}
    return [uuid for uuid, mib in held(plan).items() if mib > free[uuid]]


def modelled(config: dict[str, Any], engine: dict[str, Any], slots: tuple[Slot, ...], replicas: int = 1) -> Apps:
    """One deployment whose footprint is predicted."""
    entry = {"name": "chat", "replicas": replicas, "model": {"config": config, "engine": engine}}
    return load_deployments({"deployments": [entry]}, slots)


# --- QueryLake --------------------------------------------------------------------------------------------------------


def test_querylake_fractions_of_the_largest_card_do_not_reach_a_smaller_one():
    slots = [slot("big-0", 80_000, product=A100), *grid(1, 2, 23_500, product=A5000), slot("old-0", 11_000, product=T4)]
    asked = [model("llm", 9, 9_828), model("embedding", 8, 1_965), model("rerank", 4, 3_931)]
    # As QueryLake does it: a share of the largest card, which Ray then admits by the share on every card.
    share = 9_828 / 80_000
    assert int(1 / share) * 9_828 > 23_500 > 2 * 9_828
    for strategy in ("pack", "spread"):
        plan = make_plan(slots, asked, strategy)
        assert not plan.unplaced
        assert oversold(plan, slots) == []
    narrow = make_plan(slots[1:], asked[:1], "pack")
    assert sum(where(narrow, "llm").values()) == 5
    assert oversold(narrow, slots) == []


def test_querylake_footprint_follows_the_product_not_the_largest_card():
    slots = [slot("a-0", 80_000, product=A100), slot("b-0", 14_500, product=T4)]
    plan = make_plan(slots, [model("chat", 2, {A100: 30_000, "default": 9_828})], "spread")
    assert {berth.slot: berth.vram_mib for berth in plan.berths} == {"a-0": 30_000, "b-0": 9_828}


@pytest.mark.parametrize("replicas", range(6))
def test_querylake_one_budget_whatever_replicas_every_replica_has_its_own(replicas: int):
    plan = make_plan(grid(1, 2, 22_000), [model("embedding", replicas, 9_828)], "pack")
    assert sum(held(plan).values()) == min(replicas, 4) * 9_828
    assert sum(item.replicas for item in plan.unplaced) == max(0, replicas - 4)
    growing = replace(model("embedding", 1, 9_828), max_replicas=3)
    assert sum(held(make_plan(grid(1, 2, 22_000), [growing], "pack")).values()) == 3 * 9_828


def test_querylake_too_large_a_model_is_refused_not_warned_about():
    plan = make_plan(grid(1, 2, 22_000), [model("llm", 1, 30_000), model("rerank", 1, 3_931)], "pack")
    (refused,) = plan.unplaced
    assert (refused.deployment, refused.replicas, refused.shortage_mib) == ("llm", 1, 8_000)
    assert "llm is larger than any GPU here: it takes 29.3 GiB (30000 MiB)" in refused.reason
    assert where(plan, "llm") == {}
    assert sum(held(plan).values()) == 3_931


def test_querylake_several_gpus_per_replica_are_not_clamped_to_one():
    slots = [*grid(1, 4), slot("single-0")]
    solution = solve(slots, [model("llm", 2, 40_000, gpus=2)], "pack", options=FUSED)
    homes = {item.name: item for item in solution.plan.slots}
    gpus = [homes[berth.slot].gpu_uuids for berth in solution.plan.berths]
    assert [len(uuids) for uuids in gpus] == [2, 2]
    assert len({uuid for uuids in gpus for uuid in uuids}) == 4
    assert {homes[berth.slot].host for berth in solution.plan.berths} == {"gpu00"}
    alone = solve([slot("single-0")], [model("llm", 1, 40_000, gpus=2)], "pack", options=FUSED)
    assert alone.plan.unplaced[0].replicas == 1
    one, two = (predict(LLAMA_8B, EngineArgs(tensor_parallel_size=n, max_model_len=4096)) for n in (1, 2))
    assert (one.gpus, two.gpus) == (1, 2)
    assert 0.45 < two.weights_mib / one.weights_mib < 0.55


def test_querylake_models_on_unequal_cards():
    slots = [*grid(1, 2, 23_500, product=A5000), slot("old-0", 11_000, product=RTX_2080)]
    # Its own config: an LLM may have no replica at all.
    asked = [model("llm", 3, 9_828), model("embedding", 6, 1_965), model("rerank", 2, 3_931), model("idle", 0, 9_828)]
    plan = make_plan(slots, asked, "pack")
    assert not plan.unplaced
    assert oversold(plan, slots) == []
    assert plan.deployments["idle"] == 0
    assert where(plan, "idle") == {}


# --- ray-hive ---------------------------------------------------------------------------------------------------------


def test_ray_hive_a_mixture_of_experts_weighs_all_of_its_experts():
    # Planned there with 6.2 GiB: the experts that one token meets.
    found = predict(QWEN3_30B | {"vocab_size": 151936, "tie_word_embeddings": False}, EngineArgs(max_model_len=4096))
    assert found.weights_mib / 1024 == pytest.approx(56.87, abs=0.2)
    assert found.safe_mib > 56.87 * 1024
    slots = load_gpus({"hosts": [{"name": "a", "gpus": [gpu_entry(0, L40S, 45_488), gpu_entry(1, L40S, 45_488)]}]})
    apps = modelled(QWEN3_30B, {"max_model_len": 4096}, slots)
    assert solve(slots, apps.deployments, "pack").plan.berths == ()


def gpu_entry(index: int, name: str, mib: int, uuid: str = "") -> dict[str, Any]:
    return {"uuid": uuid or f"GPU-{index}", "index": index, "product": name, "memory_mib": mib}


@pytest.mark.parametrize(("heads", "tensor"), list(itertools.product([1, 2, 4, 8], [1, 2, 4, 8, 16])))
def test_ray_hive_kv_heads_are_replicated_when_there_are_more_ranks(heads: int, tensor: int):
    cache = kv_cache(read_model(released(num_key_value_heads=heads)), EngineArgs(tensor_parallel_size=tensor))
    # Each rank holds at least one head: layers x 2 (K and V) x heads x head_dim x 2 bytes.
    assert cache.bytes_per_token == 32 * 2 * max(1, heads // tensor) * 128 * 2


@pytest.mark.parametrize("key", sorted(OWNED_ENGINE_ARGS))
@pytest.mark.parametrize("spelled", [str, lambda key: key.replace("_", "-"), lambda key: f"--{key.replace('_', '-')}"])
def test_ray_hive_engine_arguments_that_break_the_plan_are_refused(key: str, spelled: Any):
    entry = {"name": "chat", "engine": "llm", "replicas": 1, "vram_mib": 9_000, "model": "hub/chat"}
    with pytest.raises(BerthError, match=r"would break the placement's promise.*mend: remove it and use"):
        load_apps([{**entry, "engine_args": {spelled(key): 2}}])


def test_ray_hive_engine_arguments_that_are_allowed_are_accounted_for():
    total = product("L40S").total_mib
    slots = load_gpus({"hosts": [{"name": "a", "gpus": [gpu_entry(0, L40S, total)]}]})
    sizes = {}
    for name, engine in {
        "plain": {},
        "share": {"gpu_memory_utilization": 0.8},
        "budget": {"kv_cache_memory_bytes": 12 << 30},
        "longer": {"max_model_len": 32_768},
        "more at once": {"concurrency": 8},
        "wider batches": {"max_num_seqs": 1024},
    }.items():
        (only,) = modelled(LLAMA_8B, {"max_model_len": 8192, "max_num_seqs": 64, **engine}, slots).deployments
        sizes[name] = only.vram_mib[L40S]
    assert all(size > sizes["plain"] for name, size in sizes.items() if name != "plain"), sizes
    assert 0.8 * total - 4 <= sizes["share"] <= 0.8 * total
    with pytest.raises(BerthError, match="num_gpu_blocks_override would replace the KV budget"):
        read_engine_args({"num-gpu-blocks-override": 4096})
    entry = {"name": "chat", "engine": "llm", "replicas": 1, "vram_mib": 9_000, "model": "hub/chat"}
    with pytest.raises(BerthError, match="kv_cache_memory_bytes alone is more than its footprint"):
        load_apps([{**entry, "engine_args": {"kv_cache_memory_bytes": 9_000 << 20}}])


def test_ray_hive_a_gpu_is_its_uuid_when_the_indices_change():
    def fleet(order: str) -> tuple[Slot, ...]:
        gpus = [gpu_entry(index, L40S, 45_488, f"GPU-{name}") for index, name in enumerate(order)]
        return load_gpus({"hosts": [{"name": "a", "gpus": gpus}]})

    def homes(solution: Any) -> dict[str, str]:
        return {item["deployment"]: item["gpus"][0] for item in answer(solution)["assignments"]}

    asked = (model("chat", 1, 40_000), model("rerank", 1, 30_000), model("embed", 1, 20_000))
    first = solve(fleet("bca"), asked, "pack")
    raw = load_previous(json.loads(json.dumps(answer(first))), "previous")
    for order in itertools.permutations("abc"):
        slots = fleet("".join(order))
        again = solve(slots, asked, "pack", as_previous(raw, slots, asked).plan)
        assert homes(again) == homes(first)
        assert again.summary.moves == 0


def test_ray_hive_a_model_asleep_holds_the_room_it_wakes_in():
    slots = load_gpus({"hosts": [{"name": "a", "gpus": [gpu_entry(0, L40S, 45_488)]}]})
    awake, asleep = (
        estimate(LLAMA_8B, EngineArgs(max_model_len=8192, enable_sleep_mode=sleeps), gpu="L40S").footprint
        for sleeps in (False, True)
    )
    assert asleep.safe_mib >= awake.safe_mib
    many = modelled(LLAMA_8B, {"max_model_len": 8192, "enable_sleep_mode": True}, slots, replicas=9)
    plan = solve(slots, many.deployments, "pack").plan
    placed = sum(where(plan, "chat").values())
    assert 0 < placed < 9
    # All of those placed may wake at once.
    assert placed * asleep.safe_mib <= 45_488 < (placed + 1) * asleep.safe_mib


def test_ray_hive_a_reservation_that_fails_is_told_and_holds_nothing():
    slots = grid(1, 2, 22_000)
    plan = make_plan(slots, [model("chat", 5, 10_000)], "pack")
    assert sum(where(plan, "chat").values()) == 4
    assert [(item.deployment, item.replicas) for item in plan.unplaced] == [("chat", 1)]
    assert plan.unplaced[0].shortage_mib == 8_000
    assert sum(held(plan).values()) == 40_000


def test_ray_hive_what_pends_or_went_leaks_no_room():
    slots = grid(1, 2, 22_000)
    waiting = make_plan(slots, [model("chat", 1, 20_000), model("huge", 3, 30_000)], "pack")
    assert {item.deployment for item in waiting.unplaced} == {"huge"}
    # Neither a place that was wanted and never had, nor one of a model that is gone, is in anybody's way.
    after = make_plan(slots, [model("new", 2, 22_000)], "pack", waiting)
    assert not after.unplaced
    assert held(after) == {"GPU-gpu00-0-0": 22_000, "GPU-gpu00-1-0": 22_000}
    room = replace(model("grows", 1, 10_000), max_replicas=4)
    kept = make_plan(slots, [room], "pack")
    assert sum(held(kept).values()) == 40_000
    assert sum(held(make_plan(slots, [replace(room, max_replicas=None)], "pack", kept)).values()) == 10_000


def test_ray_hive_what_was_promised_counts_before_the_driver_shows_it():
    # The reading is of before chat began to load: all memory is free on both GPUs.
    slots = load_gpus(
        {"hosts": [{"name": "a", "gpus": [{**gpu_entry(n, L40S, 45_488), "used_mib": 0} for n in (0, 1)]}]}
    )
    before = make_plan(slots, [model("chat", 1, 40_000)], "pack")
    after = make_plan(slots, [model("chat", 1, 40_000), model("other", 1, 40_000)], "pack", before)
    assert len(used_slots(after)) == 2
    third = make_plan(slots, [model("chat", 1, 40_000), model("other", 2, 40_000)], "pack", after)
    assert sum(item.replicas for item in third.unplaced) == 1
    assert oversold(third, slots) == []


# --- GPUStack ---------------------------------------------------------------------------------------------------------


def test_pack_joins_the_gpu_in_use_whatever_the_number_of_gpus_of_the_hosts_gpustack_1597():
    # A host with one GPU, where a model is pinned, and a host with two: the next model opened one of the two.
    slots = [
        slot("server-0", 24_000, product=RTX_4090),
        *(slot(f"worker-{n}", 16_000, product=RTX_4080) for n in (0, 1)),
    ]
    pinned = replace(model("first", 1, 8_000), pins=("GPU-server-0-0",))
    plan = make_plan(slots, [pinned], "pack")
    after = make_plan(slots, [pinned, model("second", 1, 8_000)], "pack", plan)
    assert where(after, "second") == {"server-0": 1}
    assert used_slots(after) == {"server-0"}


def test_pack_on_unequal_gpus_gpustack_1597():
    slots = [slot("small-0", 23_000, product="NVIDIA A10G"), slot("large-0", 80_000, product=A100)]
    assert where(make_plan(slots, [model("chat", 3, 20_000)], "pack"), "chat") == {"large-0": 3}
    assert where(make_plan(slots, [model("chat", 1, 20_000)], "pack"), "chat") == {"small-0": 1}


def test_spread_levels_after_a_deletion_gpustack_1066():
    slots = grid(1, 4)
    full = make_plan(slots, [model("a", 4, 4_000), model("b", 4, 4_000)], "spread")
    less = make_plan(slots, [model("b", 4, 4_000)], "spread", full)
    more = make_plan(slots, [model("b", 8, 4_000), model("c", 4, 4_000)], "spread", less)
    assert set(where(more, "b").values()) == {2}
    assert set(where(more, "c").values()) == {1}


def test_spread_does_not_refill_the_one_gpu_that_was_emptied_gpustack_1066():
    # Eight small models on four GPUs, those of one GPU deleted, five new ones.
    slots = grid(1, 4, 23_000)
    names = [f"m{number}" for number in range(8)]
    full = make_plan(slots, [model(name, 1, 2_000) for name in names], "spread")
    assert sorted(promised(full, item.name) for item in slots) == [4_000] * 4
    kept = [model(name, 1, 2_000) for name in names if "gpu00-0" not in where(full, name)]
    less = make_plan(slots, kept, "spread", full)
    new = [model(f"new{number}", 1, 2_000) for number in range(5)]
    after = make_plan(slots, [*kept, *new], "spread", less)
    assert sorted(promised(after, item.name) for item in slots) == [4_000, 6_000, 6_000, 6_000]
    for item in kept:
        assert where(after, item.name) == where(full, item.name)


def test_a_model_over_several_gpus_counts_what_stands_on_each_gpustack_3034():
    # Two GPUs of 24 GiB, 4 GiB taken on the first: a model of 21 GiB on each was put on both.
    slots = [slot("a-0", 24_000), slot("a-1", 24_000)]
    small = model("qwen", 1, 4_000)
    before = solve(slots, [small], "pack", options=FUSED).plan
    large = model("llama-70b", 1, 21_500, gpus=2)
    after = solve(slots, [small, large], "pack", before, options=FUSED).plan
    assert [item.deployment for item in after.unplaced] == ["llama-70b"]
    assert oversold(after, slots) == []
    third = [*slots, slot("a-2", 24_000)]
    roomy = solve(third, [small, large], "pack", before, options=FUSED).plan
    assert not roomy.unplaced
    assert oversold(roomy, third) == []


def test_never_oversells_what_strangers_hold_gpustack_3034():
    plan = make_plan([slot("a-0", 44_000, foreign=30_000)], [model("chat", 2, 9_828)], "pack")
    assert where(plan, "chat") == {"a-0": 1}
    assert plan.unplaced[0].replicas == 1


def test_two_shares_of_a_half_are_what_the_engine_takes_gpustack_4703():
    # Two models at gpu_memory_utilization 0.5 on a GPU of 24 GiB: both claimed the whole of it.
    slots = load_gpus({"hosts": [{"name": "a", "gpus": [gpu_entry(0, RTX_4090, 24_564)]}]})
    small = LLAMA_8B | {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 4096, "vocab_size": 32_000}
    engine = {"gpu_memory_utilization": 0.5, "max_model_len": 2048, "max_num_seqs": 64}
    plan = solve(slots, modelled(small, engine, slots, replicas=3).deployments, "pack").plan
    assert where(plan, "chat") == {"a-0": 2}
    assert 24_564 - 16 <= sum(held(plan).values()) <= 24_564


def test_tensor_parallel_claims_on_unequal_cards_gpustack_1560():
    # A 24 GiB and a 16 GiB card: claimed was a share of each, used was the same on both.
    unequal = [slot("a-0", 24_000, product=RTX_4090), slot("a-1", 16_000, product=RTX_4080)]
    wide = model("chat", 1, 12_000, gpus=2)
    refused = solve(unequal, [wide], "pack", options=FUSED).plan
    assert refused.unplaced
    assert sum(held(refused).values()) == 0
    both = [*unequal, slot("a-2", 16_000, product=RTX_4080)]
    plan = solve(both, [wide], "pack", options=FUSED).plan
    assert held(plan) == {"GPU-a-0-0": 0, "GPU-a-1-0": 12_000, "GPU-a-2-0": 12_000}
    # Equal cards of which strangers hold part of one: the emptier one does not make up for it.
    partly = [slot("a-0", 24_000), slot("a-1", 24_000, foreign=8_000)]
    assert solve(partly, [model("chat", 1, 20_000, gpus=2)], "pack", options=FUSED).plan.unplaced
    assert not solve(partly, [model("chat", 1, 16_000, gpus=2)], "pack", options=FUSED).plan.unplaced


def test_the_claim_is_what_the_engine_will_hold_gpustack_1651():
    # A second engine beside one that runs: the share was of the GPU's total, computed as if it were alone.
    total = product("RTX 4090").total_mib
    slots = load_gpus({"hosts": [{"name": "a", "gpus": [gpu_entry(0, RTX_4090, total)]}]})
    small = LLAMA_8B | {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 4096, "vocab_size": 32_000}
    limits = {"max_model_len": 2048, "max_num_seqs": 64}
    entries: list[dict[str, Any]] = [
        {
            "name": "half",
            "replicas": 1,
            "model": {"config": small, "engine": {**limits, "gpu_memory_utilization": 0.5}},
        },
        {
            "name": "rest",
            "replicas": 1,
            "model": {"config": small, "engine": {**limits, "gpu_memory_utilization": 0.9}},
        },
    ]
    both = load_deployments({"deployments": entries}, slots).deployments
    plan = solve(slots, both, "pack").plan
    assert len(plan.berths) == len(plan.unplaced) == 1
    entries[1]["model"]["engine"]["gpu_memory_utilization"] = 0.5
    assert not solve(slots, load_deployments({"deployments": entries}, slots).deployments, "pack").plan.unplaced
    # Without a share the claim is its own budget, and stays the same on any card.
    plain = [estimate(small, EngineArgs(**limits), gpu=gpu).footprint for gpu in ("RTX 4090", "L40S")]
    assert plain[0].kv_cache_memory_bytes == plain[1].kv_cache_memory_bytes


# --- vLLM-playground, and the compose file ----------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [2, 4])
def test_playground_tensor_parallel_is_one_slot_of_several_gpus(gpus: int, tmp_path: Path):
    slots = grid(1, 4)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    entry = {
        "name": "chat",
        "replicas": 1,
        "model": {"config": "config.json", "engine": {"tensor_parallel_size": gpus}},
    }
    (only,) = load_deployments({"deployments": [entry]}, slots, tmp_path).deployments
    assert only.gpus_per_replica == gpus
    plan = solve(slots, [only], "pack", options=FUSED).plan
    (berth,) = plan.berths
    (home,) = [item for item in plan.slots if item.name == berth.slot]
    assert len(home.gpu_uuids) == gpus


@pytest.mark.parametrize("strategy", ["pack", "spread"])
def test_compose_every_host_plans_the_same(strategy: str):
    # There each worker deploys the app anew, with what it sees itself. Here whoever plans, plans this.
    slots = grid(3, 2)
    asked = [Deployment(f"m{n}", n % 3 + 1, {"default": 4_000 + 900 * n}) for n in range(6)]
    first = make_plan(slots, asked, strategy)
    for seen in itertools.permutations(range(0, 6, 2)):
        turned = [item for start in seen for item in slots[start : start + 2]]
        assert make_plan(turned, list(reversed(asked)), strategy) == first
        assert make_plan(turned, asked, strategy, first) == first
