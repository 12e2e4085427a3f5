"""``berth footprint``: what one replica takes on each GPU, as a table for people or one JSON object for scripts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from berth.codec import dump
from berth.errors import BerthError
from berth.footprint.checkpoint import Checkpoint, read_checkpoint
from berth.footprint.engine_args import read_engine_args
from berth.footprint.measured import Measured, lookup
from berth.footprint.predict import ENGINE_VERSION, Estimate, estimate
from berth.footprint.types import EngineArgs, Footprint

FITS, DOES_NOT_FIT, BAD_INPUT = 0, 1, 2


@dataclass(frozen=True)
class _Input:
    config: dict[str, Any]
    engine: EngineArgs
    checkpoint: Checkpoint | None
    measured: Measured | None


def add_parser(subparsers: Any) -> None:
    """Add ``footprint`` to the commands of ``berth``."""
    text = "VRAM of one replica per GPU, before launch; exit 0 fits, 1 does not fit, 2 bad input"
    parser = subparsers.add_parser("footprint", help=text, description=text)
    parser.add_argument("--config", required=True, type=Path, help="a model's config.json, or its directory")
    parser.add_argument(
        "--checkpoint", type=Path, help="its safetensors files, index or hub cache entry (headers only)"
    )
    parser.add_argument("--engine", type=Path, help="YAML of vLLM's engine arguments, and concurrency")
    parser.add_argument(
        "--gpu", metavar="PRODUCT", help='the GPU it must fit, such as "L40S" or "NVIDIA H100 80GB HBM3"'
    )
    parser.add_argument("--gpu-memory-mib", type=float, metavar="MIB", help="what the driver shows, where it differs")
    parser.add_argument("--engine-version", default=ENGINE_VERSION, help="vLLM's version (default: %(default)s)")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="store of measured footprints, which beat predictions"
    )
    parser.add_argument("--model", help="the name the model is stored under there (default: the config's directory)")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the footprint; 0 it fits (or there is no GPU to fit), 1 it does not, 2 bad input."""
    try:
        given = _read(args)
        found = _estimate(given, args)
    except BerthError as error:
        return _refuse(error, args.format)
    if args.format == "json":
        print(json.dumps(answer(found, args.gpu), indent=2))
    else:
        _show(found, args.gpu)
    if found.shortfall is None:
        return FITS
    print(str(found.shortfall), file=sys.stderr)
    return DOES_NOT_FIT


def answer(found: Estimate, gpu: str | None) -> dict[str, Any]:
    """The JSON object: the footprint, ``ok`` (it fits), the GPU asked for, and ``error`` where it does not fit."""
    plain: dict[str, Any] = dump(found.footprint)
    plain |= {"ok": found.shortfall is None, "gpu": gpu}
    return plain if found.shortfall is None else plain | {"error": str(found.shortfall)}


