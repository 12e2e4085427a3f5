"""vLLM engine arguments as people write them, parsed once: either spelling, human-readable sizes, strict types."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from berth.codec import load
from berth.errors import BerthError
from berth.footprint.types import EngineArgs

MEND = "correct the engine arguments"
KNOWN = frozenset(item.name for item in fields(EngineArgs)) - {"rest"}
SIZES = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes", "max_num_seqs"})
"""Numbers that vLLM also takes as "32k" or "1.5G" (engine/arg_utils.py: human_readable_int)."""

FLAGS = frozenset({"enable_expert_parallel", "enforce_eager", "enable_lora", "enable_sleep_mode"})
WHOLE = frozenset({"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "block_size", "max_loras",
                   "max_lora_rank", "max_cudagraph_capture_size"})  # fmt: skip
UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla",
             "fp8_per_token_head", "int8_per_token_head", "nvfp4", "nvfp4_4over6")  # fmt: skip
"""vLLM 0.29's CacheDType, less the layouts whose size is not known here (turboquant, int4)."""

AUTO_LENGTH = "auto_max_model_len"
"""Key in ``EngineArgs.rest``: ``max_model_len`` was -1 or "auto", so the longest that fits is wanted."""


def read_engine_args(data: Mapping[str, Any], what: str = "engine arguments") -> EngineArgs:
    """Engine arguments from a mapping with vLLM's names, spelled with ``-`` or ``_``; ``None`` is vLLM's default.

    Arguments that memory does not depend on go to ``rest`` as they are, under their underscore spelling.

    Raises:
        BerthError: a value of the wrong type or out of range, a name given twice, or not a mapping at all.
    """
    if not isinstance(data, Mapping):
        raise BerthError(f"{what}: not a mapping of argument to value", found=type(data).__name__, mend=MEND)
    named = _one_spelling(data, what)
    if named.get("num_gpu_blocks_override") is not None:
        raise BerthError(
            f"{what}: num_gpu_blocks_override would replace the KV budget that the footprint is made of",
            found=named["num_gpu_blocks_override"],
            mend="remove it and set kv_cache_memory_bytes or concurrency",
        )
    rest: dict[str, Any] = {name: value for name, value in named.items() if name not in KNOWN}
    given = {name: value for name, value in named.items() if name in KNOWN and value is not None}
    for name in SIZES & set(given):
        given[name] = _size(given[name], name, what)
    if given.get("max_model_len") in (-1, "auto"):
        del given["max_model_len"]
        rest[AUTO_LENGTH] = True
    for name in (FLAGS | WHOLE | SIZES) & set(given):
        _check_kind(given[name], name, what)
    for name in {"dtype", "kv_cache_dtype"} & set(given):
        if isinstance(given[name], str):
            given[name] = given[name].removeprefix("torch.")
    if "speculative_config" in given:
        given["speculative_config"] = _mapping(given["speculative_config"], "speculative_config", what)
    if "compilation_config" in rest:
        rest["compilation_config"] = _compilation(rest["compilation_config"], what)
    engine = load(EngineArgs, {**given, "rest": rest}, what, MEND)
    _check_ranges(engine, what)
    return engine


def _one_spelling(data: Mapping[str, Any], what: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name in named:
            raise BerthError(f"{what}: {name} is given twice", found=key, mend=f"keep one spelling of {name}")
        named[name] = value
    return named


def _size(value: Any, name: str, what: str) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if name == "max_model_len" and text.lower() == "auto":
        return "auto"
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([kKmMgGtT]?)", text)
    if match is None:
        raise BerthError(
            f"{what}: {name} is not a number", found=value, allowed="a number, or one with k, K, m, M, g, G", mend=MEND
        )
    return int(float(match[1]) * UNITS[match[2]])


def _check_kind(value: Any, name: str, what: str) -> None:
    if name in FLAGS:
        if not isinstance(value, bool):
            raise BerthError(f"{what}: {name} is not a switch", found=value, allowed="true or false", mend=MEND)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise BerthError(f"{what}: {name} is not a whole number", found=value, mend=MEND)


def _mapping(value: Any, name: str, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping):
        raise BerthError(f"{what}: {name} is not a mapping (or one as JSON)", found=value, mend=MEND)
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def _compilation(value: Any, what: str) -> dict[str, Any]:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return {} if value is None else {"mode": value}
    if isinstance(value, str) and value.strip().isdigit():
        return {"mode": int(value)}
    return _mapping(value, "compilation_config", what)


def _check_ranges(engine: EngineArgs, what: str) -> None:
    share = engine.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise BerthError(f"{what}: gpu_memory_utilization is a share of the GPU", found=share, allowed="(0, 1]",
                         mend=MEND)  # fmt: skip
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "block_size", "max_model_len",
                 "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "max_loras", "max_lora_rank",
                 "concurrency"):  # fmt: skip
        value = getattr(engine, name)
        if value is not None and value <= 0:
            raise BerthError(f"{what}: {name} must be positive", found=value, mend=MEND)
    for name, known in (("dtype", DTYPES), ("kv_cache_dtype", KV_DTYPES)):
        value = getattr(engine, name)
        if value not in known:
            raise BerthError(f"{what}: {name} is not known", found=value, allowed=", ".join(known), mend=MEND)
    sizes = (engine.rest.get("compilation_config") or {}).get("cudagraph_capture_sizes")
    sizes = engine.rest.get("cudagraph_capture_sizes") if sizes is None else sizes
    if sizes is not None and not (isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)):
        raise BerthError(f"{what}: cudagraph_capture_sizes is not a list of batch sizes", found=sizes, mend=MEND)
    capture = engine.max_cudagraph_capture_size
    if capture is not None and capture < 0:
        raise BerthError(f"{what}: max_cudagraph_capture_size must not be negative", found=capture, mend=MEND)
