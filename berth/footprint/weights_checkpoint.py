"""What of a checkpoint vLLM loads, against what the formula expects."""

from __future__ import annotations

import re

from berth.footprint.architecture_types import Model
from berth.footprint.checkpoint import Checkpoint, Tensor
from berth.footprint.types import EngineArgs
from berth.footprint.weights_quant import DTYPE_BYTES

UNLOADED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids", ".g_idx_dummy")
SCALES = ("scale", "A_log", "correction_bias", "zero", "absmax", "quant_map", "qzeros", "_shape", "quant_state")
FLOATS = ("F64", "F32", "F16", "BF16")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def loaded_share(
    model: Model, engine: EngineArgs, checkpoint: Checkpoint | None, formula_bytes: int
) -> tuple[float, tuple[str, ...]]:
    """(bytes the checkpoint really gives over bytes the formula expects, notes); 1.0 without a checkpoint.

    Both sides leave out what vLLM pads or repacks on load, so the share carries over to each rank.
    """
    if checkpoint is None or formula_bytes <= 0:
        return 1.0, ()
    if not checkpoint.tensors:
        found = checkpoint.total_bytes
    else:
        found = sum(_loaded(name, tensor, model, engine) for name, tensor in sorted(checkpoint.tensors.items()))
    if found <= 0:
        return 1.0, ("the checkpoint holds nothing this model loads; the formula stands alone",)
    padding = _padding(model)
    share = (found + padding) / formula_bytes
    if abs(share - 1) > 0.05:
        return share, (f"the checkpoint holds {share:.3f} of what the formula expects; the checkpoint is believed",)
    return share, ()


def _loaded(name: str, tensor: Tensor, model: Model, engine: EngineArgs) -> int:
    """Bytes of one tensor once loaded: skipped, cast to the engine's dtype, or as it is."""
    if name.endswith(UNLOADED):
        return 0
    if model.tied and name.endswith("lm_head.weight"):
        return 0
    if name.startswith(("mtp.", "model.mtp.")) or _past_last_layer(name, model):
        return 0
    off = engine.rest.get("language_model_only")
    if off and any(part in name for part in ("visual", "vision", "audio_tower", "multi_modal_projector")):
        return 0
    if model.pooling and not model.encoder_only and name == "lm_head.weight":
        return 0
    if tensor.dtype in FLOATS and not any(part in name for part in SCALES):
        values = 1
        for size in tensor.shape:
            values *= size
        return values * DTYPE_BYTES.get(engine.dtype, 2)
    return tensor.bytes


def _past_last_layer(name: str, model: Model) -> bool:
    """The prediction layers of DeepSeek-V3 and its kin follow the last decoder layer in the checkpoint."""
    found = LAYER.search(name)
    if not found or "vision" in name or "visual" in name or "audio" in name or "encoder" in name:
        return False
    return int(found.group(1)) >= len(model.layers)


def _padding(model: Model) -> int:
    """Bytes vLLM adds to the vocabulary tables, which the checkpoint does not hold."""
    tables = [weight for weight in (*model.first, *model.last) if weight.split == "vocab"]
    if model.tied:
        tables = [weight for weight in tables if weight.name != "lm_head"]
    return sum((weight.rows(1) - weight.outputs[0][0]) * weight.inputs * 2 for weight in tables)
