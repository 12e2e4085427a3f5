"""The gateway on a real, small Ray Serve with light berths: what clients see when all is well and when it is not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from berth.client import client
from berth.plan.apps import Autoscaling, Sleep
from berth.plan.types import Berth
from berth.ray.deploy import lives
from berth.ray.rollout import Wanted, next_step
from berth.ray.serve_config import ServeOptions, berth_app, gateway_app, gateway_table
from tests.unit.client import examples
from tests.unit.engines import small_serve
from tests.unit.engines.small_serve import Load
from tests.unit.engines.streams import Stream, open_stream
from tests.unit.ray.builders import slot, spec

PORT = 23790
BASE = f"http://127.0.0.1:{PORT}"
OPTIONS = ServeOptions("127.0.0.1", PORT, drain_s=60.0, max_body_mib=1)
SCALING = Autoscaling(
    max_replicas=2, target_ongoing_requests=1, upscale_delay_s=0.5, downscale_delay_s=2, look_back_period_s=1
)
QUICK = {"tokens": 4, "max_model_len": 50}
HOLD_MIB, OTHERS_MIB = 700, 600
"""What one that sleeps holds awake; more than all others take or give back meanwhile."""

pytestmark = pytest.mark.runtime


def light(model: str, place: str, count: int = 1, engine_args: dict[str, Any] | None = None, **more: Any) -> Any:
    """A light berth; all of them are on the one node there is."""
    made = spec(model, engine="light", model="", num_cpus=0.01, engine_args={"hold_mib": 20, **(engine_args or {})})
    made = type(made)(**{**vars(made), **more})
    room = made.autoscaling.max_replicas if made.autoscaling else 0
    berth = Berth(model, place, 0 if room else count, 100, "test", room)
    config = berth_app(made, berth, slot("local-0"), OPTIONS)
    return {**config, "name": f"{model}@{place}"}


APPS = {
    app["name"]: app
    for app in (
        light("chat", "a", engine_args=QUICK, adapters={"sql": "/nowhere"}),
        light("chat", "b", engine_args=QUICK, adapters={"sql": "/nowhere"}),
        light("embedding", "a", engine_args={"dimensions": 8}),
        light("rerank", "a"),
        light("slow", "a", engine_args={"tokens": 30, "token_s": 0.2}, max_ongoing_requests=100),
        light("slow", "b", engine_args={"tokens": 30, "token_s": 0.2}, max_ongoing_requests=100),
        light("small", "a", engine_args={"tokens": 30, "token_s": 1}, max_ongoing_requests=2, max_queued_requests=1),
        light("idle", "a", engine_args={"tokens": 1, "token_s": 0.5}, autoscaling=SCALING, max_ongoing_requests=2),
        light("dozes", "a", engine_args={**QUICK, "hold_mib": HOLD_MIB}, sleep=Sleep(1)),
        light("apart", "a", engine_args=QUICK, prefill={}),
        light("apart-prefill", "a", engine_args=QUICK, prefill_of="apart"),
        light("many", "a", engine_args={"tokens": 2, "token_s": 15}, max_ongoing_requests=600),
        light("many", "b", engine_args={"tokens": 2, "token_s": 15}, max_ongoing_requests=600),
    )
}


class Cluster(small_serve.Cluster):
    """With the apps of this module."""

    def serve(self, names: set[str], table: set[str] | None = None) -> None:
        """Set the apps, and the berths that the gateway may use (all of them)."""
        apps = [APPS[name] for name in sorted(names)]
        routed = [app for app in apps if table is None or app["name"] in table]
        models = sorted({app["args"]["model"] for app in APPS.values() if "prefill_of" not in app["args"]})
        self.tell(apps=[*apps, gateway_app(gateway_table(models, routed, {"chat": 8.0}), OPTIONS)])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    program = str(Path(__file__).with_name("gateway_cluster.py"))
    with small_serve.running(
        Cluster, tmp_path_factory.mktemp("sim"), "gateway", [program, str(PORT), "{temp}"]
    ) as made:
        made.serve(set(APPS))
        yield made


def post(path: str, body: Any, **more: Any) -> requests.Response:
    return requests.post(f"{BASE}{path}", json=body, timeout=60, **more)


def chat(model: str, content: Any = "hello there", **more: Any) -> requests.Response:
    return post("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": content}], **more})


def health() -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{BASE}/healthz", timeout=60).json()
    return found


def wait(what: Callable[[], Any], seconds: float = 60) -> None:
    small_serve.wait(what, seconds, health)


def idle() -> bool:
    return health()["outstanding"] == {}


def test_every_route_answers_in_openais_shape(cluster: Cluster) -> None:
    models = requests.get(f"{BASE}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in models] == [
        "apart",
        "chat",
        "chat:sql",
        "dozes",
        "embedding",
        "idle",
        "many",
        "rerank",
        "slow",
        "small",
    ]
    assert requests.get(f"{BASE}/v1/models/chat:sql", timeout=60).json()["id"] == "chat:sql"
    answer = chat("chat").json()
    assert answer["choices"][0]["message"] == {**answer["choices"][0]["message"], "content": "light replica of chat"}
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4
    cut = chat("chat:sql", max_tokens=2).json()
    assert (cut["choices"][0]["finish_reason"], cut["model"]) == ("length", "chat:sql")
    text = post("/v1/completions", {"model": "chat", "prompt": "one two three"}).json()
    assert (text["choices"][0]["text"], text["usage"]["prompt_tokens"]) == ("light replica of chat", 3)
    vectors = post("/v1/embeddings", {"model": "chat", "input": ["a", "b", "a"], "dimensions": 8}).json()["data"]
    assert [len(row["embedding"]) for row in vectors] == [8, 8, 8]
    assert vectors[0]["embedding"] == vectors[2]["embedding"] != vectors[1]["embedding"]
    documents = ["a fox", "a lazy dog", "no match"]
    ranked = post("/v1/rerank", {"model": "chat", "query": "lazy dog", "documents": documents, "top_n": 2}).json()
    assert [(row["index"], row["document"]["text"]) for row in ranked["results"]] == [(1, "a lazy dog"), (0, "a fox")]


def test_replicas_that_need_no_vllm_do_not_import_it(cluster: Cluster) -> None:
    """A request brings none of its classes: their import takes a replica ten seconds and 600 MB at its first one."""
    for app in ("chat@a", "chat@b"):
        (pid,) = cluster.tell(pids=app)["pids"]
        loaded = {Path(mapped.path).name for mapped in psutil.Process(pid).memory_maps()}
        assert any(name.startswith("_raylet") for name in loaded)
        assert not [name for name in loaded if name.startswith("libtorch")]
    (gateway,) = cluster.tell(pids="berth-gateway")["pids"]
    assert any(Path(mapped.path).name.startswith("libtorch") for mapped in psutil.Process(gateway).memory_maps())


def test_a_stream_is_openais_with_usage_where_asked(cluster: Cluster) -> None:
    async def run() -> Stream:
        return await (await open_stream(PORT, "chat", stream_options={"include_usage": True})).rest()

    stream = asyncio.run(run())
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.done
    chunks = [json.loads(event) for event in stream.events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "light replica of chat"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 4)


def test_responses_whole_streamed_and_held_to_a_schema(cluster: Cluster) -> None:
    api = client(f"{BASE}/v1", max_retries=0)
    whole = api.responses.create(model="chat", instructions="be light", input="one two")
    assert (whole.status, whole.output_text) == ("completed", "light replica of chat")
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (4, 4)
    cut = api.responses.create(model="chat:sql", input=[{"role": "user", "content": "hi"}], max_output_tokens=2)
    assert (cut.status, cut.output_text, cut.model) == ("incomplete", "light replica", "chat:sql")
    events = list(api.responses.create(model="chat", input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas == ["light", " replica", " of", " chat"]
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "light replica of chat"

    class City(BaseModel):
        name: str
        people: int

    assert api.responses.parse(model="chat", input="Paris?", text_format=City).output_parsed == City(
        name="light", people=0
    )
    wait(idle)


def test_the_documents_examples_work(cluster: Cluster) -> None:
    """openai's client, Berth's and LangChain's: chat, streams, embeddings, models, structured answers, rerank."""
    examples.expected(examples.run(f"{BASE}/v1"))


