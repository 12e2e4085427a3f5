"""Engine arguments: either spelling, sizes for people, strict types, nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.footprint.engine_args import AUTO_LENGTH, KNOWN, read_engine_args
from berth.footprint.types import EngineArgs


def test_dashes_and_underscores_are_the_same_names() -> None:
    dashed = read_engine_args({"tensor-parallel-size": 2, "--gpu-memory-utilization": 0.5, "served-model-name": "chat"})
    assert dashed == EngineArgs(tensor_parallel_size=2, gpu_memory_utilization=0.5, rest={"served_model_name": "chat"})


def test_a_name_in_both_spellings_is_refused() -> None:
    with pytest.raises(BerthError, match="max_model_len is given twice"):
        read_engine_args({"max-model-len": 1, "max_model_len": 2})


@pytest.mark.parametrize(
    ("text", "value"), [("32k", 32000), ("32K", 32768), ("1.5G", 1610612736), ("2m", 2_000_000), (" 512 ", 512), (7, 7)]
)
def test_sizes_for_people(text: Any, value: int) -> None:
    assert read_engine_args({"kv_cache_memory_bytes": text}).kv_cache_memory_bytes == value


@pytest.mark.parametrize("text", [-1, "-1", "auto", "AUTO"])
def test_automatic_length_is_kept_as_a_wish(text: Any) -> None:
    engine = read_engine_args({"max_model_len": text})
    assert engine.max_model_len is None
    assert engine.rest == {AUTO_LENGTH: True}


def test_nothing_given_is_everything_at_its_default() -> None:
    assert read_engine_args(dict.fromkeys(KNOWN)) == EngineArgs() == read_engine_args({})


def test_speculation_and_compilation_as_json_text() -> None:
    engine = read_engine_args(
        {"speculative-config": '{"method": "ngram", "num-speculative-tokens": 3}', "compilation-config": "3"}
    )
    assert engine.speculative_config == {"method": "ngram", "num_speculative_tokens": 3}
    assert engine.rest["compilation_config"] == {"mode": 3}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2.0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"enforce_eager": "yes"}, "enforce_eager"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": "most"}, "gpu_memory_utilization"),
        ({"max_model_len": "long"}, "max_model_len"),
        ({"max_model_len": -5}, "max_model_len"),
        ({"concurrency": -1}, "concurrency"),
        ({"speculative_config": "[1]"}, "speculative_config"),
        ({"compilation_config": "{"}, "compilation_config"),
        ({"dtype": 16}, "dtype"),
        ({"dtype": "fp16"}, "bfloat16"),
        ({"kv_cache_dtype": "int3"}, "fp8_e4m3"),
        ({"cudagraph-capture-sizes": "1,2"}, "cudagraph_capture_sizes"),
        ({"compilation_config": {"cudagraph_capture_sizes": ["a"]}}, "cudagraph_capture_sizes"),
        ({"kv_cache_memory_bytes": [1]}, "kv_cache_memory_bytes"),
    ],
)
def test_a_wrong_value_is_named(data: dict[str, Any], named: str) -> None:
    with pytest.raises(BerthError, match=named):
        read_engine_args(data, "engine arguments of chat")


def test_not_a_mapping() -> None:
    with pytest.raises(BerthError, match="not a mapping"):
        read_engine_args(["tensor_parallel_size"])  # type: ignore[arg-type]


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(KNOWN)) | st.text(max_size=8), VALUES, max_size=5))
def test_any_mapping_is_read_or_refused_in_words(data: dict[str, Any]) -> None:
    try:
        engine = read_engine_args(data)
    except BerthError:
        return
    unknown = {name.lstrip("-").replace("-", "_") for name in data} - KNOWN
    assert unknown <= set(engine.rest)
