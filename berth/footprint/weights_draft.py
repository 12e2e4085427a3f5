"""What speculative decoding loads beside the model: its own prediction layers, an EAGLE head, or a draft model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from berth.errors import BerthError
from berth.footprint.architecture import Model, read_model
from berth.footprint.architecture_parts import Heads, attention, embedding, linear, mlp, vector
from berth.footprint.architecture_types import Cache, Layer, Weight
from berth.footprint.types import EngineArgs

NO_WEIGHTS = ("ngram", "ngram_gpu", "suffix", "prompt_lookup")
EAGLE = ("eagle", "eagle3", "dflash", "extract_hidden_states")


@dataclass(frozen=True)
class Draft:
    """The weights and the cache layers that speculation adds to the last pipeline stage."""

    weights: tuple[Weight, ...] = ()
    layers: tuple[Layer, ...] = ()
    same_scheme: bool = True
    notes: tuple[str, ...] = ()


def draft_of(model: Model, engine: EngineArgs) -> Draft:
    """What ``engine.speculative_config`` adds to ``model``.

    Raises:
        BerthError: a separate draft model whose config.json is not in a local directory, so that its size is unknown.
    """
    config = engine.speculative_config
    if not config:
        return Draft()
    method = str(config.get("method") or ("draft_model" if config.get("model") else "ngram"))
    if method in NO_WEIGHTS or method == "extract_hidden_states":
        return Draft()
    if method == "mtp" or method.endswith("_mtp"):
        return _own_layers(model)
    named = _local_model(str(config.get("model") or ""))
    if named is not None:
        return _separate(named)
    if method in EAGLE:
        return _eagle(model, method)
    if method in ("medusa", "mlp_speculator"):
        return Draft((linear("medusa.blocks", model.hidden, 5 * model.hidden, quantisable=False),), same_scheme=False,
                     notes=(f"{method} heads estimated: their config was not found",))  # fmt: skip
    raise BerthError(
        "the draft model of speculative_config is not known, so its memory cannot be told",
        found=config.get("model"),
        allowed="a local directory with its config.json, or method ngram, mtp, eagle or eagle3",
        mend="download the draft model and give its directory as speculative_config.model",
    )


def _own_layers(model: Model) -> Draft:
    """The model's prediction layers; its embeddings and head are shared with them after loading."""
    if not model.drafts:
        return Draft(notes=("speculation by mtp, but config.json names no prediction layers",))
    return Draft(tuple(weight for layer in model.drafts for weight in layer.weights), model.drafts)


def _local_model(path: str) -> Model | None:
    file = Path(path) / "config.json"
    if not path or not file.is_file():
        return None
    try:
        return read_model(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise BerthError(
            "the draft model's config.json cannot be read", found=str(error), mend=f"correct {file}"
        ) from None


def _separate(draft: Model) -> Draft:
    every = [weight for layer in draft.layers for weight in layer.weights]
    tied = [weight for weight in draft.last if not (draft.tied and weight.name == "lm_head")]
    return Draft((*draft.first, *every, *tied, *draft.everywhere), draft.layers, same_scheme=False)


def _eagle(model: Model, method: str) -> Draft:
    """One decoder layer of the model's size (llama_eagle.py, llama_eagle3.py), with a head of its own for EAGLE-3."""
    cache = next((item for layer in model.layers for item in layer.caches if item.kind in ("full", "sliding")), None)
    sizes = Heads(
        model.hidden,
        model.heads,
        cache.kv_heads if cache else model.heads,
        cache.head_size if cache else model.hidden // max(1, model.heads),
    )
    inputs = 3 if method != "eagle" else 2
    parts = [
        linear("draft.fc", inputs * model.hidden, model.hidden, quantisable=False),
        *attention("draft.layers.0.self_attn", Heads(2 * sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim)),
        *mlp("draft.layers.0.mlp", model.hidden, model.intermediate or 4 * model.hidden),
        vector("draft.norms", model.hidden, 4),
    ]
    if method != "eagle":
        parts.append(embedding("draft.lm_head", 32000, model.hidden))
    layer = Layer((), (Cache("full", sizes.kv_heads, sizes.head_dim, sizes.head_dim),))
    note = f"{method} head estimated as one layer of the model's own size: its config was not found"
    return Draft(tuple(parts), (layer,), same_scheme=False, notes=(note,))
