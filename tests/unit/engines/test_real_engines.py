"""vLLM's own engines behind the gateway, on two nodes: what light ones cannot show.

Prompts read by one engine and answered by another, a model that sees, and one that sleeps.
"""

from __future__ import annotations

import base64
import json
import operator
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import requests

from berth.plan.apps import load_apps
from berth.plan.planner import make_plan
from berth.ray.serve_config import ServeOptions, berth_apps, gateway_app, gateway_table
from tests.conftest import find_runtime
from tests.unit.engines.small_serve import ROOT, Cluster, running, wait
from tests.unit.plan.helpers import slot

PORT = 23792
OPTIONS = ServeOptions("127.0.0.1", PORT, drain_s=5.0)
MODELS = ROOT / ".berth" / "models"
NAMES = ("gpu-0", "gpu-1")
VRAM_MIB = 8000
RED, BLUE = (255, 0, 0), (0, 0, 255)
PROMPT = "the quick brown fox jumps over the lazy dog and runs away from the gpu " * 5
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
SMALL = {"max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
SHARED = {
    "engine": "llm",
    "replicas": 1,
    "vram_mib": 1500,
    "num_cpus": 0.01,
    "env": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **OFFLINE},
}
APPS: list[dict[str, Any]] = [
    {
        **SHARED,
        "name": "chat",
        "model": str(MODELS / "chat"),
        "pins": ["GPU-0"],
        # Whatever is counted as cached came from elsewhere.
        "engine_args": {**SMALL, "enable_prefix_caching": False},
        "prefill": {"pins": ["GPU-1"], "engine_args": {"max_num_seqs": 2}},
    },
    {
        **SHARED,
        "name": "sees",
        "model": str(MODELS / "vision"),
        "replicas": 2,
        "placement": "pool",
        "strategy": "spread",
        "engine_args": SMALL,
        "sleep": {"after_s": 5},
    },
]

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The app list above, planned and served as site.yml would: each berth on its slot, and the gateway."""
    build = [find_runtime(), "-m", "berth.engines.tiny_models", str(MODELS), "chat", "vision"]
    subprocess.run(build, cwd=ROOT, env=os.environ | OFFLINE, check=True)
    words = ["-m", "tests.unit.engines.pool_cluster", str(PORT), str(VRAM_MIB), *NAMES]
    with running(Cluster, tmp_path_factory.mktemp("sim"), "engines", words, len(NAMES), more=OFFLINE) as made:
        specs = load_apps(APPS)
        places = [replace(slot(name, VRAM_MIB, total=10_000), gpu_uuids=(f"GPU-{name[-1]}",)) for name in NAMES]
        plan = make_plan(tuple(places), [spec.deployment() for spec in specs], "pack")
        assert not plan.unplaced
        apps = list(berth_apps(plan, specs, OPTIONS).values())
        models = [spec.name for spec in specs if not spec.prefill_of]
        made.tell(apps=[*apps, gateway_app(gateway_table(models, apps), OPTIONS)])
        yield made


def ask(path: str = "/v1/completions", **more: Any) -> requests.Response:
    body = {"model": "chat", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}
    return requests.post(f"http://127.0.0.1:{PORT}{path}", json=body, timeout=120)


def counted() -> dict[str, int]:
    answer = requests.get(f"http://127.0.0.1:{PORT}/healthz", timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, int] = answer.json()["prefill"]["chat"]
    return found


def counter(cluster: Cluster, name: str, model: str) -> list[float]:
    """One of vLLM's counters for a model on each node that has an engine of it, from Ray's metrics ports."""
    found = []
    for node in cluster.tell(details=True)["nodes"]:
        text = requests.get(f"http://127.0.0.1:{node['metrics_port']}/metrics", timeout=30).text
        lines = re.findall(rf"^ray_vllm_{name}(?:_total)?\{{(.*)\}} (\S+)$", text, re.MULTILINE)
        values = [float(value) for labels, value in lines if f'model_name="{model}"' in labels]
        found += [sum(values)] if values else []
    return found


def fetched(cluster: Cluster, model: str) -> float:
    """Tokens of prompts whose KV cache came to this model's engine from another one."""
    return sum(counter(cluster, "external_prefix_cache_hits", model))


