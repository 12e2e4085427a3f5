"""Models without a decoder of the usual kind: BERT-like encoders (no KV cache) and Whisper (encoder and decoder)."""

from __future__ import annotations

from berth.footprint.architecture_config import Fields
from berth.footprint.architecture_families import ENCODERS
from berth.footprint.architecture_parts import Heads, attention, embedding, linear, mlp, norm, vector
from berth.footprint.architecture_types import Cache, Layer, Model, Weight


def encoder(fields: Fields, architecture: str) -> Model:
    """An encoder-only model (bert.py, roberta.py, modernbert.py, bert_with_rope.py)."""
    fields.require("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    kind = ENCODERS[architecture]
    count = fields.number("num_hidden_layers")
    return Model(
        architecture=architecture,
        model_type=fields.model_type,
        hidden=fields.number("hidden_size"),
        vocab=fields.number("vocab_size"),
        heads=fields.number("num_attention_heads"),
        layers=tuple(_encoder_layer(fields, kind, index) for index in range(count)),
        first=tuple(_encoder_embeddings(fields, kind)),
        last=tuple(_encoder_head(fields, kind, architecture)),
        max_position_embeddings=fields.number("max_position_embeddings", 0) or None,
        rotary=()
        if kind == "bert"
        else (
            (
                fields.number("max_position_embeddings"),
                fields.number("hidden_size") // fields.number("num_attention_heads"),
            ),
        ),
        pooling=True,
        encoder_only=True,
        intermediate=fields.number("intermediate_size"),
    )


def _encoder_layer(fields: Fields, kind: str, index: int) -> Layer:
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    sizes = Heads(hidden, heads, heads, hidden // heads)
    inner = fields.number("intermediate_size", 4 * hidden)
    at = f"encoder.layer.{index}"
    if kind == "bert":
        parts = attention(f"{at}.attention", sizes, qkv_bias=True, out_bias=True)
        parts += mlp(at, hidden, inner, gated=False, bias=True)
        return Layer((*parts, vector(f"{at}.LayerNorm", hidden, count=4)))
    if kind == "modernbert":
        bias = bool(fields.get("attention_bias"))
        parts = attention(f"{at}.attn", sizes, qkv_bias=bias, out_bias=bias)
        parts += mlp(f"{at}.mlp", hidden, inner, bias=bool(fields.get("mlp_bias")))
        norms = (1 if index == 0 else 2) * (2 if fields.get("norm_bias") else 1)
        return Layer((*parts, vector(f"{at}.norm", hidden, count=norms)))
    bias = bool(fields.get("qkv_proj_bias", True))
    parts = attention(f"{at}.attn", sizes, qkv_bias=bias, out_bias=bias)
    parts += mlp(f"{at}.mlp", hidden, inner, bias=bool(fields.get("mlp_fc1_bias", True)))
    return Layer((*parts, vector(f"{at}.norm", hidden, count=4)))


def _encoder_embeddings(fields: Fields, kind: str) -> list[Weight]:
    """Word, position and type tables: each is a vocabulary table to vLLM, so each is padded and divided."""
    hidden = fields.number("hidden_size")
    parts = [embedding("embeddings.word_embeddings", fields.number("vocab_size"), hidden)]
    if kind == "bert":
        parts.append(embedding("embeddings.position_embeddings", fields.number("max_position_embeddings", 512), hidden))
    if types := fields.number("type_vocab_size", 2 if kind == "bert" else 0):
        parts.append(embedding("embeddings.token_type_embeddings", types, hidden))
    bias = kind != "modernbert" or bool(fields.get("norm_bias"))
    parts.append(norm("embeddings.LayerNorm", hidden, bias=bias))
    return parts


def _encoder_head(fields: Fields, kind: str, architecture: str) -> list[Weight]:
    """Classifiers are kept in float32 (vLLM's head_dtype for pooling models)."""
    hidden = fields.number("hidden_size")
    parts = [norm("final_norm", hidden, bias=bool(fields.get("norm_bias")))] if kind == "modernbert" else []
    if architecture.endswith("Classification"):
        labels = len(fields.get("id2label", {}) or {}) or fields.number("num_labels", 2)
        dense = architecture.endswith("SequenceClassification")
        if dense:
            parts.append(Weight("pooler.dense", ((1, hidden),), hidden, bias=kind == "bert", width=4))
        parts.append(Weight("classifier", ((1, labels),), hidden, bias=True, width=4))
    return parts


def whisper(fields: Fields, architecture: str) -> Model:
    """Whisper (whisper.py): the decoder caches its own keys and values, and the encoder's for cross attention."""
    fields.require("d_model", "decoder_layers", "encoder_layers", "vocab_size")
    hidden, heads = fields.number("d_model"), fields.number("decoder_attention_heads", 8)
    sizes = Heads(hidden, heads, heads, hidden // heads)
    first = [
        Weight("model.decoder.embed_tokens", ((1, fields.number("vocab_size")),), hidden),
        vector("model.decoder.embed_positions", fields.number("max_target_positions", 448) * hidden),
    ]
    everywhere: list[Weight] = [
        Weight("model.encoder.conv1", ((1, hidden),), fields.number("num_mel_bins", 80) * 3, bias=True),
        Weight("model.encoder.conv2", ((1, hidden),), hidden * 3, bias=True),
        vector("model.encoder.embed_positions", fields.number("max_source_positions", 1500) * hidden),
        norm("model.encoder.layer_norm", hidden, bias=True),
    ]
    for index in range(fields.number("encoder_layers")):
        everywhere += _whisper_layer(
            f"model.encoder.layers.{index}", sizes, fields.number("encoder_ffn_dim"), cross=False
        )
    inner = fields.number("decoder_ffn_dim")
    caches = (
        Cache("full", heads, sizes.head_dim, sizes.head_dim),
        Cache("cross", heads, sizes.head_dim, sizes.head_dim, fields.number("max_source_positions", 1500)),
    )
    return Model(
        architecture=architecture,
        model_type=fields.model_type,
        hidden=hidden,
        vocab=fields.number("vocab_size"),
        heads=heads,
        layers=tuple(
            Layer(tuple(_whisper_layer(f"model.decoder.layers.{index}", sizes, inner, cross=True)), caches)
            for index in range(fields.number("decoder_layers"))
        ),
        first=tuple(first),
        last=(norm("model.decoder.layer_norm", hidden, bias=True),),
        everywhere=tuple(everywhere),
        tied=True,
        max_position_embeddings=fields.number("max_target_positions", 448),
        encoder_decoder=True,
        intermediate=inner,
    )


def _whisper_layer(at: str, sizes: Heads, inner: int, cross: bool) -> list[Weight]:
    parts = [*attention(f"{at}.self_attn", sizes, qkv_bias=True, out_bias=True)]
    parts += mlp(f"{at}.mlp", sizes.hidden, inner, gated=False, bias=True)
    if cross:
        parts += attention(f"{at}.encoder_attn", sizes, qkv_bias=True, out_bias=True)
    parts.append(vector(f"{at}.layer_norms", sizes.hidden, count=6 if cross else 4))
    return parts


def projection(name: str, inputs: int, outputs: int, bias: bool = True) -> Weight:
    """A linear layer that no quantisation touches."""
    return linear(name, inputs, outputs, bias=bias, quantisable=False)
