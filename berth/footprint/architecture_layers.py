"""The decoder layers of a model, one by one: which mixer, which window, which feed-forward, which cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from berth.footprint.architecture_config import Fields
from berth.footprint.architecture_families import Traits
from berth.footprint.architecture_parts import (
    Delta,
    Heads,
    Latent,
    Mamba,
    attention,
    delta_net,
    experts,
    latent_attention,
    latent_cache,
    linear,
    mamba1,
    mamba2,
    mlp,
    norm,
    router,
    short_conv,
    vector,
)
from berth.footprint.architecture_types import Cache, Layer, Weight

MAMBA1 = ("MambaForCausalLM", "FalconMambaForCausalLM")
ATTENTION_FREE = (*MAMBA1, "Mamba2ForCausalLM")
QWEN_HYBRIDS = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Families with one prediction layer, under mtp. in the checkpoint, whether or not the config counts it."""

SLIDING = ("sliding_attention", "sliding_window", "local", "swa")


@dataclass(frozen=True)
class Plan:
    """The decoder's layers and those of its own multi-token-prediction head."""

    layers: tuple[Layer, ...]
    drafts: tuple[Layer, ...] = ()


def attention_free(family: str) -> bool:
    """Whether the family has recurrent layers only."""
    return family in ATTENTION_FREE


def require(fields: Fields, family: str) -> None:
    """Raise for what neither weights nor caches can do without: layers, and the sizes of attention heads."""
    needed = ["num_hidden_layers"]
    if not attention_free(family):
        needed += [] if fields.has("num_key_value_heads") and fields.has("head_dim") else ["num_attention_heads"]
        needed += [] if is_mla(fields) or fields.has("head_dim") else ["hidden_size"]
    fields.require(*needed)


def is_mla(fields: Fields) -> bool:
    """Multi-head latent attention: the config gives the latent's rank."""
    return bool(fields.config.get("kv_lora_rank"))


def expert_count(fields: Fields) -> int:
    """Routed experts per layer, 0 for a dense model."""
    count = int(fields.number("num_experts", 0))
    return count if count > 1 else 0


def plan(fields: Fields, traits: Traits, family: str) -> Plan:
    """Every decoder layer of the model, and its draft layers."""
    count = fields.number("num_hidden_layers")
    kinds = layer_kinds(fields, traits, family, count)
    layers = tuple(_layer(fields, traits, family, index, kinds[index], count) for index in range(count))
    return Plan(layers, _drafts(fields, traits, family, count))


def layer_kinds(fields: Fields, traits: Traits, family: str, count: int) -> list[str]:
    """Per layer: full, sliding or chunked attention, a recurrent mixer, both, or a feed-forward alone."""
    if family == "NemotronHForCausalLM":
        return _nemotron_kinds(fields, count)
    if attention_free(family):
        return ["mamba"] * count
    if family == "FalconH1ForCausalLM":
        return ["both"] * count
    if isinstance(given := fields.config.get("layer_types"), list) and len(given) >= count:
        return [_kind(str(kind), fields) for kind in given[:count]]
    if family in ("JambaForCausalLM", "BambaForCausalLM"):
        period, offset = fields.number("attn_layer_period", 8), fields.number("attn_layer_offset", 4)
        chosen = fields.get("attn_layer_indices")
        return [
            "full_attention" if (i in chosen if chosen is not None else i % period == offset) else "mamba"
            for i in range(count)
        ]
    if interval := fields.get("full_attention_interval"):
        return ["linear_attention" if (i + 1) % int(interval) else "full_attention" for i in range(count)]
    return [_window_kind(fields, traits, i) for i in range(count)]


def _kind(kind: str, fields: Fields) -> str:
    if kind in SLIDING:
        return "sliding_attention" if fields.get("sliding_window") else "full_attention"
    if kind == "attention":
        return "full_attention"
    return kind


def _nemotron_kinds(fields: Fields, count: int) -> list[str]:
    """Nemotron-H spells its layers out, one letter each."""
    letters = {"M": "mamba", "*": "full_only", "-": "mlp", "E": "moe"}
    words = {"mamba": "mamba", "attention": "full_only", "mlp": "mlp", "moe": "moe"}
    if isinstance(given := fields.config.get("layers_block_type"), list):
        return [words.get(str(kind), "mlp") for kind in given]
    pattern = str(fields.get("hybrid_override_pattern", ""))
    kinds = [letters[letter] for letter in pattern if letter in letters]
    return kinds or ["mamba"] * count


