"""Deployments of ``berth plan`` that name a model: their footprints, predicted for each product of the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from berth.codec import STRICT, replace
from berth.errors import BerthError
from berth.footprint.architecture import read_model
from berth.footprint.checkpoint import Checkpoint, read_checkpoint
from berth.footprint.engine_args import read_engine_args
from berth.footprint.predict import FP8_GENERATION, Estimate, estimate
from berth.footprint.types import EngineArgs
from berth.plan.contract_files import read_data
from berth.plan.types import Slot

FP8_WEIGHTS_GENERATION = 7.5
"""The least compute capability on which vLLM 0.29 keeps FP8 weights and computes in 16 bits (Marlin; fp8.py,
marlin_utils_fp8.py). An FP8 KV cache has no such way out: it needs FP8_GENERATION (triton_attn.py)."""


@dataclass(frozen=True)
class ModelEntry:
    """A model: its ``config.json`` (a path, a directory with one, or its content), vLLM's engine arguments (a path or
    their content), and a checkpoint directory whose headers beat the formula for the weights."""

    __pydantic_config__ = STRICT
    config: str | dict[str, Any]
    engine: str | dict[str, Any] | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """A model read: what its footprint follows from, and how many GPUs of one host a replica takes."""

    config: Mapping[str, Any]
    engine: EngineArgs
    checkpoint: Checkpoint | None
    gpus: int


def read_model_source(entry: ModelEntry, gpus_per_replica: int | None, name: str, base: Path) -> ModelSource:
    """Read the files of ``entry``, relative to ``base``.

    Raises:
        BerthError: a file cannot be read, or the engine's parallelism is not ``gpus_per_replica``.
    """
    what = f"deployment {name}: model"
    config, directory = entry.config, None
    if isinstance(config, str):
        path = base / Path(config).expanduser()
        directory = path if path.is_dir() else None
        config = _mapping(path / "config.json" if directory else path, f"{what}.config")
    arguments = entry.engine or {}
    if isinstance(arguments, str):
        arguments = _mapping(base / Path(arguments).expanduser(), f"{what}.engine")
    engine = read_engine_args(arguments, f"{what}.engine")
    parallel = engine.tensor_parallel_size * engine.pipeline_parallel_size * engine.data_parallel_size
    if gpus_per_replica is not None and parallel == 1:
        engine = replace(engine, tensor_parallel_size=gpus_per_replica)
    elif gpus_per_replica not in (None, parallel):
        raise BerthError(
            f"deployment {name}: gpus_per_replica is not what the engine spreads over",
            found=gpus_per_replica,
            allowed=f"{parallel}, or leave it out",
        )
    return ModelSource(config, engine, _checkpoint(entry, directory, base), gpus_per_replica or parallel)


def _checkpoint(entry: ModelEntry, directory: Path | None, base: Path) -> Checkpoint | None:
    if entry.checkpoint is not None:
        return read_checkpoint(base / Path(entry.checkpoint).expanduser())
    has_weights = directory is not None and any(directory.glob("*.safetensors*"))
    return read_checkpoint(directory) if directory is not None and has_weights else None


def _mapping(path: Path, what: str) -> dict[str, Any]:
    data = read_data(path, what)
    if not isinstance(data, dict):
        raise BerthError(f"{what} {path} is not an object", found=type(data).__name__)
    return data


@dataclass(frozen=True)
class Footprints:
    """MiB to reserve on each GPU by product, on ``gpus`` GPUs per replica.

    ``shortfall`` says why no product here holds the model ("" when one does); ``min_compute_capability`` is set when
    every product here lacks it.
    """

    sizes: Mapping[str, int]
    gpus: int
    notes: tuple[str, ...] = ()
    shortfall: str = ""
    min_compute_capability: str = ""


@dataclass
class _Answers:
    fits: dict[str, int] = field(default_factory=dict)
    too_large: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def predicted(source: ModelSource, cards: Mapping[str, Slot], name: str) -> Footprints:
    """The footprints of a model on each product of ``cards``.

    A product on which it would not run is left out with a note; when none is left, those that are too small stay in, so
    that the plan can tell how much is missing.

    Raises:
        BerthError: the config or an engine argument is wrong, or its own limits leave no room on any product.
    """
    what = f"deployment {name}: model"
    least = _least_capability(source, what)
    able = {card: slot for card, slot in cards.items() if not 0 < float(slot.compute_capability or 0) < least}
    barred = [f"not on {card}: its FP8 needs compute capability {least}" for card in sorted(cards) if card not in able]
    if not able:
        needed = str(least) if cards else ""
        sizes = {"default": _estimate(source, None, what).footprint.safe_mib}
        return Footprints(sizes, source.gpus, tuple(barred), min_compute_capability=needed)
    answers = _Answers()
    for card, slot in sorted(able.items()):
        _ask(source, card, slot, answers, what)
    refused = "; ".join(answers.refused)
    if answers.fits:
        notes = (*barred, *answers.notes, *(f"not on {item}" for item in answers.refused))
        return Footprints(answers.fits, source.gpus, notes)
    if not answers.too_large:
        raise BerthError(f"deployment {name}: the model fits no GPU product here", found=refused)
    return Footprints(answers.too_large, source.gpus, (*barred, *answers.notes), refused)


def _ask(source: ModelSource, card: str, slot: Slot, answers: _Answers, what: str) -> None:
    answer = _estimate(source, slot, what)
    mib = answer.footprint.safe_mib
    answers.notes += [f"on {card}: {note}" for note in answer.footprint.notes]
    if answer.shortfall is None:
        answers.fits[card] = mib
        return
    answers.refused.append(f"{card}: {answer.shortfall}")
    if mib > slot.total_mib:
        answers.too_large[card] = mib


def _estimate(source: ModelSource, slot: Slot | None, what: str) -> Estimate:
    try:
        if slot is None:
            return estimate(source.config, source.engine, source.checkpoint)
        return estimate(source.config, source.engine, source.checkpoint, slot.product, float(slot.total_mib))
    except BerthError as error:
        raise BerthError(f"{what}: {error}") from None


def _least_capability(source: ModelSource, what: str) -> float:
    """The least compute capability that runs the model's FP8; 0 when it has none."""
    if source.engine.kv_cache_dtype.startswith("fp8"):
        return FP8_GENERATION
    try:
        quantisation = read_model(source.config).quantisation
    except BerthError as error:
        raise BerthError(f"{what}: {error}") from None
    method = quantisation.method if quantisation else ""
    return FP8_WEIGHTS_GENERATION if "fp8" in f"{method} {source.engine.quantization or ''}" else 0.0
