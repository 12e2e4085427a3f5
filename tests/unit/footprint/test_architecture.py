"""Reading config.json: released models' parameter counts, nested configs, missing keys, unknown architectures."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.footprint.architecture import read_model
from berth.footprint.kv_cache import kv_cache
from berth.footprint.types import EngineArgs
from berth.footprint.weights import parameters, weights
from tests.unit.footprint.cases import FILES, case
from tests.unit.footprint.test_kv_cache import released

SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "patch_size": 14, "spatial_merge_size": 2,
}  # fmt: skip
RELEASED: list[tuple[str, int, dict[str, Any]]] = [
    ("Llama-3.1-8B", 8030261248, released()),
    (
        "Mixtral-8x7B",
        46702792704,
        released(architectures=["MixtralForCausalLM"], model_type="mixtral", vocab_size=32000, num_local_experts=8),
    ),
    (
        "DeepSeek-V3",
        671026419200,
        {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
            "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
            "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280, "topk_method": "noaux_tc",
        },
    ),
    (
        "Gemma-3-4B: its config leaves heads, head size and vocabulary to the class",
        4300079472,
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                            "num_hidden_layers": 34, "sliding_window": 1024},
            "vision_config": SIGLIP,
        },
    ),
    (
        "Qwen2.5-VL-7B",
        8292166656,
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 3584,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
            "vocab_size": 152064, "tie_word_embeddings": False, "vision_config": QWEN_TOWER,
        },
    ),
    (
        "Mistral-Small-3.1-24B",
        24011361280,
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "spatial_merge_size": 2,
            "multimodal_projector_bias": False,
            "text_config": {"model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128,
                            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 32768,
                            "vocab_size": 131072, "tie_word_embeddings": False},
            "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64,
                              "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
        },
    ),
    (
        "InternVL2.5-8B (vocabulary padded by 55 rows, twice)",
        8075365376 + 2 * 55 * 4096,
        {
            "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
            "select_layer": -1,
            "llm_config": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_size": 4096,
                           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                           "intermediate_size": 14336, "vocab_size": 92553, "bias": False},
            "vision_config": {"model_type": "intern_vit_6b", "hidden_size": 1024, "image_size": 448,
                              "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                              "patch_size": 14, "norm_type": "layer_norm", "qkv_bias": True},
        },
    ),
    (
        "dots.ocr: the tower is all defaults",
        3039179264,
        released(architectures=["DotsOCRForCausalLM"], model_type="dots_ocr", hidden_size=1536, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, vocab_size=151936,
                 vision_config={}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "config"), RELEASED, ids=[name for name, _, _ in RELEASED])
def test_parameters_of_released_models(name: str, count: int, config: dict[str, Any]) -> None:
    assert parameters(read_model(config)) == count


def test_missing_keys_are_named_together() -> None:
    with pytest.raises(BerthError, match="num_hidden_layers, num_attention_heads, hidden_size"):
        read_model({"architectures": ["LlamaForCausalLM"], "vocab_size": 32000})


def test_a_config_that_tells_the_cache_only_refuses_the_weights() -> None:
    config = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = read_model(config)
    assert kv_cache(model, EngineArgs()).bytes_per_token == 4 * 2 * 2 * 64 * 2
    with pytest.raises(BerthError, match="hidden_size, vocab_size"):
        weights(model, EngineArgs())


def test_an_unknown_architecture_is_estimated_and_says_so() -> None:
    strange = read_model(released(architectures=["BrandNewForCausalLM"], model_type="brand_new"))
    assert parameters(strange) == 8030261248
    assert "unknown architecture BrandNewForCausalLM" in strange.notes[0]
    assert weights(strange, EngineArgs()).notes == strange.notes


def test_windows_that_are_switched_off_are_no_windows() -> None:
    config = case("qwen2")["config"]
    kinds = lambda changes: {c.kind for layer in read_model(config | changes).layers for c in layer.caches}  # noqa: E731
    assert kinds({}) == {"full"}
    assert kinds({"use_sliding_window": True, "max_window_layers": 2}) == {"full", "sliding"}


def test_thinker_configs_are_found_two_levels_down() -> None:
    inner = {key: value for key, value in case("qwen3_moe")["config"].items() if key != "architectures"}
    outer = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "thinker_config": {"text_config": inner, "x": 1},
    }
    assert len(read_model(outer).layers) == inner["num_hidden_layers"]


@given(st.sampled_from(sorted(FILES)), st.data())
@settings(max_examples=150, deadline=None)
def test_a_config_with_keys_missing_is_read_or_refused_never_a_crash(name: str, data: st.DataObject) -> None:
    config = dict(case(name)["config"])
    dropped = data.draw(st.lists(st.sampled_from(sorted(config)), max_size=4, unique=True))
    for key in dropped:
        config.pop(key)
    try:
        model = read_model(config)
        found = weights(model, EngineArgs())
    except BerthError as error:
        refused = str(error)
    else:
        refused = ""
        assert kv_cache(model, EngineArgs()).bytes_per_block >= 0
        assert found.bytes_per_gpu > 0
    assert not refused or (dropped and refused.startswith("config.json lacks"))


@given(st.sampled_from(sorted(FILES)))
@settings(max_examples=40, deadline=None)
def test_reading_does_not_depend_on_the_order_of_keys(name: str) -> None:
    config = case(name)["config"]
    assert read_model(dict(reversed(list(config.items())))) == read_model(config)


@pytest.mark.parametrize("value", [7, [7], {"a": 1}, "LlamaForCausalLM"])
def test_architectures_of_another_kind_are_refused(value: object) -> None:
    with pytest.raises(BerthError, match="architectures is not a list of names"):
        read_model({**case("llama")["config"], "architectures": value})
