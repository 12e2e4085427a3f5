"""The small random configs of ``configs/`` with vLLM's recorded answers, one file each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from berth.footprint.architecture import Model, read_model
from berth.footprint.types import EngineArgs

CONFIGS = Path(__file__).parent / "configs"
FILES = {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}


def case(name: str) -> dict[str, Any]:
    """One case: config, engine arguments, and what vLLM answered (or why it refused)."""
    return json.loads(FILES[name].read_text(encoding="utf-8"))


def answered() -> list[str]:
    """The cases vLLM could build on the CPU platform."""
    return [name for name in FILES if "refused" not in case(name)["vllm"]]


def model_of(name: str) -> Model:
    """The model of a case."""
    return read_model(case(name)["config"])


def engine_of(name: str) -> EngineArgs:
    """The engine arguments of a case."""
    return EngineArgs(**case(name)["engine"])


LOGS = Path(__file__).resolve().parents[2] / "data" / "vllm_memory_cases.json"
"""Memory figures of public vLLM logs, with the configs of their models."""


def config_of(fields: dict[str, Any]) -> dict[str, Any]:
    """A logged model's config: where it counts layer types instead of listing them, they are spread evenly."""
    config = {key: value for key, value in fields.items() if key != "layer_types_count"}
    counts = sorted(fields.get("layer_types_count", {}).items(), key=lambda item: (-item[1], item[0]))
    if len(counts) != 2:
        return config
    (common, many), (rare, few) = counts
    every = (many + few) // few
    places = {min(many + few - 1, every * (index + 1) - 1) for index in range(few)}
    places |= set(range(many + few - (few - len(places)), many + few))
    return config | {"layer_types": [rare if index in places else common for index in range(many + few)]}


def minor_version(text: str | None) -> int | None:
    """The minor version of a vLLM release string, None for unreleased builds."""
    parts = (text or "").split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "0" and parts[1].isdigit() and parts[1] != "1" else None


def logged_engine(log: dict[str, Any]) -> EngineArgs:
    """The engine arguments of a logged run; releases before 0.27 counted one batch in flight for windows."""
    early = (minor_version(log["vllm_version"]) or 29) < 27
    return EngineArgs(
        tensor_parallel_size=log["tensor_parallel_size"] or 1,
        pipeline_parallel_size=log["pipeline_parallel_size"] or 1,
        enable_expert_parallel=bool(log["expert_parallel"]),
        dtype=log["dtype"] or "auto",
        quantization=log["quantization"],
        kv_cache_dtype=log["kv_cache_dtype"] or "auto",
        max_num_batched_tokens=log["max_num_batched_tokens"],
        runner="pooling" if "Embedding" in log["model_key"] else "auto",
        rest={"async_scheduling": False} if early else {},
    )
