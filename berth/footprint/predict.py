"""The footprint of one replica: every term, the KV budget to set, and whether it fits."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from berth.errors import BerthError
from berth.footprint.architecture import Model, read_model
from berth.footprint.architecture_config import Fields, text_config
from berth.footprint.checkpoint import Checkpoint
from berth.footprint.engine_args import AUTO_LENGTH
from berth.footprint.kv_cache import KvCache, kv_cache
from berth.footprint.measured import Measured
from berth.footprint.products import Product, product
from berth.footprint.runtime import MIB, activation, batch_of, graphs, overhead
from berth.footprint.runtime_coefficients import COEFFICIENTS, Coefficients
from berth.footprint.types import EngineArgs, Footprint, Term
from berth.footprint.weights import parameters, scheme_of, weights

ENGINE_VERSION = "0.29.0"
"""The vLLM whose arithmetic this is."""

DEFAULT_MODEL_LEN = 2048
"""Context of a model whose config.json tells none (vLLM 0.29, _get_and_verify_max_len)."""

FP8_GENERATION = 8.9

MOST_LAYERS = 2000

ONE_BATCH_AHEAD, TOKENS_BY_CONCURRENCY = 27, 20
"""First minor versions of vLLM that keep a second batch in flight, and that print the cache's tokens as concurrency
times max_model_len (before: blocks of one group)."""


@dataclass(frozen=True)
class Estimate:
    """A footprint, and why it does not fit (``None`` when it does, or when no GPU is known to fit it into)."""

    footprint: Footprint
    shortfall: BerthError | None = None


@dataclass(frozen=True)
class _Case:
    model: Model
    engine: EngineArgs
    cache: KvCache
    model_len: int
    terms: tuple[Term, ...]
    gpu: Product | None
    limit_mib: float | None
    engine_version: str
    notes: tuple[str, ...]

    @property
    def rest_mib(self) -> float:
        """Bound of everything but the KV cache."""
        return sum(term.safe_mib for term in self.terms)

    @property
    def padding_mib(self) -> float:
        """What rounding up to 2 MiB may add to each layer's KV tensor."""
        return 2.0 * sum(group.layers for group in self.cache.groups)


def predict(
    config: Mapping[str, Any],
    engine: EngineArgs,
    checkpoint: Checkpoint | None = None,
    gpu: str | None = None,
    gpu_total_mib: float | None = None,
    measured: Measured | None = None,
    engine_version: str = ENGINE_VERSION,
) -> Footprint:
    """The footprint of one replica on each of its GPUs.

    The KV budget comes from ``kv_cache_memory_bytes``; else from ``concurrency`` requests of ``max_model_len``; else,
    with ``gpu_memory_utilization`` and a known GPU, it is the rest of that share; else it holds one request.
    ``gpu_memory_utilization`` is the share of the GPU the replica must stay within (its bound, context included).
    ``measured`` (of the same model, arguments, product and version) replaces the predicted terms.

    Raises:
        BerthError: bad input, or it does not fit: the GPU (or the share) is too small, with the largest
            ``max_model_len`` that would fit.
    """
    found = estimate(config, engine, checkpoint, gpu, gpu_total_mib, measured, engine_version)
    if found.shortfall is not None:
        raise found.shortfall
    return found.footprint


def estimate(
    config: Mapping[str, Any],
    engine: EngineArgs,
    checkpoint: Checkpoint | None = None,
    gpu: str | None = None,
    gpu_total_mib: float | None = None,
    measured: Measured | None = None,
    engine_version: str = ENGINE_VERSION,
    fitted: Coefficients = COEFFICIENTS,
) -> Estimate:
    """``predict`` without the refusal: the footprint and, where it does not fit, why.

    Raises:
        BerthError: bad input.
    """
    case = _case(config, engine, checkpoint, gpu, gpu_total_mib, engine_version, fitted)
    if measured is not None:
        case = replace(case, terms=measured.over(case.terms))
    budget = _budget(case)
    footprint = _footprint(case, budget, measured is not None)
    return Estimate(footprint, _shortfall(case, footprint, budget))


