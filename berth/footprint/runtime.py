"""Memory of a running engine beside weights and KV cache: activations, CUDA graphs, context, libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from berth.footprint.architecture import Model
from berth.footprint.architecture_config import Fields, text_config
from berth.footprint.products import GIB, Product
from berth.footprint.runtime_coefficients import COEFFICIENTS, Coefficients
from berth.footprint.types import EngineArgs, Term
from berth.footprint.weights import dtype_bytes, stage_layers

MIB = 1 << 20

SAMPLER_BYTES = 14
"""Bytes per logit at the sampler's peak in the profile run: 16-bit logits, their float32 copy, probabilities and the
exponential noise (v1/sample/sampler.py, ops/topk_topp_sampler.py)."""

SAMPLER_BYTES_BOUND = 40
"""The same where requests bring penalties (two counts of 64 bits and masks per logit, v1/sample/ops/penalties.py,
which the profile run leaves out), or where sampling sorts the logits (values, 64-bit indices and their copies)."""

LARGE_GPU, LARGER_GPU = 70 * GIB // MIB, 160 * GIB // MIB

CONTEXT_MIB, CONTEXT_BOUND_MIB = 460, 580
"""CUDA context with loaded kernels: 0.41 GiB on A100, 0.45 on H100, 0.5 to 0.6 on H200 (total less free at start, and
nvidia-smi less the engine's own sum, of the shared logs)."""

NCCL_MIB, NCCL_BOUND_MIB = 200, 450
"""Communicators and all-reduce buffers of several ranks before Hopper."""

NVLS_MIB, NVLS_BOUND_MIB = 1100, 2000
"""The same from compute capability 9.0 on, where NCCL registers NVLink SHARP buffers."""

GRAPHS_BOUND, UNIFIED_BOUND = 1.25, 1.75
"""What the bound multiplies the graphs' expected value and the host's share of unified memory by."""

MLA_WORKSPACE_TOKENS = 64 * 1024
"""Most tokens of MLA's chunked-prefill workspace (mla_attention.py: determine_chunked_prefill_workspace_size)."""

ENCODER_ITEM_TOKENS = {
    "Qwen2VL": 16384, "Qwen2_5_VL": 16384, "Qwen2_5Omni": 16384, "Qwen3VL": 153600, "Qwen3_5": 16384,
    "DotsOCR": 14400, "Glm4v": 24576,
}  # fmt: skip
"""Most tokens of one multimodal item by architecture, where it exceeds a batch: as logged ("Encoder cache will be
initialized with a budget of ... tokens"; GLM-4V: its processor's limit). Other models' items fit into a batch."""

IMAGE_TOKENS = 16384
"""Most tokens of an image, where a video would be larger."""

DEEPSTACK = (8, 16, 24)
"""Qwen3-VL's class default of deepstack_visual_indexes: each layer's features are kept beside the output."""

TOWERS = ("vision_config", "visual", "audio_config")

ENCODER_PATCHES = 65536
"""Most patches that one encoder run of the profile works on (16384 tokens of four patches each)."""


@dataclass(frozen=True)
class Batch:
    """Sizes of a batch as vLLM would take them; ``notes`` tell which were not given and on what they depend."""

    tokens: int
    sequences: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a model that activations depend on, per token and before division by ranks."""

    hidden: int
    vocab: int
    dense: int
    expert: int
    experts_per_token: int
    experts: int
    attention: int
    latent: int


def batch_of(model: Model, engine: EngineArgs, gpu: Product | None, model_len: int) -> Batch:
    """max_num_batched_tokens and max_num_seqs: as given, else vLLM 0.29's defaults of the OpenAI server for the GPU.

    EngineArgs.get_batch_defaults: 16384 / 1024 from 160 GiB on, 8192 / 1024 from 70 GiB on (A100 excepted), else
    2048 / 256. Without a GPU 8192 / 256 are taken.
    """
    tokens, sequences = _defaults(gpu)
    notes = []
    if gpu is None and None in (engine.max_num_batched_tokens, engine.max_num_seqs):
        notes.append(
            f"no GPU named: vLLM's batch defaults depend on it, {engine.max_num_batched_tokens or tokens} tokens and "
            f"{engine.max_num_seqs or sequences} sequences taken"
        )
    if engine.rest.get("performance_mode") == "throughput":
        tokens, sequences = 2 * tokens, 2 * sequences
    sequences = engine.max_num_seqs or sequences
    if engine.max_num_batched_tokens is not None:
        tokens = engine.max_num_batched_tokens
    else:
        # Encoders and engines without chunked prefill take a whole prompt in one batch.
        whole = model.encoder_only or engine.rest.get("enable_chunked_prefill") is False
        tokens = min(sequences * model_len, max(tokens, model_len) if whole else tokens)
    return Batch(max(1, tokens), max(1, min(sequences, tokens)), tuple(notes))


def _defaults(gpu: Product | None) -> tuple[int, int]:
    if gpu is None:
        return 8192, 256
    if gpu.total_mib >= LARGER_GPU:
        return 16384, 1024
    if gpu.total_mib >= LARGE_GPU and "a100" not in gpu.name.lower():
        return 8192, 1024
    return 2048, 256


def sizes_of(model: Model, config: Mapping[str, Any]) -> Sizes:
    """The dimensions activations depend on, from config.json."""
    fields = Fields(text_config(config), model.model_type)
    per_token = fields.number("num_experts_per_tok") or fields.number("top_k_experts") or fields.number("moe_topk")
    expert = fields.number("moe_intermediate_size") or fields.number("expert_intermediate_size")
    attention = latent = 0
    for layer in model.layers:
        for cache in layer.caches:
            if cache.kind == "mla":
                latent = max(latent, cache.head_size)
            elif cache.state is not None:
                state = cache.state
                inner = max(state.inner, state.heads * state.head_dim)
                # Recurrent layers keep their projection, the convolution's output and float32 copies of both.
                attention = max(attention, 6 * (inner + 2 * state.key_heads * state.key_dim))
            else:
                attention = max(attention, (2 * model.heads + 2 * cache.kv_heads) * cache.head_size)
    if latent:
        attention = model.heads * (4 * latent // 3 + fields.number("v_head_dim", 128))
    return Sizes(
        hidden=model.hidden,
        vocab=model.vocab,
        dense=model.intermediate or 4 * model.hidden,
        expert=expert or (model.intermediate if model.experts else 0),
        experts_per_token=(per_token or 2) if model.experts else 0,
        experts=model.experts,
        attention=attention,
        latent=latent,
    )


def forward_bytes(sizes: Sizes, tokens: int, ranks: int, width: int = 2) -> int:
    """Peak of one decoder layer over a full batch on one rank.

    Residual and hidden states, and the widest of: gated MLP (gate and up, and their product), attention's projections,
    or experts (two workspaces of experts per token: fused_moe/experts/triton_moe.py, workspace_shapes).
    """
    stream = 2 * sizes.hidden
    dense = 3 * sizes.dense // ranks
    attention = sizes.attention // ranks
    experts = 0
    if sizes.experts:
        inner = sizes.expert // ranks or 1
        workspaces = max(inner, sizes.hidden) + max(2 * inner, sizes.hidden)
        experts = sizes.experts_per_token * workspaces + sizes.hidden + 2 * sizes.experts
        dense = 0
    return int(tokens * width * (stream + max(dense, attention, experts)))


def sampler_bytes(sizes: Sizes, batch: Batch, drafts: int, bound: bool) -> int:
    """Peak of sampling one token for every sequence; with speculation the bound counts every drafted token."""
    logits = batch.sequences * sizes.vocab
    if not bound:
        return SAMPLER_BYTES * logits
    return max(
        SAMPLER_BYTES_BOUND * logits, SAMPLER_BYTES * min(batch.tokens, batch.sequences * (1 + drafts)) * sizes.vocab
    )


def encoder_bytes(model: Model, config: Mapping[str, Any], engine: EngineArgs, batch: Batch) -> tuple[int, int]:
    """(peak of the vision or audio encoder, its outputs that stay while the decoder runs), in bytes on one rank.

    The profile run feeds the largest item (v1/worker/gpu_model_runner.py, profile_run).
    """
    if not _encodes(model, engine):
        return 0, 0
    tower = next((config[key] for key in TOWERS if isinstance(config.get(key), Mapping)), None)
    vision: Mapping[str, Any] = tower or {}
    fields = Fields(vision)
    hidden = fields.number("hidden_size") or fields.number("embed_dim") or 1152
    if hidden == model.hidden and fields.number("embed_dim"):
        hidden = fields.number("embed_dim")
    inner = fields.number("intermediate_size", 4 * hidden)
    tokens = max(batch.tokens, _item_tokens(model, engine))
    ranks = 1 if engine.rest.get("mm_encoder_tp_mode") == "data" else engine.tensor_parallel_size
    patches = min(4 * tokens, ENCODER_PATCHES)
    deep = vision.get("deepstack_visual_indexes") or (DEEPSTACK if model.architecture.startswith("Qwen3VL") else ())
    outputs = tokens * model.hidden * 2 * (1 + len(deep))
    return patches * 2 * (2 * hidden + 2 * inner // ranks), outputs


def _item_tokens(model: Model, engine: EngineArgs) -> int:
    tokens = next((size for name, size in ENCODER_ITEM_TOKENS.items() if model.architecture.startswith(name)), 0)
    limits = engine.rest.get("limit_mm_per_prompt")
    video = limits.get("video") if isinstance(limits, Mapping) else None
    return min(tokens, IMAGE_TOKENS) if video == 0 else tokens


def _encodes(model: Model, engine: EngineArgs) -> bool:
    limits = engine.rest.get("limit_mm_per_prompt")
    off = isinstance(limits, Mapping) and limits and not any(limits.values())
    skipped = engine.rest.get("language_model_only") or engine.rest.get("skip_mm_profiling")
    return bool(model.everywhere or _item_tokens(model, engine)) and not (off or skipped)


def activation(
    model: Model, config: Mapping[str, Any], engine: EngineArgs, batch: Batch, fitted: Coefficients = COEFFICIENTS
) -> Term:
    """Peak of transient tensors: the largest of encoder, decoder layer and sampler, as the profile run meets them."""
    sizes, ranks = sizes_of(model, config), engine.tensor_parallel_size
    width = dtype_bytes(model, engine)
    forward = forward_bytes(sizes, batch.tokens, ranks, width)
    forward += _lora_bytes(sizes, engine, batch)
    stream = batch.tokens * sizes.hidden * width
    pooled = model.pooling or engine.runner == "pooling" or model.encoder_only
    drafts = int((engine.speculative_config or {}).get("num_speculative_tokens") or 0)
    sample = 2 * stream if pooled else stream + sampler_bytes(sizes, batch, drafts, bound=False)
    bound = 2 * stream if pooled else stream + sampler_bytes(sizes, batch, drafts, bound=True)
    encoder, outputs = encoder_bytes(model, config, engine, batch)
    expected = max(encoder, outputs + max(forward, sample)) / MIB
    worst = max(encoder, outputs + max(forward, bound)) / MIB
    last = "pooler" if pooled else "sampler"
    formula = (
        f"max(encoder {encoder / MIB:.0f}, encoder outputs {outputs / MIB:.0f} + max(layer {forward / MIB:.0f} for "
        f"{batch.tokens} tokens, {last} {sample / MIB:.0f} for {batch.sequences} sequences))"
    )
    return Term(
        "activation",
        expected,
        worst + fitted.margin_rest,
        formula,
        "vLLM 0.29 v1/worker/gpu_model_runner.py profile_run, v1/sample, fused_moe; bound: penalties or sorting",
    )


def _lora_bytes(sizes: Sizes, engine: EngineArgs, batch: Batch) -> int:
    """Punica's float32 buffer for the widest fused projection (lora/punica_wrapper/punica_gpu.py)."""
    return 3 * batch.tokens * engine.max_lora_rank * 4 if engine.enable_lora else 0


def capture_sizes(engine: EngineArgs, batch: Batch, gpu: Product | None = None) -> tuple[int, ...]:
    """Batch sizes that vLLM captures CUDA graphs for, ascending; none when it runs eagerly.

    VllmConfig._set_cudagraph_sizes: 1, 2, 4, every 8th below 256, every 16th up to min(2 x sequences x tokens per
    step, 512; 1024 on data-center Blackwell), and with speculation the uniform decode sizes.
    """
    compilation = engine.rest.get("compilation_config") or {}
    mode = str(engine.rest.get("cudagraph_mode") or compilation.get("cudagraph_mode") or "").upper()
    if engine.enforce_eager or mode == "NONE" or engine.max_cudagraph_capture_size == 0:
        return ()
    given = engine.rest.get("cudagraph_capture_sizes") or compilation.get("cudagraph_capture_sizes")
    if isinstance(given, list):
        return tuple(sorted({int(size) for size in given if int(size) <= batch.tokens}))
    step = 1 + int((engine.speculative_config or {}).get("num_speculative_tokens") or 0)
    ceiling = 1024 if gpu is not None and 10 <= gpu.generation < 11 else 512
    largest = engine.max_cudagraph_capture_size or int(compilation.get("max_cudagraph_capture_size") or 0)
    explicit = bool(largest)
    largest = min(batch.tokens, largest or min(batch.sequences * step * 2, ceiling))
    sizes = set(_grid(largest))
    if batch.tokens <= largest:
        sizes.add(batch.tokens)
    if step > 1 and not explicit:
        counts = {*_grid(min(batch.sequences, ceiling)), min(batch.sequences, ceiling)}
        sizes |= {count * step for count in counts if count * step <= largest}
    return tuple(sorted(sizes))


def _grid(largest: int) -> list[int]:
    small = [size for size in (1, 2, 4) if size <= largest]
    return small + list(range(8, min(largest + 1, 256), 8)) + list(range(256, largest + 1, 16))


def graphs(
    model: Model, engine: EngineArgs, batch: Batch, gpu: Product | None = None, fitted: Coefficients = COEFFICIENTS
) -> Term:
    """CUDA graphs: captured sizes x layers x a fitted cost of each, more where several ranks communicate."""
    sizes = capture_sizes(engine, batch, gpu)
    source = "vLLM 0.29 config/vllm.py _set_cudagraph_sizes; cost per graph fitted (runtime_coefficients.py)"
    if not sizes:
        return Term("cuda_graphs", 0.0, 0.0, "no graphs are captured", source)
    count = graph_units(model, engine, sizes)
    each = fitted.graph_other if is_other(model) else fitted.graph_dense
    if engine.enable_lora:
        # Captured with and without adapters (cudagraph_specialize_lora).
        count *= 2
    ranks = fitted.graph_ranks * (len(sizes) / 51) if engine.tensor_parallel_size > 1 else 0.0
    expected = count * each + ranks
    formula = (
        f"{len(sizes)} sizes up to {sizes[-1]} x layers of a stage = {count} graphs x {each:g} MiB + ranks {ranks:.0f}"
    )
    return Term("cuda_graphs", expected, GRAPHS_BOUND * expected + fitted.margin_graphs, formula, source)


def graph_units(model: Model, engine: EngineArgs, sizes: tuple[int, ...]) -> int:
    """Captured sizes x layers of the longest pipeline stage."""
    longest = max(end - begin for begin, end in stage_layers(len(model.layers), engine.pipeline_parallel_size))
    return len(sizes) * max(1, longest)


def is_other(model: Model) -> bool:
    """Whether a layer launches many more kernels than a dense attention layer: experts, recurrent states."""
    return bool(model.experts) or model.hybrid


def overhead(
    model: Model,
    config: Mapping[str, Any],
    engine: EngineArgs,
    gpu: Product | None,
    model_len: int,
    fitted: Coefficients = COEFFICIENTS,
) -> tuple[Term, ...]:
    """CUDA context, CUDA libraries and workspaces, and with several ranks the communicators."""
    unified = fitted.unified if gpu is not None and gpu.unified else 0.0
    latent = sizes_of(model, config).latent
    workspace = min(max(8 * model_len, 4096), MLA_WORKSPACE_TOKENS) * latent * 2 / MIB if latent else 0.0
    libraries = fitted.non_torch + workspace
    terms = [
        Term("cuda_context", CONTEXT_MIB, CONTEXT_BOUND_MIB, "CUDA context and kernels of one process",
             "start-up logs: total less free at start; nvidia-smi less the engine's own sum"),
        Term("non_torch", libraries + unified, libraries + UNIFIED_BOUND * unified,
             f"libraries {fitted.non_torch:.0f} + memory shared with the host {unified:.0f} + MLA workspace "
             f"{workspace:.0f}", "fitted to start-up logs (runtime_coefficients.py); vLLM 0.29 mla_attention.py"),
    ]  # fmt: skip
    if engine.tensor_parallel_size * engine.pipeline_parallel_size * engine.data_parallel_size > 1:
        # Workstation Blackwell (12.x) has no NVLink.
        hopper = gpu is not None and 9 <= gpu.generation < 11
        few, many = (NVLS_MIB, NVLS_BOUND_MIB) if hopper else (NCCL_MIB, NCCL_BOUND_MIB)
        terms.append(
            Term("communication", few, many, f"NCCL and all-reduce buffers{', NVLink SHARP' if hopper else ''}",
                 "start-up logs with several ranks; vLLM 0.29 distributed/device_communicators")
        )  # fmt: skip
    return tuple(terms)