def _window_kind(fields: Fields, traits: Traits, index: int) -> str:
    """A layer's window where no list names it: by the family's habit."""
    if traits.window == "chunked":
        rope = fields.at("no_rope_layers", index, 0 if (index + 1) % 4 == 0 else 1)
        return "chunked_attention" if rope and fields.get("attention_chunk_size") else "full_attention"
    if not fields.config.get("sliding_window") and not (traits.window != "all" and fields.get("sliding_window")):
        return "full_attention"
    if fields.get("use_sliding_window") is False:
        return "full_attention"
    if traits.window == "even":
        return "sliding_attention" if index % 2 == 0 else "full_attention"
    if traits.window == "pattern":
        return _patterned(fields, index)
    if fields.get("use_sliding_window") and fields.has("max_window_layers"):
        return "sliding_attention" if index >= fields.number("max_window_layers") else "full_attention"
    return "sliding_attention"


def _patterned(fields: Fields, index: int) -> str:
    """One full layer after every n-1 windowed ones; Exaone spells the pattern in letters."""
    pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", None))
    if isinstance(pattern, str) and pattern:
        last = index == fields.number("num_hidden_layers") - 1
        return "sliding_attention" if pattern[index % len(pattern)] == "L" and not last else "full_attention"
    every = int(pattern) if pattern else {"cohere2": 4, "olmo3": 4, "gemma3n_text": 5}.get(fields.model_type, 6)
    return "full_attention" if (index + 1) % every == 0 else "sliding_attention"


def heads_of(fields: Fields, kind: str = "full_attention") -> Heads:
    """Query and KV heads of a layer, with the defaults of its config class."""
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    kv = fields.number("num_key_value_heads", heads)
    if fields.model_type == "falcon":
        kv = kv if fields.get("new_decoder_architecture") else (1 if fields.get("multi_query", True) else heads)
    if fields.model_type == "gpt_bigcode" and fields.get("multi_query", True):
        kv = 1
    dim = fields.number("head_dim", 0) or hidden // max(1, heads)
    if kind != "sliding_attention" and fields.get("global_head_dim"):
        dim = fields.number("global_head_dim")
        if fields.get("attention_k_eq_v"):
            kv = fields.number("num_global_key_value_heads", kv)
    return Heads(hidden, heads, kv, dim, fields.number("v_head_dim", 0) if not is_mla(fields) else 0)


def latent_of(fields: Fields) -> Latent:
    """MLA's sizes."""
    return Latent(
        fields.number("hidden_size"),
        fields.number("num_attention_heads"),
        fields.number("kv_lora_rank"),
        int(fields.config.get("q_lora_rank") or 0),
        fields.number("qk_rope_head_dim", 64),
        fields.number("qk_nope_head_dim", 128),
        fields.number("v_head_dim", 128),
    )


def _flag(fields: Fields, flag: bool | str) -> bool:
    return bool(fields.get(flag, False)) if isinstance(flag, str) else flag


def _qk_norm(fields: Fields, traits: Traits) -> str:
    if traits.qk_norm == "use_qk_norm":
        return "head" if fields.get("use_qk_norm") else ""
    if traits.qk_norm == "cohere":
        return "each" if fields.get("use_qk_norm") else ""
    return traits.qk_norm


def _layer(fields: Fields, traits: Traits, family: str, index: int, kind: str, count: int) -> Layer:
    at = f"model.layers.{index}"
    weights: list[Weight] = []
    caches: list[Cache] = []
    shared = _reads_other_cache(fields, index, count)
    if kind in ("full_attention", "sliding_attention", "chunked_attention", "both", "full_only"):
        more, cache = _attention(fields, traits, family, at, kind, index, shared)
        weights += more
        caches += [] if shared else cache
    if kind in ("mamba", "linear_attention", "conv", "both"):
        mixer, state = _mixer(fields, family, at, kind)
        weights += mixer
        caches.append(state)
    weights += _feed_forward(fields, traits, family, at, index, kind, count)
    weights += _norms(fields, traits, family, at, index, kind)
    return Layer(tuple(weights), tuple(caches))


def _reads_other_cache(fields: Fields, index: int, count: int) -> bool:
    """Cross-layer KV sharing (Gemma 3n, Gemma 4): the last layers read an earlier layer's cache."""
    return index >= count - fields.number("num_kv_shared_layers", 0)


