"""The main job with the real engine, on real raylets, beside a Ray cluster that is not ours.

The tests stand in order: each goes on from where the one before left the cluster.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from openai import OpenAI

from berth.client import client
from tests.e2e import bad_input, openai_features
from tests.e2e.cluster import ROOT, Cluster

pytestmark = pytest.mark.e2e
FOREIGN_PORT = 26379
PAIR = "local-4"
"""The slot of two GPUs, beside the four of the local inventory."""
WIDE = {
    "name": "wide",
    "engine": "llm",
    "model": "{{ serve_apps_model_dir }}/chat",
    "replicas": 1,
    "gpus_per_replica": 2,
    "concurrency": 4,
    "engine_args": {"max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True},
}
FAR = {
    "name": "far",
    "engine": "llm",
    "model": "{{ serve_apps_model_dir }}/chat",
    "replicas": 1,
    "slots_per_replica": 2,
    "concurrency": 4,
    "engine_args": {"max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True},
}
OLD = {
    "name": "old",
    "engine": "llm",
    "fallback": "transformers",
    "model": "{{ serve_apps_model_dir }}/old",
    "replicas": 1,
    "vram_mib": 1024,
    "engine_args": {"max_model_len": 256, "max_num_seqs": 2, "kv_cache_memory_bytes": 1 << 20},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("main")
    extra = {
        "nvidia_driver_sim_profile": str(ROOT / "tests/e2e/l40s-x6.yml"),
        "placement_slot_shapes": [[4, 5]],
        "serve_apps_list": [*with_adapter(directory / "adapter"), WIDE, FAR, OLD],
    }
    made = Cluster("e2e", directory / "state", 25000, extra)
    yield made
    made.teardown()


def with_adapter(directory: Path) -> list[dict[str, Any]]:
    """The local inventory's app list, chat with a LoRA adapter beside it, embedding once: chat shows two of a kind."""
    bad_input.write_adapter(directory)
    text = (ROOT / "inventories/local/group_vars/all/apps.yml").read_text(encoding="utf-8")
    apps: list[dict[str, Any]] = yaml.safe_load(text)["serve_apps_list"]
    chat, embedding = (next(app for app in apps if app["name"] == name) for name in ("chat", "embedding"))
    embedding["replicas"] = 1
    chat["adapters"] = {"tiny": str(directory)}
    chat["engine_args"] |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, **openai_features.ENGINE_ARGS}
    return apps


def runtime() -> Path:
    return next((ROOT / ".berth" / "runtime").glob("*/.complete")).parent


