"""Footprints of the app list's models where none are given: kept from the last plan, measured before, or predicted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from berth.codec import dump
from berth.errors import BerthError
from berth.footprint import measured
from berth.footprint.checkpoint import Checkpoint, read_checkpoint
from berth.footprint.engine_args import read_engine_args
from berth.footprint.measured import Measured
from berth.footprint.predict import ENGINE_VERSION, estimate
from berth.footprint.types import EngineArgs, Footprint
from berth.plan.apps import AppSpec, parallel_sizes
from berth.plan.slots import HostInput
from berth.plan.types import Plan, PlannedFootprint, Slot

MIB = 1 << 20
RUNNERS = {"embedding": "pooling", "rerank": "pooling"}


def store_beside(plan: Path) -> Path:
    """The file of measured footprints that belongs to the plan file ``plan``."""
    return plan.with_name("footprints.json")


@dataclass(frozen=True)
class Card:
    """A GPU product of the fleet: what the driver calls its total, and simulated MiB per MiB held (1.0: a real one)."""

    product: str
    total_mib: int
    vram_scale: float = 1.0

    @property
    def name(self) -> str:
        """The product under which measurements are kept: a simulated card must never answer for a real one."""
        return self.product if self.vram_scale == 1.0 else f"simulated x{self.vram_scale:g} {self.product}"


@dataclass(frozen=True)
class Source:
    """What a model's footprint follows from."""

    config: dict[str, Any]
    checkpoint: Checkpoint | None
    engine: EngineArgs


def cards(hosts: Sequence[HostInput], slots: Sequence[Slot]) -> tuple[Card, ...]:
    """The products of ``slots``, each with its smallest total and the largest scale it is simulated with."""
    scales = {host.gpus.host: host.gpus.vram_scale for host in hosts}
    products: dict[str, list[Slot]] = {}
    for slot in slots:
        products.setdefault(slot.product, []).append(slot)
    return tuple(
        Card(name, min(slot.total_mib for slot in mine), max(scales.get(slot.host, 1.0) for slot in mine))
        for name, mine in sorted(products.items())
    )


def footprints(
    apps: Sequence[AppSpec], products: Sequence[Card], previous: Plan | None, store: Path | None
) -> dict[str, dict[str, PlannedFootprint]]:
    """For each app without ``vram_mib`` and each product it may run on, its footprint.

    What the previous plan says stays while model, engine arguments and product are the same: a better guess restarts
    nothing. A product that is too small for the model is left out; ``store`` is the file of measured footprints.

    Raises:
        BerthError: the model's config cannot be read, or no product can hold it, with the reason of each.
    """
    found: dict[str, dict[str, PlannedFootprint]] = {}
    for app in apps:
        if app.given_mib is None:
            before = previous.footprints.get(app.name, {}) if previous else {}
            found[app.name] = _of_app(app, products, before, store)
    return found


def _of_app(
    app: AppSpec, products: Sequence[Card], before: Mapping[str, PlannedFootprint], store: Path | None
) -> dict[str, PlannedFootprint]:
    source = read_source(app)
    found: dict[str, PlannedFootprint] = {}
    refused: dict[str, str] = {}
    for card in products:
        if app.products and card.product not in app.products:
            continue
        key = _key(source, card)
        standing = before.get(card.product)
        if standing is not None and standing.key == key:
            found[card.product] = standing
            continue
        try:
            found[card.product] = _planned(app, source, card, key, store)
        except BerthError as error:
            refused[card.product] = str(error)
    if not found and refused:
        raise BerthError(
            f"app {app.name}: no GPU product here can hold it",
            found="; ".join(f"{product}: {why}" for product, why in refused.items()),
            mend="change what the messages name in engine_args, gpus_per_replica or concurrency of the app",
        )
    return found


def _planned(app: AppSpec, source: Source, card: Card, key: str, store: Path | None) -> PlannedFootprint:
    seen = measured.lookup(store, app.model, source.engine, card.name, ENGINE_VERSION) if store else None
    if card.vram_scale != 1.0:
        return _simulated(source, card, key, seen)
    answer = estimate(
        source.config, source.engine, source.checkpoint, card.product, float(card.total_mib), seen, ENGINE_VERSION
    )
    if answer.shortfall is not None:
        raise answer.shortfall
    how = answer.footprint
    return PlannedFootprint(how.safe_mib, "measured" if how.measured else "predicted", key, how.kv_cache_memory_bytes)


