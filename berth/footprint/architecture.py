"""A model's weights and caches from its Hugging Face config.json.

The shapes are those of vLLM 0.29's modules: fused projections, padded vocabularies, replicated routers. An unknown
architecture gets the best generic estimate (Llama's layer with what the config says), and a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from berth.errors import BerthError
from berth.footprint import architecture_encoders as encoders
from berth.footprint import architecture_layers as layers
from berth.footprint.architecture_config import Fields, text_config
from berth.footprint.architecture_families import ENCODERS, Traits, model_type_of, traits_of
from berth.footprint.architecture_parts import embedding, linear, norm, vector
from berth.footprint.architecture_quant import read_quantisation
from berth.footprint.architecture_towers import towers
from berth.footprint.architecture_types import Model, Weight

__all__ = ["Model", "read_model"]

POOLING_ENDINGS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForRewardModel", "ForRetrieval")
GENERATING_ENDINGS = ("LMHeadModel", "ChatModel", "GLMModel")
"""Names that end like a headless model's and generate all the same."""


def read_model(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes; nested multimodal configs included.

    A config without hidden_size or vocab_size still tells the KV cache, but ``weights`` will refuse it.

    Raises:
        BerthError: naming every key the arithmetic needs and the config lacks; ``architectures`` is no list of names.
    """
    outer = Fields(config)
    named = config.get("architectures") or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise BerthError(
            "config.json: architectures is not a list of names", found=named, mend="give the model's own config.json"
        )
    architecture = named[0]
    if architecture in ENCODERS:
        return _finish(encoders.encoder(outer, architecture), config)
    if "Whisper" in architecture or outer.model_type == "whisper":
        return _finish(encoders.whisper(outer, architecture), config)
    inner = text_config(config)
    fields = Fields(inner, _guess(inner, architecture), nested=set(inner) != set(config))
    return _finish(_decoder(fields, architecture), config)


def _guess(inner: Mapping[str, Any], architecture: str) -> str:
    """The model_type of a config without one: by its architecture, or by keys only one family has."""
    if architecture or inner.get("architectures"):
        return model_type_of(architecture)
    return "qwen3_5_text" if inner.get("linear_num_value_heads") else ""


def _decoder(fields: Fields, architecture: str) -> Model:
    named = str((fields.config.get("architectures") or [architecture])[0])
    traits, family, known = traits_of(named if fields.nested else architecture, fields.model_type)
    if fields.nested and not known:
        traits, family, known = traits_of(architecture, fields.model_type)
    layers.require(fields, family)
    hidden, vocab = fields.number("hidden_size"), fields.number("vocab_size")
    tied = bool(fields.get("tie_word_embeddings", traits.tied))
    plan = layers.plan(fields, traits, family)
    first, last = _ends(fields, traits, family, architecture, tied)
    notes = (
        () if known else (f"unknown architecture {architecture or '(none named)'}: estimated as a Llama-like model",)
    )
    return Model(
        architecture=architecture or family,
        model_type=fields.model_type,
        hidden=hidden,
        vocab=vocab,
        missing=fields.missing("hidden_size", "vocab_size"),
        heads=fields.number("num_attention_heads"),
        layers=plan.layers,
        first=first,
        last=last,
        drafts=plan.drafts,
        tied=tied,
        max_position_embeddings=fields.number("max_position_embeddings", 0) or None,
        rotary=layers.rotary_tables(fields, family),
        pooling=_pools(architecture),
        encoder_only=_encodes(fields, architecture),
        mla=layers.is_mla(fields),
        state_dtype=layers.state_dtype(fields, family),
        experts=layers.expert_count(fields),
        intermediate=fields.number("intermediate_size"),
        notes=notes,
    )


def _pools(architecture: str) -> bool:
    return architecture.endswith(POOLING_ENDINGS) and not architecture.endswith(GENERATING_ENDINGS)


def _encodes(fields: Fields, architecture: str) -> bool:
    """A decoder turned into an encoder: every token sees every other, so nothing is cached."""
    return bool(
        fields.config.get("use_bidirectional_attention") is True
        or fields.config.get("is_causal") is False
        or "Bidirectional" in architecture
    )


def _ends(
    fields: Fields, traits: Traits, family: str, architecture: str, tied: bool
) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """The embeddings before the first layer, and the norm and head after the last."""
    hidden, vocab = fields.number("hidden_size"), fields.number("vocab_size")
    width = fields.number("word_embed_proj_dim", hidden)
    first = [embedding("model.embed_tokens", vocab, width)]
    if width != hidden:
        first += [linear("model.project_in", width, hidden), linear("model.project_out", hidden, width)]
    if traits.positions is not None:
        first.append(
            vector("model.embed_positions", (fields.number("max_position_embeddings") + traits.positions) * hidden)
        )
    if family == "BloomForCausalLM":
        first.append(norm("model.word_embeddings_layernorm", hidden, bias=True))
    if family.startswith(("Gemma3n", "Gemma4")):
        first += layers.per_layer_inputs(fields, family)
    last: list[Weight] = []
    if traits.final_norm:
        last.append(norm("model.norm", hidden, traits.layer_norm and traits.norm_bias))
    if not _pools(architecture):
        bias = bool(fields.get(traits.head_bias, False)) if isinstance(traits.head_bias, str) else traits.head_bias
        last.append(embedding("lm_head", vocab, width, bias=bias))
    elif architecture.endswith("ForSequenceClassification"):
        labels = len(fields.get("id2label", {}) or {}) or fields.number("num_labels", 2)
        last.append(Weight("score", ((1, labels),), hidden, width=4))
    return tuple(first), tuple(last)


def _finish(model: Model, config: Mapping[str, Any]) -> Model:
    """Add what the outer config decides: dtype, quantisation, towers."""
    inner = text_config(config)
    dtype = str(
        config.get("torch_dtype") or config.get("dtype") or inner.get("torch_dtype") or inner.get("dtype") or ""
    )
    quantisation, kv_dtype = read_quantisation(inner)
    more, notes = towers(config, model)
    first = model.first
    return replace(
        model,
        dtype=dtype.removeprefix("torch.") or "bfloat16",
        quantisation=quantisation,
        kv_cache_dtype=kv_dtype,
        first=first,
        everywhere=model.everywhere + more,
        notes=model.notes + notes,
    )
