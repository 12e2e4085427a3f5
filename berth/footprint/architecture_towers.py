"""Vision and audio towers with their projectors: what a multimodal model loads beside its decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from berth.footprint.architecture_config import Fields
from berth.footprint.architecture_encoders import projection
from berth.footprint.architecture_parts import Heads, attention, mlp, norm, vector
from berth.footprint.architecture_types import Model, Weight

Config = Mapping[str, Any]
VISION_KEYS = ("vision_config", "visual", "vision_model_config", "vit_config", "vision_encoder")
AUDIO_KEYS = ("audio_config", "audio_encoder_config", "sound_config")


def towers(config: Config, model: Model) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """The weights of every tower of a multimodal config, and notes where they are an estimate."""
    if isinstance(config.get("thinker_config"), Mapping):
        config = config["thinker_config"]
    weights: list[Weight] = []
    notes: list[str] = []
    vision = next((config[key] for key in VISION_KEYS if isinstance(config.get(key), Mapping)), None)
    if vision is None:
        vision = ASSUMED.get(model.architecture)
    if vision is not None:
        more, known = _vision(config, vision, model)
        weights += more
        if not known:
            notes.append("vision tower estimated as a plain vision transformer")
    audio = next((config[key] for key in AUDIO_KEYS if isinstance(config.get(key), Mapping)), None)
    if audio is not None:
        weights += _audio(Fields(audio), model)
        notes.append("audio tower estimated as a Whisper encoder")
    return tuple(weights), tuple(notes)


ASSUMED: dict[str, Config] = {
    "DotsOCRForCausalLM": {"model_type": "dots_vit"},
    "Qwen2_5_VLForConditionalGeneration": {"model_type": "qwen2_5_vl", "hidden_size": 1280},
    "Gemma3ForConditionalGeneration": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "image_size": 896,
        "patch_size": 14,
    },
    "LlavaForConditionalGeneration": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 336,
        "patch_size": 14,
    },
    "Qwen2VLForConditionalGeneration": {"model_type": "qwen2_vl"},
}
"""Towers of released models, for configs that leave them out."""


def _vision(config: Config, vision: Config, model: Model) -> tuple[list[Weight], bool]:
    name, kind = model.architecture, str(vision.get("model_type") or "")
    if name.startswith("Qwen2VL") or name.startswith("Qwen2_5_VL"):
        return _qwen2(vision, model, newer=name.startswith("Qwen2_5")), True
    if name.startswith(("Qwen3VL", "Qwen3_5")):
        return _qwen3(vision, model), True
    if name.startswith("DotsOCR"):
        return _dots(vision, model), True
    if kind.startswith("intern_vit") or name.startswith(("InternVL", "NVLM", "H2OVL")):
        return _intern(config, vision, model), True
    if kind == "pixtral" or name.startswith(("Mistral3", "Pixtral", "LightOnOCR")):
        return _pixtral(config, vision, model), True
    if kind.startswith(("clip", "siglip")):
        return _clip(config, vision, model, kind), True
    return _plain(vision, model), False


def _plain_layer(
    at: str,
    hidden: int,
    heads: int,
    inner: int,
    *,
    bias: bool = True,
    gated: bool = False,
    norms: int = 4,
    head: int = 0,
) -> list[Weight]:
    sizes = Heads(hidden, heads, heads, head or hidden // max(1, heads))
    parts = [
        *attention(f"{at}.attn", sizes, qkv_bias=bias, out_bias=bias),
        *mlp(f"{at}.mlp", hidden, inner, gated=gated, bias=bias),
    ]
    parts.append(vector(f"{at}.norms", hidden, count=norms))
    return parts


def _fields(vision: Config, model_type: str) -> Fields:
    return Fields({**vision, "model_type": model_type})


def _clip(config: Config, vision: Config, model: Model, kind: str) -> list[Weight]:
    """CLIP and SigLIP (clip.py, siglip.py) with LLaVA's two-layer or Gemma 3's projector."""
    clip = kind.startswith("clip")
    fields = Fields(vision)
    hidden, inner, heads = (
        fields.number("hidden_size"),
        fields.number("intermediate_size"),
        fields.number("num_attention_heads"),
    )
    layers = fields.number("num_hidden_layers")
    at = "vision_tower"
    select = config.get("vision_feature_layer", -2 if clip else None)
    kept = layers + 1 + int(select) if isinstance(select, int) and select < 0 else layers
    patch, image = fields.number("patch_size", 14), fields.number("image_size", 224)
    positions = (image // patch) ** 2 + (1 if clip else 0)
    parts = [
        Weight(f"{at}.patch_embedding", ((1, hidden),), 3 * patch * patch, bias=not clip),
        vector(f"{at}.position_embedding", positions * hidden),
    ]
    if clip:
        parts.append(vector(f"{at}.class_embedding_and_pre_norm", hidden, count=3))
    for index in range(kept):
        parts += _plain_layer(f"{at}.encoder.layers.{index}", hidden, heads, inner)
    if kept == layers:
        parts.append(norm(f"{at}.post_layernorm", hidden, bias=True))
    if model.architecture.startswith("Gemma3"):
        return [
            *parts,
            vector("multi_modal_projector.mm_input_projection_weight", hidden * model.hidden),
            norm("multi_modal_projector.mm_soft_emb_norm", hidden),
        ]
    if model.architecture.startswith("PaliGemma"):
        return [*parts, projection("multi_modal_projector.linear", hidden, model.hidden)]
    return [
        *parts,
        projection("multi_modal_projector.linear_1", hidden, model.hidden),
        projection("multi_modal_projector.linear_2", model.hidden, model.hidden),
    ]


def _qwen2(vision: Config, model: Model, newer: bool) -> list[Weight]:
    """Qwen2-VL and Qwen2.5-VL (qwen2_vl.py, qwen2_5_vl.py)."""
    fields = _fields(vision, "qwen2_5_vl_vision" if newer else "qwen2_vl_vision")
    hidden = fields.number("hidden_size") if newer else fields.number("embed_dim")
    out = int(vision.get("out_hidden_size" if newer else "hidden_size") or model.hidden)
    inner = fields.number("intermediate_size") if newer else int(hidden * float(fields.get("mlp_ratio", 4)))
    merged = hidden * fields.number("spatial_merge_size", 2) ** 2
    at = "visual"
    patch = 3 * fields.number("temporal_patch_size", 2) * fields.number("patch_size", 14) ** 2
    parts = [Weight(f"{at}.patch_embed", ((1, hidden),), patch)]
    for index in range(fields.number("depth", 32)):
        norms = 2 if newer else 4
        parts += _plain_layer(
            f"{at}.blocks.{index}", hidden, fields.number("num_heads", 16), inner, gated=newer, norms=norms
        )
    parts.append(norm(f"{at}.merger.ln_q", hidden, bias=not newer))
    return [*parts, projection(f"{at}.merger.mlp.0", merged, merged), projection(f"{at}.merger.mlp.2", merged, out)]


def _qwen3(vision: Config, model: Model) -> list[Weight]:
    """Qwen3-VL and Qwen3.5 (qwen3_vl.py): a merger at the end and one per deep-stack layer."""
    fields = _fields(vision, "qwen3_vl_vision")
    hidden, inner = fields.number("hidden_size"), fields.number("intermediate_size")
    out = int(vision.get("out_hidden_size") or model.hidden)
    merged = hidden * fields.number("spatial_merge_size", 2) ** 2
    at = "visual"
    patch = 3 * fields.number("temporal_patch_size", 2) * fields.number("patch_size", 16) ** 2
    parts = [
        Weight(f"{at}.patch_embed", ((1, hidden),), patch, bias=True),
        vector(f"{at}.pos_embed", fields.number("num_position_embeddings", 2304) * hidden),
    ]
    for index in range(fields.number("depth", 27)):
        parts += _plain_layer(f"{at}.blocks.{index}", hidden, fields.number("num_heads", 16), inner)
    stacked = [] if model.architecture.startswith("Qwen3_5") else list(fields.get("deepstack_visual_indexes", []) or [])
    for index in range(1 + len(stacked)):
        parts += [
            norm(f"{at}.merger.{index}.norm", hidden if index == 0 else merged, bias=True),
            projection(f"{at}.merger.{index}.fc1", merged, merged),
            projection(f"{at}.merger.{index}.fc2", merged, out),
        ]
    return parts


def _dots(vision: Config, model: Model) -> list[Weight]:
    """dots.ocr's tower (dots_ocr.py); the defaults are those of its own config class."""
    fields = Fields(vision)
    hidden = int(vision.get("embed_dim") or 1536)
    inner, layers = int(vision.get("intermediate_size") or 4224), int(vision.get("num_hidden_layers") or 42)
    heads, patch = int(vision.get("num_attention_heads") or 12), int(vision.get("patch_size") or 14)
    merged = hidden * int(vision.get("spatial_merge_size") or 2) ** 2
    bias = bool(fields.get("use_bias"))
    at = "vision_tower"
    parts = [
        Weight(f"{at}.patch_embed", ((1, hidden),), 3 * patch * patch, bias=True),
        norm(f"{at}.patch_embed.norm", hidden),
    ]
    for index in range(layers):
        parts += _plain_layer(f"{at}.blocks.{index}", hidden, heads, inner, bias=bias, gated=True, norms=2)
    return [
        *parts,
        norm(f"{at}.post_trunk_norm", hidden),
        norm(f"{at}.merger.ln_q", hidden, bias=True),
        projection(f"{at}.merger.mlp.0", merged, merged),
        projection(f"{at}.merger.mlp.2", merged, int(vision.get("hidden_size") or model.hidden)),
    ]


