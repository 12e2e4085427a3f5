"""Bytes of a model's weights on its fullest GPU, loaded by vLLM 0.29."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from berth.footprint.architecture import Model
from berth.footprint.architecture_config import incomplete
from berth.footprint.architecture_quant import cautious, online
from berth.footprint.architecture_types import Quantisation, Weight
from berth.footprint.checkpoint import Checkpoint
from berth.footprint.types import EngineArgs
from berth.footprint.weights_checkpoint import loaded_share
from berth.footprint.weights_draft import Draft, draft_of
from berth.footprint.weights_quant import DTYPE_BYTES, applies, shape_of, weight_bytes

MIB = 1 << 20
SOURCE = "vLLM 0.29 model_executor/models and layers (parameter shapes); PyTorch c10 CUDACachingAllocator (rounding)"


@dataclass(frozen=True)
class Weights:
    """Weight memory of one replica on its fullest GPU.

    ``bytes_per_gpu`` is what vLLM prints as "Model loading took" (parameters, rotary tables, allocator rounding);
    ``safe_bytes_per_gpu`` adds what the allocator may keep reserved beside them. ``tensor_bytes`` are the parameters
    alone on that GPU, ``parameters`` those of the whole model, padding included.
    """

    bytes_per_gpu: int
    parameters: int
    safe_bytes_per_gpu: int
    tensor_bytes: int
    formula: str
    source: str = SOURCE
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """How far weights are divided: tensor parallel ranks, expert parallel ranks, and the ranks that split an expert."""

    tensor: int
    experts: int
    expert_tensor: int

    def of(self, weight: Weight) -> tuple[int, int]:
        """(tensor parallel ranks, expert parallel ranks) that divide ``weight``."""
        return (self.expert_tensor, self.experts) if weight.experts > 1 else (self.tensor, 1)


@dataclass(frozen=True)
class _Sum:
    tensors: int = 0
    allocated: int = 0
    reserved: int = 0

    def __add__(self, other: _Sum) -> _Sum:
        return _Sum(self.tensors + other.tensors, self.allocated + other.allocated, self.reserved + other.reserved)


def dtype_bytes(model: Model, engine: EngineArgs) -> int:
    """Bytes of one unquantised value: float32 checkpoints run in 16 bits unless ``dtype`` asks for float32."""
    if engine.dtype in ("auto", ""):
        return 2
    return DTYPE_BYTES.get(engine.dtype, 2)


def scheme_of(model: Model, engine: EngineArgs) -> Quantisation | None:
    """The model's own scheme, else the one the engine applies while loading."""
    return model.quantisation or online(engine.quantization)


def parallel_of(engine: EngineArgs) -> Ranks:
    """The ranks that divide the weights (fused_moe/config.py: without EP, experts are split over data ranks too)."""
    tensor, data = engine.tensor_parallel_size, engine.data_parallel_size
    if engine.enable_expert_parallel:
        return Ranks(tensor, tensor * data, 1)
    return Ranks(tensor, 1, tensor * data)