def _case(
    config: Mapping[str, Any],
    engine: EngineArgs,
    checkpoint: Checkpoint | None,
    gpu: str | None,
    gpu_total_mib: float | None,
    engine_version: str,
    fitted: Coefficients,
) -> _Case:
    _check_layers(config)
    model = read_model(config)
    _check_division(model, engine)
    device = _device(gpu, gpu_total_mib)
    model_len = engine.max_model_len or model.max_position_embeddings or DEFAULT_MODEL_LEN
    batch = batch_of(model, engine, device, model_len)
    sized = replace(engine, max_num_batched_tokens=batch.tokens, max_num_seqs=batch.sequences)
    if minor_of(engine_version) < ONE_BATCH_AHEAD:
        sized = replace(sized, rest={**engine.rest, "async_scheduling": False})
    loaded = weights(model, sized, checkpoint)
    cache = kv_cache(model, sized)
    terms = (
        Term("weights", loaded.bytes_per_gpu / MIB, loaded.safe_bytes_per_gpu / MIB, loaded.formula, loaded.source),
        activation(model, config, sized, batch, fitted),
        graphs(model, sized, batch, device, fitted),
        *overhead(model, config, sized, device, model_len, fitted),
    )
    notes = (*loaded.notes, *cache.notes, *batch.notes, *_notes(model, engine, device, engine_version))
    limit = _limit(engine, device)
    return _Case(model, engine, cache, model_len, terms, device, limit, engine_version, tuple(dict.fromkeys(notes)))


def _check_layers(config: Mapping[str, Any]) -> None:
    """Refuse a number of layers that no model has, before anything is made for each of them."""
    count = Fields(text_config(config)).number("num_hidden_layers", 1)
    if not 0 < count <= MOST_LAYERS:
        raise BerthError(
            "config.json: num_hidden_layers", found=count, allowed=f"1 to {MOST_LAYERS}", mend="correct config.json"
        )


def _check_division(model: Model, engine: EngineArgs) -> None:
    """Refuse what vLLM refuses: heads that ranks do not divide, stages without a layer (config/parallel.py)."""
    ranks, stages = engine.tensor_parallel_size, engine.pipeline_parallel_size
    if model.heads % ranks:
        raise BerthError(
            "tensor_parallel_size does not divide the model's attention heads",
            found=f"{ranks} ranks, {model.heads} heads",
            allowed=", ".join(str(count) for count in range(1, model.heads + 1) if model.heads % count == 0),
            mend="set tensor_parallel_size to one of these",
        )
    if stages > len(model.layers):
        raise BerthError(
            "pipeline_parallel_size is more than the model has layers",
            found=stages,
            allowed=f"1 to {len(model.layers)}",
            mend="set pipeline_parallel_size lower",
        )


def _device(gpu: str | None, total_mib: float | None) -> Product | None:
    """The named product, with the given total where there is one; a total alone makes a nameless product."""
    if total_mib is not None and not total_mib > 0:
        raise BerthError(
            "the GPU's memory must be positive", found=total_mib, mend="give what the driver shows, in MiB"
        )
    if gpu is None:
        return None if total_mib is None else Product("GPU", int(total_mib), "")
    try:
        found = product(gpu)
    except BerthError:
        if total_mib is None:
            raise
        return Product(gpu, int(total_mib), "")
    return found if total_mib is None else replace(found, total_mib=int(total_mib))


def _limit(engine: EngineArgs, device: Product | None) -> float | None:
    """MiB that the replica must stay within: its share of the GPU, or with a KV budget of its own the whole GPU."""
    if device is None:
        return None
    share = engine.gpu_memory_utilization
    if share is None or engine.kv_cache_memory_bytes is not None:
        return float(device.total_mib)
    return float(math.floor(device.total_mib * share))


