"""Why an engine did not start: which term of its footprint was wrong, from what vLLM said.

vLLM's engine is a process of its own: what it raises is printed there, and the replica hears only that it is gone.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from berth.errors import BerthError

MIB = 1 << 20
KEPT_BYTES = 1 << 20
TOLERANCE = 1.02
"""vLLM prints GiB with two digits, and loads are up to 1.025 of a checkpoint's size."""

_FRAMES = (
    ("cuda_graphs", {"capture_model", "_capture_cudagraphs", "profile_cudagraph_memory"}),
    ("kv_cache", {"initialize_kv_cache", "initialize_kv_cache_tensors", "_allocate_kv_cache_tensors"}),
    ("weights", {"load_model", "load_weights", "process_weights_after_loading"}),
    (
        "activation",
        {"profile_run", "_dummy_run", "_dummy_sampler_run", "_dummy_pooler_run", "warming_up_model"}
        | {"determine_available_memory", "compile_or_warm_up_model", "execute_model"},
    ),
    ("kv_cache", {"initialize_from_config"}),
)
"""The term that asks for memory below a function of vLLM 0.29, the first that is in the trace: graphs are captured
by dummy runs, and a KV cache is made by what warms up afterwards."""

_NAMES = {
    "weights": "the weights take",
    "kv_cache": "the KV cache takes",
    "activation": "the activations of a profiling run take",
    "cuda_graphs": "the CUDA graphs take",
    "unknown": "it takes",
}
_MENDS = {
    "weights": "raise vram_mib (left out, it is predicted), or use gpus_per_replica or engine_args.quantization",
    "kv_cache": "lower engine_args.max_model_len, or raise vram_mib and engine_args.kv_cache_memory_bytes together",
    "activation": "lower engine_args.max_num_batched_tokens or max_num_seqs, or raise vram_mib",
    "cuda_graphs": "set engine_args.max_cudagraph_capture_size or enforce_eager, or raise vram_mib",
    "unknown": "raise vram_mib",
}
_VERIFY = "berth verify: it names who holds memory on this GPU beyond the plan"

_GIB = r"(-?[\d.]+) ?GiB"
_SIZE = r"([\d.]+) (GiB|MiB|KiB|bytes)"
_NEEDED = re.compile(rf"max seq len \((\d+)\), \(?{_GIB} KV cache is needed.*?KV cache memory \({_GIB}\)")
_LONGEST = re.compile(r"estimated maximum model length is (\d+)")
_FREE = re.compile(
    rf"Free memory on device .*?\(([\d.]+)/([\d.]+) ?GiB\) on startup is less than .*?\([\d.]+, {_GIB}\)"
)
_HOST = re.compile(
    rf"Available memory on node \d+ \(([\d.]+)/.*?GiB\).*?is less than requested memory for kv \({_GIB}\)"
)
_LOADED = re.compile(rf"Model loading took {_GIB}")
_LEFT = re.compile(rf"Available KV cache memory: {_GIB}")
_CUDA = re.compile(rf"CUDA out of memory\. Tried to allocate {_SIZE}.*?capacity of {_SIZE} of which {_SIZE} is free")
_IN_USE = re.compile(rf"[Tt]his process has {_SIZE} memory in use")
_SIMULATED = re.compile(r"simulated GPU \S+ is out of memory: asked (\d+) MiB, free (\d+) MiB, total (\d+) MiB")
_OUT = re.compile(r"out of memory", re.IGNORECASE)
_IN = re.compile(r"\bin (\w+)\s*$")
_NO_BLOCKS = "No available memory for the cache blocks"


@dataclass(frozen=True)
class Planned:
    """What a replica was promised on each GPU, in MiB; ``terms`` are the bounds of the footprint's terms by name,
    where they can be told, and ``kv_mib`` the KV budget that is set."""

    app: str
    slot: str
    vram_mib: int
    kv_mib: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)


