"""Ask vLLM itself: parameters and KV cache of the configs in ``configs/``, without weights and without an engine.

Runs inside the runtime environment: ``python oracle.py FILE.json ...`` prints one JSON object, name -> answer. Each
model is built on torch's meta device, at tensor parallel size 1; nothing is allocated. Four things are set to what a
CUDA platform has, because the CPU platform differs and Berth predicts for GPUs: kernel blocks are multiples of 16
tokens, the KV cache layout is the CUDA default (LBNHC), scheduling is asynchronous, and recurrent states keep the dtype
the model asks for. Image transforms (torchvision) are not there and not needed: an empty package stands for them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", TRANSFORMERS_VERBOSITY="error"
)
KV_BYTES = 512 << 20


def _as_cuda() -> None:
    """Give the CPU platform the cache rules of the CUDA one; inspect models in this process."""
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.attention.backends.mla import cpu_mla

    registry._run_in_subprocess = lambda function: function()
    cpu_attn.CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda: [MultipleOf(16)])
    cpu_mla.CPUMLABackend.get_supported_kernel_block_sizes = staticmethod(lambda: [16])
    original = CpuPlatform.check_and_update_config.__func__

    def as_cuda(cls: Any, config: Any) -> None:
        before = config.cache_config.mamba_ssm_cache_dtype
        original(cls, config)
        config.cache_config.mamba_ssm_cache_dtype = before
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(as_cuda)


class _Anything(type):
    """The type of classes that have every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Empty(types.ModuleType):
    """A package of which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``torchvision`` and everything under it, empty."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: Any) -> Any:
        return _Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def _pixtral_without_vision() -> None:
    """transformers leaves Pixtral's rotary class out where it has no torchvision; it has no parameters."""
    import torch
    from transformers.models.pixtral import modeling_pixtral

    if not hasattr(modeling_pixtral, "PixtralRotaryEmbedding"):
        modeling_pixtral.PixtralRotaryEmbedding = torch.nn.Module


def _register_config(model_type: str) -> None:
    """A plain config class for models whose own comes as code with their checkpoint."""
    from transformers import AutoConfig, PretrainedConfig

    AutoConfig.register(model_type, type(f"Config_{model_type}", (PretrainedConfig,), {"model_type": model_type}))


def _distributed() -> None:
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with tempfile.NamedTemporaryFile(delete=False) as store:
        pass
    init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)


def _engine_config(folder: Path, case: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    (folder / "config.json").write_text(json.dumps(case["config"]))
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_BYTES,
        **case["engine"],
    ).create_engine_config()


def _models(config: Any) -> list[Any]:
    """The model, and the draft model of a speculative config, on the meta device."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    models = []
    with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
        models.append(initialize_model(config))
        speculative = config.speculative_config
        if speculative is not None and speculative.draft_model_config is not None and speculative.method != "ngram":
            models.append(initialize_model(config, model_config=speculative.draft_model_config, prefix="draft"))
    return models


def _specs(config: Any) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import AttentionSpec

    specs = {}
    for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        if spec := layer.get_kv_cache_spec(config):
            specs[name] = layer.get_attn_backend().customize_spec(spec) if isinstance(spec, AttentionSpec) else spec
    return specs


def _kv_answer(config: Any) -> dict[str, Any]:
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils as kv
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs

    current_platform.update_block_size_for_backend(config)
    specs = _specs(config)
    register_all_kvcache_specs(config)
    config.cache_config.kv_cache_layout = "LBNHC"
    groups = kv.get_kv_cache_groups(config, dict(specs))
    if not groups:
        return {"groups": []}
    ours = kv.get_kv_cache_configs(config, [specs], [KV_BYTES])
    scheduler = kv.generate_scheduler_kv_cache_config(ours)
    per_block = kv._pool_bytes_per_block(groups)
    needed = kv._max_memory_usage_bytes_from_groups(config, groups)
    return {
        "groups": [[type(g.kv_cache_spec).__name__, len(g.layer_names), g.kv_cache_spec.block_size] for g in groups],
        "block_size": config.cache_config.block_size,
        "bytes_per_block": per_block,
        "request_bytes": needed,
        "blocks": scheduler.num_blocks,
        "tokens": kv.get_kv_cache_capacity(config, scheduler)[0],
        "largest_model_len": kv._estimate_max_model_len_from_groups(config, groups, needed // 2),
        "max_model_len": config.model_config.max_model_len,
        "in_flight_tokens": config.max_in_flight_tokens,
    }


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """vLLM's figures for one case; ``error`` where this vLLM cannot build it on this platform."""
    from vllm.config import set_current_vllm_config

    with tempfile.TemporaryDirectory() as folder:
        config = _engine_config(Path(folder), case)
        with set_current_vllm_config(config):
            models = _models(config)
            tensors = {f"{i}.{n}": p for i, m in enumerate(models) for n, p in m.named_parameters()}
            result: dict[str, Any] = {
                "parameters": sum(p.numel() for n, p in tensors.items() if n.startswith("0.")),
                "weight_bytes": sum(p.numel() * p.element_size() for n, p in tensors.items() if n.startswith("0.")),
                "draft_bytes": sum(p.numel() * p.element_size() for n, p in tensors.items() if n.startswith("1.")),
                "kv": _kv_answer(config),
            }
            if os.environ.get("ORACLE_TENSORS"):
                result["tensors"] = {n: [str(p.dtype)[6:], list(p.shape)] for n, p in tensors.items()}
    return result


def main(files: list[str]) -> dict[str, Any]:
    """The answers of every case file, by its stem."""
    from transformers.utils import import_utils

    # transformers must know that there is none, and remember it, before the empty one stands.
    import_utils.is_torchvision_available()
    sys.meta_path.append(_NoTorchvision())
    _pixtral_without_vision()
    _as_cuda()
    for model_type in ("internlm2", "minicpm", "internvl_chat", "dots_ocr"):
        _register_config(model_type)
    started = False
    answers: dict[str, Any] = {}
    for file in files:
        case = json.loads(Path(file).read_text())
        try:
            if not started:
                from vllm.config import VllmConfig, set_current_vllm_config

                with set_current_vllm_config(VllmConfig()):
                    _distributed()
                started = True
            answers[Path(file).stem] = answer(case)
            print(Path(file).stem, "answered", file=sys.stderr, flush=True)
        except Exception as error:  # each case stands alone: what vLLM refuses here is an answer too
            answers[Path(file).stem] = {"error": f"{type(error).__name__}: {error}"[:300]}
            if os.environ.get("ORACLE_TENSORS"):
                traceback.print_exc()
    return answers


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    print(json.dumps(main(sys.argv[1:])), file=out, flush=True)