@pytest.fixture(scope="module")
def foreign(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[psutil.Process]]:
    """Somebody else's Ray, started as people start it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("BERTH_", "RAY_"))}
    directory = Path(f"/tmp/foreign-ray-{os.getpid()}")
    command = [
        *(str(runtime() / "bin" / "ray"), "start", "--head", "--block", f"--port={FOREIGN_PORT}", "--num-cpus=1"),
        *(f"--temp-dir={directory}", "--dashboard-port=26380", "--dashboard-agent-listen-port=26381"),
        *("--ray-client-server-port=26382", "--metrics-export-port=26383", "--object-store-memory=80000000"),
        *("--node-ip-address=127.0.0.1", "--disable-usage-stats", "--include-log-monitor=False"),
    ]
    with (tmp_path_factory.mktemp("foreign") / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    ours = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while "raylet" not in {child.name() for child in ours.children(recursive=True)}:
        assert time.monotonic() < deadline, "the foreign Ray did not start"
        time.sleep(0.5)
    time.sleep(3)
    family = [ours, *ours.children(recursive=True)]
    yield family
    for member in [*ours.children(recursive=True), ours]:
        member.kill()
    subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_check_mode_on_a_fresh_machine_changes_nothing(cluster: Cluster) -> None:
    run = cluster.site("pack", "--check", "--diff", extra={"berth_agent_root": str(cluster.state / "agent")}).ok()
    assert "would be installed first" in " ".join(run.output.split())
    assert not cluster.state.exists()
    assert not cluster.run_dir.exists()


def test_pack_shares_gpus_as_planned(cluster: Cluster) -> None:
    run = cluster.site("pack").ok()
    assert "waiting for" in run.output, "no progress was shown"
    berths = cluster.plan()["berths"]
    assert {berth["slot"] for berth in berths if berth["deployment"] not in ("far", "wide")} == {"local-0"}
    counts = {berth["deployment"]: berth["replicas"] for berth in berths}
    assert counts == {"chat": 2, "embedding": 1, "far": 1, "old": 1, "rerank": 1, "wide": 1}
    report = cluster.verify()
    assert (report["rc"], report["ok"], report["failures"]) == (0, True, [])


def test_the_predicted_footprint_is_what_the_driver_sees(cluster: Cluster) -> None:
    """chat has no vram_mib: planned from its config.json, its KV cache set in vLLM, both found again by the driver."""
    (planned,) = cluster.plan()["footprints"]["chat"].values()
    assert planned["source"] == "predicted"
    chat = [berth for berth in cluster.plan()["berths"] if berth["deployment"] == "chat"]
    assert {berth["vram_mib"] for berth in chat} == {planned["vram_mib"]}
    rows = [row for row in cluster.verify()["rows"] if row["slot"] in {berth["slot"] for berth in chat}]
    held = [item["vram_mib"] for row in rows for item in row["replicas"] if item["berth"].startswith("chat@")]
    kv_mib = planned["kv_cache_memory_bytes"] / 2**20 * 96
    assert all(kv_mib < mib <= planned["vram_mib"] for mib in held), (held, kv_mib, planned)
    records = json.loads((cluster.state / "controller" / "footprints.json").read_text())["records"].values()
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    (kept,) = [item for item in records if [item["engine"][size] for size in sizes] == [1, 1]]
    assert kept["measured"]["total_mib"] == max(held)


def test_the_driver_sees_engines_below_their_replicas(cluster: Cluster) -> None:
    """Asked of NVML and /proc alone: every process on the GPU descends from one replica, engines from chat's."""
    replica_of = {pid: name for name, pids in cluster.replicas().items() for pid in pids.values()}
    homes = {berth["slot"] for berth in cluster.plan()["berths"]}
    assert homes == {"local-0", "local-1", PAIR}
    packed = [uuid for slot in cluster.plan()["slots"] if slot["name"] in homes for uuid in slot["gpu_uuids"]]
    owners, below = set(), 0
    for uuid, seen in cluster.nvml().items():
        assert uuid in packed or not seen["pids"], f"{uuid} is used though everything is packed on {packed}"
        for pid in map(int, seen["pids"]):
            line = [pid, *(parent.pid for parent in psutil.Process(pid).parents())]
            held = [replica for replica in line if replica in replica_of]
            assert len(held) == 1, f"{pid} belongs to {held}"
            owners.add(held[0])
            below += held[0] != pid
    assert owners == {pid for pid, name in replica_of.items() if name != "berth-gateway"}
    assert below >= 2, "no engine process of its own: joining by process tree was not tried"


