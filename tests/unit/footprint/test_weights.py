"""Weights: how they are divided, quantised, rounded by the allocator, and what a checkpoint changes."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.footprint.architecture import read_model
from berth.footprint.checkpoint import Checkpoint, Tensor
from berth.footprint.types import EngineArgs
from berth.footprint.weights import MIB, allocation, stage_layers, weights
from tests.unit.footprint.cases import FILES, LOGS, case, config_of, engine_of, logged_engine, model_of
from tests.unit.footprint.test_kv_cache import DEEPSEEK_LITE, QWEN3_30B, released

GIB = 1 << 30


@pytest.mark.parametrize(
    ("config", "engine", "gib"),
    [
        # "Model loading took" of public logs; the configs are the released ones.
        (released(), EngineArgs(), 14.9889),
        (released(max_position_embeddings=8192), EngineArgs(tensor_parallel_size=4), 3.7418),
        (
            released(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=3584, num_hidden_layers=28,
                     num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
                     max_position_embeddings=32768),
            EngineArgs(), 14.2488,
        ),
        (
            released(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=2560, num_hidden_layers=36,
                     head_dim=128, intermediate_size=9728, vocab_size=151936, max_position_embeddings=40960,
                     tie_word_embeddings=True),
            EngineArgs(), 7.5552,
        ),
        (
            released(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=5120, num_hidden_layers=64,
                     num_attention_heads=64, head_dim=128, intermediate_size=25600, vocab_size=151936,
                     max_position_embeddings=40960),
            EngineArgs(tensor_parallel_size=8), 7.6871,
        ),
    ],
)  # fmt: skip
def test_loads_are_those_of_public_logs(config: dict[str, Any], engine: EngineArgs, gib: float) -> None:
    assert weights(read_model(config), engine).bytes_per_gpu / GIB == pytest.approx(gib, rel=0.001)


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_bound_holds_the_expectation(name: str) -> None:
    found = weights(model_of(name), engine_of(name))
    assert found.tensor_bytes <= found.bytes_per_gpu <= found.safe_bytes_per_gpu


@pytest.mark.parametrize(
    ("count", "stages", "sizes"),
    [(32, 1, [32]), (32, 4, [8, 8, 8, 8]), (61, 4, [15, 15, 16, 15]), (27, 2, [14, 13]), (10, 4, [2, 3, 3, 2])],
)
def test_stages_are_divided_as_vllm_divides_them(count: int, stages: int, sizes: list[int]) -> None:
    assert [end - begin for begin, end in stage_layers(count, stages)] == sizes


def test_tensor_parallel_ranks_replicate_heads_they_cannot_divide() -> None:
    model = read_model(released())
    at = {ranks: weights(model, EngineArgs(tensor_parallel_size=ranks)).tensor_bytes for ranks in (1, 8, 16)}
    kv = 2 * 128 * 4096 * 2 * 32  # one key and one value head in every layer
    assert at[8] * 8 > at[1]
    assert at[16] == pytest.approx((at[8] - kv) / 2 + kv, rel=0.001)


def test_expert_parallel_gives_whole_experts_to_ranks() -> None:
    model = read_model(QWEN3_30B | {"num_experts": 6, "moe_intermediate_size": 768})
    split = weights(model, EngineArgs(tensor_parallel_size=4)).tensor_bytes
    whole = weights(model, EngineArgs(tensor_parallel_size=4, enable_expert_parallel=True)).tensor_bytes
    expert = 3 * 768 * 2048 * 2
    assert whole - split == 48 * (2 * expert - 6 * expert // 4)  # the fullest rank holds 2 of 6


def test_experts_are_divided_over_data_ranks_too() -> None:
    model = read_model(QWEN3_30B)
    one = weights(model, EngineArgs(data_parallel_size=1)).tensor_bytes
    two = weights(model, EngineArgs(data_parallel_size=2)).tensor_bytes
    assert one - two == 48 * 128 * 3 * 768 * 2048 * 2 // 2


def test_a_tied_head_is_a_copy_where_it_stands_on_another_stage() -> None:
    tied = read_model(released(tie_word_embeddings=True))
    table = 128256 * 4096 * 2
    assert (
        weights(tied, EngineArgs()).tensor_bytes == weights(read_model(released()), EngineArgs()).tensor_bytes - table
    )
    assert weights(tied, EngineArgs(pipeline_parallel_size=2)).tensor_bytes > (16060522496 - table) / 2


def test_lora_slots_are_counted_at_their_full_rank() -> None:
    model, engine = model_of("llama"), EngineArgs(enable_lora=True, max_loras=2, max_lora_rank=16)
    plain = weights(model, EngineArgs()).bytes_per_gpu
    per_layer = (3 * 128 + 256) + (128 + 128) + (2 * 128 + 704) + (352 + 128)
    assert weights(model, engine).bytes_per_gpu - plain == 2 * 16 * 2 * (4 * per_layer + 1000 + 128)


def test_pooling_drops_the_head_and_switched_off_towers_drop_out() -> None:
    model = model_of("qwen3_vl")
    every = weights(model, EngineArgs()).tensor_bytes
    text = weights(model, EngineArgs(rest={"language_model_only": True})).tensor_bytes
    assert (
        every - text == weights(model, EngineArgs(rest={"limit_mm_per_prompt": {"image": 1}})).tensor_bytes - text > 0
    )
    assert weights(model, EngineArgs(rest={"limit_mm_per_prompt": {"image": 0, "video": 0}})).tensor_bytes == text
    llama = model_of("llama")
    pooled = weights(llama, EngineArgs(runner="pooling")).tensor_bytes
    assert weights(llama, EngineArgs()).tensor_bytes - pooled == 1024 * 128 * 2


@pytest.mark.parametrize(
    ("scheme", "share"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 / 2),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, (4 + 20 / 128) / 16),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, (4 + 20 / 64) / 16),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
            4.5 / 16,
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5 / 16),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1 / 2),
    ],
)
def test_linear_weights_take_the_bits_of_their_scheme(scheme: dict[str, Any], share: float) -> None:
    tables = 2 * 128256 * 4096 * 2
    plain = weights(read_model(released()), EngineArgs()).tensor_bytes - tables
    small = weights(read_model(released(quantization_config=scheme)), EngineArgs()).tensor_bytes - tables
    assert small / plain == pytest.approx(share, rel=0.003)


@pytest.mark.parametrize(
    "ignored",
    [
        "model.layers.0.self_attn.q_proj",
        "re:.*layers\\.0\\.self_attn.*",
        "*layers.0.self_attn*",
        "layers.0.self_attn.q_proj",
    ],
)
def test_modules_that_are_ignored_keep_their_dtype(ignored: str) -> None:
    scheme = {"quant_method": "fp8", "ignored_layers": [ignored]}
    every = weights(read_model(released(quantization_config={"quant_method": "fp8"})), EngineArgs()).tensor_bytes
    some = weights(read_model(released(quantization_config=scheme)), EngineArgs()).tensor_bytes
    qkv, out = 6144 * 4096, 4096 * 4096
    assert some - every == pytest.approx(qkv if "q_proj" in ignored else qkv + out, abs=100)


def test_mxfp4_experts_grow_by_their_padding() -> None:
    config = case("gpt_oss_mxfp4")["config"] | {"hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64}
    padded = weights(read_model(config), EngineArgs()).tensor_bytes
    aligned = weights(read_model(config | {"hidden_size": 3072, "intermediate_size": 2944}), EngineArgs()).tensor_bytes
    experts = 4 * 8 * 3 * 3072 * 2944 * 17 // 32
    assert padded > experts
    assert aligned - padded < aligned - experts  # the experts are the same, only the rest is smaller


def test_quantised_latent_projections_are_kept_a_second_time() -> None:
    config = DEEPSEEK_LITE | {"quantization_config": {"quant_method": "fp8"}}
    found = weights(read_model(config), EngineArgs(tensor_parallel_size=2))
    assert f"dequantised MLA projections {27 * 16 * 256 * 512 * 2 / 2 / MIB:.1f}" in found.formula


def test_an_incomplete_scheme_is_bounded_with_attention_kept() -> None:
    config = released(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    found = weights(read_model(config), EngineArgs())
    attention = 32 * (6144 + 4096) * 4096 * 2 * (1 - 4.5 / 16)
    assert found.safe_bytes_per_gpu - found.bytes_per_gpu > attention
    assert "does not say which layers" in found.notes[0]


def test_a_draft_model_is_read_from_its_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(case("llama")["config"]), encoding="utf-8")
    engine = EngineArgs(
        speculative_config={"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    )
    extra = (
        weights(read_model(released()), engine).tensor_bytes
        - weights(read_model(released()), EngineArgs()).tensor_bytes
    )
    assert extra == case("llama")["vllm"]["weight_bytes"]


def test_a_draft_model_nobody_knows_is_refused() -> None:
    engine = EngineArgs(speculative_config={"model": "org/somewhere-else", "num_speculative_tokens": 3})
    with pytest.raises(BerthError, match="draft model of speculative_config is not known"):
        weights(read_model(released()), engine)


def checkpoint_of(sizes: dict[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    width = {"F32": 4, "BF16": 2, "I32": 4}
    tensors = {}
    for name, (dtype, shape) in sizes.items():
        values = 1
        for item in shape:
            values *= item
        tensors[name] = Tensor(dtype, shape, values * width[dtype])
    return Checkpoint(sum(t.bytes for t in tensors.values()), tensors)


def llama_tensors(dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors a checkpoint of the case "llama" holds."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (dtype, (1000, 128)),
        "lm_head.weight": (dtype, (1000, 128)),
        "model.norm.weight": (dtype, (128,)),
    }
    shapes = {"q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128),
              "gate_proj": (352, 128), "up_proj": (352, 128), "down_proj": (128, 352)}  # fmt: skip
    for index in range(4):
        for name, shape in shapes.items():
            found[f"model.layers.{index}.{name}.weight"] = (dtype, shape)
        found[f"model.layers.{index}.input_layernorm.weight"] = (dtype, (128,))
        found[f"model.layers.{index}.post_attention_layernorm.weight"] = (dtype, (128,))
    return found


def test_a_checkpoint_that_is_what_the_config_says_changes_nothing() -> None:
    model = model_of("llama")
    plain = weights(model, EngineArgs())
    for dtype in ("BF16", "F32"):  # float32 files are cast to 16 bits on load
        assert weights(model, EngineArgs(), checkpoint_of(llama_tensors(dtype))).tensor_bytes == plain.tensor_bytes


def test_what_vllm_does_not_load_does_not_count() -> None:
    more = llama_tensors() | {
        "model.layers.4.mlp.gate_proj.weight": ("BF16", (352, 128)),
        "mtp.layers.0.mlp.gate_proj.weight": ("BF16", (352, 128)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (16,)),
    }
    model = model_of("llama")
    assert weights(model, EngineArgs(), checkpoint_of(more)).tensor_bytes == weights(model, EngineArgs()).tensor_bytes


def test_the_header_beats_the_formula_and_says_so() -> None:
    more = llama_tensors() | {"model.extra.weight": ("BF16", (1000, 256))}
    model = model_of("llama")
    found = weights(model, EngineArgs(), checkpoint_of(more))
    assert found.tensor_bytes == pytest.approx(weights(model, EngineArgs()).tensor_bytes + 1000 * 256 * 2, abs=2)
    assert "the checkpoint is believed" in found.notes[0]


def test_an_index_total_is_believed() -> None:
    model = read_model(released())
    assert weights(model, EngineArgs(), Checkpoint(16060522496)).tensor_bytes == 16060522496


@given(st.integers(0, 1 << 34))
@settings(max_examples=200, deadline=None)
def test_the_allocator_rounds_up_and_wastes_less_than_two_mebibytes(size: int) -> None:
    allocated, reserved = allocation(size)
    assert size <= allocated <= reserved < size + 2 * MIB
    assert allocated - size <= MIB


@given(st.sampled_from(sorted(FILES)), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
@settings(max_examples=80, deadline=None)
def test_more_ranks_never_weigh_more(name: str, tensor: int, stages: int) -> None:
    engine = dataclasses.replace(engine_of(name), speculative_config=None)
    split = dataclasses.replace(engine, tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    assert weights(model_of(name), split).tensor_bytes <= weights(model_of(name), engine).tensor_bytes


@pytest.mark.skipif(not LOGS.exists(), reason="the logged cases are not in this checkout")
def test_weights_of_public_logs() -> None:
    data = json.loads(LOGS.read_text(encoding="utf-8"))
    errors, held = [], []
    for log in data["cases"]:
        model = read_model(config_of(data["models"][log["model_key"]]["fields"]))
        if not log["weights_gib_per_gpu"] or model.missing:
            continue
        found, real = weights(model, logged_engine(log)), log["weights_gib_per_gpu"] * GIB
        errors.append(abs(found.bytes_per_gpu / real - 1))
        held.append(found.safe_bytes_per_gpu >= real)
    assert len(errors) > 60
    assert statistics.median(errors) <= 0.005
    assert sum(held) / len(held) >= 0.95
