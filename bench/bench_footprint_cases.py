"""Footprints against start-up logs of real vLLM engines, each case judged with its model left out of every fit.

The peer is the guess that other planners make: parameters x bytes x 1.2, plus the KV cache. ``--refit`` fits the
constants of berth/footprint/runtime_coefficients.py to all cases and prints them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.record import RESULTS, Target, finish, show
from berth.errors import BerthError
from berth.footprint.architecture import read_model
from berth.footprint.engine_args import read_engine_args
from berth.footprint.predict import ENGINE_VERSION, estimate, minor_of
from berth.footprint.products import Product, product
from berth.footprint.runtime import (
    CONTEXT_MIB,
    GRAPHS_BOUND,
    UNIFIED_BOUND,
    batch_of,
    capture_sizes,
    graph_units,
    is_other,
)
from berth.footprint.runtime_coefficients import Coefficients
from berth.footprint.types import EngineArgs, Footprint

CASES = Path(__file__).parents[1] / "tests" / "data" / "vllm_memory_cases.json"
GIB_MIB = 1024
WEIGHTS, TOKENS, HELD, OVER = 0.01, 0.005, 0.95, 0.06
PEER_FACTOR = 1.2
QUANTILE = 0.8
"""Share of cases whose own term the margin covers alone; the margins of several terms add up."""

ASSUMED = "budget partly assumed (the product's total, or vLLM's default share)"
LEAST_MARGIN = 200.0
REST = ("activation", "non_torch", "communication")

ARGUMENTS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "dtype", "quantization",
             "kv_cache_dtype", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "enforce_eager",
             "max_cudagraph_capture_size")  # fmt: skip
"""Engine arguments that a case states under vLLM's own names."""

DEFAULT_SHARES = ((22, 0.92), (0, 0.9))
"""vLLM's default gpu_memory_utilization from a minor version on (as the logs print it)."""


@dataclass(frozen=True)
class Case:
    """One logged start: what the engine was told, and what it said it took, in MiB per GPU (``None``: not said).

    ``rest_mib`` is activation and non-torch memory together: the budget less weights and KV cache, less the graph
    estimate where that version deducts it. ``stated`` tells that no part of the budget had to be assumed.
    """

    name: str
    model: str
    family: str
    config: dict[str, Any]
    engine: EngineArgs
    gpu: Product | None
    version: str
    weights_mib: float | None
    kv_mib: float | None
    kv_tokens: int | None
    graphs_mib: float | None
    rest_mib: float | None
    stated: bool
    speculative: bool
    excluded: str = ""
    unpredictable: str = ""

    @property
    def real_mib(self) -> float | None:
        """What the replica took, context included; graphs that were not logged count as captured none."""
        if self.rest_mib is None or self.weights_mib is None or self.kv_mib is None:
            return None
        return self.weights_mib + self.kv_mib + self.rest_mib + (self.graphs_mib or 0.0) + CONTEXT_MIB


