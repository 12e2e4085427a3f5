"""Activations, graphs and overhead: vLLM's own sizes, and terms that move the right way."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.footprint.products import Product, product
from berth.footprint.runtime import activation, batch_of, capture_sizes, graphs, overhead, sizes_of
from berth.footprint.types import EngineArgs
from tests.unit.footprint.cases import case, model_of

NAMES = ("llama", "qwen3_moe", "deepseek_v3", "gemma3_mm", "bert", "jamba", "gpt_oss", "qwen2_5_vl")
GPUS = ("T4", "L40S", "A100", "H100", "B200", "GB10")

SCHEDULES = [
    {"max_num_seqs": seqs, "max_num_batched_tokens": tokens, "drafts": drafts, "largest": largest, "sizes": sizes}
    for seqs, tokens, drafts, largest, sizes in [
        (256, 2048, 0, None, None),
        (16, 2048, 0, None, None),
        (1, 2048, 0, None, None),
        (1024, 8192, 0, None, None),
        (256, 300, 0, None, None),
        (32, 2048, 3, None, None),
        (200, 8192, 2, None, None),
        (256, 2048, 0, 48, None),
        (256, 2048, 0, 100, None),
        (64, 64, 0, None, None),
        (256, 2048, 4, 64, None),
        (256, 2048, 0, None, [4, 1, 16, 4096]),
    ]
]

ORACLE = """
import json, sys
from types import SimpleNamespace as S
from vllm.config.vllm import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine import arg_utils
from vllm.usage.usage_lib import UsageContext
asked = json.load(sys.stdin)
sizes = []
for one in asked["schedules"]:
    compilation = S(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, max_cudagraph_capture_size=one["largest"],
                    cudagraph_capture_sizes=one["sizes"], post_init_cudagraph_sizes=lambda: None,
                    pass_config=S(enable_sp=False))
    config = S(model_config=S(enforce_eager=False), compilation_config=compilation, performance_mode="balanced",
               scheduler_config=S(**{key: one[key] for key in ("max_num_seqs", "max_num_batched_tokens")}),
               parallel_config=S(tensor_parallel_size=1), speculative_config=None,
               uniform_decode_query_len=1 + one["drafts"], num_speculative_tokens=one["drafts"])
    VllmConfig._set_cudagraph_sizes(config)
    sizes.append(compilation.cudagraph_capture_sizes)
defaults = []
for name, mib in asked["gpus"]:
    arg_utils.current_platform = S(get_device_total_memory=lambda mib=mib: mib << 20, is_tpu=lambda: False,
                                   get_device_name=lambda name=name: name, is_cpu=lambda: False)
    tokens, seqs = arg_utils.EngineArgs.get_batch_defaults(1)
    defaults.append([tokens[UsageContext.OPENAI_API_SERVER], seqs[UsageContext.OPENAI_API_SERVER]])