def _simulated(source: Source, card: Card, key: str, seen: Measured | None) -> PlannedFootprint:
    """On a simulated GPU, which takes ``vram_scale`` for each MiB of weights and KV cache, and a context as it is."""
    how = estimate(source.config, source.engine, source.checkpoint).footprint
    kv_mib = (how.kv_cache_memory_bytes or 0) / MIB * card.vram_scale
    if seen is not None:
        mib = (seen.total_mib - seen.kv_mib) * (1 + measured.MARGIN) + measured.MARGIN_MIB + kv_mib
    else:
        # The simulated driver counts tensors to the byte: no allocator's rounding, no activations, no graphs.
        context = sum(term.safe_mib for term in how.terms if term.name == "cuda_context")
        mib = how.weights_mib * card.vram_scale + kv_mib + context
    return PlannedFootprint(math.ceil(mib), "predicted" if seen is None else "measured", key, how.kv_cache_memory_bytes)


def read_source(app: AppSpec) -> Source:
    """The model's config, its checkpoint where it is at hand, and the engine arguments as they will be.

    Raises:
        BerthError: there is no readable ``config.json``, or an engine argument is not what it should be.
    """
    where = Path(app.config or app.model).expanduser()
    file = where / "config.json" if where.is_dir() else where
    mend = f"set config of app {app.name} to the model's config.json on the controller, or give its vram_mib"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BerthError(
            f"app {app.name}: its footprint cannot be predicted without its config.json", found=str(error), mend=mend
        ) from None
    if not isinstance(config, dict):
        raise BerthError(f"app {app.name}: {file} is not a model's config.json", found=type(config).__name__, mend=mend)
    arguments = {
        **app.engine_args,
        **parallel_sizes(app.gpus_per_replica, app.slots_per_replica, app.across_slots),
        "runner": RUNNERS.get(app.engine, "generate"),
        "concurrency": app.concurrency,
        **({"enable_sleep_mode": True} if app.sleep else {}),
        # It captures no graphs.
        **({"enforce_eager": True} if app.engine == "transformers" else {}),
    }
    has_weights = where.is_dir() and any(where.glob("*.safetensors*"))
    return Source(
        config,
        read_checkpoint(where) if has_weights else None,
        read_engine_args(arguments, f"engine_args of app {app.name}"),
    )


def _key(source: Source, card: Card) -> str:
    weights = source.checkpoint.total_bytes if source.checkpoint else 0
    text = json.dumps([source.config, weights, dump(source.engine), dump(card), ENGINE_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def note_measured(
    apps: Sequence[AppSpec], plan: Plan, scales: Mapping[str, float], rows: Sequence[Any], store: Path
) -> tuple[list[str], list[str]]:
    """Keep what the replicas of a verified cluster really hold; (keys newly written, findings in words).

    ``rows`` are ``berth.verify.compare.Row``: only running replicas whose memory the driver tells count, the fullest
    GPU of each model and product. ``scales`` gives each host's ``vram_scale``. Models that sleep are left
    out: what they hold asleep is less than they will.

    Raises:
        BerthError: the store cannot be read or written.
    """
    held: dict[tuple[str, str, float], int] = {}
    for row in rows:
        for replica in row.replicas:
            name = replica.berth.partition("@")[0]
            if replica.state == "RUNNING" and replica.vram_mib and row.product in plan.footprints.get(name, {}):
                key = (name, row.product, scales.get(row.host, 1.0))
                held[key] = max(held.get(key, 0), replica.vram_mib)
    written: list[str] = []
    findings: list[str] = []
    by_name = {app.name: app for app in apps}
    totals = {slot.product: slot.total_mib for slot in plan.slots}
    for (name, product, scale), mib in sorted(held.items()):
        if name in by_name and by_name[name].sleep is None:
            card = Card(product, totals[product], scale)
            _note(by_name[name], card, plan.footprints[name][product], mib, store, written, findings)
    return written, findings


def _note(
    app: AppSpec,
    card: Card,
    planned: PlannedFootprint,
    mib: int,
    store: Path,
    written: list[str],
    findings: list[str],
) -> None:
    source = read_source(app)
    kv_mib = min(float(mib), (planned.kv_cache_memory_bytes or 0) / MIB * card.vram_scale)
    now = Measured(float(mib), kv_mib)
    before = measured.lookup(store, app.model, source.engine, card.name, ENGINE_VERSION)
    if before is not None and before.total_mib - before.kv_mib >= now.total_mib - now.kv_mib:
        return
    predicted = _prediction(source, card)
    told = measured.record(store, app.model, source.engine, card.name, ENGINE_VERSION, now, predicted)
    written.append(f"{app.name} on {card.name}: {mib} MiB")
    findings += [f"{app.name} on {card.name}: {line}" for line in told]


def _prediction(source: Source, card: Card) -> Footprint | None:
    """What a finding is measured against; None on a simulated GPU, which holds neither activations nor graphs."""
    if card.vram_scale != 1.0:
        return None
    return estimate(source.config, source.engine, source.checkpoint, card.product, float(card.total_mib)).footprint
