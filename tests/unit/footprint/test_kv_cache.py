"""KV cache: figures known from running engines, and laws that hold for every model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.footprint.architecture import read_model
from berth.footprint.kv_cache import kv_cache
from berth.footprint.types import EngineArgs
from tests.unit.footprint.cases import LOGS, answered, config_of, engine_of, logged_engine, minor_version, model_of

CACHED = [name for name in answered() if kv_cache(model_of(name), engine_of(name)).groups]


def released(**changes: Any) -> dict[str, Any]:
    """Llama-3.1-8B's config, with changes."""
    base: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
    return base | changes


QWEN3_30B: dict[str, Any] = released(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48,
    num_key_value_heads=4, head_dim=128, intermediate_size=6144, num_experts=128, moe_intermediate_size=768,
)  # fmt: skip
DEEPSEEK_LITE: dict[str, Any] = released(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", hidden_size=2048, num_hidden_layers=27,
    num_attention_heads=16, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    n_routed_experts=64, moe_intermediate_size=1408, n_shared_experts=2, first_k_dense_replace=1,
)  # fmt: skip
QWEN3_NEXT: dict[str, Any] = released(
    architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", hidden_size=2048, num_hidden_layers=48,
    num_attention_heads=16, num_key_value_heads=2, head_dim=256, full_attention_interval=4,
    linear_num_value_heads=32, linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
    num_experts=512, moe_intermediate_size=512,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "engine", "bytes_per_token"),
    [
        (released(), EngineArgs(), 131072),
        (released(), EngineArgs(kv_cache_dtype="fp8"), 65536),
        (released(), EngineArgs(tensor_parallel_size=8), 16384),
        (released(), EngineArgs(tensor_parallel_size=16), 16384),  # fewer KV heads than ranks: each holds one
        (released(), EngineArgs(pipeline_parallel_size=2), 65536),
        (released(num_hidden_layers=33), EngineArgs(pipeline_parallel_size=2), 17 * 4096),  # the fuller stage counts
        (QWEN3_30B, EngineArgs(), 98304),
        (DEEPSEEK_LITE, EngineArgs(), 31104),
        (DEEPSEEK_LITE, EngineArgs(tensor_parallel_size=8), 31104),  # a latent is never divided
    ],
)
def test_bytes_per_token_of_released_models(config: dict[str, Any], engine: EngineArgs, bytes_per_token: int) -> None:
    assert kv_cache(read_model(config), engine).bytes_per_token == bytes_per_token


def test_block_size_of_a_hybrid_is_the_one_its_log_shows() -> None:
    # Qwen3-Next-80B-A3B at TP 2: "Setting attention block size to 544 tokens", states padded to that page.
    cache = kv_cache(read_model(QWEN3_NEXT), EngineArgs(tensor_parallel_size=2))
    assert cache.block_size == 544
    assert [group.layers for group in cache.groups] == [12, 12, 12, 12]


def test_states_cost_the_same_at_any_length() -> None:
    cache = kv_cache(model_of("mamba2"), engine_of("mamba2"))
    assert cache.request_blocks(100) == cache.request_blocks(1_000_000) == 1
    assert cache.bytes_per_token == 0


def test_speculation_adds_its_layer_and_its_states() -> None:
    model, engine = model_of("qwen3_next"), engine_of("qwen3_next")
    plain = kv_cache(model, engine)
    spec = kv_cache(
        model, dataclasses.replace(engine, speculative_config={"method": "mtp", "num_speculative_tokens": 2})
    )
    assert sum(group.layers for group in spec.groups) == sum(group.layers for group in plain.groups) + 1
    eagle = dataclasses.replace(engine_of("llama"), speculative_config={"method": "eagle3", "model": "elsewhere/head"})
    assert (
        kv_cache(model_of("llama"), eagle).bytes_per_token
        == 5 / 4 * kv_cache(model_of("llama"), engine).bytes_per_token
    )


def test_prefix_caching_off_keeps_one_state_instead_of_two() -> None:
    model, engine = model_of("jamba"), engine_of("jamba")
    off = kv_cache(model, dataclasses.replace(engine, rest={"enable_prefix_caching": False}))
    assert kv_cache(model, engine).request_blocks(160) - off.request_blocks(160) == 3  # one less for each state group


