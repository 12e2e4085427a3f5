"""Our arithmetic against vLLM's own: recorded answers always, vLLM itself where the runtime is there."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from berth.footprint.kv_cache import kv_cache
from berth.footprint.weights import weights
from berth.footprint.weights_draft import draft_of
from tests.unit.footprint.cases import FILES, answered, case, engine_of, model_of

ORACLE = Path(__file__).with_name("oracle.py")
KV_BYTES = 512 << 20
AFTER_LOADING = {"llama_fp8_online"}
"""vLLM quantises these while it loads; on the meta device they are still whole."""


def test_enough_architectures_are_covered() -> None:
    architectures = {case(name)["config"]["architectures"][0] for name in answered()}
    assert len(architectures) >= 50


@pytest.mark.parametrize("name", answered())
def test_parameters_and_bytes_are_those_of_the_model_vllm_builds(name: str) -> None:
    found = case(name)["vllm"]
    model = model_of(name)
    ours = weights(model, dataclasses.replace(engine_of(name), speculative_config=None, enable_lora=False))
    if name in AFTER_LOADING:
        assert ours.tensor_bytes < found["weight_bytes"]
    elif model.quantisation is None:
        assert (ours.parameters, ours.tensor_bytes) == (found["parameters"], found["weight_bytes"])
    else:
        # Scalars beside the weights (scales of attention, shapes) and integer packing of zero points are left out.
        assert ours.tensor_bytes == pytest.approx(found["weight_bytes"], rel=0.01)


@pytest.mark.parametrize("name", answered())
def test_kv_cache_is_the_one_vllm_lays_out(name: str) -> None:
    found = case(name)["vllm"]["kv"]
    ours = kv_cache(model_of(name), engine_of(name))
    if not found["groups"]:
        assert ours.groups == ()
        assert ours.bytes_for(4096) == 0
        return
    length = found["max_model_len"]
    assert ours.bytes_per_block == found["bytes_per_block"]
    assert ours.request_blocks(length) * ours.bytes_per_block == found["request_bytes"]
    assert sorted(group.layers for group in ours.groups) == sorted(group[1] for group in found["groups"])
    assert ours.tokens_in(KV_BYTES, length) == found["tokens"]
    half = found["request_bytes"] // 2 + ours.bytes_per_block
    assert ours.largest_model_len(half, length) == found["largest_model_len"]
    assert ours.context.in_flight == found["in_flight_tokens"] or ours.groups[0].kind in ("mla", "full")


@pytest.mark.parametrize("name", [name for name in answered() if case(name)["vllm"]["draft_bytes"]])
def test_prediction_layers_are_those_vllm_builds_less_what_they_share(name: str) -> None:
    model, found = model_of(name), case(name)["vllm"]["draft_bytes"]
    plain = weights(model, dataclasses.replace(engine_of(name), speculative_config=None))
    ours = weights(model, engine_of(name)).tensor_bytes - plain.tensor_bytes
    shared = 2 * model.first[0].rows(1) * model.hidden * 2
    assert draft_of(model, engine_of(name)).layers
    assert ours == found - shared


@pytest.mark.parametrize("name", [name for name in FILES if name not in answered()])
def test_what_the_cpu_platform_refuses_is_predicted_all_the_same(name: str) -> None:
    model = model_of(name)
    ours = weights(model, engine_of(name))
    plain = weights(
        dataclasses.replace(model, quantisation=None), dataclasses.replace(engine_of(name), quantization=None)
    )
    assert 0 < ours.tensor_bytes <= plain.tensor_bytes
    assert (ours.tensor_bytes < plain.tensor_bytes) == (model.quantisation is not None)
    assert kv_cache(model, engine_of(name)).bytes_per_token > 0


@pytest.mark.runtime
def test_recorded_answers_are_what_vllm_says_now(runtime_python: str) -> None:
    files = [str(FILES[name]) for name in answered()]
    run = subprocess.run(
        [runtime_python, str(ORACLE), *files], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    now = json.loads(run.stdout)
    assert now == {name: case(name)["vllm"] for name in answered()}