def _intern(config: Config, vision: Config, model: Model) -> list[Weight]:
    """InternViT (intern_vit.py) and the pixel-shuffle projector (internvl.py)."""
    fields = Fields(vision)
    hidden, inner, heads = (
        fields.number("hidden_size"),
        fields.number("intermediate_size"),
        fields.number("num_attention_heads"),
    )
    layers, select = fields.number("num_hidden_layers"), config.get("select_layer", -1)
    kept = layers + 1 + int(select) if isinstance(select, int) and select < 0 else layers
    patch = fields.number("patch_size", 14)
    positions = (fields.number("image_size", 448) // patch) ** 2 + 1
    at = "vision_model"
    parts = [
        Weight(f"{at}.patch_embedding", ((1, hidden),), 3 * patch * patch, bias=True),
        vector(f"{at}.position_and_class_embedding", (positions + 1) * hidden),
    ]
    layer_norm = 2 if str(vision.get("norm_type", "layer_norm")) == "layer_norm" else 1
    for index in range(kept):
        layer = _plain_layer(f"{at}.encoder.layers.{index}", hidden, heads, inner, norms=2 * layer_norm + 2)
        if not vision.get("qkv_bias", True):
            layer[0] = Weight(layer[0].name, layer[0].outputs, layer[0].inputs, layer[0].split, linear=True)
        if vision.get("qk_normalization"):
            layer.append(norm(f"{at}.encoder.layers.{index}.qk_norm", 2 * hidden))
        parts += layer
    wide = hidden * int(1 / float(config.get("downsample_ratio", 0.5))) ** 2
    return [
        *parts,
        norm("mlp1.0", wide, bias=True),
        projection("mlp1.1", wide, model.hidden),
        projection("mlp1.3", model.hidden, model.hidden),
    ]


def _pixtral(config: Config, vision: Config, model: Model) -> list[Weight]:
    """Pixtral's tower in the Hugging Face layout with Mistral 3's patch merger (pixtral.py, mistral3.py)."""
    fields = _fields(vision, "pixtral")
    hidden, inner, heads = (
        fields.number("hidden_size"),
        fields.number("intermediate_size"),
        fields.number("num_attention_heads"),
    )
    head = int(vision.get("head_dim") or hidden // heads)
    at = "vision_tower"
    parts = [
        Weight(f"{at}.patch_conv", ((1, hidden),), 3 * fields.number("patch_size", 16) ** 2),
        norm(f"{at}.ln_pre", hidden),
    ]
    for index in range(fields.number("num_hidden_layers")):
        parts += _plain_layer(
            f"{at}.transformer.layers.{index}", hidden, heads, inner, bias=False, gated=True, norms=2, head=head
        )
    bias = bool(config.get("multimodal_projector_bias", not model.architecture.startswith("Mistral3")))
    merge = int(config.get("spatial_merge_size") or 1) ** 2
    if model.architecture.startswith("Mistral3"):
        parts.append(norm("multi_modal_projector.norm", hidden))
        parts.append(projection("multi_modal_projector.patch_merger", hidden * merge, hidden, bias=False))
    return [
        *parts,
        projection("multi_modal_projector.linear_1", hidden, model.hidden, bias=bias),
        projection("multi_modal_projector.linear_2", model.hidden, model.hidden, bias=bias),
    ]


def _plain(vision: Config, model: Model) -> list[Weight]:
    """A vision transformer of the given sizes; for towers without arithmetic of their own."""
    fields = Fields(vision)
    hidden = fields.number("hidden_size", 0) or fields.number("embed_dim", 0) or fields.number("width", 0)
    layers = fields.number("num_hidden_layers", 0) or fields.number("depth", 0) or fields.number("layers", 0)
    if not hidden or not layers:
        return []
    inner = fields.number("intermediate_size", 0) or int(hidden * float(fields.get("mlp_ratio", 4)))
    heads = fields.number("num_attention_heads", 16) or 16
    patch = fields.number("patch_size", 14)
    parts = [Weight("vision_tower.patch_embed", ((1, hidden),), 3 * patch * patch, bias=True)]
    gated = str(vision.get("hidden_act", "")).startswith("silu") or str(vision.get("model_type", "")).startswith(
        "gemma4"
    )
    for index in range(layers):
        parts += _plain_layer(f"vision_tower.blocks.{index}", hidden, heads, inner, gated=gated)
    return [*parts, projection("multi_modal_projector", hidden, model.hidden)]


def _audio(fields: Fields, model: Model) -> list[Weight]:
    hidden = fields.number("d_model", 0) or fields.number("hidden_size", 1280)
    layers = int(fields.config.get("encoder_layers") or 0) or fields.number("num_hidden_layers", 0)
    inner = int(fields.config.get("encoder_ffn_dim") or 0) or fields.number("intermediate_size", 0) or 4 * hidden
    parts: list[Weight] = []
    for index in range(layers):
        parts += _plain_layer(f"audio_tower.layers.{index}", hidden, max(1, hidden // 64), inner)
    return [*parts, projection("audio_tower.proj", hidden, model.hidden)]
