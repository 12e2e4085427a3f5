"""The cache spec of every layer on one rank: heads divided, dtypes applied, pages of attention and states aligned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from berth.footprint.architecture import Model
from berth.footprint.architecture_types import Cache, State
from berth.footprint.kv_cache_groups import Spec
from berth.footprint.types import EngineArgs
from berth.footprint.weights import dtype_bytes, stage_layers
from berth.footprint.weights_draft import draft_of
from berth.footprint.weights_quant import DTYPE_BYTES

BLOCK = 16
"""vLLM's default block size, and the granularity of the CUDA attention kernels' blocks (MultipleOf(16))."""

MLA_HYBRID_BLOCK = 128
"""Manager blocks of hybrids with latent attention are a multiple of this (platforms/interface.py)."""

DEFAULT_BATCHED_TOKENS = 8192
"""max_num_batched_tokens of the OpenAI server on GPUs of 70 to 160 GiB (EngineArgs.get_batch_defaults); others less or,
from 160 GiB on, twice as much: set it to be exact."""


@dataclass(frozen=True)
class Context:
    """What turns tokens into blocks beside the specs themselves.

    ``in_flight`` tokens are scheduled but not settled (windows hold them too), ``state_mode`` is vLLM's
    mamba_cache_mode, ``context_parallel`` the ranks that share a request's tokens.
    """

    in_flight: int
    batched_tokens: int
    stages: int = 1
    state_mode: str = "none"
    speculative_tokens: int = 0
    context_parallel: int = 1
    notes: tuple[str, ...] = ()


def context_of(model: Model, engine: EngineArgs) -> Context:
    """The context of a model under engine arguments, with vLLM's defaults."""
    batched = engine.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS
    stages = engine.pipeline_parallel_size
    # One batch per stage, and one more where the next is scheduled while the last runs (max_concurrent_batches).
    batches = stages if engine.rest.get("async_scheduling") is False else stages + 1
    windows = any(cache.window for layer in model.layers for cache in layer.caches)
    guessed = windows and engine.max_num_batched_tokens is None
    note = f"windowed layers sized for max_num_batched_tokens {batched} (not given)"
    return Context(
        in_flight=batches * batched,
        batched_tokens=batched,
        stages=stages,
        state_mode=_state_mode(model, engine),
        speculative_tokens=int((engine.speculative_config or {}).get("num_speculative_tokens") or 0),
        context_parallel=int(engine.rest.get("decode_context_parallel_size") or 1),
        notes=(note,) if guessed else (),
    )


def _state_mode(model: Model, engine: EngineArgs) -> str:
    """mamba_cache_mode: hybrids that generate cache prefixes by default, and then keep aligned states."""
    caching = engine.rest.get("enable_prefix_caching")
    if caching is None:
        caching = model.hybrid and not model.pooling and engine.runner != "pooling"
    mode = str(engine.rest.get("mamba_cache_mode") or "none")
    if not caching:
        return "none"
    return mode if mode != "none" else "align"


def kv_dtype_bytes(model: Model, engine: EngineArgs) -> float:
    """Bytes of one cached value; ``auto`` follows the model, or the KV scheme its checkpoint was quantised with."""
    name = engine.kv_cache_dtype if engine.kv_cache_dtype != "auto" else (model.kv_cache_dtype or "auto")
    if name.startswith(("fp8", "int8")):
        return 1
    return DTYPE_BYTES.get(name, 0) if name not in ("auto", "nvfp4") else dtype_bytes(model, engine)


def specs_of(model: Model, engine: EngineArgs, context: Context) -> tuple[list[Spec], int]:
    """(the spec of every layer with a cache, the block size of full attention)."""
    block = engine.block_size or BLOCK
    if model.encoder_only:
        return [], block
    placed = list(_placed(model, engine))
    if model.hybrid:
        block = _hybrid_block(model, engine, context, block, [cache for cache, _ in placed])
    return [_spec(cache, stage, model, engine, context, block) for cache, stage in placed], block


def _placed(model: Model, engine: EngineArgs) -> Iterable[tuple[Cache, int]]:
    """Every cache with its pipeline stage, in layer order; draft layers live on the last stage."""
    for stage, (begin, end) in enumerate(stage_layers(len(model.layers), engine.pipeline_parallel_size)):
        for layer in model.layers[begin:end]:
            for cache in layer.caches:
                yield cache, stage
    for layer in draft_of(model, engine).layers:
        for cache in layer.caches:
            yield cache, engine.pipeline_parallel_size - 1


