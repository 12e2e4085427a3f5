"""The whole footprint: its terms add up, its KV budget is what was asked for, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.footprint.engine_args import AUTO_LENGTH
from berth.footprint.kv_cache import kv_cache
from berth.footprint.predict import estimate, predict
from berth.footprint.products import PRODUCTS, product
from berth.footprint.types import EngineArgs, Footprint
from tests.unit.footprint.cases import case, model_of

NAMES = ("llama", "qwen3_moe", "deepseek_v3", "gemma3", "gpt_oss", "jamba", "mamba2", "llama_awq", "qwen2_vl", "bert")
CACHED = tuple(name for name in NAMES if name != "bert")
GPUS = tuple(item.name for item in PRODUCTS)
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


def _config(name: str) -> dict[str, object]:
    config: dict[str, object] = case(name)["config"]
    return config


def _largest(error: BerthError) -> int:
    found = re.search(r"max_model_len to (\d+)", str(error))
    assert found is not None, str(error)
    return int(found[1])


def _consistent(found: Footprint) -> None:
    assert found.total_mib == pytest.approx(sum(term.expected_mib for term in found.terms), abs=2)
    assert found.safe_mib == pytest.approx(sum(term.safe_mib for term in found.terms), abs=2)
    assert all(0 <= term.expected_mib <= term.safe_mib + 0.11 for term in found.terms)
    parts = found.weights_mib + found.kv_mib + found.activation_mib + found.graphs_mib + found.overhead_mib
    assert found.total_mib == pytest.approx(parts, abs=2)


@given(st.sampled_from(NAMES), st.sampled_from([None, *GPUS]), st.sampled_from([1, 2]), st.integers(16, 4096))
@settings(max_examples=80, deadline=None)
def test_terms_add_up_for_every_model_on_every_gpu(name: str, gpu: str | None, ranks: int, length: int) -> None:
    found = estimate(_config(name), EngineArgs(tensor_parallel_size=ranks, max_model_len=length), gpu=gpu).footprint
    _consistent(found)
    assert found.gpus == ranks
    assert found.max_model_len == length


@given(st.sampled_from(CACHED), st.integers(16, 4096), st.floats(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_budget_holds_the_requests_that_were_asked_for(name: str, length: int, requests: float) -> None:
    engine = EngineArgs(max_model_len=length, concurrency=requests, max_num_batched_tokens=512, max_num_seqs=64)
    found = predict(_config(name), engine)
    assert found.kv_cache_memory_bytes == kv_cache(model_of(name), engine).bytes_for(length, requests)
    assert found.kv_tokens is not None
    assert found.kv_tokens >= length


def test_one_request_when_nothing_is_said_and_the_budget_when_it_is() -> None:
    one = predict(LLAMA_8B, EngineArgs(max_model_len=4096))
    assert one.kv_cache_memory_bytes == (4096 // 16 + 1) * 16 * 131072
    given_budget = predict(LLAMA_8B, EngineArgs(max_model_len=4096, kv_cache_memory_bytes=10 << 30))
    assert given_budget.kv_cache_memory_bytes == 10 << 30
    assert given_budget.kv_mib == 10240


@given(st.floats(0.3, 1.0), st.sampled_from(["H100", "L40S", "A100 80GB", "H200"]))
@settings(max_examples=30, deadline=None)
def test_a_share_is_filled_and_never_exceeded(share: float, gpu: str) -> None:
    total = estimate(LLAMA_8B, EngineArgs(), gpu=gpu)
    engine = EngineArgs(gpu_memory_utilization=share, max_model_len=2048)
    found = estimate(LLAMA_8B, engine, gpu=gpu)
    limit = share * product(gpu).total_mib
    if found.shortfall is None:
        assert limit - 4 <= found.footprint.safe_mib <= limit
    else:
        assert found.footprint.safe_mib > limit - 1
    assert total.footprint.weights_mib == found.footprint.weights_mib


@given(
    st.sampled_from(["L4", "L40S", "RTX 4090", "A100 40GB"]), st.sampled_from([None, 0.8]), st.sampled_from([None, 3])
)
@settings(max_examples=24, deadline=None)
def test_the_length_in_a_refusal_is_the_largest_that_fits(
    gpu: str, share: float | None, requests: float | None
) -> None:
    engine = EngineArgs(
        max_num_seqs=64, max_num_batched_tokens=2048, gpu_memory_utilization=share, concurrency=requests
    )
    found = estimate(LLAMA_8B, engine, gpu=gpu)
    assume(found.shortfall is not None)
    assert found.shortfall is not None
    largest = _largest(found.shortfall)
    assert predict(LLAMA_8B, dataclasses.replace(engine, max_model_len=largest), gpu=gpu).safe_mib > 0
    with pytest.raises(BerthError, match="does not fit"):
        predict(LLAMA_8B, dataclasses.replace(engine, max_model_len=largest + 16), gpu=gpu)


def test_a_budget_below_one_request_names_the_largest_length() -> None:
    engine = EngineArgs(max_model_len=32768, kv_cache_memory_bytes=1 << 30)
    with pytest.raises(BerthError, match="holds no request") as caught:
        predict(LLAMA_8B, engine)
    largest = _largest(caught.value)
    assert predict(LLAMA_8B, dataclasses.replace(engine, max_model_len=largest)).max_model_len == largest
    with pytest.raises(BerthError):
        predict(LLAMA_8B, dataclasses.replace(engine, max_model_len=largest + 1))


def test_weights_that_fit_nowhere_ask_for_another_gpu() -> None:
    with pytest.raises(BerthError, match="larger GPU"):
        predict(LLAMA_8B, EngineArgs(max_model_len=128), gpu="T4")


def test_automatic_length_is_the_longest_that_fits() -> None:
    auto = EngineArgs(rest={AUTO_LENGTH: True}, max_num_seqs=64, max_num_batched_tokens=2048)
    found = predict(LLAMA_8B, auto, gpu="L4")
    assert found.max_model_len is not None
    assert 1024 < found.max_model_len < 131072
    with pytest.raises(BerthError):
        predict(LLAMA_8B, dataclasses.replace(auto, rest={}, max_model_len=found.max_model_len + 32), gpu="L4")


def test_sleep_mode_holds_what_it_needs_to_wake() -> None:
    awake = predict(LLAMA_8B, EngineArgs(max_model_len=4096), gpu="H100")
    asleep = predict(LLAMA_8B, EngineArgs(max_model_len=4096, enable_sleep_mode=True), gpu="H100")
    assert asleep.safe_mib >= awake.safe_mib
    assert any("wake" in note for note in asleep.notes)


def test_an_encoder_has_no_cache() -> None:
    found = predict(_config("bert"), EngineArgs(), gpu="T4")
    assert (found.kv_tokens, found.kv_cache_memory_bytes, found.kv_mib, found.kv_bytes_per_token) == (None, None, 0, 0)


def test_fp8_below_its_generation_is_told() -> None:
    config = LLAMA_8B | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    engine = EngineArgs(max_model_len=2048)
    assert any("8.9" in note for note in predict(config, engine, gpu="A100").notes)
    assert not any("8.9" in note for note in predict(config, engine, gpu="L40S").notes)


def test_a_share_without_a_gpu_is_not_ignored_in_silence() -> None:
    found = predict(LLAMA_8B, EngineArgs(gpu_memory_utilization=0.5, max_model_len=2048))
    assert any("gpu_memory_utilization" in note for note in found.notes)


def test_an_unknown_product_with_its_memory_given() -> None:
    assert predict(LLAMA_8B, EngineArgs(max_model_len=2048), gpu="Prototype", gpu_total_mib=60000).safe_mib < 60000
    with pytest.raises(BerthError, match="Prototype"):
        predict(LLAMA_8B, EngineArgs(max_model_len=2048), gpu="Prototype")
    with pytest.raises(BerthError, match="positive"):
        predict(LLAMA_8B, EngineArgs(max_model_len=2048), gpu="L4", gpu_total_mib=0)


@pytest.mark.parametrize(
    ("config", "engine", "named"),
    [
        (LLAMA_8B, EngineArgs(tensor_parallel_size=3), "attention heads"),
        (LLAMA_8B, EngineArgs(pipeline_parallel_size=33), "1 to 32"),
        (LLAMA_8B | {"num_hidden_layers": 10**9}, EngineArgs(), "num_hidden_layers"),
        (LLAMA_8B | {"num_hidden_layers": -1}, EngineArgs(), "num_hidden_layers"),
    ],
)
def test_what_vllm_would_refuse_is_refused(config: dict[str, object], engine: EngineArgs, named: str) -> None:
    with pytest.raises(BerthError, match=named):
        predict(config, engine)


def test_older_engines_print_the_cache_of_one_group() -> None:
    engine = EngineArgs(max_model_len=1024, kv_cache_memory_bytes=1 << 26)
    new, old = (predict(_config("gpt_oss"), engine, engine_version=version) for version in ("0.29.0", "0.13.0"))
    groups = kv_cache(model_of("gpt_oss"), engine)
    assert len(groups.groups) > 1
    assert old.kv_tokens == (1 << 26) // groups.bytes_per_block // len(groups.groups) * groups.block_size
    assert new.kv_tokens != old.kv_tokens


def test_a_quantisation_nobody_knows_is_told() -> None:
    assert any("nonsense" in note for note in predict(LLAMA_8B, EngineArgs(quantization="nonsense")).notes)