@dataclass(frozen=True)
class Verdict:
    """One case's errors, signed and relative unless named MiB; ``None`` where the log says too little."""

    case: str
    model: str
    family: str
    weights: float | None = None
    kv_tokens: float | None = None
    rest_mib: float | None = None
    graphs_mib: float | None = None
    real_mib: float | None = None
    total: float | None = None
    safe_over: float | None = None
    held: bool | None = None
    peer: float | None = None
    weights_held: bool | None = None
    unread: str = ""
    notes: tuple[str, ...] = field(default=())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the errors and write results/footprint_cases.json; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--refit", action="store_true", help="print the constants fitted to all cases, and stop")
    parser.add_argument("--each", action="store_true", help="print every case too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    cases = read_cases(args.cases)
    if args.refit:
        print(fit(facts_of(cases)))
        return 0
    verdicts = cross_validated(cases)
    _show(verdicts, args.each)
    figures = {
        "all_cases_fit": asdict(fit(facts_of(cases))),
        "summary": summary(verdicts),
        "per_case": list(map(asdict, verdicts)),
    }
    given = list(arguments if arguments is not None else sys.argv[1:])
    return finish("footprint_cases", given, figures, targets(verdicts), args.results)


def read_cases(path: Path) -> list[Case]:
    """The logged cases."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [_case(log, data["models"][log["model_key"]]["fields"]) for log in data["cases"]]


def _case(log: dict[str, Any], fields: dict[str, Any]) -> Case:
    kv, gpu = log["available_kv_gib_per_gpu"], _gpu(log)
    engine = {name: log[name] for name in ARGUMENTS if log[name] is not None}
    if log["expert_parallel"]:
        engine["enable_expert_parallel"] = True
    if kv and kv > 0:
        engine["kv_cache_memory_bytes"] = int(kv * (1 << 30))
    if "Embedding" in log["model_key"]:
        engine["runner"] = "pooling"
    notes = log["notes"] or ""
    if "language_model_only" in notes:
        engine["language_model_only"] = True
    rest, stated = _rest(log, gpu)
    graphs = log["cuda_graph_gib"]
    return Case(
        name=log["id"],
        model=log["model_key"],
        family=str((fields.get("architectures") or ["(not stated)"])[0]),
        config=fields,
        engine=read_engine_args(engine),
        gpu=gpu,
        version=log["vllm_version"] or ENGINE_VERSION,
        weights_mib=_mib(log["weights_gib_per_gpu"]),
        kv_mib=_mib(kv) if kv and kv > 0 else None,
        kv_tokens=log["kv_tokens"],
        graphs_mib=_mib(graphs) if graphs is not None and graphs > 0 else None,
        rest_mib=rest,
        stated=stated,
        speculative=bool(log["speculative"]),
        excluded=_excluded(log),
        unpredictable=_unpredictable(log, fields),
    )


def _mib(gib: float | None) -> float | None:
    return None if gib is None else gib * GIB_MIB


def _gpu(log: dict[str, Any]) -> Product | None:
    total = log["gpu_total_gib"]
    try:
        found = product(log["gpu"] or "")
    except BerthError:
        return Product("GPU", int(total * GIB_MIB), "") if total else None
    return replace(found, total_mib=int(total * GIB_MIB)) if total else found


def _excluded(log: dict[str, Any]) -> str:
    """Why a case is not judged for totals: its log describes something else than one replica's own memory."""
    if log["outcome"] == "failed":
        return "did not start"
    if "LoRA" in (log["notes"] or ""):
        return "LoRA slots not stated"
    if (log["gpu"] or "").startswith("AMD"):
        return "not CUDA"
    if (log["cuda_graph_gib"] or 0) < 0:
        return "a negative graph figure: another process freed memory meanwhile"
    return ""


def _unpredictable(log: dict[str, Any], fields: dict[str, Any]) -> str:
    """Why a case's weights cannot follow from what it gives; its rest and graphs may be fitted to all the same."""
    if log["speculative"]:
        return "a draft model whose config the log does not give"
    if log["quantization"] == "compressed-tensors" and "quantization_config" not in fields:
        return "compressed-tensors without the quantization_config that says what is compressed"
    return ""


def _rest(log: dict[str, Any], gpu: Product | None) -> tuple[float | None, bool]:
    """(activation and non-torch memory in MiB, whether the log states the whole budget)."""
    weights, kv, share = log["weights_gib_per_gpu"], log["available_kv_gib_per_gpu"], log["gpu_memory_utilization"]
    minor = minor_of(log["vllm_version"] or ENGINE_VERSION)
    requested = log["requested_gib"]
    if requested is None and gpu is not None:
        requested = (
            gpu.total_mib / GIB_MIB * (share or next(value for first, value in DEFAULT_SHARES if minor >= first))
        )
    if requested is None or weights is None or kv is None:
        return None, False
    deducted = log["cuda_graph_estimated_gib"] or 0.0 if minor >= 21 else 0.0
    rest = requested - weights - kv - deducted
    stated = log["requested_gib"] is not None or (share is not None and log["gpu_total_gib"] is not None)
    # A negative rest refutes the assumed share or total.
    return (rest * GIB_MIB, stated) if rest > 0 else (None, False)


def _estimate(case: Case, fitted: Coefficients) -> Footprint:
    gpu = case.gpu
    return estimate(
        case.config,
        case.engine,
        gpu=gpu.name if gpu else None,
        gpu_total_mib=gpu.total_mib if gpu else None,
        engine_version=case.version,
        fitted=fitted,
    ).footprint


BARE = Coefficients(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Facts:
    """What the formulas alone say of a case: the rest (expected, bound), captured sizes, sizes x layers, kind."""

    case: Case
    rest_mib: float
    rest_bound_mib: float
    sizes: int
    units: int
    other: bool

    @property
    def several(self) -> bool:
        return self.case.engine.tensor_parallel_size > 1

    @property
    def unified(self) -> bool:
        return self.case.gpu is not None and self.case.gpu.unified


def facts_of(cases: Sequence[Case]) -> list[Facts]:
    """The facts of every case that may be fitted to: readable, and its own memory alone."""
    return [found for case in cases if not case.excluded and (found := _facts(case)) is not None]


def _facts(case: Case) -> Facts | None:
    try:
        model, found = read_model(case.config), _estimate(case, BARE)
    except BerthError:
        return None
    length = case.engine.max_model_len or model.max_position_embeddings or 2048
    sizes = capture_sizes(case.engine, batch_of(model, case.engine, case.gpu, length), case.gpu)
    rest = [term for term in found.terms if term.name in REST]
    return Facts(
        case,
        sum(term.expected_mib for term in rest),
        sum(term.safe_mib for term in rest),
        max(1, len(sizes)),
        max(1, graph_units(model, case.engine, sizes)),
        is_other(model),
    )


def fit(facts: Sequence[Facts]) -> Coefficients:
    """The constants that suit ``facts``: medians of what the logs leave after the formulas, margins by quantile."""
    graphs = [(item, item.case.graphs_mib) for item in facts if item.case.graphs_mib is not None]
    rests = [(item, item.case.rest_mib) for item in facts if item.case.rest_mib is not None]
    each = {
        kind: _median([logged / item.units for item, logged in graphs if item.other is kind and not item.several])
        for kind in (False, True)
    }
    ranks = [(logged - each[item.other] * item.units) * 51 / item.sizes for item, logged in graphs if item.several]
    own = max(0.0, _median([logged - item.rest_mib for item, logged in rests if not item.unified]))
    shared = max(0.0, _median([logged - item.rest_mib for item, logged in rests if item.unified]) - own)
    fitted = Coefficients(each[False], each[True], max(0.0, _median(ranks)), own, shared)
    over_rest = [logged - item.rest_bound_mib - own - UNIFIED_BOUND * shared * item.unified for item, logged in rests]
    over_graphs = [logged - GRAPHS_BOUND * _graphs(item, fitted) for item, logged in graphs]
    return Coefficients(
        graph_dense=round(fitted.graph_dense, 3),
        graph_other=round(fitted.graph_other, 3),
        graph_ranks=round(fitted.graph_ranks),
        non_torch=round(own),
        unified=round(shared),
        margin_rest=round(max(LEAST_MARGIN, _quantile(over_rest))),
        margin_graphs=round(max(LEAST_MARGIN, _quantile(over_graphs))),
    )


def _graphs(item: Facts, fitted: Coefficients) -> float:
    each = fitted.graph_other if item.other else fitted.graph_dense
    return item.units * each + (fitted.graph_ranks * item.sizes / 51 if item.several else 0.0)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _quantile(values: Sequence[float], share: float = QUANTILE) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def cross_validated(cases: Sequence[Case]) -> list[Verdict]:
    """Every case judged with constants fitted to the other models' cases alone."""
    facts = facts_of(cases)
    fits = {model: fit([item for item in facts if item.case.model != model]) for model in {c.model for c in cases}}
    return [judge(case, fits[case.model]) for case in cases]


def judge(case: Case, fitted: Coefficients) -> Verdict:
    """The errors of one case."""
    try:
        found = _estimate(case, fitted)
    except BerthError as error:
        return Verdict(case.name, case.model, case.family, unread=error.what)
    terms = {term.name: term for term in found.terms}
    real = None if case.excluded or case.unpredictable else case.real_mib
    unlogged = terms["cuda_graphs"] if case.graphs_mib is None else None
    total = found.total_mib - (unlogged.expected_mib if unlogged else 0.0)
    safe = found.safe_mib - (unlogged.safe_mib if unlogged else 0.0)
    rest = sum(terms[name].expected_mib for name in REST if name in terms)
    tokens = case.kv_tokens if case.kv_mib and not case.speculative else None
    held = None if real is None else safe >= real
    return Verdict(
        case=case.name,
        model=case.model,
        family=case.family,
        weights=None if not case.weights_mib else found.weights_mib / case.weights_mib - 1,
        kv_tokens=None
        if not tokens or not found.kv_tokens or case.excluded.startswith("spec")
        else found.kv_tokens / tokens - 1,
        rest_mib=None if case.rest_mib is None or case.excluded else rest - case.rest_mib,
        graphs_mib=None if not case.graphs_mib or case.excluded else found.graphs_mib - case.graphs_mib,
        real_mib=real,
        total=None if real is None else total / real - 1,
        safe_over=None if real is None else safe / real - 1,
        held=held,
        peer=None if real is None else peer_guess(case, found) / real - 1,
        weights_held=None if not case.weights_mib else terms["weights"].safe_mib >= case.weights_mib,
        notes=tuple(note for note in (case.excluded, case.unpredictable, "" if case.stated else ASSUMED) if note),
    )


def peer_guess(case: Case, found: Footprint) -> float:
    """MiB by the usual rule: parameters x bytes of the stated precision x 1.2 on each GPU, plus the KV cache."""
    bits = {"awq": 4, "gptq": 4, "bit": 4, "mxf": 4, "fp8": 8, "com": 8}
    width = bits.get((case.engine.quantization or "")[:3], 16) / 8
    ranks = case.engine.tensor_parallel_size * case.engine.pipeline_parallel_size
    return (found.parameters or 0) * width * PEER_FACTOR / ranks / (1 << 20) + (case.kv_mib or 0.0)


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts and medians of absolute errors over all cases."""
    judged = [item for item in verdicts if item.held is not None]
    return {
        "cases": len(verdicts),
        "unread": [item.case for item in verdicts if item.unread],
        "weights": _spread([item.weights for item in verdicts]),
        "kv_tokens": _spread([item.kv_tokens for item in verdicts]),
        "rest_mib": _spread([item.rest_mib for item in verdicts]),
        "graphs_mib": _spread([item.graphs_mib for item in verdicts]),
        "total": _spread([item.total for item in verdicts]),
        "peer_total": _spread([item.peer for item in judged]),
        "judged_totals": len(judged),
        "held": sum(bool(item.held) for item in judged),
        "peer_held": sum((item.peer or 0) >= 0 for item in judged),
        "not_held": [item.case for item in judged if not item.held],
        "safe_over_median": _median([item.safe_over or 0 for item in judged]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float]:
    found = sorted(abs(value) for value in values if value is not None)
    return {
        "cases": len(found),
        "median": _median(found),
        "p90": _quantile(found),
        "worst": found[-1] if found else 0.0,
    }


def targets(verdicts: Sequence[Verdict]) -> list[Target]:
    """The promises, with what was found."""
    found = summary(verdicts)
    held = found["held"] / max(1, found["judged_totals"])
    weights, tokens, over = found["weights"]["median"], found["kv_tokens"]["median"], found["safe_over_median"]
    return [
        Target(f"weights, median error <= {WEIGHTS:.0%} ({found['weights']['cases']} cases)", f"{weights:.2%}",
               weights <= WEIGHTS),
        Target(f"KV tokens from logged KV bytes, median error <= {TOKENS:.1%} ({found['kv_tokens']['cases']} cases)",
               f"{tokens:.3%}", tokens <= TOKENS),
        Target(f"bound holds in >= {HELD:.0%} of {found['judged_totals']} cases with a known total", f"{held:.1%}",
               held >= HELD),
        Target(f"bound over real total, median <= {OVER:.0%}", f"{over:.1%}", over <= OVER),
    ]  # fmt: skip


def _show(verdicts: Sequence[Verdict], each: bool) -> None:
    families = sorted({item.family for item in verdicts})
    columns: tuple[tuple[str, Callable[[Verdict], float | None]], ...] = (
        ("weights %", lambda item: _percent(item.weights)), ("KV tokens %", lambda item: _percent(item.kv_tokens)),
        ("rest MiB", lambda item: item.rest_mib), ("graphs MiB", lambda item: item.graphs_mib),
        ("total %", lambda item: _percent(item.total)), ("peer's total %", lambda item: _percent(item.peer)),
        ("bound over %", lambda item: _percent(item.safe_over)),
    )  # fmt: skip
    rows = []
    for name in (*families, "all"):
        members = [item for item in verdicts if name in (item.family, "all")]
        cells = [_cell([get(item) for item in members]) for _, get in columns]
        judged = [item.held for item in members if item.held is not None]
        rows.append((name, len(members), *cells, f"{sum(judged)}/{len(judged)}"))
    show(
        "Median absolute error, each model left out of its own fit",
        ("family", "cases", *(n for n, _ in columns), "held"),
        rows,
    )
    found = summary(verdicts)
    ours, theirs = found["total"]["median"], found["peer_total"]["median"]
    print(f"total, median error: ours {ours:.1%}, peer's guess {theirs:.1%} (ratio {theirs / max(ours, 1e-9):.1f});"
          f" the guess is below the real total in {found['judged_totals'] - found['peer_held']} of"
          f" {found['judged_totals']} cases, our bound in {found['judged_totals'] - found['held']}")  # fmt: skip
    if each:
        for item in verdicts:
            print(item)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _cell(values: Sequence[float | None]) -> object:
    found = [abs(value) for value in values if value is not None]
    return f"{_median(found):.2f}" if found else "-"


if __name__ == "__main__":
    sys.exit(main())
