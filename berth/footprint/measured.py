"""Footprints of replicas that ran: stored per model, engine arguments, GPU product and engine version, and used next.

One JSON file, read and replaced as a whole. A measurement beats the prediction; one beyond the prediction's bound is
told in words, because then either the arithmetic or the replica is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from berth.codec import STRICT, dump, load, write_json
from berth.errors import BerthError
from berth.footprint.products import product
from berth.footprint.types import EngineArgs, Footprint, Term

SOURCE = "measured on a replica that ran"
OVERHEAD_NAMES = ("cuda_context", "non_torch", "communication")
MARGIN, MARGIN_MIB = 0.01, 64
"""What the bound adds to a measured term: a second run of the same replica is not the same to the byte."""

IRRELEVANT = frozenset(
    {"served_model_name", "host", "port", "api_key", "chat_template", "tool_call_parser", "reasoning_parser", "seed",
     "disable_log_requests", "disable_log_stats", "uvicorn_log_level", "trust_remote_code", "revision", "tokenizer",
     "download_dir", "load_format", "enable_auto_tool_choice", "response_role", "model"}
)  # fmt: skip
"""Arguments that never touch memory; any other difference makes another key."""


@dataclass(frozen=True)
class Measured:
    """What NVML and vLLM reported of one replica, in MiB per GPU (the fullest); ``None`` where nobody said.

    ``total_mib`` is NVML's figure for the replica's processes with the KV cache in it (``kv_mib``).
    """

    __pydantic_config__ = STRICT
    total_mib: float
    kv_mib: float
    weights_mib: float | None = None
    activation_mib: float | None = None
    graphs_mib: float | None = None

    def over(self, terms: Sequence[Term]) -> tuple[Term, ...]:
        """``terms`` (without the KV cache) with what was measured in place of what was predicted.

        The parts vLLM named replace theirs; what NVML shows beyond them is put on the other terms in proportion.
        """
        known = {"weights": self.weights_mib, "activation": self.activation_mib, "cuda_graphs": self.graphs_mib}
        named = {name: value for name, value in known.items() if value is not None}
        open_terms = [term for term in terms if term.name not in named]
        left = max(0.0, self.total_mib - self.kv_mib - sum(named.values()))
        predicted = sum(term.expected_mib for term in open_terms)
        shares = {
            term.name: (term.expected_mib / predicted if predicted else 1 / len(open_terms)) for term in open_terms
        }
        return tuple(_measured(term, named.get(term.name, left * shares.get(term.name, 0.0))) for term in terms)


@dataclass(frozen=True)
class Record:
    """One measurement with what it was measured on: the file keeps these, by key."""

    __pydantic_config__ = STRICT
    model: str
    engine: dict[str, Any]
    product: str
    engine_version: str
    measured: Measured
    runs: int = 1
    findings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Store:
    """The whole file."""

    __pydantic_config__ = STRICT
    version: int = 1
    records: dict[str, Record] = field(default_factory=dict)


def _measured(term: Term, value: float) -> Term:
    bound = value * (1 + MARGIN) + MARGIN_MIB * (value > 0) * (term.name in ("weights", "activation"))
    return replace(term, expected_mib=value, safe_mib=bound, formula=f"{SOURCE}; {term.formula}", source=SOURCE)


def key_of(model: str, engine: EngineArgs, gpu: str, engine_version: str) -> str:
    """The key of a measurement. The KV budget and what it follows from are left out: KV memory is counted apart."""
    text = json.dumps([model, relevant(engine), _product_name(gpu), engine_version], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def relevant(engine: EngineArgs) -> dict[str, Any]:
    """The engine arguments that decide everything but the KV cache."""
    plain: dict[str, Any] = dump(engine)
    rest = {name: value for name, value in plain.pop("rest").items() if name not in IRRELEVANT}
    budget = ("kv_cache_memory_bytes", "gpu_memory_utilization", "concurrency")
    return {**{name: value for name, value in plain.items() if name not in budget}, "rest": rest}


def _product_name(gpu: str) -> str:
    try:
        return product(gpu).name
    except BerthError:
        return gpu


def lookup(path: Path, model: str, engine: EngineArgs, gpu: str, engine_version: str) -> Measured | None:
    """What was measured of the same replica before; ``None`` when it never ran.

    Raises:
        BerthError: the file is there and cannot be read.
    """
    record = read(path).records.get(key_of(model, engine, gpu, engine_version))
    return None if record is None else record.measured


def record(
    path: Path,
    model: str,
    engine: EngineArgs,
    gpu: str,
    engine_version: str,
    measured: Measured,
    predicted: Footprint | None = None,
) -> tuple[str, ...]:
    """Store a measurement and return its findings: how far the prediction was off, where it was beyond its bound.

    Of several runs the largest total is kept, with its own parts: the next replica may be that one again.

    Raises:
        BerthError: the measurement contradicts itself, or the file cannot be read.
    """
    if not 0 <= measured.kv_mib <= measured.total_mib:
        raise BerthError(
            "a measured footprint whose KV cache is larger than all of it",
            found=f"KV {measured.kv_mib} MiB of {measured.total_mib} MiB",
            mend="read NVML after the engine has started",
        )
    store, key = read(path), key_of(model, engine, gpu, engine_version)
    found = findings(predicted, measured) if predicted is not None else ()
    before = store.records.get(key)
    kept = measured
    if before is not None and before.measured.total_mib - before.measured.kv_mib > measured.total_mib - measured.kv_mib:
        kept = before.measured
    runs = 1 + (before.runs if before else 0)
    entry = Record(model, relevant(engine), _product_name(gpu), engine_version, kept, runs, found)
    write_json(path, dump(replace(store, records={**store.records, key: entry})))
    return found


def findings(predicted: Footprint, measured: Measured) -> tuple[str, ...]:
    """Every term that ran beyond its predicted bound, and a bound that reserved much more than was used."""
    found = []
    actual = measured.total_mib - measured.kv_mib + predicted.kv_mib
    if actual > predicted.safe_mib:
        found.append(
            f"the replica holds {actual:.0f} MiB (at the predicted KV budget), {actual - predicted.safe_mib:.0f} MiB"
            f" beyond its bound of {predicted.safe_mib} MiB (expected {predicted.total_mib})"
        )
    parts: Mapping[str, float | None] = {
        "weights": measured.weights_mib, "activation": measured.activation_mib, "cuda_graphs": measured.graphs_mib,
    }  # fmt: skip
    for term in predicted.terms:
        value = parts.get(term.name)
        if value is not None and value > term.safe_mib:
            found.append(
                f"{term.name} took {value:.0f} MiB, beyond its bound of {term.safe_mib:.0f} (expected"
                f" {term.expected_mib:.0f}: {term.formula})"
            )
    if actual < 0.85 * predicted.safe_mib:
        more = predicted.safe_mib / max(1, actual) - 1
        found.append(f"the bound of {predicted.safe_mib} MiB reserves {more:.0%} more than the {actual:.0f} MiB in use")
    return tuple(found)


def read(path: Path) -> Store:
    """The store at ``path``; empty when there is no file yet.

    Raises:
        BerthError: the file is torn or of another shape.
    """
    if not path.exists():
        return Store()
    mend = f"correct {path}, or remove it to predict everything again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BerthError("the store of measured footprints cannot be read", found=str(error), mend=mend) from None
    store = load(Store, data, "store of measured footprints", mend)
    if store.version != 1:
        raise BerthError(
            "the store of measured footprints has another version", found=store.version, allowed=1, mend=mend
        )
    return store