def token_bytes(cache: Cache, model: Model, engine: EngineArgs) -> int:
    """Bytes of one token in one attention layer on one rank: heads are divided (at least one each), latents are not."""
    width = kv_dtype_bytes(model, engine)
    if cache.kind == "mla":
        # head_size_v marks the sparse indexer's cache, whose sizes are bytes already.
        return cache.head_size if cache.head_size_v else _latent_bytes(cache, engine, width)
    heads = max(1, cache.kv_heads // engine.tensor_parallel_size)
    name = engine.kv_cache_dtype
    if name.startswith("nvfp4"):
        size = cache.head_size + cache.head_size_v
        return heads * (size // 2 + size // 16)
    scales = 8 if name.endswith("per_token_head") else 0
    return int(heads * ((cache.head_size + cache.head_size_v) * width + scales))


def _latent_bytes(cache: Cache, engine: EngineArgs, width: float) -> int:
    # fp8_ds_mla: 512 fp8 values, four float32 scales, 64 rotary values in 16 bits (mla_attention.py).
    return 656 if engine.kv_cache_dtype == "fp8_ds_mla" else int(cache.head_size * width)


def _spec(cache: Cache, stage: int, model: Model, engine: EngineArgs, context: Context, block: int) -> Spec:
    if cache.kind == "state":
        assert cache.state is not None
        size = state_bytes(cache.state, model, engine, context)
        if model.hybrid:
            page = max(size, block * _attention_token_bytes(model, engine))
            return Spec("state", page, block if context.state_mode != "none" else 0, stage=stage)
        return Spec("state", size, 0, stage=stage)
    per_token = token_bytes(cache, model, engine)
    # Windowed layers choose the smallest kernel block themselves (attention.py: get_kv_cache_spec).
    own = BLOCK if cache.kind == "sliding" else block
    shape = (cache.kv_heads, cache.head_size, cache.head_size_v)
    return Spec(cache.kind, per_token * own, own, cache.window, shape, stage)


def _attention_token_bytes(model: Model, engine: EngineArgs) -> int:
    """Bytes of one token in the model's (first) full attention layer: the unit states are padded to."""
    for layer in model.layers:
        for cache in layer.caches:
            if cache.kind != "state":
                return token_bytes(cache, model, engine)
    return 0


def _hybrid_block(model: Model, engine: EngineArgs, context: Context, block: int, caches: list[Cache]) -> int:
    """The block size that makes an attention page at least as large as a state (_align_hybrid_block_size)."""
    states = [cache.state for cache in caches if cache.state is not None]
    largest = max(state_bytes(state, model, engine, context) for state in states)
    per_token = _attention_token_bytes(model, engine)
    unit = max(BLOCK, block, MLA_HYBRID_BLOCK if model.mla else 0)
    if context.state_mode == "all":
        unit = math.lcm(unit, 256)
    return max(block, unit * math.ceil(largest / (unit * per_token)))


def state_bytes(state: State, model: Model, engine: EngineArgs, context: Context) -> int:
    """Bytes of one recurrent state on one rank: its convolution's tail and its temporal part (mamba_utils.py)."""
    ranks, extra = engine.tensor_parallel_size, context.speculative_tokens
    cache_dtype = str(engine.rest.get("mamba_cache_dtype") or "auto")
    tail = DTYPE_BYTES.get(cache_dtype, 2) if cache_dtype != "auto" else dtype_bytes(model, engine)
    named = str(engine.rest.get("mamba_ssm_cache_dtype") or "auto")
    named = named if named != "auto" else (model.state_dtype or "auto")
    temporal = DTYPE_BYTES.get(named, 2) if named != "auto" else tail
    if state.kind == "mamba1":
        return state.inner // ranks * ((state.kernel - 1) * tail + state.size * temporal)
    if state.kind == "conv":
        return state.inner // ranks * (state.kernel - 1) * tail
    if state.kind == "mamba2":
        groups = state.groups if state.groups % ranks == 0 else ranks
        width = state.inner + 2 * groups * state.size
        values = state.heads // ranks * state.head_dim * state.size
        return width // ranks * (state.kernel - 1 + extra) * tail + values * temporal
    width = 2 * state.key_heads * state.key_dim + state.heads * state.head_dim
    values = state.heads // ranks * state.head_dim * state.key_dim
    temporal = 4 if state.kind == "kda" else temporal
    return width // ranks * (state.kernel - 1 + extra) * tail + values * temporal