def test_one_engine_reads_the_prompt_and_another_answers_from_its_cache(cluster: Cluster) -> None:
    before, tokens = counted(), fetched(cluster, "chat")
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
    wait(lambda: fetched(cluster, "chat") - tokens == length, found=lambda: fetched(cluster, "chat"))
    assert not fetched(cluster, "chat-prefill"), "the engine that reads prompts fetched one"


def test_streams_chats_and_least_lengths_go_the_same_way(cluster: Cluster) -> None:
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
    assert [model["id"] for model in models] == ["chat", "sees"]
    assert ask(model="chat-prefill").status_code == 404
    for path, more in (("/v1/completions", {}), ("/v1/responses", {"input": "hi"})):
        answer = ask(path, **more, kv_transfer_params={"remote_host": "10.0.0.1", "remote_port": 1})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "kv_transfer_params"


def picture(*colour: int) -> dict[str, Any]:
    """40 x 30 pixels of a colour (red, green, blue: 0 to 255), as a PNG in a data URL."""
    rows = (b"\0" + bytes(colour) * 40) * 30
    parts = {b"IHDR": struct.pack(">IIBBBBB", 40, 30, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    ]
    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_a_model_that_sees_is_shown_pictures_as_openais_are(cluster: Cluster) -> None:
    def seen(*pictures: dict[str, Any], **more: Any) -> requests.Response:
        content = [{"type": "text", "text": "what is it"}, *pictures]
        chat = {"model": "sees", "prompt": None, "messages": [{"role": "user", "content": content}]}
        return ask("/v1/chat/completions", **chat, logprobs=True, **more)

    def told(*pictures: dict[str, Any]) -> tuple[int, list[float]]:
        answer = seen(*pictures).json()
        return answer["usage"]["prompt_tokens"], [
            round(item["logprob"], 3) for item in answer["choices"][0]["logprobs"]["content"]
        ]

    (nothing, _), (red, one), (blue, other) = told(), told(picture(*RED)), told(picture(*BLUE))
    assert red == blue == nothing + 4, "four tokens of a picture"
    assert one != other, "it did not look"
    assert told(picture(*RED))[1] == pytest.approx(one, abs=0.05)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    refused = seen(broken)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error"), refused.text
    elsewhere = seen({"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}})
    assert (elsewhere.status_code, "allowed_media_domains" in elsewhere.text) == (400, True), elsewhere.text
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}, picture(*RED)]}]
    blind = ask("/v1/chat/completions", prompt=None, messages=chat)
    assert blind.status_code == 400, "a model that does not see says so"


def test_a_pool_of_them_has_one_on_each_slot_and_both_answer(cluster: Cluster) -> None:
    assert cluster.places("sees@pool") == dict.fromkeys(NAMES, 1)
    before = counter(cluster, "request_success", "sees")
    assert len(before) == 2, "each had its warm-up"

    def both() -> bool:
        told()
        return all(map(operator.gt, counter(cluster, "request_success", "sees"), before))

    wait(both)


def test_engines_that_nobody_asks_sleep_and_wake_as_they_were(cluster: Cluster) -> None:
    def all_at_once() -> set[str]:
        with ThreadPoolExecutor(8) as pool:
            return set(pool.map(lambda _: told(), range(8)))

    (text,), awake = all_at_once(), cluster.used_mib()
    both = 2 * SMALL["kv_cache_memory_bytes"] >> 20
    wait(lambda: cluster.used_mib() <= awake - both, found=cluster.used_mib)
    assert all_at_once() == {text}
    assert cluster.used_mib() == awake


def told() -> str:
    answer = ask(model="sees")
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text