def _attention(
    fields: Fields, traits: Traits, family: str, at: str, kind: str, index: int, shared: bool
) -> tuple[list[Weight], list[Cache]]:
    name = f"{at}.self_attn"
    if is_mla(fields):
        latent = latent_of(fields)
        parts = list(latent_attention(name, latent, bias=bool(fields.get("attention_bias"))))
        caches = [latent_cache(latent)]
        if fields.get("index_head_dim"):
            more, cache = _indexer(fields, name)
            parts += more
            caches.append(cache)
        return parts, caches
    heads = heads_of(fields, kind)
    parts = list(
        attention(
            name,
            heads,
            qkv_bias=_flag(fields, traits.qkv_bias),
            out_bias=_flag(fields, traits.out_bias),
            gate=traits.gate,
            qk_norm=_qk_norm(fields, traits),
        )
    )
    if traits.sinks:
        parts.append(Weight(f"{name}.sinks", ((heads.heads, 1),), 1, "outputs"))
    window = fields.number("sliding_window", 0) if kind == "sliding_attention" else 0
    chunk = fields.number("attention_chunk_size", 0) if kind == "chunked_attention" else 0
    cache_kind = "sliding" if window else "chunked" if chunk else "full"
    cache = Cache(cache_kind, heads.kv_heads, heads.head_dim, heads.value_dim, window or chunk)  # type: ignore[arg-type]
    return parts, [cache]