def _budget(case: _Case) -> int:
    """Bytes of KV cache to set (``kv_cache_memory_bytes``)."""
    engine, cache = case.engine, case.cache
    if not cache.groups:
        return 0
    if engine.kv_cache_memory_bytes is not None:
        return engine.kv_cache_memory_bytes
    rest = _room(case)
    auto = bool(engine.rest.get(AUTO_LENGTH))
    if rest is not None and engine.concurrency is None and (auto or engine.gpu_memory_utilization is not None):
        least = cache.bytes_for(1 if auto else case.model_len)
        # Too small a share is told as a shortfall of what one request needs, never as a smaller cache.
        return max(least, rest // cache.bytes_per_block * cache.bytes_per_block)
    return cache.bytes_for(case.model_len, engine.concurrency or 1.0)


def _room(case: _Case) -> int | None:
    """Bytes that the limit leaves for the KV cache."""
    if case.limit_mib is None:
        return None
    return max(0, int((case.limit_mib - case.rest_mib - case.padding_mib) * MIB))


def _length(case: _Case, budget: int) -> int:
    """The context the budget was made for: as asked, or with "auto" the longest that fits."""
    if not case.engine.rest.get(AUTO_LENGTH):
        return case.model_len
    return max(1, case.cache.largest_model_len(budget, case.model_len))


def _footprint(case: _Case, budget: int, measured: bool) -> Footprint:
    kv_mib = budget / MIB
    kv = Term("kv_cache", kv_mib, kv_mib + (case.padding_mib if budget else 0.0), case.cache.formula, case.cache.source)
    terms = (case.terms[0], kv, *case.terms[1:])
    expected = {term.name: term.expected_mib for term in terms}
    length = _length(case, budget)
    return Footprint(
        weights_mib=round(expected["weights"], 1),
        kv_bytes_per_token=case.cache.bytes_per_token,
        kv_mib=round(kv_mib, 1),
        activation_mib=round(expected["activation"], 1),
        graphs_mib=round(expected["cuda_graphs"], 1),
        overhead_mib=round(sum(term.expected_mib for term in terms[4:]), 1),
        total_mib=math.ceil(sum(expected.values())),
        safe_mib=math.ceil(sum(term.safe_mib for term in terms)),
        terms=tuple(replace(t, expected_mib=round(t.expected_mib, 1), safe_mib=round(t.safe_mib, 1)) for t in terms),
        kv_tokens=_tokens(case, budget, length),
        kv_cache_memory_bytes=budget if case.cache.groups else None,
        max_model_len=length,
        parameters=parameters(case.model),
        gpus=case.engine.tensor_parallel_size * case.engine.pipeline_parallel_size * case.engine.data_parallel_size,
        measured=measured,
        notes=case.notes,
    )


def minor_of(version: str) -> int:
    """The minor version of a vLLM 0.x release; development builds without one count as the newest."""
    parts = version.split(".")
    known = len(parts) > 2 and parts[0] == "0" and parts[1].isdigit() and int(parts[1]) > 1
    return int(parts[1]) if known else 29


def _tokens(case: _Case, budget: int, length: int) -> int | None:
    """What the engine prints as "GPU KV cache size"."""
    if not case.cache.groups:
        return None
    if minor_of(case.engine_version) < TOKENS_BY_CONCURRENCY:
        return budget // case.cache.bytes_per_block // len(case.cache.groups) * case.cache.block_size
    return case.cache.tokens_in(budget, length)


def _shortfall(case: _Case, footprint: Footprint, budget: int) -> BerthError | None:
    """Why the replica does not fit; ``None`` when it does."""
    cache, length = case.cache, footprint.max_model_len or case.model_len
    needed = cache.bytes_for(length)
    if cache.groups and budget < needed:
        return BerthError(
            f"kv_cache_memory_bytes holds no request of max_model_len {length}",
            found=f"{budget} bytes",
            allowed=f"{needed} bytes or more",
            mend=_shorter(cache.largest_model_len(budget, length)),
        )
    limit = case.limit_mib
    if limit is None or footprint.safe_mib <= limit:
        return None
    share = case.engine.gpu_memory_utilization
    where = f"{case.gpu.name if case.gpu else 'the GPU'} ({case.gpu.total_mib if case.gpu else 0} MiB)"
    if limit != (case.gpu.total_mib if case.gpu else 0):
        where = f"its share of {share:g} of {where}, {limit:.0f} MiB"
    return BerthError(
        f"the replica does not fit into {where}: it needs {footprint.safe_mib} MiB, "
        f"{footprint.safe_mib - int(limit)} MiB more",
        found=f"max_model_len {length}, KV cache {footprint.kv_mib:.0f} MiB, everything else {case.rest_mib:.0f} MiB",
        mend=_remedy(case, length),
    )


def _remedy(case: _Case, length: int) -> str:
    """The largest context that fits the limit; where none does, what else to change."""
    room = _room(case) or 0
    requests = case.engine.concurrency or 1.0
    lengths = range(1, length + 1) if case.cache.groups else range(0)
    largest = bisect_right(lengths, room, key=lambda tokens: case.cache.bytes_for(tokens, requests))
    if largest and case.engine.kv_cache_memory_bytes is None:
        return _shorter(largest)
    if largest:
        return f"set kv_cache_memory_bytes to {room} or less (the largest max_model_len that fits then is {largest})"
    return (
        "no max_model_len fits: use a larger GPU or share, a larger tensor_parallel_size, a quantised model, "
        "or a smaller max_num_seqs"
    )


def _shorter(largest: int) -> str:
    if largest <= 0:
        return "no max_model_len fits that budget: raise kv_cache_memory_bytes"
    return f"set max_model_len to {largest} or less (the largest that fits)"


def _notes(model: Model, engine: EngineArgs, device: Product | None, engine_version: str) -> list[str]:
    notes = []
    if not engine_version.startswith("0.29"):
        notes.append(f"the arithmetic is vLLM {ENGINE_VERSION}'s; {engine_version} may differ")
    if engine.enable_sleep_mode:
        notes.append("sleep mode: what it frees asleep stays reserved, it needs all of it to wake")
    if engine.gpu_memory_utilization is not None and device is None and engine.kv_cache_memory_bytes is None:
        notes.append("gpu_memory_utilization is a share of a GPU that is not named: it could not be accounted for")
    if engine.gpu_memory_utilization is not None and engine.kv_cache_memory_bytes is not None:
        notes.append("kv_cache_memory_bytes replaces the rest of the share that gpu_memory_utilization would give;"
                     " vLLM still wants that share to be free when it starts")  # fmt: skip
    if device is not None and 0 < device.generation < FP8_GENERATION and _fp8(model, engine):
        notes.append(f"FP8 needs compute capability {FP8_GENERATION}; {device.name} has {device.compute_capability}:"
                     " weights stay FP8 (Marlin), the arithmetic is 16-bit")  # fmt: skip
    if engine.quantization and scheme_of(model, engine) is None:
        notes.append(f"quantization {engine.quantization} is not known: weights counted without it")
    longest = model.max_position_embeddings
    if engine.max_model_len and longest and engine.max_model_len > longest:
        notes.append(f"max_model_len {engine.max_model_len} is more than the model's {longest}: vLLM refuses it unless"
                     " rotary scaling allows it")  # fmt: skip
    return notes


def _fp8(model: Model, engine: EngineArgs) -> bool:
    method = model.quantisation.method if model.quantisation else ""
    return "fp8" in f"{method} {engine.quantization or ''}" or engine.kv_cache_dtype.startswith("fp8")
