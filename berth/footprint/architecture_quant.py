"""Quantisation schemes as configs declare them, under one description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from berth.footprint.architecture_types import Quantisation

Config = Mapping[str, Any]


def read_quantisation(config: Config) -> tuple[Quantisation | None, str | None]:
    """(the scheme of ``quantization_config``, the KV cache dtype it asks for); None where there is none."""
    given = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(given, Mapping):
        return None, None
    method = str(given.get("quant_method") or given.get("method") or "").lower()
    method = {"auto_gptq": "gptq", "auto_awq": "awq", "gptq_marlin": "gptq", "awq_marlin": "awq"}.get(method, method)
    ignored = _ignored(given)
    if method in ("gptq", "awq", "inc", "auto-round"):
        return _grouped(given, method, ignored), None
    if method in ("fp8", "fbgemm_fp8", "deepseek_v4_fp8"):
        block = given.get("weight_block_size")
        return (
            Quantisation(
                "fp8",
                8,
                block=(int(block[0]), int(block[1])) if block else None,
                channel_scales=method == "fbgemm_fp8",
                input_scales=given.get("activation_scheme") == "static",
                ignored=ignored,
            ),
            None,
        )
    if method == "mxfp4":
        return Quantisation("mxfp4", 4, group=32, ignored=ignored, targets=("experts",)), None
    if method == "compressed-tensors":
        return _compressed_tensors(given, ignored), _kv_dtype(given.get("kv_cache_scheme"))
    if method.startswith("modelopt") or given.get("quant_algo") or "quantization" in given:
        return _modelopt(given, ignored)
    if method == "bitsandbytes":
        bits = 8 if given.get("load_in_8bit") else 4
        return Quantisation("bitsandbytes", bits, group=0 if bits == 8 else 64, ignored=ignored), None
    if method in ("torchao", "quark", "hqq", "gguf"):
        return Quantisation(
            method, int(given.get("bits") or 8), group=int(given.get("group_size") or 0), ignored=ignored
        ), None
    return None, None


def online(method: str | None) -> Quantisation | None:
    """The scheme of ``quantization=`` of the engine where the config has none.

    vLLM applies some while it loads unquantised weights; for the others the checkpoint was quantised and its config
    should say how: the usual form of each is taken then (4 bits in groups of 128).
    """
    name = (method or "").strip().lower()
    if name in ("awq", "awq_marlin", "gptq", "gptq_marlin", "auto_awq", "auto_gptq"):
        return Quantisation("awq" if "awq" in name else "gptq", 4, group=128, zero_points=True, ignored=("lm_head",))
    if name == "compressed-tensors":
        return Quantisation("compressed-tensors", 4, group=128, complete=False, ignored=("lm_head",))
    if name == "mxfp4":
        return Quantisation("mxfp4", 4, group=32, targets=("experts",))
    if name in ("modelopt_fp4", "nvfp4"):
        return Quantisation("nvfp4", 4, group=16, complete=False, ignored=("lm_head",))
    if name in (
        "fp8",
        "fp8_per_tensor",
        "ptpc_fp8",
        "fbgemm_fp8",
        "modelopt",
        "experts_int8",
        "int8_per_channel_weight_only",
    ):
        return Quantisation("fp8", 8)
    if name == "fp8_per_block":
        return Quantisation("fp8", 8, block=(128, 128))
    if name == "bitsandbytes":
        return Quantisation("bitsandbytes", 4, group=64)
    if name == "mxfp8":
        return Quantisation("mxfp8", 8, group=32)
    return None


def cautious(scheme: Quantisation | None) -> Quantisation | None:
    """The scheme a bound is computed with: where it is not complete, attention keeps the model's dtype."""
    if scheme is None or scheme.complete:
        return scheme
    return replace(scheme, ignored=(*scheme.ignored, "re:.*self_attn.*", "re:.*linear_attn.*", "re:.*mtp.*"))


def _ignored(given: Config) -> tuple[str, ...]:
    names: list[str] = []
    for key in (
        "ignore",
        "modules_to_not_convert",
        "ignored_layers",
        "exclude_modules",
        "llm_int8_skip_modules",
        "modules_to_not_quantize",
    ):
        value = given.get(key)
        names += [str(name) for name in value] if isinstance(value, list) else []
    inner = given.get("quantization")
    if isinstance(inner, Mapping):
        names += [str(name) for name in inner.get("exclude_modules") or []]
    return tuple(sorted(set(names)))


def _grouped(given: Config, method: str, ignored: tuple[str, ...]) -> Quantisation:
    """GPTQ and AWQ: packed weights, one scale (and zero point) per group of inputs."""
    group = int(given.get("group_size") or given.get("q_group_size") or 128)
    return Quantisation(
        method,
        int(given.get("bits") or given.get("w_bit") or 4),
        group=max(0, group),
        zero_points=method != "awq" or bool(given.get("zero_point", True)),
        act_order=bool(given.get("desc_act")),
        ignored=ignored,
    )


def _compressed_tensors(given: Config, ignored: tuple[str, ...]) -> Quantisation | None:
    """The widest scheme of compressed-tensors' config groups (mixed ones are estimated by the first)."""
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return None
    name = sorted(groups)[0]
    group = groups[name] or {}
    weights = group.get("weights") or {}
    bits, kind = int(weights.get("num_bits") or 8), str(weights.get("type") or "int")
    strategy = str(weights.get("strategy") or "channel")
    inputs = group.get("input_activations") or {}
    targets = tuple(str(item) for item in group.get("targets") or () if item != "Linear")
    block = weights.get("block_structure")
    if isinstance(block, str) and "x" in block:
        block = [int(item) for item in block.split("x")]
    method = "fp8" if bits == 8 else "nvfp4" if kind == "float" and strategy == "tensor_group" else "compressed-tensors"
    if bits == 4 and kind == "float" and strategy == "group":
        method = "mxfp4"
    return Quantisation(
        method,
        bits,
        group=int(weights.get("group_size") or 0) if strategy in ("group", "tensor_group") else 0,
        block=(int(block[0]), int(block[1])) if strategy == "block" and block else None,
        zero_points=not weights.get("symmetric", True),
        channel_scales=strategy == "channel",
        input_scales=bool(inputs) and inputs.get("dynamic") is False,
        act_order=weights.get("actorder") == "group",
        ignored=ignored,
        targets=targets,
    )


def _modelopt(given: Config, ignored: tuple[str, ...]) -> tuple[Quantisation | None, str | None]:
    inner = given.get("quantization") if isinstance(given.get("quantization"), Mapping) else given
    assert isinstance(inner, Mapping)
    algorithm = str(inner.get("quant_algo") or "").upper()
    kv = (
        "fp8"
        if str(inner.get("kv_cache_quant_algo") or "").upper() == "FP8"
        else _kv_dtype(given.get("kv_cache_scheme"))
    )
    if "NVFP4" in algorithm or algorithm in ("FP4", "W4A16_NVFP4"):
        group = int(inner.get("group_size") or 16)
        return Quantisation("nvfp4", 4, group=group, input_scales=True, complete=bool(ignored), ignored=ignored), kv
    if algorithm.startswith("MXFP8"):
        return Quantisation("mxfp8", 8, group=32, ignored=ignored), kv
    if "FP8" in algorithm:
        return Quantisation("fp8", 8, input_scales=True, ignored=ignored), kv
    return None, kv


def _kv_dtype(scheme: Any) -> str | None:
    if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8 and scheme.get("type") == "float":
        return "fp8"
    return None