def test_context_parallel_ranks_share_a_request() -> None:
    model = read_model(DEEPSEEK_LITE)
    whole, eighth = kv_cache(model, EngineArgs()), EngineArgs(rest={"decode_context_parallel_size": 8})
    assert kv_cache(model, eighth).tokens_in(1 << 30, 8192) == 8 * whole.tokens_in(1 << 30, 8192)


def test_a_checkpoint_quantised_with_an_fp8_cache_gets_one() -> None:
    scheme = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    assert kv_cache(read_model(released(quantization_config=scheme)), EngineArgs()).bytes_per_token == 65536


def test_layers_that_read_another_layers_cache_have_none() -> None:
    cache = kv_cache(model_of("gemma3n"), engine_of("gemma3n"))
    assert sum(group.layers for group in cache.groups) == 5


@given(st.sampled_from(CACHED), st.integers(1, 200_000), st.floats(0.1, 40))
@settings(max_examples=150, deadline=None)
def test_what_is_asked_for_fits_and_a_block_less_does_not(name: str, tokens: int, requests: float) -> None:
    cache = kv_cache(model_of(name), engine_of(name))
    budget = cache.bytes_for(tokens, requests)
    blocks = budget // cache.bytes_per_block
    assert budget == blocks * cache.bytes_per_block
    # vLLM's own rule, after the null block: every request's blocks come from the pool.
    assert (blocks - 1) >= max(1.0, requests) * cache.request_blocks(tokens) - 1e-6
    assert (blocks - 2) < max(1.0, requests) * cache.request_blocks(tokens)
    assert cache.largest_model_len(budget, tokens) == tokens


@given(st.sampled_from(CACHED), st.integers(0, 1 << 30), st.integers(1, 100_000))
@settings(max_examples=150, deadline=None)
def test_largest_model_len_fits_and_one_more_does_not(name: str, budget: int, limit: int) -> None:
    cache = kv_cache(model_of(name), engine_of(name))
    length = cache.largest_model_len(budget, limit)
    assert 0 <= length <= limit
    if length:
        assert cache.bytes_for(length) <= budget
    if length < limit:
        assert cache.bytes_for(length + 1) > budget


@given(st.sampled_from(CACHED), st.integers(1, 50_000), st.integers(1, 50_000))
@settings(max_examples=80, deadline=None)
def test_longer_requests_never_need_less(name: str, one: int, other: int) -> None:
    cache = kv_cache(model_of(name), engine_of(name))
    short, long = sorted((one, other))
    assert cache.bytes_for(short) <= cache.bytes_for(long)
    assert cache.request_blocks(short) > 0


@given(st.sampled_from(CACHED), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
@settings(max_examples=80, deadline=None)
def test_more_ranks_never_need_more_on_one(name: str, tensor: int, stages: int) -> None:
    engine = engine_of(name)
    split = dataclasses.replace(engine, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    one, many = kv_cache(model_of(name), engine), kv_cache(model_of(name), split)
    assert many.bytes_per_token <= one.bytes_per_token


def _token_errors() -> dict[str, float]:
    """Relative error of the tokens predicted from the logged KV bytes, by log; speculation and cut configs left out."""
    data = json.loads(LOGS.read_text(encoding="utf-8"))
    errors = {}
    for log in data["cases"]:
        budget, tokens = log["available_kv_gib_per_gpu"], log["kv_tokens"]
        if not tokens or not budget or budget <= 0 or log["speculative"]:
            continue
        model = read_model(config_of(data["models"][log["model_key"]]["fields"]))
        cache = kv_cache(model, logged_engine(log))
        size, version = int(budget * (1 << 30)), minor_version(log["vllm_version"])
        if version is None or version < 20:  # what these releases printed
            ours = size // cache.bytes_per_block // len(cache.groups) * cache.block_size
        else:
            ours = cache.tokens_in(size, log["max_model_len"] or 32768)
        errors[log["id"]] = abs(ours / tokens - 1) - 0.005 / budget  # the log rounds bytes to 0.01 GiB
    return errors


@pytest.mark.skipif(not LOGS.exists(), reason="the logged cases are not in this checkout")
def test_tokens_of_public_logs_follow_from_their_kv_bytes() -> None:
    errors = _token_errors()
    assert len(errors) > 50
    assert {name: error for name, error in errors.items() if error > 0.002} == {}
