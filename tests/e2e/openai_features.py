"""What OpenAI's own client asks of the real engine beyond a chat: answers held to a form, tools, responses.

The model is tiny and random, so what it says proves that the engine held it: left alone it says none of this.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

ENGINE_ARGS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
"""What a model needs in the app list for tools."""
QUESTION: Any = [{"role": "user", "content": "which?"}]
# Between the keys of an object a random model may put spaces for long.
ROOM: dict[str, Any] = {"max_tokens": 1000, "seed": 7}


class Colour(StrEnum):
    red = "red"
    green = "green"


class Car(BaseModel):
    colour: Colour
    fast: bool


PARAMETERS = Car.model_json_schema()
TOOL: Any = {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS}}
NAMED: Any = {"type": "function", "function": {"name": "paint"}}


def held_to_a_form(api: OpenAI) -> None:
    whole = api.chat.completions.parse(model="chat", messages=QUESTION, response_format=Car, **ROOM)
    assert isinstance(whole.choices[0].message.parsed, Car)

    def said(form: dict[str, Any]) -> str:
        more = {"structured_outputs": form}
        answer = api.chat.completions.create(model="chat", messages=QUESTION, extra_body=more, **ROOM)
        return str(answer.choices[0].message.content)

    assert said({"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch("[0-9]{3}-[ab]", said({"regex": "[0-9]{3}-[ab]"}))
    grammar = 'root ::= "SELECT " ("a" | "b") " FROM t"'
    assert said({"grammar": grammar}) in ("SELECT a FROM t", "SELECT b FROM t")


def tools(api: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "chat", "messages": QUESTION, "tools": [TOOL], **ROOM}
    for choice in (NAMED, "required"):
        calls = api.chat.completions.create(**ask, tool_choice=choice).choices[0].message.tool_calls
        assert calls
        assert {call.function.name for call in calls} == {"paint"}
        assert all(Car.model_validate_json(call.function.arguments) for call in calls)
    parts = [
        call.function
        for chunk in api.chat.completions.create(**ask, tool_choice=NAMED, stream=True)
        for call in (chunk.choices[0].delta.tool_calls or () if chunk.choices else ())
    ]
    assert parts[0].name == "paint"
    assert Car.model_validate_json("".join(part.arguments or "" for part in parts))


def several_with_logprobs(api: OpenAI) -> None:
    answer = api.chat.completions.create(
        model="chat", messages=QUESTION, n=2, max_tokens=3, logprobs=True, top_logprobs=2, extra_body={"min_tokens": 3}
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert [len(token.top_logprobs) for token in tokens] == [2, 2, 2]
        assert all(token.logprob < 0 for token in tokens)


def responses(api: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "chat", "input": "hello", "temperature": 0, "max_output_tokens": 12}
    whole = api.responses.create(**ask)
    assert whole.usage is not None
    assert whole.output_text
    events = list(api.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1, "it was not streamed"
    last = events[-1]
    assert last.type == "response.completed"
    assert "".join(deltas) == last.response.output_text == whole.output_text
    held = api.responses.parse(model="chat", input="which?", text_format=Car, max_output_tokens=1000)
    assert isinstance(held.output_parsed, Car)
    for asked, status in (
        ({**ask, "model": "embedding"}, 400),
        ({**ask, "model": "old"}, 400),
        ({**ask, "temperature": 99}, 400),
        ({**ask, "previous_response_id": whole.id}, 400),
        ({**ask, "input": "word " * 3000}, 400),
        ({**ask, "model": "nobody"}, 404),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            api.responses.create(**asked)
        assert refused.value.status_code == status, (asked, refused.value)
