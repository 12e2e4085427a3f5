"""What a model is made of, as far as memory goes: its weights, its caches, its buffers. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["outputs", "inputs", "vocab", "whole"]
CacheKind = Literal["full", "sliding", "chunked", "mla", "state", "cross"]
StateKind = Literal["mamba1", "mamba2", "delta", "kda", "linear", "conv"]

VOCAB_PADDING = 64
"""vLLM's DEFAULT_VOCAB_PADDING_SIZE (model_executor/layers/vocab_parallel_embedding.py)."""


@dataclass(frozen=True)
class Weight:
    """One parameter as vLLM holds it, fused parts included, at tensor parallel size 1.

    ``outputs`` are the fused parts as (units, size of a unit): a key projection is (kv heads, head size), and a unit
    is never split, so that heads are replicated where there are fewer of them than ranks. ``split`` tells which axis
    tensor parallelism divides; ``experts`` are copies that expert parallelism divides. A ``linear`` weight is one that
    quantisation may replace; ``bias`` adds one value per output. ``width`` is set where the size of a value is not the
    model's own (bytes), ``count`` for identical small parameters kept as one entry.
    """

    name: str
    outputs: tuple[tuple[int, int], ...]
    inputs: int = 1
    split: Split = "whole"
    experts: int = 1
    linear: bool = False
    bias: bool = False
    width: int | None = None
    count: int = 1

    def rows(self, ranks: int) -> int:
        """Outputs that the fullest of ``ranks`` tensor parallel ranks holds."""
        if self.split == "vocab":
            return _ceil(_round_up(self.outputs[0][0], VOCAB_PADDING), ranks)
        share = ranks if self.split == "outputs" else 1
        return sum(max(1, _ceil(units, share)) * size for units, size in self.outputs)

    def columns(self, ranks: int) -> int:
        """Inputs that one of ``ranks`` tensor parallel ranks holds."""
        return _ceil(self.inputs, ranks) if self.split == "inputs" else self.inputs


@dataclass(frozen=True)
class State:
    """A recurrent state of fixed size per request: Mamba, gated delta net, linear attention, short convolution."""

    kind: StateKind
    inner: int = 0
    kernel: int = 0
    heads: int = 0
    head_dim: int = 0
    size: int = 0
    groups: int = 0
    key_heads: int = 0
    key_dim: int = 0


@dataclass(frozen=True)
class Cache:
    """The KV cache of one layer: kind, heads, and the window in tokens where there is one."""

    kind: CacheKind
    kv_heads: int = 0
    head_size: int = 0
    head_size_v: int = 0
    window: int = 0
    state: State | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its weights and the caches it writes (none where it reads another layer's)."""

    weights: tuple[Weight, ...]
    caches: tuple[Cache, ...] = ()


@dataclass(frozen=True)
class Quantisation:
    """How linear weights are stored: scheme, bits, group of inputs with one scale, block of a block scale.

    ``ignored`` are the module names (or ``re:`` patterns) that keep the model's dtype. ``complete`` is false where the
    config does not say which ones do, so that a bound must allow for attention in the model's dtype.
    """

    method: str
    bits: int
    group: int = 0
    block: tuple[int, int] | None = None
    zero_points: bool = False
    channel_scales: bool = False
    input_scales: bool = False
    act_order: bool = False
    complete: bool = True
    ignored: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model as its config.json describes it, normalised.

    ``first`` are the weights of the first pipeline stage (embeddings), ``last`` those of the last (head, final norm),
    ``everywhere`` those of every stage (vision and audio towers, projectors). ``drafts`` are the layers of the model's
    own multi-token-prediction head, loaded only when speculation asks for them. ``rotary`` are the (positions, width)
    of the rotary tables kept beside the weights. ``hybrid`` models mix attention with states. ``missing`` are the keys
    without which the weights cannot be told.
    """

    architecture: str
    model_type: str
    hidden: int
    vocab: int
    heads: int
    layers: tuple[Layer, ...]
    first: tuple[Weight, ...]
    last: tuple[Weight, ...]
    everywhere: tuple[Weight, ...] = ()
    drafts: tuple[Layer, ...] = ()
    tied: bool = False
    dtype: str = "bfloat16"
    quantisation: Quantisation | None = None
    max_position_embeddings: int | None = None
    rotary: tuple[tuple[int, int], ...] = ()
    pooling: bool = False
    encoder_only: bool = False
    encoder_decoder: bool = False
    mla: bool = False
    state_dtype: str | None = None
    experts: int = 0
    intermediate: int = 0
    kv_cache_dtype: str | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def hybrid(self) -> bool:
        """Attention and recurrent states in one model: vLLM then aligns their pages."""
        kinds = {cache.kind for layer in self.layers for cache in layer.caches}
        return "state" in kinds and len(kinds) > 1


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def _round_up(value: int, to: int) -> int:
    return _ceil(value, to) * to
