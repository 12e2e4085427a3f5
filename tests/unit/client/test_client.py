"""The client against a small server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel, Field

from berth import client as berth_client
from berth.client import InvalidAnswer, abatch, aparse, arerank, async_client, batch, client, parse, rerank
from tests.unit.client.fake_api import FakeApi, running

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with running() as server:
        yield server


class City(BaseModel):
    name: str
    people: int = Field(ge=1)


def ask(made: openai.OpenAI, content: str = "hello") -> str:
    messages = [{"role": "user", "content": content}]
    answer = made.chat.completions.create(model="chat", messages=messages)  # type: ignore[arg-type]
    return str(answer.choices[0].message.content)


def test_where_and_with_which_key_come_from_arguments_or_the_environment(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")
    assert ask(client(api.url)) == "light replica of chat"
    monkeypatch.setenv("BERTH_BASE_URL", api.url)
    monkeypatch.setenv("BERTH_API_KEY", "from-environment")
    ask(client())
    ask(client(api_key="from-argument"))
    assert api.keys == {"none", "from-environment", "from-argument"}


def test_an_overloaded_cluster_is_asked_again_when_it_says(api: FakeApi) -> None:
    api.busy, api.retry_after_s = 2, 1
    began = time.monotonic()
    assert ask(client(api.url))
    assert 2 <= time.monotonic() - began < 10
    api.busy = 1
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client(api.url, max_retries=0))
    assert refused.value.code == "overloaded"


def test_a_batch_keeps_order_bounds_and_errors(api: FakeApi) -> None:
    api.delay_s = 0.02
    made, seen = client(api.url), list[tuple[int, int]]()
    items = [f"question {index}" for index in range(20)]
    items[7] = "fail"
    outcomes = batch(
        lambda text: made.embeddings.create(model="embedding", input=text),
        items,
        concurrency=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [outcome.ok for outcome in outcomes] == [text != "fail" for text in items]
    assert isinstance(outcomes[7].error, openai.BadRequestError)
    with pytest.raises(openai.BadRequestError):
        outcomes[7].get()
    alone = made.embeddings.create(model="embedding", input=items[3]).data[0].embedding
    assert outcomes[3].get().data[0].embedding == alone
    assert seen == [(done, 20) for done in range(1, 21)]
    assert 1 < api.peak <= 4


def test_a_batch_in_asyncio_does_the_same(api: FakeApi) -> None:
    api.delay_s, api.busy = 0.02, 3
    seen = []

    async def run() -> list[berth_client.Outcome[str]]:
        async with async_client(api.url) as made:

            async def one(text: str) -> str:
                message = {"role": "user", "content": text}
                answer = await made.chat.completions.create(model="chat", messages=[message])  # type: ignore[list-item]
                return f"{text}: {answer.choices[0].message.content}"

            items = ["a", "fail", *(f"q{index}" for index in range(10))]
            return await abatch(one, items, concurrency=3, progress=lambda done, _: seen.append(done))

    outcomes = asyncio.run(run())
    said = "light replica of chat"
    assert [outcome.value for outcome in outcomes[:3]] == [f"a: {said}", None, f"q0: {said}"]
    assert isinstance(outcomes[1].error, openai.BadRequestError)
    assert seen == list(range(1, 13))
    assert api.peak <= 3


def test_a_batch_of_nothing_and_one_without_hands() -> None:
    assert batch(str, []) == []
    assert asyncio.run(abatch(asyncio.sleep, [])) == []
    with pytest.raises(ValueError, match="found: 0; allowed: >= 1"):
        batch(str, ["a"], concurrency=0)


def test_an_answer_becomes_a_model(api: FakeApi) -> None:
    assert parse(client(api.url), City, model="chat", messages=HELLO) == City(name="light", people=1)

    async def run() -> City:
        async with async_client(api.url) as made:
            return await aparse(made, City, model="chat", messages=HELLO)

    assert asyncio.run(run()) == City(name="light", people=1)


@pytest.mark.parametrize(
    ("said", "why"), [("Paris, I think", "Invalid JSON"), ('{"name": "Paris", "people": 0}', "people: Input should be")]
)
def test_an_answer_that_is_no_such_model_comes_with_its_text(api: FakeApi, said: str, why: str) -> None:
    api.say = said
    with pytest.raises(InvalidAnswer, match=why) as found:
        parse(client(api.url), City, model="chat", messages=HELLO)
    assert found.value.raw == said


def test_an_answer_that_was_cut_off_is_told_as_that(api: FakeApi) -> None:
    with pytest.raises(InvalidAnswer, match="cut off; mend: a larger max_tokens") as found:
        parse(client(api.url), City, model="chat", messages=HELLO, max_tokens=1)
    assert found.value.raw == '{"name":'


def test_rerank_tells_documents_best_first(api: FakeApi) -> None:
    documents = ["a fox", "a lazy dog", "a dog"]
    best = rerank(client(api.url), model="rerank", query="lazy dog", documents=documents, top_n=2)
    assert [(row.index, row.score, row.document) for row in best] == [(1, 1.0, "a lazy dog"), (2, 0.5, "a dog")]

    async def run() -> list[berth_client.Ranked]:
        async with async_client(api.url) as made:
            return await arerank(made, model="rerank", query="lazy dog", documents=documents)

    assert [row.index for row in asyncio.run(run())] == [1, 2, 0]


def test_an_unknown_model_is_openais_not_found(api: FakeApi) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        rerank(client(api.url), model="nobody", query="a", documents=["b"])
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