def stage_layers(count: int, stages: int) -> list[tuple[int, int]]:
    """(first, end) layer of each pipeline stage, as vLLM's get_pp_indices divides them (distributed/utils.py)."""
    sizes = [count // stages] * stages
    for extra in range(2, count % stages + 2):
        sizes[-extra] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def weights(model: Model, engine: EngineArgs, checkpoint: Checkpoint | None = None) -> Weights:
    """The weights of ``model`` on the fullest GPU of a replica run with ``engine``.

    With a ``checkpoint`` its headers decide how many bytes there are; the formula decides how they are divided.

    Raises:
        BerthError: config.json lacked a key the weights need, or speculation needs a draft model that is not known.
    """
    if model.missing:
        raise incomplete(model.missing)
    width, scheme = dtype_bytes(model, engine), scheme_of(model, engine)
    draft = draft_of(model, engine)
    fullest = _fullest(model, engine, draft, scheme)
    bound = _fullest(model, engine, draft, cautious(scheme))
    share, notes = loaded_share(model, engine, checkpoint, whole_bytes(model, engine))
    rotary = rotary_bytes(model, width)
    lora = lora_bytes(model, engine, width)
    latent = latent_copies(model, engine, scheme)
    expected = int(fullest.allocated * share) + rotary + lora + latent
    safe = int(bound.reserved * share) + rotary + lora + latent_copies(model, engine, scheme, True)
    return Weights(
        bytes_per_gpu=expected,
        parameters=parameters(model),
        safe_bytes_per_gpu=int(safe * (1 + _margin(model, scheme, checkpoint))) + 16 * MIB,
        tensor_bytes=int(fullest.tensors * share),
        formula=_formula(engine, fullest, share, rotary, lora, latent),
        notes=model.notes + draft.notes + notes + _scheme_notes(model, scheme),
    )


def _fullest(model: Model, engine: EngineArgs, draft: Draft, scheme: Quantisation | None) -> _Sum:
    """The pipeline stage whose weights take most; a draft lives on the last."""
    width, ranks = dtype_bytes(model, engine), parallel_of(engine)
    stages = [_stage(model, engine, stage, width, ranks, scheme) for stage in range(engine.pipeline_parallel_size)]
    stages[-1] = stages[-1] + _total(draft.weights, width, ranks, scheme if draft.same_scheme else None)
    return max(stages, key=lambda item: item.allocated)


def _scheme_notes(model: Model, scheme: Quantisation | None) -> tuple[str, ...]:
    if scheme is None or scheme.complete:
        return ()
    return (f"{scheme.method}: the config does not say which layers stay unquantised; give the checkpoint to be exact",)


def _margin(model: Model, scheme: Quantisation | None, checkpoint: Checkpoint | None) -> float:
    """What the bound adds: kernels repack quantised weights, and a formula alone cannot see which layers were kept."""
    if checkpoint is not None:
        return 0.01 if scheme is None else 0.03
    if scheme is None:
        return 0.015 if not model.notes else 0.10
    return 0.05


def _formula(engine: EngineArgs, fullest: _Sum, share: float, rotary: int, lora: int, latent: int) -> str:
    parts = [
        f"parameters of the fullest rank (TP {engine.tensor_parallel_size}, PP {engine.pipeline_parallel_size}) "
        f"{fullest.tensors / MIB:.1f} MiB",
        f"allocator rounding {(fullest.allocated - fullest.tensors) / MIB:.1f}",
    ]
    if share != 1.0:
        parts.insert(1, f"times {share:.4f} (checkpoint headers over formula)")
    for name, value in (("rotary tables", rotary), ("LoRA slots", lora), ("dequantised MLA projections", latent)):
        if value:
            parts.append(f"{name} {value / MIB:.1f}")
    return " + ".join(parts).replace(" + times", " times")


def parameters(model: Model) -> int:
    """Parameters of the whole model as vLLM creates it: padded vocabulary, no draft layers."""
    own = [weight for layer in model.layers for weight in layer.weights]
    return sum(_values(weight) for weight in (*model.first, *own, *_head(model, 1), *model.everywhere))


def _values(weight: Weight) -> int:
    shape = shape_of(weight, 1, 1)
    return shape.values + shape.biases


def whole_bytes(model: Model, engine: EngineArgs) -> int:
    """Bytes of the model at one rank, to compare with a checkpoint; online quantisation left out."""
    every = [weight for layer in model.layers for weight in layer.weights]
    every += [*model.first, *_head(model, 1, engine.runner == "pooling"), *_towers(model, engine)]
    return _total(every, dtype_bytes(model, engine), Ranks(1, 1, 1), model.quantisation).tensors


def _head(model: Model, stages: int, pooling: bool = False) -> tuple[Weight, ...]:
    """The last stage's weights; a tied head is the embedding itself, or on another stage a copy of it."""
    if pooling:
        return tuple(weight for weight in model.last if weight.name != "lm_head")
    if not model.tied or stages > 1:
        return model.last
    kept = tuple(weight for weight in model.last if weight.name != "lm_head")
    biased = [weight for weight in model.last if weight.name == "lm_head" and weight.bias]
    return kept + tuple(replace(weight, inputs=1, bias=False) for weight in biased)


def _towers(model: Model, engine: EngineArgs) -> tuple[Weight, ...]:
    """Towers, unless every modality is switched off (language_model_only, or all limits zero)."""
    limits: Any = engine.rest.get("limit_mm_per_prompt")
    off = engine.rest.get("language_model_only") or (isinstance(limits, dict) and limits and not any(limits.values()))
    return () if off and not model.encoder_decoder else model.everywhere


def _stage(model: Model, engine: EngineArgs, stage: int, width: int, ranks: Ranks, scheme: Quantisation | None) -> _Sum:
    stages = engine.pipeline_parallel_size
    begin, end = stage_layers(len(model.layers), stages)[stage]
    own = [weight for layer in model.layers[begin:end] for weight in layer.weights]
    if stage == 0:
        own += model.first
    if stage == stages - 1:
        own += _head(model, stages, engine.runner == "pooling")
    towers = _towers(model, engine)
    tower_ranks = Ranks(1, 1, 1) if engine.rest.get("mm_encoder_tp_mode") == "data" else ranks
    return _total(own, width, ranks, scheme) + _total(towers, width, tower_ranks, None)


def _total(every: Iterable[Weight], width: int, ranks: Ranks, scheme: Quantisation | None) -> _Sum:
    total = _Sum()
    for weight in every:
        tensor, expert = ranks.of(weight)
        size = weight_bytes(shape_of(weight, tensor, expert), weight, width, scheme)
        total = total + _Sum(size, *allocation(size))
    return total


def allocation(size: int) -> tuple[int, int]:
    """(allocated, reserved) bytes of one tensor under PyTorch's caching allocator.

    Tensors of 10 MiB and more get a segment rounded up to 2 MiB; a remainder of at most 1 MiB stays part of the
    block and counts as allocated, a larger one is split off but stays reserved (kMinLargeAlloc, kRoundLarge,
    kSmallSize). Smaller ones share segments and are rounded to 512 bytes.
    """
    if size < 10 * MIB:
        rounded = -(-size // 512) * 512
        return rounded, rounded
    remainder = -size % (2 * MIB)
    return size + (remainder if remainder <= MIB else 0), size + remainder


def rotary_bytes(model: Model, width: int) -> int:
    """Cosine and sine tables: positions x width x 2 bytes, one per distinct set of rotary parameters, on every rank."""
    return sum(positions * size * width for positions, size in model.rotary)


def latent_copies(model: Model, engine: EngineArgs, scheme: Quantisation | None, safe: bool = False) -> int:
    """16-bit copies of MLA's key and value up-projections (mla_attention.py: W_UK_T, W_UV).

    Quantised ones are dequantised, so the copy is new memory; unquantised ones are views (counted in the safe bound).
    """
    if not model.mla:
        return 0
    total = 0
    begin, end = max(stage_layers(len(model.layers), engine.pipeline_parallel_size), key=lambda part: part[1] - part[0])
    for layer in model.layers[begin:end]:
        for weight in layer.weights:
            if weight.name.endswith("kv_b_proj") and (safe or applies(weight, scheme)):
                total += shape_of(weight, engine.tensor_parallel_size, 1).values * 2
    return total


def lora_bytes(model: Model, engine: EngineArgs, width: int) -> int:
    """LoRA slots: for every linear layer, A and B at the largest rank, for each of ``max_loras`` (lora/layers)."""
    if not engine.enable_lora:
        return 0
    ranks, values = parallel_of(engine), 0
    begin, end = max(stage_layers(len(model.layers), engine.pipeline_parallel_size), key=lambda part: part[1] - part[0])
    for layer in model.layers[begin:end]:
        for weight in layer.weights:
            if not weight.linear:
                continue
            shape = shape_of(weight, *ranks.of(weight))
            values += shape.experts * (len(weight.outputs) * shape.columns + shape.rows)
    head = 0 if model.pooling else -(-model.vocab // engine.tensor_parallel_size) + model.hidden
    return engine.max_loras * engine.max_lora_rank * (values + head) * width