def schema() -> dict[str, Any]:
    """JSON Schema of what ``--format json`` prints: a footprint that fits or not, or an error."""
    made = TypeAdapter(Footprint).json_schema(mode="serialization")
    terms = made.pop("$defs")
    properties = made["properties"] | {
        "ok": {"type": "boolean", "description": "it fits; true where there is no GPU to fit"},
        "gpu": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "error": {"type": "string", "description": "why it does not fit, and the largest max_model_len that would"},
    }
    names = sorted(set(properties) - {"error"})
    footprint = {**made, "properties": properties, "required": names, "additionalProperties": False}
    failure = {
        "type": "object",
        "title": "Error",
        "properties": {"ok": {"const": False}, "error": {"type": "string"}},
        "required": ["ok", "error"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "berth footprint --format json",
        "anyOf": [{"$ref": "#/$defs/Footprint"}, {"$ref": "#/$defs/Error"}],
        "$defs": {**terms, "Footprint": footprint, "Error": failure},
    }


def _read(args: argparse.Namespace) -> _Input:
    config, directory = _config(args.config)
    engine = read_engine_args(_yaml(args.engine), f"engine arguments {args.engine}") if args.engine else EngineArgs()
    checkpoint = read_checkpoint(args.checkpoint) if args.checkpoint else None
    if checkpoint is None and args.config.is_dir() and any(directory.glob("*.safetensors*")):
        checkpoint = read_checkpoint(directory)
    return _Input(config, engine, checkpoint, _measured(args, engine, directory))


def _measured(args: argparse.Namespace, engine: EngineArgs, directory: Path) -> Measured | None:
    if args.measured is None:
        return None
    if args.gpu is None:
        raise BerthError("a measured footprint belongs to a GPU product", mend="name it with --gpu")
    return lookup(args.measured, args.model or directory.resolve().name, engine, args.gpu, args.engine_version)


def _config(path: Path) -> tuple[dict[str, Any], Path]:
    """(the config, the directory it lies in); of a hub cache entry the newest snapshot."""
    file = path
    if path.is_dir():
        found = [
            path / "config.json",
            *sorted(path.glob("snapshots/*/config.json"), key=lambda item: item.stat().st_mtime),
        ]
        file = next((item for item in (found[0], *reversed(found[1:])) if item.is_file()), found[0])
    data = _json(file, "the model's config")
    beside = file.parent / "hf_quant_config.json"
    if "quantization_config" not in data and beside.is_file():
        # ModelOpt's older exports say there what is quantised (vLLM reads it too).
        data["quantization_config"] = {
            "quant_method": "modelopt",
            **(_json(beside, "its quantization").get("quantization") or {}),
        }
    return data, file.parent


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BerthError(f"{what} cannot be read", found=str(error), mend=f"give a config.json, not {path}") from None
    if not isinstance(data, dict):
        raise BerthError(f"{what} is not a JSON object", found=type(data).__name__, mend=f"correct {path}")
    return data


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BerthError("the engine arguments cannot be read", found=str(error), mend=f"correct {path}") from None
    return {} if data is None else data


def _estimate(given: _Input, args: argparse.Namespace) -> Estimate:
    try:
        return estimate(
            given.config,
            given.engine,
            given.checkpoint,
            args.gpu,
            args.gpu_memory_mib,
            given.measured,
            args.engine_version,
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A config.json is anything at all: what no reader foresaw is still bad input, not a crash.
        raise BerthError(
            "the model's config or the engine arguments have a value that the arithmetic cannot use",
            found=f"{type(error).__name__}: {error}",
            mend=f"correct {args.config}" + (f" or {args.engine}" if args.engine else ""),
        ) from error


def _refuse(error: BerthError, style: str) -> int:
    if style == "json":
        print(json.dumps({"ok": False, "error": str(error)}))
    print(str(error), file=sys.stderr)
    return BAD_INPUT


def _show(found: Estimate, gpu: str | None) -> None:
    footprint = found.footprint
    table = Table(title=f"One replica on each of its {footprint.gpus} GPU{'s' * (footprint.gpus > 1)}, MiB")
    for name, justify in (("term", "left"), ("expected", "right"), ("bound", "right"), ("from", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for term in footprint.terms:
        table.add_row(term.name, f"{term.expected_mib:,.0f}", f"{term.safe_mib:,.0f}", term.formula)
    table.add_section()
    table.add_row(
        "total", f"{footprint.total_mib:,}", f"{footprint.safe_mib:,}", "measured" if footprint.measured else ""
    )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if footprint.kv_cache_memory_bytes:
        console.print(
            f"set kv_cache_memory_bytes: {footprint.kv_cache_memory_bytes}  ({footprint.kv_tokens} tokens, "
            f"max_model_len {footprint.max_model_len})",
            soft_wrap=True,
        )
    for note in footprint.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if gpu and found.shortfall is None:
        console.print(f"fits {gpu}", markup=False)
