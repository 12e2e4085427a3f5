"""Bytes of one weight under a quantisation scheme, as vLLM 0.29's linear and fused expert methods create it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from berth.footprint.architecture_types import Quantisation, Weight

DTYPE_BYTES = {"float32": 4, "float": 4, "float64": 8, "bfloat16": 2, "float16": 2, "half": 2, "auto": 2}
MXFP4_HIDDEN, MXFP4_INNER = 256, 128
"""Marlin's MXFP4 experts: hidden size padded to 256, intermediate size to 128 (fused_moe/oracle/mxfp4.py)."""


@dataclass(frozen=True)
class Shape:
    """One rank's share of a weight: experts, outputs, inputs, and the values beside them (biases)."""

    experts: int
    rows: int
    columns: int
    biases: int

    @property
    def values(self) -> int:
        """Weights proper, without biases."""
        return self.experts * self.rows * self.columns


def shape_of(weight: Weight, ranks: int, expert_ranks: int) -> Shape:
    """The fullest rank's share under tensor parallelism (``ranks``) and expert parallelism (``expert_ranks``)."""
    if weight.experts > 1 and expert_ranks > 1:
        experts, split = -(-weight.experts // expert_ranks), 1
    else:
        experts, split = weight.experts, ranks
    rows = weight.rows(split) * weight.count
    return Shape(experts, rows, weight.columns(split), experts * rows if weight.bias else 0)


def applies(weight: Weight, scheme: Quantisation | None) -> bool:
    """Whether ``scheme`` replaces this weight."""
    if scheme is None or not weight.linear:
        return False
    if scheme.targets == ("experts",) and weight.experts <= 1:
        return False
    return not any(_matches(pattern, weight.name) for pattern in scheme.ignored)


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "qkv"),
    "gate_up_proj": ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "w13": ("gate_proj", "up_proj", "experts", "w1", "w3"),
    "w2": ("down_proj", "experts"),
    "in_proj_qkvz": ("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_ba", "in_proj_b", "in_proj_a"),
    "shared_experts": ("shared_experts", "shared_expert"),
}


def _names(name: str) -> tuple[str, ...]:
    """The checkpoint's names of a fused module: what ignore lists speak of."""
    head, _, tail = name.rpartition(".")
    heads = [head, head.replace("shared_experts", "shared_expert")]
    heads += [f"model.language_model.{item.removeprefix('model.')}" for item in heads]
    tails = FUSED.get(tail, (tail,))
    names = [f"{item}.{part}" for item in heads for part in (*tails, tail)]
    if ".experts." in name or name.endswith("experts"):
        names += [item.replace(".experts.", ".experts.0.") for item in names]
    return tuple(names)


def _matches(pattern: str, name: str) -> bool:
    """Rules of compressed-tensors and ModelOpt: ``re:`` expressions, ``*`` wildcards, else a name or the end of one."""
    names = _names(name)
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error:
            return False
        return any(expression.match(item) for item in names)
    if "*" in pattern:
        expression = re.compile(re.escape(pattern).replace(r"\*", ".*") + r"($|\.)")
        return any(expression.match(item) for item in names)
    plain = pattern.strip(".")
    return any(item == plain or item.startswith(plain + ".") or item.endswith("." + plain) for item in names)


def weight_bytes(shape: Shape, weight: Weight, dtype_bytes: int, scheme: Quantisation | None) -> int:
    """Bytes of one rank's share of ``weight``."""
    width = weight.width or dtype_bytes
    if not applies(weight, scheme):
        return shape.values * width + shape.biases * width
    assert scheme is not None
    return _quantised(shape, weight, dtype_bytes, scheme) + shape.biases * dtype_bytes


def _quantised(shape: Shape, weight: Weight, dtype_bytes: int, scheme: Quantisation) -> int:
    parts = len(weight.outputs) * shape.experts
    if scheme.method in ("fp8", "fbgemm_fp8"):
        return shape.values + _fp8_scales(shape, scheme, parts)
    if scheme.method == "mxfp8":
        return shape.values + shape.values // 32
    if scheme.method == "bitsandbytes":
        # nf4: two values a byte and one float32 absmax per 64 values; int8: one float32 per row.
        return (
            shape.values // 2 + shape.values // 64 * 4
            if scheme.bits == 4
            else shape.values + shape.rows * shape.experts * 4
        )
    if scheme.method == "nvfp4":
        return shape.values // 2 + shape.values // scheme.group + parts * 8
    if scheme.method == "mxfp4":
        rows, columns = _mxfp4_padded(shape, weight)
        return shape.experts * rows * columns * 17 // 32
    return _packed(shape, dtype_bytes, scheme)


def _fp8_scales(shape: Shape, scheme: Quantisation, parts: int) -> int:
    """float32 scales: per block, per output channel, or per fused part (and one for static inputs)."""
    if scheme.block:
        rows, columns = scheme.block
        return shape.experts * (-(-shape.rows // rows)) * (-(-shape.columns // columns)) * 4
    if scheme.channel_scales:
        return shape.experts * shape.rows * 4
    return parts * 4 * (2 if scheme.input_scales else 1)


def _mxfp4_padded(shape: Shape, weight: Weight) -> tuple[int, int]:
    """One expert's padded matrix: the hidden side to 256, the intermediate side to 128."""
    if weight.split == "outputs":
        halves = len(weight.outputs)
        return _up(shape.rows // halves, MXFP4_INNER) * halves, _up(shape.columns, MXFP4_HIDDEN)
    return _up(shape.rows, MXFP4_HIDDEN), _up(shape.columns, MXFP4_INNER)


def _packed(shape: Shape, dtype_bytes: int, scheme: Quantisation) -> int:
    """GPTQ, AWQ, pack-quantized: packed integers, a scale per group and output, packed zero points where there are."""
    groups = -(-shape.columns // scheme.group) if scheme.group else 1
    scales = shape.experts * shape.rows * groups
    total = shape.values * scheme.bits // 8 + scales * dtype_bytes
    if scheme.zero_points:
        total += scales * scheme.bits // 8
    if scheme.act_order:
        total += shape.experts * shape.columns * 4
    return total


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