print("ANSWER" + json.dumps({"sizes": sizes, "defaults": defaults}))
"""


def _engine(schedule: dict[str, Any]) -> EngineArgs:
    return EngineArgs(
        max_num_seqs=schedule["max_num_seqs"],
        max_num_batched_tokens=schedule["max_num_batched_tokens"],
        max_cudagraph_capture_size=schedule["largest"],
        speculative_config={"num_speculative_tokens": schedule["drafts"]} if schedule["drafts"] else None,
        rest={"compilation_config": {"cudagraph_capture_sizes": schedule["sizes"]}} if schedule["sizes"] else {},
    )


@pytest.mark.runtime
def test_capture_sizes_and_batch_defaults_are_vllms(runtime_python: str) -> None:
    gpus = [product(name) for name in GPUS]
    asked = {"schedules": SCHEDULES, "gpus": [(gpu.name, gpu.total_mib) for gpu in gpus]}
    done = subprocess.run(
        [runtime_python, "-c", ORACLE], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, done.stderr[-2000:]
    answer = json.loads(lines[0].removeprefix("ANSWER"))
    model = model_of("llama")
    ours = [list(capture_sizes(engine, batch_of(model, engine, None, 4096))) for engine in map(_engine, SCHEDULES)]
    assert ours == answer["sizes"]
    batches = [batch_of(model, EngineArgs(), gpu, 131072) for gpu in gpus]
    assert [[batch.tokens, batch.sequences] for batch in batches] == answer["defaults"]


def test_no_graphs_where_none_are_captured() -> None:
    model = model_of("llama")
    for engine in (
        EngineArgs(enforce_eager=True),
        EngineArgs(max_cudagraph_capture_size=0),
        EngineArgs(rest={"compilation_config": {"cudagraph_mode": "NONE"}}),
    ):
        term = graphs(model, engine, batch_of(model, engine, None, 2048))
        assert (term.expected_mib, term.safe_mib) == (0, 0)


def test_encoders_take_a_whole_prompt_in_one_batch() -> None:
    engine = EngineArgs()
    assert batch_of(model_of("bert"), engine, product("T4"), 8192).tokens == 8192
    assert batch_of(model_of("llama"), engine, product("T4"), 8192).tokens == 2048


def test_a_batch_that_was_not_given_says_so() -> None:
    assert batch_of(model_of("llama"), EngineArgs(), None, 2048).notes
    assert not batch_of(model_of("llama"), EngineArgs(max_num_seqs=8, max_num_batched_tokens=512), None, 2048).notes


@given(st.sampled_from(NAMES), st.sampled_from([1, 2, 4]), st.integers(1, 512), st.integers(64, 16384))
@settings(max_examples=60, deadline=None)
def test_larger_batches_never_take_less_and_bounds_are_bounds(name: str, ranks: int, seqs: int, tokens: int) -> None:
    model, config = model_of(name), case(name)["config"]
    engine = EngineArgs(tensor_parallel_size=ranks, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    more = dataclasses.replace(engine, max_num_seqs=2 * seqs, max_num_batched_tokens=2 * tokens)
    one, two = (activation(model, config, item, batch_of(model, item, None, 4096)) for item in (engine, more))
    assert 0 < one.expected_mib <= two.expected_mib
    assert one.expected_mib <= one.safe_mib <= two.safe_mib


def test_the_sampler_holds_every_sequence_times_the_vocabulary() -> None:
    model, config = model_of("llama"), case("llama")["config"]
    engine = EngineArgs(max_num_seqs=100, max_num_batched_tokens=100)
    wide = dataclasses.replace(model, vocab=1_000_000)
    term = activation(wide, config, engine, batch_of(wide, engine, None, 4096))
    assert term.expected_mib == pytest.approx((14 * 100 * 1_000_000 + 100 * model.hidden * 2) / (1 << 20))


def test_images_switched_off_are_not_profiled() -> None:
    model, config = model_of("qwen2_5_vl"), case("qwen2_5_vl")["config"]
    sized = EngineArgs(max_num_seqs=1, max_num_batched_tokens=64)
    off = dataclasses.replace(sized, rest={"limit_mm_per_prompt": {"image": 0, "video": 0}})
    seen, unseen = (activation(model, config, item, batch_of(model, item, None, 4096)) for item in (sized, off))
    assert seen.expected_mib > 10 * unseen.expected_mib


def test_experts_count_by_token_not_by_model() -> None:
    sizes = sizes_of(model_of("qwen3_moe"), case("qwen3_moe")["config"])
    assert sizes.experts_per_token == case("qwen3_moe")["config"]["num_experts_per_tok"]
    assert sizes.experts > sizes.experts_per_token


def test_ranks_communicate_and_more_so_over_nvlink_sharp() -> None:
    model, config = model_of("llama"), case("llama")["config"]

    def names(engine: EngineArgs, gpu: Product) -> dict[str, float]:
        return {term.name: term.expected_mib for term in overhead(model, config, engine, gpu, 4096)}

    two = EngineArgs(tensor_parallel_size=2)
    assert "communication" not in names(EngineArgs(), product("H100"))
    assert names(two, product("H100"))["communication"] > names(two, product("A100"))["communication"]
    assert names(two, product("RTX PRO 6000"))["communication"] == names(two, product("A100"))["communication"]
    assert names(EngineArgs(), product("GB10"))["non_torch"] > names(EngineArgs(), product("H100"))["non_torch"]
