"""What the light engine says, in this process; the VRAM it takes is tried in test_light.py."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from typing import Any

import pytest

from berth.engines.errors import ApiError
from berth.engines.light import LightServer
from berth.engines.light_answers import instance


def server(**engine_args: Any) -> LightServer:
    return LightServer({"model": "chat", "gpus": 1, "vram_mib": 100, "engine_args": engine_args})


def ask(made: LightServer, method: str, **request: Any) -> list[Any]:
    async def run() -> list[Any]:
        return [part async for part in await getattr(made, method)({"model": "chat", **request})]

    return asyncio.run(run())


def say(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_whole_answer_and_a_streamed_one_say_the_same() -> None:
    made = server(tokens=7)
    (whole,) = ask(made, "chat", messages=say("one two three"))
    events = ask(made, "chat", messages=say("one two three"), stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole["choices"][0]["message"]["content"] == "light replica of chat 4 5 6"
    assert chunks[-1]["usage"] == whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    assert {event[-2:] for event in events} == {"\n\n"}
    assert "usage" not in json.loads(ask(made, "chat", messages=say("x"), stream=True)[-1].removeprefix("data: "))


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_where_the_request_says(key: str) -> None:
    (cut,) = ask(server(), "completions", prompt="hi", **{key: 2})
    assert (cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]) == ("light replica", "length")
    (whole,) = ask(server(), "completions", prompt="hi", **{key: 4})
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    made = server(max_model_len=5)
    assert ask(made, "chat", messages=say("one two three four"))
    with pytest.raises(ApiError, match="maximum context length is 5 tokens") as refused:
        ask(made, "chat", messages=say("one two three four"), max_tokens=2)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert made.running == 0


def test_who_is_cancelled_stops_at_once() -> None:
    made = server(token_s=60)

    async def run() -> None:
        async def read() -> None:
            async for _ in await made.chat({"model": "chat", "messages": say("hi"), "stream": True}):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        assert made.running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made.running == 0

    asyncio.run(run())


def test_vectors_follow_from_the_text_alone() -> None:
    (answer,) = ask(server(), "embeddings", input=["a", "b", "a"])
    first, second, third = (row["embedding"] for row in answer["data"])
    assert first == third != second
    assert len(first) == 16
    assert math.isclose(math.hypot(*first), 1)
    (packed,) = ask(server(dimensions=4), "embeddings", input="a", encoding_format="base64")
    unpacked = struct.unpack("<4f", base64.b64decode(packed["data"][0]["embedding"]))
    (plain,) = ask(server(dimensions=4), "embeddings", input="a")
    assert unpacked == pytest.approx(plain["data"][0]["embedding"])


def test_token_ids_are_one_input_or_several() -> None:
    assert [len(ask(server(), "embeddings", input=given)[0]["data"]) for given in ([1, 2], [[1, 2], [3]])] == [1, 2]


def test_scores_are_the_share_of_common_words() -> None:
    (answer,) = ask(server(), "score", text_1="lazy dog", text_2=["a fox", "a dog", "Lazy dog"])
    assert [row["score"] for row in answer["data"]] == [0.0, 0.5, 1.0]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 18},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}, "minItems": 2},
        "colour": {"enum": ["red", "blue"]},
        "note": {"anyOf": [{"type": "null"}, {"type": "string"}]},
        "score": {"type": ["number", "null"]},
    },
    "$defs": {"Tag": {"type": "object", "properties": {"ok": {"type": "boolean"}}}},
}


def test_a_schema_is_answered_with_its_least_value() -> None:
    expected = {
        "name": "light",
        "age": 18,
        "tags": [{"ok": False}, {"ok": False}],
        "colour": "red",
        "note": None,
        "score": 0.0,
    }
    assert instance(SCHEMA, SCHEMA) == expected
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    (answer,) = ask(server(), "chat", messages=say("hi"), response_format=wanted)
    assert json.loads(answer["choices"][0]["message"]["content"]) == expected


@pytest.mark.parametrize(
    "schema", [None, [], "object", {"type": "banana"}, {"properties": []}, {"properties": {"a": {"type": "b"}}}]
)
def test_a_schema_that_is_none_is_refused(schema: Any) -> None:
    with pytest.raises(ApiError, match="malformed") as refused:
        ask(
            server(),
            "chat",
            messages=say("hi"),
            response_format={"type": "json_schema", "json_schema": {"schema": schema}},
        )
    assert (refused.value.status, refused.value.param) == (400, "response_format")