class Printed:
    """What this process and its children print from now on, where that goes to files, as a Ray worker's does."""

    def __init__(self) -> None:
        self._starts: dict[str, int] = {}
        for number in (1, 2):
            try:
                found = os.fstat(number)
                if stat.S_ISREG(found.st_mode):
                    self._starts[os.readlink(f"/proc/self/fd/{number}")] = found.st_size
            except OSError:
                continue

    def text(self) -> str:
        """The end of it, at most ``KEPT_BYTES`` of each file."""
        parts = []
        for path, start in self._starts.items():
            try:
                with open(path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    file.seek(max(start, size - KEPT_BYTES))
                    parts.append(file.read().decode(errors="replace"))
            except OSError:
                continue
        return "\n".join(parts)


def planned_of(config: Mapping[str, Any]) -> Planned:
    """What the replica with this ``config`` (berth.engines.app.build) was promised, on the GPU it sees.

    The terms are predicted here and now, from the model's own files: the plan keeps their sum alone.
    """
    budget = config["engine_args"].get("kv_cache_memory_bytes")
    scale, terms = 1.0, dict[str, float]()
    # A failed start is being explained: what cannot be told is left out, never a second failure.
    with suppress(Exception):
        scale, terms = _terms(config)
    return Planned(
        app=str(config["model"]),
        slot=os.environ.get("BERTH_SLOT", "unknown"),
        vram_mib=int(config["vram_mib"]),
        kv_mib=budget / MIB * scale if isinstance(budget, int) else None,
        terms=terms,
    )


def _terms(config: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    """(simulated MiB per MiB held, bound of each term in MiB)."""
    from berth.footprint.checkpoint import read_checkpoint
    from berth.footprint.engine_args import read_engine_args
    from berth.footprint.predict import estimate
    from berth.gpu.nvml import read_host

    seen = read_host("here")
    mine = os.environ.get("BERTH_GPU_UUIDS", "").split(",")
    card = next(gpu for gpu in seen.gpus if gpu.uuid in mine)
    where = _directory(str(config["source"]))
    arguments = read_engine_args({**config["engine_args"], "tensor_parallel_size": config["gpus"]})
    checkpoint = read_checkpoint(where) if any(where.glob("*.safetensors*")) else None
    text = json.loads((where / "config.json").read_text(encoding="utf-8"))
    # A simulated card's size says nothing about a model that is scaled.
    real = (card.product, float(card.total_mib)) if seen.vram_scale == 1.0 else (None, None)
    found = {term.name: term.safe_mib for term in estimate(text, arguments, checkpoint, *real).footprint.terms}
    return seen.vram_scale, {
        name: mib * seen.vram_scale if name in ("weights", "kv_cache") else mib for name, mib in found.items()
    }


def _directory(source: str) -> Path:
    """The model's files: a directory, or what the hub's cache has of it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(source, "config.json"))).parent


def explain(text: str, planned: Planned) -> BerthError | None:
    """Which term was wrong, planned against found, and the variable that mends it; None when it was not memory.

    ``text``: what the engine printed and raised.
    """
    flat = " ".join(re.sub(r"\([^()]*pid=\d+[^()]*\)|(ERROR|INFO) \d\d-\d\d [\d:]+ \[[^\]]*\]", " ", text).split())
    for reader in (_kv_needed, _not_free, _host_memory, _no_blocks):
        if (found := reader(flat, planned)) is not None:
            return found
    return _out_of_memory(text, flat, planned)


def _error(planned: Planned, what: str, found: str, allowed: str, mend: str) -> BerthError:
    where = f"app {planned.app}, slot {planned.slot}: the engine does not start"
    return BerthError(f"{where}: {what}", found=found, allowed=allowed, mend=mend)


def _kv_needed(flat: str, planned: Planned) -> BerthError | None:
    match = _NEEDED.search(flat)
    if match is None:
        return None
    length, needed, there = int(match[1]), float(match[2]) * 1024, float(match[3]) * 1024
    longest = _LONGEST.search(flat)
    shorter = f"engine_args.max_model_len: {longest[1]} or less" if longest else "a smaller engine_args.max_model_len"
    return _error(
        planned,
        f"term kv_cache: the KV cache does not hold one request of max_model_len {length} tokens",
        f"{needed:.0f} MiB needed, {there:.0f} MiB there",
        f"{there if planned.kv_mib is None else planned.kv_mib:.0f} MiB planned",
        f"{shorter}, or more for it: concurrency, or vram_mib and engine_args.kv_cache_memory_bytes together",
    )


def _not_free(flat: str, planned: Planned) -> BerthError | None:
    match = _FREE.search(flat)
    if match is None:
        return None
    free, total, wanted = (float(match[number]) * 1024 for number in (1, 2, 3))
    return _error(
        planned,
        "no term of its footprint is wrong: the GPU has less free than the plan promised",
        f"{free:.0f} MiB free of {total:.0f}",
        f"{wanted:.0f} MiB, its footprint",
        _VERIFY,
    )


def _host_memory(flat: str, planned: Planned) -> BerthError | None:
    match = _HOST.search(flat)
    if match is None:
        return None
    return _error(
        planned,
        "term kv_cache: the host's own memory does not hold it (the CPU engine)",
        f"{float(match[1]) * 1024:.0f} MiB free",
        f"{float(match[2]) * 1024:.0f} MiB planned",
        "lower concurrency or engine_args.kv_cache_memory_bytes, or free memory on the host",
    )


def _no_blocks(flat: str, planned: Planned) -> BerthError | None:
    """Nothing is left for the KV cache: the weights are larger than planned, or what a profiling run takes is."""
    if _NO_BLOCKS not in flat:
        return None
    weights, left = _last(_LOADED, flat), _last(_LEFT, flat)
    bound = planned.terms.get("weights")
    if weights is not None and (
        (bound is None and weights >= planned.vram_mib) or (bound and weights > bound * TOLERANCE)
    ):
        return _term("weights", f"{weights:.0f} MiB", planned)
    if weights is None or left is None:
        return _error(
            planned,
            "weights and activations leave nothing for the KV cache",
            "0 MiB for it" if left is None else f"{left:.0f} MiB for it",
            f"{planned.vram_mib} MiB for all of them",
            "raise vram_mib (or leave it out, to have it predicted)",
        )
    return _term("activation", f"{planned.vram_mib - left - weights:.0f} MiB beside {weights:.0f} of weights", planned)


def _out_of_memory(text: str, flat: str, planned: Planned) -> BerthError | None:
    lines = text.splitlines()
    last = max((number for number, line in enumerate(lines) if _OUT.search(line)), default=None)
    if last is None:
        return None
    term = _asking(lines[:last])
    if (simulated := _matches(_SIMULATED, flat)) is not None:
        asked, free, total = (float(figure) for figure in simulated)
        bound = planned.terms.get(term)
        held = f"{asked:.0f} MiB asked for, {free:.0f} free of {total:.0f}"
        # Its first allocation takes the context with it.
        right = bound is not None and asked <= bound * TOLERANCE + planned.terms.get("cuda_context", 0)
        return _someone_else(held, planned) if right else _term(term, held, planned)
    if (cuda := _matches(_CUDA, flat)) is not None:
        asked, total, free = (_mib(*cuda[at : at + 2]) for at in (0, 2, 4))
        used = _matches(_IN_USE, flat)
        mine = None if used is None else _mib(*used)
        held = f"{asked:.0f} MiB more asked for, {free:.0f} free of {total:.0f}"
        if mine is not None:
            held = f"{mine:.0f} MiB held by this process, {held}"
            if mine + asked <= planned.vram_mib:
                return _someone_else(held, planned)
        return _term(term, held, planned)
    return _term(term, lines[last].strip()[-300:], planned)


def _someone_else(held: str, planned: Planned) -> BerthError:
    return _error(
        planned,
        "no term of its footprint is wrong: it stayed within it, others hold more of the GPU than the plan knows",
        held,
        f"{planned.vram_mib} MiB, its footprint",
        _VERIFY,
    )


def _term(term: str, found: str, planned: Planned) -> BerthError:
    bound = planned.kv_mib if term == "kv_cache" and planned.kv_mib is not None else planned.terms.get(term)
    whole = f"of {planned.vram_mib} MiB, its footprint"
    allowed = whole.removeprefix("of ") if bound is None else f"{bound:.0f} MiB planned {whole}"
    return _error(planned, f"term {term}: {_NAMES[term]} more than planned", found, allowed, _MENDS[term])


def _asking(lines: list[str]) -> str:
    """The term whose turn it was in the last trace of ``lines``; "unknown" when none of its functions is known."""
    start = max((number for number, line in enumerate(lines) if "Traceback (most recent" in line), default=0)
    frames = {match[1] for line in lines[start:] if (match := _IN.search(line))}
    return next((term for term, names in _FRAMES if frames & names), "unknown")


def _last(pattern: re.Pattern[str], flat: str) -> float | None:
    """The last figure of ``pattern``, GiB, in MiB."""
    found = pattern.findall(flat)
    return float(found[-1]) * 1024 if found else None


def _matches(pattern: re.Pattern[str], flat: str) -> tuple[str, ...] | None:
    found = pattern.findall(flat)
    return tuple(found[-1]) if found else None


def _mib(figure: str, unit: str) -> float:
    return float(figure) * {"GiB": 1024.0, "MiB": 1.0, "KiB": 1 / 1024, "bytes": 1 / MIB}[unit]