def test_openais_clients_raise_what_the_gateway_says(cluster: Cluster) -> None:
    api = client(f"{BASE}/v1", max_retries=0)
    question: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        api.chat.completions.create(model="nobody", messages=question)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        api.chat.completions.create(model="chat", messages=question, max_tokens=60)
    assert long.value.code == "context_length_exceeded"
    langchain = ChatOpenAI(base_url=f"{BASE}/v1", api_key=SecretStr("none"), model="nobody")
    with pytest.raises(openai.NotFoundError):
        langchain.invoke("hi")


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (CHAT, {"model": "nobody", "messages": MESSAGES}, 404, "model_not_found", "model"),
        (CHAT, {"model": "chat:nobody", "messages": MESSAGES}, 404, "model_not_found", "model"),
        (CHAT, {"messages": MESSAGES}, 400, None, "model"),
        (CHAT, {"model": "chat", "messages": "hi"}, 400, None, "messages"),
        (
            CHAT,
            {"model": "chat", "messages": MESSAGES, "max_tokens": "many"},
            400,
            None,
            "max_tokens",
        ),
        (CHAT, b'{"model": ', 400, None, None),
        (
            CHAT,
            {"model": "chat", "messages": [{"role": "user", "content": "word " * 60}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            CHAT,
            {"model": "chat", "messages": MESSAGES, "stream": True, "response_format": SCHEMA},
            400,
            None,
            "response_format",
        ),
        ("/v1/embeddings", {"model": "chat", "input": {"a": 1}}, 400, None, "input"),
        (RESPONSES, {"model": "nobody", "input": "hi"}, 404, "model_not_found", "model"),
        (RESPONSES, {"model": "chat", "input": 5}, 400, None, "input"),
        (
            RESPONSES,
            {"model": "chat", "input": "word " * 60, "stream": True},
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            RESPONSES,
            {"model": "chat", "input": "hi", "previous_response_id": "resp_1"},
            400,
            "unsupported_parameter",
            "previous_response_id",
        ),
        (RESPONSES, {"model": "chat", "input": "hi", "background": True}, 400, "unsupported_parameter", "background"),
        ("/v1/rerank", {"model": "chat", "query": "a", "documents": []}, 400, None, "documents"),
        ("/v1/nothing", {}, 404, None, None),
    ],
)
def test_refusals_are_openais(cluster: Cluster, path: str, body: Any, status: int, code: Any, param: Any) -> None:
    url = f"{BASE}{path}"
    data = body if isinstance(body, bytes) else json.dumps(body)
    answer = requests.post(url, data=data, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert (error["param"] or "").partition(".")[0] == (param or "")
    assert error["message"]


@pytest.mark.parametrize("told", [True, False], ids=["its length is told", "chunked"])
def test_a_body_that_is_too_large_is_refused(cluster: Cluster, told: bool) -> None:
    body = json.dumps({"model": "chat", "messages": MESSAGES, "user": "x" * (2 << 20)}).encode()
    data: Any = body if told else iter([body[: 1 << 19], body[1 << 19 :]])
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{BASE}{CHAT}", data=data, headers=headers, timeout=60)
    assert answer.status_code == 413, answer.text
    assert "larger than 1 MiB" in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_requests_of_a_session_stay_together(cluster: Cluster) -> None:
    async def run() -> dict[str, int]:
        streams = [await open_stream(PORT, "slow", session="mine") for _ in range(6)]
        found: dict[str, int] = health()["outstanding"]
        for stream in streams:
            stream.close()
        return found

    found = asyncio.run(run())
    assert list(found.values()) == [6], "two random choices would have shared them out"
    wait(idle)


def test_prompts_are_read_apart_where_replicas_are_there_for_it(cluster: Cluster) -> None:
    asked = {"model": "apart", "messages": [{"role": "user", "content": "one two three"}]}
    before = health()["prefill"]["apart"]

    def cached(**more: Any) -> int | None:
        answer = post("/v1/chat/completions", asked | more)
        assert answer.status_code == 200, answer.text
        details = answer.json()["usage"].get("prompt_tokens_details")
        return details["cached_tokens"] if details else None

    assert cached() == 3
    assert cached(n=2) is None, "two answers would fetch one cache twice"
    events = post("/v1/chat/completions", asked | {"stream": True, "stream_options": {"include_usage": True}}).text
    assert '"cached_tokens": 3' in events or '"cached_tokens":3' in events
    assert health()["prefill"]["apart"] == {"apart": before["apart"] + 2, "alone": before["alone"] + 1}
    assert "apart-prefill" not in [card["id"] for card in requests.get(f"{BASE}/v1/models", timeout=60).json()["data"]]
    assert post("/v1/chat/completions", asked | {"model": "apart-prefill"}).status_code == 404
    refused = post("/v1/chat/completions", asked | {"kv_transfer_params": {"remote_host": "10.0.0.1"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "kv_transfer_params")
    # Serve would let the request wait until another one has started.
    cluster.tell(kill="apart-prefill@a")
    assert cached() is None
    assert health()["prefill"]["apart"]["alone"] == before["alone"] + 2
    wait(lambda: cached() == 3, 60)


def test_full_berths_say_so_and_who_hangs_up_makes_room(cluster: Cluster) -> None:
    async def run() -> None:
        streams = [await open_stream(PORT, "small") for _ in range(2)]
        waiting = asyncio.create_task(open_stream(PORT, "small"))
        await asyncio.to_thread(wait, lambda: health()["outstanding"] == {"small@a": 3})
        refused = await open_stream(PORT, "small")
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert not waiting.done()
        refused.close()
        streams[0].close()
        third = await asyncio.wait_for(waiting, 20)
        assert third.status == 200, "the engine did not stop for whom nobody hears"
        for stream in (streams[1], third):
            stream.close()
        await asyncio.to_thread(wait, idle)
        again = [await asyncio.wait_for(open_stream(PORT, "small"), 20) for _ in range(2)]
        for stream in again:
            stream.close()

    asyncio.run(run())
    assert chat("small", max_tokens=1).status_code == 200
    wait(idle)


def test_a_client_that_does_not_stream_and_hangs_up_is_forgotten_too(cluster: Cluster) -> None:
    with pytest.raises(requests.Timeout):
        requests.post(
            f"{BASE}/v1/chat/completions",
            json={"model": "small", "messages": MESSAGES},
            timeout=1,
        )
    wait(idle)


def test_a_model_sleeps_wakes_grows_and_sleeps_again(cluster: Cluster) -> None:
    wait(lambda: health()["asleep"] == ["idle@a"])
    assert chat("idle").status_code == 200, "the first request waits for the start"
    assert health()["asleep"] == []
    (first,) = cluster.tell(pids="idle@a")["pids"]
    loads = [Load(partial(chat, "idle", max_tokens=2)) for _ in range(3)]
    with ExitStack() as all_at_once:
        for load in loads:
            all_at_once.enter_context(load)
        wait(lambda: len(cluster.tell(pids="idle@a")["pids"]) == 2, 40)
    assert [load.failures for load in loads] == [[], [], []]
    assert first in cluster.tell(pids="idle@a")["pids"]
    wait(lambda: health()["asleep"] == ["idle@a"], 40)
    assert cluster.tell(pids="idle@a")["pids"] == []


def test_an_engine_that_nobody_asks_gives_its_memory_back_and_wakes_for_all_who_do(cluster: Cluster) -> None:
    assert chat("dozes").status_code == 200
    for _ in range(2):
        awake = cluster.used_mib()
        wait(lambda full=awake: cluster.used_mib() <= full - OTHERS_MIB)
        assert "dozes@a" in health()["models"]["dozes"]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: chat("dozes"), range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert cluster.used_mib() >= awake - OTHERS_MIB // 2


def test_a_berth_leaves_the_table_and_goes_under_load_without_an_error(cluster: Cluster) -> None:
    with Load(partial(chat, "slow", max_tokens=2)) as load:

        async def run() -> list[Stream]:
            streams = [await open_stream(PORT, "slow") for _ in range(20)]
            await asyncio.to_thread(cluster.serve, set(APPS), set(APPS) - {"slow@b"})
            assert health()["models"]["slow"] == ["slow@a"]
            await asyncio.to_thread(cluster.serve, set(APPS) - {"slow@b"})
            await asyncio.to_thread(cluster.serve, set(APPS), set(APPS) - {"slow@b"})
            await asyncio.to_thread(cluster.serve, set(APPS))
            return await asyncio.gather(*(stream.rest() for stream in streams))

        streams = asyncio.run(run())
        load.goes_on()
    assert all(stream.done and stream.error is None for stream in streams)
    assert load.failures == []
    assert health()["models"]["slow"] == ["slow@a", "slow@b"]
    wait(idle)


def test_a_model_changes_under_load_without_an_error_and_with_so_many_replicas_up(cluster: Cluster) -> None:
    """The rollout's own steps on a real Serve: every berth of the model gets other arguments."""
    names = [f"roll@{place}" for place in "xyz"]
    quick = {"tokens": 3, "token_s": 0.05, "start_s": 1}
    old = {name: light("roll", name[-1], engine_args=quick) for name in names}
    new = {name: light("roll", name[-1], engine_args={**quick, "tokens": 5}) for name in names}
    others = [APPS[name] for name in sorted(APPS)]
    models = sorted({app["args"]["model"] for app in APPS.values()} | {"roll"})
    for berths in (others, [*others, *old.values()]):
        # The gateway takes no berth into its table that is not there yet.
        cluster.tell(apps=[*others, *old.values(), gateway_app(gateway_table(models, berths), OPTIONS)])
    before = {name: cluster.tell(pids=name)["pids"] for name in names}
    aim = Wanted({**APPS, **new}, models, {"local-0": 8_000}, OPTIONS, min_available={"roll": 2})
    up: list[int] = []
    steps: list[str] = []
    wait(lambda: health()["models"]["roll"] == names)
    # Several at once: the first request of every new replica waits some seconds for the import of vLLM's classes.
    loads = [Load(partial(chat, "roll", max_tokens=2)) for _ in range(4)]
    with ExitStack() as all_at_once:
        for load in loads:
            all_at_once.enter_context(load)
        until = time.monotonic() + 120
        while True:
            live = lives(cluster.tell(details=True)["serve"])
            up.append(sum(live[name].running for name in names if name in live))
            step = next_step(live, aim)
            if step.kind == "done":
                break
            if step.kind == "put":
                steps.append(step.why)
                assert "roll" not in step.down, step.why
                cluster.tell(put=list(step.apps))
            assert time.monotonic() < until, (step.why, steps)
            time.sleep(0.5)
        for load in loads:
            load.goes_on()
    assert min(up) == 2, "it never changed a berth, or went below min_available"
    assert [load.failures for load in loads] == [[], [], [], []]
    assert len(chat("roll").json()["choices"][0]["message"]["content"].split()) == 5
    after = {name: cluster.tell(pids=name)["pids"] for name in names}
    assert all(not set(before[name]) & set(after[name]) for name in names), "a berth kept its old arguments"
    assert [step for step in steps if step.startswith("restart")] == [f"restart {name}" for name in names]
    cluster.serve(set(APPS))


def test_a_killed_replica_fails_only_what_had_begun_there(cluster: Cluster) -> None:
    with Load(partial(chat, "slow", max_tokens=2)) as load:

        async def run() -> tuple[int, list[Stream]]:
            streams = [await open_stream(PORT, "slow") for _ in range(20)]
            begun = health()["outstanding"]["slow@a"]
            await asyncio.to_thread(cluster.tell, kill="slow@a")
            return begun, await asyncio.gather(*(stream.rest() for stream in streams))

        begun, streams = asyncio.run(run())
        assert chat("slow", max_tokens=1).status_code == 200, "the other berth goes on"
        load.goes_on()
    failed = [stream for stream in streams if stream.error]
    assert 0 < len(failed) <= begun
    assert {stream.error["code"] for stream in failed if stream.error} == {"unavailable"}
    assert all(stream.done for stream in streams), "every stream has an end"
    assert load.failures == [], "what had not begun went to the other berth"
    wait(lambda: health()["models"]["slow"] == ["slow@a", "slow@b"], 60)
    wait(idle)


def test_a_thousand_streams_at_once(cluster: Cluster) -> None:
    proxy = connections()

    async def run() -> list[Stream]:
        gate = asyncio.Semaphore(50)

        async def opened() -> Stream:
            async with gate:
                return await open_stream(PORT, "many")

        streams = await asyncio.gather(*(opened() for _ in range(1000)))
        assert {stream.status for stream in streams} == {200}
        counts = health()["outstanding"]
        assert sum(counts.values()) == 1000, f"they were not open together: {counts}"
        assert all(count <= 600 for count in counts.values())
        return await asyncio.gather(*(stream.rest() for stream in streams))

    streams = asyncio.run(run())
    assert [stream.error for stream in streams if stream.error or not stream.done] == []
    wait(idle)
    wait(lambda: connections() <= proxy + 2)


def connections() -> int:
    """Open connections to the port, seen from everybody on this machine."""
    return sum(1 for item in psutil.net_connections("tcp") if item.status == "ESTABLISHED" and item.laddr.port == PORT)