def test_a_replica_of_two_gpus_has_a_worker_on_each(cluster: Cluster) -> None:
    """vLLM's own executor inside the slot: asked of NVML and /proc, one process per GPU, both below the replica."""
    (berth,) = [item for item in cluster.plan()["berths"] if item["deployment"] == "wide"]
    pair = next(slot["gpu_uuids"] for slot in cluster.plan()["slots"] if slot["name"] == PAIR)
    assert (berth["slot"], len(pair)) == (PAIR, 2)
    (replica,) = cluster.replicas()[f"wide@{PAIR}"].values()
    seen = cluster.nvml()
    workers = [list(seen[uuid]["pids"].items()) for uuid in pair]
    assert [len(found) for found in workers] == [1, 1], workers
    ((one, held), (other, also)) = (found[0] for found in workers)
    assert one != other, "one process holds both GPUs: the model was not split"
    for pid in (int(one), int(other)):
        assert replica in {parent.pid for parent in psutil.Process(pid).parents()}
    # Half of the weights and of the KV cache on each, and no more than was planned.
    assert held == also
    assert held <= berth["vram_mib"]
    ask = {"model": "wide", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    assert cluster.api("/v1/completions", ask).json()["usage"]["completion_tokens"] == 4


def test_a_replica_over_two_slots_has_a_part_in_each(cluster: Cluster) -> None:
    """vLLM's own multi-node executor between them: one app, a process on each GPU below the part that is planned there.

    When a part's worker ends, the whole replica starts anew and the witnesses agree again.
    """
    team = _parts(cluster)
    assert [len(pids) for pids in team.values()] == [1, 1], team
    mine = cluster.replicas()["far@local-0"]
    below = [{parent.pid for parent in psutil.Process(pid).parents()} & set(mine.values()) for (pid,) in team.values()]
    assert [len(found) for found in below] == [1, 1]
    assert below[0] != below[1], "a part is not below its own replica"
    ask = {"model": "far", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    assert cluster.api("/v1/completions", ask).json()["usage"]["completion_tokens"] == 4
    ((worker,),) = list(team.values())[1:]
    psutil.Process(worker).kill()
    deadline = time.monotonic() + 240
    while (
        (now := cluster.replicas()["far@local-0"]).keys() & mine.keys() == mine.keys()
        or len(now) < 2
        # The gateway hears of a new replica a moment after Serve's controller.
        or cluster.api("/v1/completions", ask).status_code != 200
    ):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(1)
    assert worker not in [pid for pids in _parts(cluster).values() for pid in pids]
    report = cluster.verify()
    assert (report["rc"], report["failures"]) == (0, []), report["failures"]


def _parts(cluster: Cluster) -> dict[str, list[int]]:
    """far's slots in the order of its team, each with the processes that the driver shows below far's replicas."""
    replicas, seen = set(cluster.replicas()["far@local-0"].values()), cluster.nvml()
    team = next(berth["team"] for berth in cluster.plan()["berths"] if berth["deployment"] == "far")
    gpus = {slot["name"]: slot["gpu_uuids"] for slot in cluster.plan()["slots"]}
    return {
        name: [
            pid
            for uuid in gpus[name]
            for pid in map(int, seen[uuid]["pids"])
            if replicas & {parent.pid for parent in psutil.Process(pid).parents()}
        ]
        for name in team
    }


def test_the_api_answers(cluster: Cluster) -> None:
    models = cluster.api("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["chat", "chat:tiny", "embedding", "far", "old", "rerank", "wide"]
    ask = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = cluster.api("/v1/chat/completions", ask).json()
    assert answer["usage"]["completion_tokens"] >= 1
    stream = cluster.api("/v1/chat/completions", {**ask, "stream": True}, stream=True)
    assert list(stream.iter_lines())[-2:] == [b"data: [DONE]", b""]
    vector = cluster.api("/v1/embeddings", {"model": "embedding", "input": "hi"}).json()["data"][0]["embedding"]
    assert len(vector) == 64
    documents = ["a fox", "a dog", "a gpu"]
    ranked = cluster.api("/v1/rerank", {"model": "rerank", "query": "dog", "documents": documents, "top_n": 2}).json()
    assert len(ranked["results"]) == 2
    scores = [row["relevance_score"] for row in ranked["results"]]
    assert scores == sorted(scores, reverse=True)
    _refused(cluster, {**ask, "model": "nobody"}, 404, "model_not_found")
    _refused(
        cluster, {**ask, "messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context_length_exceeded"
    )
    malformed = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}
    for stream in (False, True):
        _refused(cluster, {**ask, "response_format": malformed, "stream": stream}, 400, None)
    logs = "".join(
        file.read_text() for file in cluster.run_dir.glob("local-0/session_latest/logs/serve/replica_chat@*")
    )
    assert "CALL /v1/chat/completions OK" in logs, "vLLM's import closed the replica's log"


@pytest.mark.parametrize(
    "asked",
    [
        openai_features.held_to_a_form,
        openai_features.tools,
        openai_features.several_with_logprobs,
        openai_features.responses,
    ],
    ids=lambda item: item.__name__,
)
def test_openais_own_client_gets_what_it_asks_the_engine_for(cluster: Cluster, asked: Callable[[OpenAI], None]) -> None:
    asked(client(f"http://127.0.0.1:{cluster.port_base + 5}/v1", max_retries=0))


def test_a_model_that_vllm_cannot_run_runs_on_transformers_and_says_so(cluster: Cluster) -> None:
    card = cluster.api("/v1/models/old").json()
    assert (card["engine"], card["engine_reason"][:10]) == ("transformers", "vLLM says:")
    assert "GPTNeoForCausalLM" in card["engine_reason"]
    assert "engine" not in cluster.api("/v1/models/chat").json()
    assert list(cluster.api("/healthz").json()["engines"]) == ["old@local-0"]
    # Warm and with a seed: at its coldest a random model says the same special token again and again.
    ask = {"model": "old", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 48, "ignore_eos": True}
    ask |= {"temperature": 1.5, "seed": 7}
    whole = cluster.api("/v1/chat/completions", ask).json()
    said = whole["choices"][0]["message"]["content"]
    assert (whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]) == (48, "length")
    lines = list(cluster.api("/v1/chat/completions", {**ask, "stream": True}, stream=True).iter_lines())
    assert lines[-2:] == [b"data: [DONE]", b""]
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said
    assert len(chunks) > 4, "it was not streamed"
    stopped = cluster.api("/v1/chat/completions", {**ask, "stop": said[3:5]}).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (said[: said.index(said[3:5])], "stop")
    other = cluster.api("/v1/chat/completions", {**ask, "seed": 8}).json()["choices"][0]["message"]["content"]
    assert other != said
    _refused(cluster, {**ask, "messages": ask["messages"] * 300}, 400, "context_length_exceeded")
    _refused(cluster, {**ask, "response_format": {"type": "json_object"}}, 400, "unsupported_parameter")


def _refused(cluster: Cluster, ask: dict[str, Any], status: int, code: str | None) -> None:
    answer = cluster.api("/v1/chat/completions", ask)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"] == {**answer.json()["error"], "type": "invalid_request_error", "code": code}


def test_an_adapter_is_asked_for_by_its_name(cluster: Cluster) -> None:
    ask = {"prompt": "the quick brown fox", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    said = {
        name: cluster.api("/v1/completions", {**ask, "model": name}).json()["choices"][0]["text"]
        for name in ("chat", "chat:tiny")
    }
    assert said["chat"] != said["chat:tiny"], "the adapter changed nothing"
    again = cluster.api("/v1/completions", {**ask, "model": "chat"}).json()["choices"][0]["text"]
    assert again == said["chat"], "the adapter stayed with the model"


def test_tokens_there_and_back(cluster: Cluster) -> None:
    text = "the quick brown fox"
    there = cluster.api("/tokenize", {"model": "chat", "prompt": text, "add_special_tokens": False})
    assert there.status_code == 200, there.text
    assert there.json()["count"] == len(there.json()["tokens"]) > 0
    back = cluster.api("/detokenize", {"model": "chat", "tokens": there.json()["tokens"]})
    assert back.json() == {"prompt": text}
    chat = cluster.api("/tokenize", {"model": "chat", "messages": [{"role": "user", "content": text}]})
    assert chat.json()["count"] > there.json()["count"], "the chat template adds the role"


def test_bad_input_is_refused_in_words_and_leaves_nothing(cluster: Cluster) -> None:
    """What is loaded with the first request of a kind stays, and so does a connection to a replica that was not asked
    before; what leaks does so every time."""
    _misuse(cluster)
    left: list[dict[str, tuple[int | None, int]]] = []
    for _ in range(4):
        before = bad_input.held(cluster)
        _misuse(cluster)
        deadline = time.monotonic() + 20
        while (more := _held_more(cluster, before)) and time.monotonic() < deadline:
            time.sleep(0.5)
        if not more:
            return
        left.append({key: (before.get(key), now) for key, now in more})
    pytest.fail(f"(before, after) of each time: {left}")


def _held_more(cluster: Cluster, before: dict[str, int]) -> list[tuple[str, int]]:
    return [(key, now) for key, now in bad_input.held(cluster).items() if now > before.get(key, 0)]


def _misuse(cluster: Cluster) -> None:
    port = cluster.port_base + 5
    for path, body, status, code in bad_input.REFUSED:
        found, answer = bad_input.send(port, path, body)
        assert (found, answer["error"]["code"]) == (status, code), (path, body, answer)
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"]
    status, answer = bad_input.too_large(port)
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    bad_input.slow_clients(port, lambda: _answered(cluster))
    for _ in range(4):
        bad_input.hang_up(port)
    _answered(cluster)


def _answered(cluster: Cluster) -> None:
    answer = cluster.api("/v1/chat/completions", bad_input.ASK, headers={"Connection": "close"})
    assert answer.status_code == 200, answer.text


def test_who_hangs_up_is_forgotten_by_the_engine(cluster: Cluster) -> None:
    ask = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1500, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(cluster.api, "/v1/chat/completions", {**ask, "stream": True}, stream=True) for _ in range(4)
        ]
        streams = [item.result() for item in asked]
    # The tiny model may be through with some by now, but not with all.
    assert sum(cluster.api("/healthz").json()["outstanding"].values()) > 0
    before = _cancelled(cluster)
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 20
    while cluster.api("/healthz").json()["outstanding"] or _cancelled(cluster) == before:
        assert time.monotonic() < deadline, (cluster.api("/healthz").json(), _cancelled(cluster))
        time.sleep(0.2)


def _cancelled(cluster: Cluster) -> int:
    """Requests that chat's replicas gave up."""
    files = cluster.run_dir.glob("local-*/session_latest/logs/serve/replica_chat@*")
    return sum(file.read_text().count("CALL /v1/chat/completions CANCELLED") for file in files)


def test_a_second_run_changes_nothing(cluster: Cluster) -> None:
    before = cluster.replicas()
    assert cluster.site("pack").ok().changed == 0
    assert cluster.replicas() == before


def test_check_mode_on_a_running_machine_tells_and_changes_nothing(cluster: Cluster) -> None:
    before, plan = cluster.replicas(), cluster.plan()
    run = cluster.site("spread", "--check", "--diff").ok()
    assert run.changed >= 2
    assert re.search(r"make \w+@local-[123]", run.output)
    assert "break" in run.output
    assert (cluster.replicas(), cluster.plan()) == (before, plan)


def test_flip_to_spread_is_make_before_break(cluster: Cluster, foreign: list[psutil.Process]) -> None:
    before, raylets = cluster.replicas(), _raylets(cluster)
    load = Load(cluster)
    with load:
        cluster.site("spread").ok()
    after = cluster.replicas()
    placed = {name.split("@")[0]: set() for name in after if "@" in name}
    for name, pids in after.items():
        if "@" in name and pids:
            placed[name.split("@")[0]].add(name.split("@")[1])
            if name == "far@local-0":
                assert pids == before[name], "its slots are as they were, and yet a part of it moved"
                continue
            assert len(pids) == 1, f"{name} has {len(pids)} replicas"
    counts = {model: len(slots) for model, slots in placed.items()}
    assert counts == {"chat": 2, "embedding": 1, "far": 1, "old": 1, "rerank": 1, "wide": 1}
    assert after[f"wide@{PAIR}"] == before[f"wide@{PAIR}"], "there is one slot of two GPUs, and yet its replica moved"
    assert _raylets(cluster) == raylets, "a raylet was restarted"
    assert after["berth-gateway"] == before["berth-gateway"], "the gateway was restarted"
    stays = [name for name in after if name.endswith("@local-0") and after[name] and name != "far@local-0"]
    assert stays, "no model kept a replica where all of them were"
    for name in stays:
        assert len(after[name].items() & before[name].items()) == 1, f"the replica of {name} that stays was restarted"
    assert load.sent > 5, "it was hardly asked meanwhile"
    assert load.failures == []
    assert cluster.verify()["rc"] == 0


def test_down_leaves_nothing_of_ours_and_everything_of_others(cluster: Cluster, foreign: list[psutil.Process]) -> None:
    ports = [value for key, value in cluster.variables().items() if key.endswith("_port")]
    cluster.teardown().ok()
    assert cluster.processes() == []
    assert not cluster.run_dir.exists()
    assert not (cluster.state / "controller" / "lock").exists()
    assert not cluster.sim_dir.exists()
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"somebody still listens on {port}"
    assert all(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in foreign)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", FOREIGN_PORT)) == 0, "the foreign Ray does not answer any more"


class Load:
    """Chat requests, one after the other, until the block ends; keeps what went wrong."""

    def __init__(self, cluster: Cluster) -> None:
        self.sent, self.failures = 0, list[str]()
        self._cluster, self._stop = cluster, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        ask = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        while not self._stop.wait(0.3):
            self.sent += 1
            try:
                answer = self._cluster.api("/v1/chat/completions", ask)
            except OSError as error:
                self.failures.append(str(error))
                continue
            if answer.status_code != 200:
                self.failures.append(f"{answer.status_code} {answer.text[:200]}")


def _raylets(cluster: Cluster) -> set[int]:
    return {item.pid for item in cluster.processes() if item.command == "raylet"}
