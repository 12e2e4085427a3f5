"""What a footprint is predicted from and what it says. Pure data; bytes and MiB as the names tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from berth.codec import STRICT


@dataclass(frozen=True)
class EngineArgs:
    """The vLLM engine arguments that memory depends on, under vLLM's own names; ``None`` is vLLM's default.

    ``concurrency`` is Berth's: how many requests of ``max_model_len`` tokens the KV cache must hold at once.
    ``rest`` keeps every argument that memory does not depend on, so that none is lost on the way to vLLM.
    """

    __pydantic_config__ = STRICT
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool = False
    max_cudagraph_capture_size: int | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    speculative_config: dict[str, Any] | None = None
    enable_sleep_mode: bool = False
    runner: str = "auto"
    concurrency: float | None = None
    rest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """One part of a footprint: what is expected, a bound that holds, the formula with its numbers, and its source."""

    __pydantic_config__ = STRICT
    name: str
    expected_mib: float
    safe_mib: float
    formula: str
    source: str


@dataclass(frozen=True)
class Footprint:
    """VRAM of one replica on each of its ``gpus`` GPUs (the fullest of them), in MiB.

    ``total_mib`` is the sum of the expected terms, ``safe_mib`` the bound to reserve. ``kv_cache_memory_bytes`` is the
    KV budget to set in vLLM, ``kv_tokens`` what it holds, ``max_model_len`` the context it was made for.
    ``measured`` tells that terms were read off a replica that ran, not predicted.
    """

    __pydantic_config__ = STRICT
    weights_mib: float
    kv_bytes_per_token: float
    kv_mib: float
    activation_mib: float
    graphs_mib: float
    overhead_mib: float
    total_mib: int
    safe_mib: int
    terms: tuple[Term, ...]
    kv_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None
    parameters: int | None = None
    gpus: int = 1
    measured: bool = False
    notes: tuple[str, ...] = ()
