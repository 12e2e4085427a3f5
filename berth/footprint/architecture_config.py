"""Reading a Hugging Face config.json: nested configs, other spellings of the same key, defaults of its config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from berth.errors import BerthError
from berth.footprint.architecture_defaults import DEFAULTS

Config = Mapping[str, Any]

TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder_config", "decoder")
"""Where multimodal configs keep the language model's config (vLLM's get_hf_text_config knows the same ones)."""

SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "dim", "model_dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers", "decoder_layers", "block_count"),
    "num_attention_heads": ("n_head", "n_heads", "decoder_attention_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "n_kv_heads", "num_query_groups", "multi_query_group_num"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "hidden_dim", "block_ff_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"),
    "vocab_size": ("padded_vocab_size",),
    "head_dim": ("attention_head_dim", "kv_channels"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    "num_shared_experts": ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "torch_dtype": ("dtype",),
}


class Fields:
    """A config with one spelling per key, falling back to the defaults of its model_type."""

    def __init__(self, config: Config, model_type: str = "", nested: bool = False) -> None:
        self.config = config
        self.nested = nested
        self.model_type = str(config.get("model_type") or model_type)
        self.defaults: Config = DEFAULTS.get(self.model_type, {})

    def get(self, key: str, default: Any = None) -> Any:
        """The value under any spelling of ``key``, else the class default, else ``default``."""
        names = (key, *SPELLINGS.get(key, ()))
        for source in (self.config, self.defaults):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return default

    def has(self, key: str) -> bool:
        """Whether the config itself (not its class defaults) gives ``key``."""
        return any(self.config.get(name) is not None for name in (key, *SPELLINGS.get(key, ())))

    def number(self, key: str, default: int = 0) -> int:
        """An integer; of a list (one per layer) the largest."""
        value = self.get(key, default)
        if isinstance(value, list):
            value = max((item for item in value if item is not None), default=0)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise BerthError(f"config.json: {key} is not a number", found=value, mend="correct config.json") from None

    def at(self, key: str, index: int, default: Any = 0) -> Any:
        """``key`` of one layer, where it may be a list with an entry per layer."""
        value = self.get(key, default)
        if isinstance(value, list):
            return value[index] if index < len(value) else default
        return value

    def missing(self, *keys: str) -> tuple[str, ...]:
        """Those of ``keys`` that are not there, or not positive.

        Only a nested config may leave its sizes to its class: multimodal ones are written that way, others are cut.
        """
        return tuple(key for key in keys if not self.get(key) or not (self.nested or self.has(key)))

    def require(self, *keys: str) -> None:
        """Raise one BerthError that names every key of ``keys`` that is missing or not positive."""
        if missing := self.missing(*keys):
            raise incomplete(missing, ", ".join(sorted(map(str, self.config))[:40]))


def incomplete(missing: tuple[str, ...], found: str | None = None) -> BerthError:
    """The error that names the missing keys of a config.json."""
    return BerthError(
        f"config.json lacks {', '.join(missing)}, which the memory arithmetic needs",
        found=found,
        mend="give the model's complete config.json (of the repository that holds the weights)",
    )


def text_config(config: Config) -> dict[str, Any]:
    """The language model's config, with what only the outer one says (dtype, quantisation, tied embeddings)."""
    inner: Config = config
    for key in TEXT_KEYS:
        value = inner.get(key)
        if isinstance(value, Mapping) and (len(value) > 1 or key == "text_config"):
            inner = text_config(value) if key == "thinker_config" else value
            break
    else:
        return dict(config)
    merged = dict(inner)
    for key in ("torch_dtype", "dtype", "quantization_config", "tie_word_embeddings"):
        if merged.get(key) is None and config.get(key) is not None:
            merged[key] = config[key]
    return merged