def _indexer(fields: Fields, at: str) -> tuple[list[Weight], Cache]:
    """DeepSeek-V3.2's sparse attention indexer: its keys are cached in fp8 with one float32 scale per 128 values."""
    size, heads = fields.number("index_head_dim"), fields.number("index_n_heads", 64)
    hidden, rank = fields.number("hidden_size"), int(fields.config.get("q_lora_rank") or fields.number("hidden_size"))
    parts = [
        linear(f"{at}.indexer.wq_b", rank, heads * size),
        Weight(f"{at}.indexer.wk_weights_proj", ((1, size + heads),), hidden),
        norm(f"{at}.indexer.k_norm", size, bias=True),
    ]
    return parts, Cache("mla", 1, size + size // 128 * 4, 1)


def _mixer(fields: Fields, family: str, at: str, kind: str) -> tuple[list[Weight], Cache]:
    hidden = fields.number("hidden_size")
    if kind == "conv":
        parts, cache = short_conv(
            f"{at}.short_conv",
            hidden,
            fields.number("conv_dim", hidden),
            fields.number("conv_L_cache", 3),
            bool(fields.get("conv_bias")),
        )
    elif kind == "linear_attention":
        sizes = Delta(
            hidden,
            fields.number("linear_num_value_heads", 32),
            fields.number("linear_num_key_heads", 16),
            fields.number("linear_key_head_dim", 128),
            fields.number("linear_value_head_dim", 128),
            fields.number("linear_conv_kernel_dim", 4),
        )
        parts, cache = delta_net(f"{at}.linear_attn", sizes)
    elif family in MAMBA1 or family == "JambaForCausalLM":
        parts, cache = mamba1(f"{at}.mamba", _mamba_sizes(fields, family), norms=family == "JambaForCausalLM")
    else:
        gated = family != "FalconH1ForCausalLM" or bool(fields.get("mamba_rms_norm"))
        parts, cache = mamba2(f"{at}.mamba", _mamba_sizes(fields, family), norm_weight=gated)
    return list(parts), cache


def _mamba_sizes(fields: Fields, family: str) -> Mamba:
    hidden = fields.number("hidden_size")
    heads = (
        fields.number("mamba_n_heads", 0)
        or fields.number("mamba_num_heads", 0)
        or int(fields.config.get("num_heads") or 0)
    )
    dim = fields.get("mamba_d_head", None) or fields.get("mamba_head_dim", None) or fields.get("head_dim", 64)
    inner = (
        fields.number("mamba_d_ssm", 0)
        or fields.number("mamba_expand", 0) * hidden
        or fields.number("expand", 2) * hidden
    )
    if family in MAMBA1:
        inner = fields.number("intermediate_size", 0) or inner
    if family == "Mamba2ForCausalLM":
        inner = int(fields.config.get("intermediate_size") or inner)
    if family == "NemotronHForCausalLM":
        inner = heads * int(dim)
    dim = inner // heads if not isinstance(dim, int) and heads else dim
    rank = fields.get("mamba_dt_rank", None) or fields.get("time_step_rank", None)
    return Mamba(
        hidden=hidden,
        inner=inner,
        state=fields.number("mamba_d_state", 0)
        or fields.number("ssm_state_size", 0)
        or fields.number("state_size", 16),
        kernel=fields.number("mamba_d_conv", 0) or fields.number("conv_kernel", 4),
        heads=heads,
        head_dim=int(dim),
        groups=fields.number("mamba_n_groups", 0) or fields.number("n_groups", 1),
        dt_rank=rank if isinstance(rank, int) else -(-hidden // 16),
        conv_bias=bool(fields.get("mamba_conv_bias", fields.get("use_conv_bias", True))),
        proj_bias=bool(fields.get("mamba_proj_bias", fields.get("use_bias", False))),
    )


def _feed_forward(
    fields: Fields, traits: Traits, family: str, at: str, index: int, kind: str, count: int
) -> list[Weight]:
    if attention_free(family) or (family == "NemotronHForCausalLM" and kind not in ("mlp", "moe")):
        return []
    if family == "Gemma4ForCausalLM":
        return _gemma4_feed_forward(fields, at, index, count)
    if kind == "moe" or (kind != "mlp" and is_moe_layer(fields, family, index)):
        return moe(fields, traits, family, at, index)
    inner = int(fields.at("intermediate_size", index, 0) or 0)
    if family.startswith("Llama4"):
        inner = fields.number("intermediate_size_mlp", inner)
    if family.startswith("Lfm2"):
        inner = _lfm2_inner(fields)
    if family == "PhiForCausalLM":
        inner = fields.number("n_inner", 0)  # phi.py reads n_inner alone
    if family == "GraniteMoeHybridForCausalLM":
        inner = fields.number("shared_intermediate_size", inner)
    inner = inner or 4 * fields.number("hidden_size")
    bias = _flag(fields, traits.mlp_bias)
    return list(mlp(f"{at}.mlp", fields.number("hidden_size"), inner, gated=traits.gated, bias=bias))


def _lfm2_inner(fields: Fields) -> int:
    """LFM2's block width: two thirds, a multiplier, rounded up (lfm2.py)."""
    inner = int(fields.config.get("block_ff_dim") or fields.number("intermediate_size"))
    if not fields.get("block_auto_adjust_ff_dim", True):
        return inner
    inner = int(2 * inner / 3)
    inner = int(float(fields.get("block_ffn_dim_multiplier", 1.0)) * inner)
    multiple = fields.number("block_multiple_of", 256)
    return multiple * (-(-inner // multiple))


def _gemma4_feed_forward(fields: Fields, at: str, index: int, count: int) -> list[Weight]:
    """Gemma 4: a dense MLP in every layer, routed experts beside it where the model has them."""
    hidden, inner = fields.number("hidden_size"), fields.number("intermediate_size")
    wide = 2 if fields.get("use_double_wide_mlp") and _reads_other_cache(fields, index, count) else 1
    parts = list(mlp(f"{at}.mlp", hidden, inner * wide))
    if routed := expert_count(fields):
        parts += experts(f"{at}.moe", hidden, fields.number("moe_intermediate_size"), routed)
        parts += [router(f"{at}.router", hidden, routed), vector(f"{at}.router.scale", hidden)]
        parts += [vector(f"{at}.moe.per_expert_scale", routed), norm(f"{at}.post_feedforward_layernorm_1", hidden)]
        parts += [norm(f"{at}.feedforward_layernorm_2", hidden), norm(f"{at}.pre_feedforward_layernorm_2", hidden)]
    if width := int(fields.config.get("hidden_size_per_layer_input") or 0):
        parts += [
            linear(f"{at}.per_layer_input_gate", hidden, width),
            linear(f"{at}.per_layer_projection", width, hidden),
        ]
        parts.append(norm(f"{at}.post_per_layer_input_norm", hidden))
    return parts


def is_moe_layer(fields: Fields, family: str, index: int) -> bool:
    """Whether a layer's feed-forward is a mixture of experts, in every spelling configs use."""
    if not expert_count(fields):
        return False
    if family.startswith("Llama4"):
        step = fields.number("interleave_moe_layer_step", 1)
        chosen = fields.config.get("moe_layers")
        return index in chosen if chosen else step > 0 and (index + 1) % step == 0
    if family == "JambaForCausalLM":
        return bool(index % fields.number("expert_layer_period", 2) == fields.number("expert_layer_offset", 1))
    if fields.has("moe_layer_start_index") or family == "Ernie4_5_MoeForCausalLM":
        start, end = fields.number("moe_layer_start_index", 0), fields.config.get("moe_layer_end_index")
        last = fields.number("num_hidden_layers") - 1 if end is None or end == -1 else int(end)
        return bool(start <= index <= last and (index + 1) % fields.number("moe_layer_interval", 1) == 0)
    if index in (fields.get("mlp_only_layers") or []):
        return False
    if index < fields.number("first_k_dense_replace", 0) or index < fields.number("num_dense_layers", 0):
        return False
    every = fields.config.get("moe_layer_freq")
    if isinstance(every, list):
        return bool(every[index])
    step = fields.number("decoder_sparse_step", 1)
    return index % int(every or 1) == 0 and (step <= 1 or (index + 1) % step == 0)


def moe(fields: Fields, traits: Traits, family: str, at: str, index: int) -> list[Weight]:
    """Router, routed experts and shared experts of one layer."""
    hidden, count = fields.number("hidden_size"), expert_count(fields)
    inner = int(fields.at("moe_intermediate_size", index, 0) or fields.at("intermediate_size", index, 0))
    name = f"{at}.mlp"
    gated = family != "NemotronHForCausalLM"
    latent = fields.number("moe_latent_size", 0) or hidden
    parts = [router(name, hidden, count, bias=_flag(fields, traits.router_bias), width=traits.router_width)]
    if _correction(fields, traits):
        parts.append(vector(f"{name}.e_score_correction_bias", count, width=4))
    parts += experts(name, latent, inner, count, gated=gated, bias=traits.expert_bias)
    shared = _shared_inner(fields, family, index, inner)
    if shared:
        parts += mlp(f"{name}.shared_experts", hidden, shared, gated=gated)
    if traits.shared_gate and shared:
        parts.append(Weight(f"{name}.shared_expert_gate", ((1, 1),), hidden))
    return parts


def _correction(fields: Fields, traits: Traits) -> bool:
    if traits.correction == "noaux_tc":
        return fields.get("topk_method") == "noaux_tc" or fields.model_type in ("deepseek_v3", "kimi_k2", "mistral4")
    return _flag(fields, traits.correction)


def _shared_inner(fields: Fields, family: str, index: int, inner: int) -> int:
    """Width of the shared experts, taken together."""
    if given := fields.number("shared_expert_intermediate_size", 0) or fields.number("shared_intermediate_size", 0):
        return int(given)
    if given := fields.number("moe_shared_expert_intermediate_size", 0):
        return int(given) * max(1, fields.number("num_shared_experts", 1))
    if family.startswith("Llama4"):
        return inner
    if family == "HunYuanMoEV1ForCausalLM":
        if not fields.get("use_mixed_mlp_moe"):
            return 0
        return fields.number("intermediate_size") * int(fields.at("num_shared_experts", index, 1) or 1)
    return int(fields.at("num_shared_experts", index, 0) or 0) * inner


def _norms(fields: Fields, traits: Traits, family: str, at: str, index: int, kind: str) -> list[Weight]:
    hidden = fields.number("hidden_size")
    count = traits.norms
    if family == "FalconForCausalLM" and (
        not fields.get("parallel_attn", True) or fields.get("new_decoder_architecture")
    ):
        count = 1 if fields.number("num_ln_in_parallel_attn", 2) == 1 and fields.get("parallel_attn", True) else 2
    parts = []
    if count:
        parts.append(vector(f"{at}.norms", hidden, count * (2 if traits.layer_norm and traits.norm_bias else 1)))
    if family.startswith("Gemma3n"):
        parts += _altup(fields, at)
    return parts


def _altup(fields: Fields, at: str) -> list[Weight]:
    """Gemma 3n's alternating updates, its low-rank residual and its per-layer inputs (gemma3n.py)."""
    hidden, inputs, rank = (
        fields.number("hidden_size"),
        fields.number("altup_num_inputs", 4),
        fields.number("laurel_rank", 64),
    )
    width = fields.number("hidden_size_per_layer_input", 256)
    return [
        vector(f"{at}.altup.correct_output_scale", hidden, width=4),
        vector(f"{at}.altup.coefs", inputs * inputs + inputs**3),
        linear(f"{at}.altup.modality_router", hidden, inputs, quantisable=False),
        norm(f"{at}.altup.router_norm", hidden),
        linear(f"{at}.laurel.linear_left", hidden, rank),
        linear(f"{at}.laurel.linear_right", rank, hidden, split="inputs"),
        norm(f"{at}.laurel.post_laurel_norm", hidden),
        linear(f"{at}.per_layer_input_gate", hidden, width),
        linear(f"{at}.per_layer_projection", width, hidden),
        norm(f"{at}.post_per_layer_input_norm", hidden),
    ]


def per_layer_inputs(fields: Fields, family: str) -> list[Weight]:
    """The per-layer embeddings of Gemma 3n and the small Gemma 4 models."""
    # Gemma 4's large models have none, and say so or leave it out; Gemma 3n's class default holds.
    given = fields.config.get("hidden_size_per_layer_input")
    width = int(given or 0) if family == "Gemma4ForCausalLM" else fields.number("hidden_size_per_layer_input", 0)
    hidden = fields.number("hidden_size")
    parts: list[Weight] = []
    if width:
        total = width * fields.number("num_hidden_layers")
        vocab = fields.number("vocab_size_per_layer_input", fields.number("vocab_size"))
        parts += [
            Weight("model.embed_tokens_per_layer", ((vocab, 1),), total, "vocab"),
            linear("model.per_layer_model_projection", hidden, total, split="outputs"),
            norm("model.per_layer_projection_norm", width),
        ]
    if family.startswith("Gemma3n"):
        inputs = fields.number("altup_num_inputs", 4)
        parts.append(Weight("model.altup_projections", ((inputs - 1, hidden), (inputs - 1, hidden)), hidden))
    return parts


def _drafts(fields: Fields, traits: Traits, family: str, count: int) -> tuple[Layer, ...]:
    """The model's own multi-token-prediction layers (DeepSeek-V3, GLM-4.5, Qwen3-Next, Qwen3.5, MiMo)."""
    number = (
        fields.number("num_nextn_predict_layers", 0)
        or int(fields.config.get("mtp_num_hidden_layers") or 0)
        or (1 if family in QWEN_HYBRIDS else 0)
    )
    hidden = fields.number("hidden_size")
    drafts = []
    for extra in range(number):
        # An index past the last decoder layer: dense-first rules and cache sharing do not reach it.
        layer = _layer(fields, traits, family, count + extra, "full_attention", 10**9)
        at = f"model.layers.{count + extra}"
        own = tuple(replace(weight, name=weight.name.replace(at, f"mtp.layers.{extra}")) for weight in layer.weights)
        at = f"mtp.layers.{extra}" if family in QWEN_HYBRIDS else at
        more = (vector(f"{at}.draft_norms", hidden, 3), linear(f"{at}.eh_proj", 2 * hidden, hidden, quantisable=False))
        drafts.append(Layer((own if family in QWEN_HYBRIDS else layer.weights) + more, layer.caches))
    return tuple(drafts)


def rotary_tables(fields: Fields, family: str) -> tuple[tuple[int, int], ...]:
    """(positions, width) of the cosine and sine tables vLLM keeps, one per distinct set of rotary parameters."""
    told = fields.has("max_position_embeddings") or fields.config.get("model_type")
    positions = fields.number("max_position_embeddings", 0) if told else 0
    if not positions or attention_free(family) or family in ("GPT2LMHeadModel", "OPTForCausalLM", "BloomForCausalLM"):
        return ()
    scaling: Any = fields.config.get("rope_scaling") or fields.config.get("rope_parameters") or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "") if isinstance(scaling, dict) else ""
    if kind in ("yarn", "deepseek_yarn") and scaling.get("original_max_position_embeddings"):
        positions = int(scaling["original_max_position_embeddings"] * float(scaling.get("factor", 1)))
    share = float(
        fields.get("partial_rotary_factor", None)
        or (scaling.get("partial_rotary_factor") if isinstance(scaling, dict) else None)
        or fields.get("rotary_pct", 1.0)
    )
    width = fields.number("qk_rope_head_dim", 64) if is_mla(fields) else int(heads_of(fields).head_dim * share)
    tables = 2 if fields.get("rope_local_base_freq") or family.startswith(("Gemma3", "Gemma4")) else 1
    return ((positions, width),) * tables


def state_dtype(fields: Fields, family: str) -> str | None:
    """The dtype of the recurrent state where it is not the model's (models/config.py: Nemotron-H, Qwen3.5)."""
    if family == "NemotronHForCausalLM":
        return str(fields.get("mamba_ssm_cache_dtype", "float32"))
    if family.startswith("Qwen3_5") and fields.config.get("mamba_ssm_dtype"):
        return str(fields.config["mamba_ssm_dtype"])
    if family.startswith("Qwen3_5") and not fields.config.get("model_type"):
        return "float32"  # as every released checkpoint of the family says
    return None
