"""Prompts read by one real engine and answered by another: the KV cache goes over NIXL, and vLLM counts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from berth.plan.apps import load_apps
from berth.plan.planner import make_plan
from berth.ray.serve_config import ServeOptions, berth_apps, gateway_app, gateway_table
from tests.conftest import find_runtime
from tests.unit.engines.small_serve import ROOT, Cluster, running, wait
from tests.unit.plan.helpers import slot

PORT, METRICS_PORT = 23792, 23793
OPTIONS = ServeOptions("127.0.0.1", PORT, drain_s=5.0)
MODELS = ROOT / ".berth" / "models"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
PROMPT = "the quick brown fox jumps over the lazy dog and runs away from the gpu " * 5
APPS: list[dict[str, Any]] = [
    {
        "name": "chat",
        "engine": "llm",
        "model": str(MODELS / "chat"),
        "replicas": 1,
        "vram_mib": 1500,
        "num_cpus": 0.01,
        "engine_args": {
            "max_model_len": 512,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 24,
            # Whatever is counted as cached came from elsewhere.
            "enable_prefix_caching": False,
        },
        "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
        "prefill": {"replicas": 1, "engine_args": {"max_num_seqs": 2}},
    }
]

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The app list above, planned and served as site.yml would: a berth of each, and the gateway."""
    subprocess.run(
        [find_runtime(), "-m", "berth.engines.tiny_models", str(MODELS)], cwd=ROOT, env=os.environ | OFFLINE, check=True
    )
    words = [str(Path(__file__).with_name("gateway_cluster.py")), str(PORT), "{temp}", str(METRICS_PORT)]
    pythonpath = os.environ.get("PYTHONPATH", "")
    with running(
        Cluster, tmp_path_factory.mktemp("sim"), "prefill", words, pythonpath=pythonpath, more=OFFLINE
    ) as made:
        specs = load_apps(APPS)
        place = replace(slot("local-0", 8000, total=10_000), gpu_uuids=("GPU-0",))
        plan = make_plan((place,), [spec.deployment() for spec in specs], "pack")
        apps = list(berth_apps(plan, specs, OPTIONS).values())
        made.tell(apps=[*apps, gateway_app(gateway_table(["chat"], apps), OPTIONS)])
        yield made


def ask(path: str = "/v1/completions", **more: Any) -> requests.Response:
    body = {"model": "chat", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}
    return requests.post(f"http://127.0.0.1:{PORT}{path}", json=body, timeout=120)


def counted() -> dict[str, int]:
    answer = requests.get(f"http://127.0.0.1:{PORT}/healthz", timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, int] = answer.json()["prefill"]["chat"]
    return found


def fetched() -> dict[str, float]:
    """Tokens of prompts whose KV cache came from another engine, by the name of the model that answers."""
    text = requests.get(f"http://127.0.0.1:{METRICS_PORT}/metrics", timeout=30).text
    lines = re.findall(r"^ray_vllm_external_prefix_cache_hits(?:_total)?\{(.*)\} (\S+)$", text, re.MULTILINE)
    return {re.findall(r'model_name="([^"]*)"', labels)[0]: float(value) for labels, value in lines}


def test_one_engine_reads_the_prompt_and_another_answers_from_its_cache(cluster: Cluster) -> None:
    before, tokens = counted(), fetched().get("chat", 0)
    apart = ask().json()
    assert counted() == {**before, "apart": before["apart"] + 1}
    # Several prompts go to one engine alone, which says the same from a cache of its own.
    alone = ask(prompt=[PROMPT, "a"]).json()
    assert counted() == {"apart": before["apart"] + 1, "alone": before["alone"] + 1}
    assert apart["choices"][0]["text"] == alone["choices"][0]["text"]
    assert apart["usage"]["completion_tokens"] == 12
    length = apart["usage"]["prompt_tokens"]
    assert length > 64
    assert "kv_transfer_params" not in {key for key, value in apart.items() if value is not None}
    wait(lambda: fetched().get("chat", 0) - tokens == length, found=fetched)
    assert not fetched().get("chat-prefill"), "the engine that reads prompts fetched one"


def test_streams_chats_tools_and_least_lengths_go_the_same_way(cluster: Cluster) -> None:
    before = counted()["apart"]
    chat = {"messages": [{"role": "user", "content": PROMPT}], "prompt": None, "min_tokens": 4}
    whole = ask("/v1/chat/completions", **chat).json()
    assert whole["usage"]["completion_tokens"] == 12
    streamed = ask("/v1/chat/completions", **chat, stream=True).text
    parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    said = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
    assert said == whole["choices"][0]["message"]["content"]
    assert counted()["apart"] == before + 2


def test_nobody_asks_for_it_by_name_and_nobody_names_an_engine(cluster: Cluster) -> None:
    models = requests.get(f"http://127.0.0.1:{PORT}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in models] == ["chat"]
    assert ask(model="chat-prefill").status_code == 404
    for words in ({"kv_transfer_params": {"remote_host": "10.0.0.1", "remote_port": 1}},):
        for path, more in (("/v1/completions", {}), ("/v1/responses", {"input": "hi"})):
            answer = ask(path, **more, **words)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "kv_transfer_params"
