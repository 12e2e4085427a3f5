"""The KV cache of one replica: bytes per block, per request, per token, as vLLM 0.29 lays it out.

vLLM gives every layer a cache spec, sorts layers with equal specs into groups of equal size, and lets all groups draw
blocks from one pool; a block is as large as the largest group. So memory is counted in blocks, never in tokens alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from berth.footprint.architecture import Model
from berth.footprint.kv_cache_groups import Group, Spec, groups_of, pool_bytes
from berth.footprint.kv_cache_specs import Context, context_of, specs_of
from berth.footprint.types import EngineArgs

SOURCE = "vLLM 0.29 v1/core/kv_cache_utils.py (groups, pool, capacity), v1/kv_cache_interface.py (pages, windows)"


@dataclass(frozen=True)
class KvCache:
    """The cache of a model under given engine arguments.

    ``bytes_per_token`` is per GPU and marginal: what one more token of a long context costs. ``bytes_per_block`` is
    the pool's unit on the GPU whose pipeline stage needs most, ``block_size`` the tokens of a block of full attention.
    """

    bytes_per_token: float
    block_size: int
    bytes_per_block: int
    groups: tuple[Group, ...]
    context: Context
    formula: str
    source: str = SOURCE
    notes: tuple[str, ...] = ()

    def request_blocks(self, tokens: int) -> int:
        """Blocks that one request of ``tokens`` tokens holds at most, over all groups."""
        return sum(group_pages(group, tokens, self.context) for group in self.groups)

    def bytes_for(self, tokens_per_request: int, requests: float = 1.0) -> int:
        """``kv_cache_memory_bytes`` that lets ``requests`` requests of that length run at once (one at least).

        One block more than they hold, because vLLM keeps a null block back. 0 where the model has no KV cache.
        """
        if not self.groups:
            return 0
        blocks = math.ceil(max(1.0, requests) * self.request_blocks(tokens_per_request) - 1e-9)
        return (blocks + 1) * self.bytes_per_block

    def tokens_in(self, kv_bytes: int, max_model_len: int) -> int:
        """What vLLM prints as "GPU KV cache size" for a budget: concurrency at ``max_model_len`` times that length."""
        if not self.groups:
            return 0
        return int(kv_bytes // self.bytes_per_block / self.request_blocks(max_model_len) * max_model_len)

    def largest_model_len(self, kv_bytes: int, limit: int) -> int:
        """The largest ``max_model_len`` up to ``limit`` with which one request fits; 0 where none does."""
        if not self.groups:
            return limit
        usable = kv_bytes // self.bytes_per_block - 1
        if limit < 1 or self.request_blocks(1) > usable:
            return 0
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.request_blocks(middle) <= usable else (low, middle - 1)
        return low


def kv_cache(model: Model, engine: EngineArgs) -> KvCache:
    """The KV cache of ``model`` run with ``engine``; without groups for models that keep none (encoders)."""
    context = context_of(model, engine)
    specs, block_size = specs_of(model, engine, context)
    if not specs:
        return KvCache(0.0, block_size, 0, (), context, "no KV cache: the model only encodes")
    groups = groups_of(specs)
    per_block = pool_bytes(groups, context.stages)
    growing = [group for group in groups if group.kind in ("full", "mla")]
    per_token = sum(per_block / (group.block_size * context.context_parallel) for group in growing)
    return KvCache(
        bytes_per_token=per_token,
        block_size=block_size,
        bytes_per_block=per_block,
        groups=groups,
        context=context,
        formula=_formula(groups, per_block, context),
        notes=context.notes,
    )


def group_pages(group: Group, tokens: int, context: Context) -> int:
    """Blocks of one group for a request of ``tokens`` tokens (max_memory_usage_bytes of its spec over its page)."""
    return max(_pages(spec, tokens, context) for spec in group.specs)


def _pages(spec: Spec, tokens: int, context: Context) -> int:
    if spec.kind == "sliding":
        held = min(spec.window - 1 + context.in_flight, tokens)
        # One more: the window may start inside a block.
        return -(-held // spec.block_size) + 1
    if spec.kind == "chunked":
        return -(-min(spec.window + context.in_flight, tokens) // spec.block_size)
    if spec.kind == "cross":
        return -(-max(spec.window, context.batched_tokens) // spec.block_size)
    if spec.kind == "state":
        if context.state_mode == "all":
            return -(-tokens // spec.block_size) + context.speculative_tokens
        return (2 if context.state_mode == "align" else 1) + context.speculative_tokens
    share = -(-tokens // context.context_parallel)
    return -(-share // spec.block_size)


def _formula(groups: tuple[Group, ...], per_block: int, context: Context) -> str:
    parts = []
    for group in groups:
        spec = group.specs[0]
        window = f", window {spec.window}" if spec.window else ""
        parts.append(f"{group.layers} {group.kind} layers x {spec.page_bytes} B per {group.block_size} tokens{window}")
    rule = "blocks of every group come from one pool" if len(groups) > 1 else "one pool"
    tail = f"; states in mode {context.state_mode}" if any(group.kind == "state" for group in groups) else ""
    return f"{' + '.join(parts)}; {rule} of {per_block} B blocks, one kept back{tail}"
