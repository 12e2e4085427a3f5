"""What the transformers engine reads and writes, in this process; the engine itself runs in tests/e2e."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.engines.errors import ApiError
from berth.engines.fallback import cannot_run
from berth.engines.transformers_text import Room, Text, flat_messages, limits, one_prompt, refuse_unknown

# Bytes as tokens: a character of several bytes is not whole before its last one.


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def spoken(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    made = Text(decode, stop)
    pieces = []
    for token in text.encode():
        pieces.append(made.add(token))
        if made.stopped:
            return pieces, made
    return [*pieces, made.end()], made


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_pieces_are_the_text_and_no_piece_ends_inside_a_character(text: str) -> None:
    pieces, made = spoken(text)
    assert "".join(pieces) == text
    assert made.tokens == len(text.encode())
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet="ab ", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_sequence(text: str, stop: list[str]) -> None:
    pieces, made = spoken(text, tuple(stop))
    ends = [at for at in (text.find(item) for item in stop) if at >= 0]
    said = "".join(pieces)
    if not ends:
        assert (said, made.stopped) == (text, False)
        return
    assert made.stopped
    # Of two sequences the one that ends first in the stream wins, as it does in vLLM.
    first = min(text.find(item) + len(item) for item in stop if item in text)
    assert said in {text[:at] for at in ends if at <= first}


def asked(**request: Any) -> Any:
    return limits({"max_tokens": 5, **request}, None, prompt_tokens=10, longest=100, chat=True)


def test_defaults_are_openais_then_the_models_own() -> None:
    class Own:
        temperature = 0.3
        top_k = 20

    assert asked().temperature == 1.0
    made = limits({}, Own(), 10, 100, chat=True)
    assert (made.temperature, made.top_k, made.max_tokens) == (0.3, 20, 90)
    assert limits({}, Own(), 10, 100, chat=False).max_tokens == 16
    assert limits({"temperature": 0}, Own(), 10, 100, chat=False).temperature == 0
    assert asked(stop="end").stop == ("end",)


@pytest.mark.parametrize(
    "request_", [{"max_tokens": 91}, {"max_completion_tokens": 91}, {"temperature": 3.0}, {"top_p": 2}]
)
def test_what_does_not_fit_is_refused_by_name(request_: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        asked(**request_)
    assert refused.value.status == 400
    if "temperature" not in request_ and "top_p" not in request_:
        assert refused.value.code == "context_length_exceeded"
    else:
        assert refused.value.param in request_


@pytest.mark.parametrize(
    "request_",
    [
        {"tools": [{"type": "function"}]},
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["a"]}},
        {"presence_penalty": 0.5},
    ],
)
def test_a_parameter_it_lacks_is_never_ignored(request_: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=next(iter(request_))) as refused:
        refuse_unknown(request_)
    assert (refused.value.status, refused.value.code) == (400, "unsupported_parameter")


def test_parameters_that_ask_for_nothing_are_taken() -> None:
    refuse_unknown({"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "min_p": 0})


def test_prompts() -> None:
    assert one_prompt({"prompt": "a"}) == one_prompt({"prompt": ["a"]}) == "a"
    assert one_prompt({"prompt": [1, 2]}) == [1, 2]
    for wrong in ([], ["a", "b"], None):
        with pytest.raises(ApiError, match="one prompt at a time"):
            one_prompt({"prompt": wrong})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert flat_messages({"messages": [{"role": "user", "content": parts}]}) == [{"role": "user", "content": "a\nb"}]
    with pytest.raises(ApiError, match="image_url"):
        flat_messages({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_a_long_request_is_not_overtaken_for_ever() -> None:
    async def run() -> list[str]:
        room, order = Room(10), []

        async def one(name: str, tokens: int) -> None:
            await room.take(tokens)
            order.append(name)

        await room.take(8)
        waiting = [asyncio.create_task(one("large", 9)), asyncio.create_task(one("small", 1))]
        await asyncio.sleep(0.01)
        assert order == [], "the small one went before the large one that asked first"
        room.give(8)
        await asyncio.gather(*waiting)
        assert room.free == 0
        return order

    assert asyncio.run(run()) == ["large", "small"]


def test_one_that_hangs_up_while_it_waits_leaves_the_room_to_others() -> None:
    async def run() -> None:
        room = Room(10)
        await room.take(10)
        waiting = asyncio.create_task(room.take(5))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        room.give(10)
        await asyncio.wait_for(room.take(10), 1)

    asyncio.run(run())


# vLLM 0.29, model_executor/models/registry.py, in the envelope of pydantic's.
REFUSED = """1 validation error for ModelConfig
  Value error, Model architectures ['OldForCausalLM'] are not supported for now. Supported: dict_keys(['A'])
  [type=value_error, input_value=ArgsKwargs((), {'model'}), input_type=ArgsKwargs]"""


def test_only_vllms_own_word_on_the_architecture_leads_to_the_fallback() -> None:
    assert cannot_run(REFUSED) == "vLLM says: Model architectures ['OldForCausalLM'] are not supported for now"
    gone = "Model architecture X was supported in vLLM until v0.10.2, and is not supported anymore"
    assert cannot_run(f"Value error, {gone}. Please use an older version") == f"vLLM says: {gone}"
    for other in ("CUDA out of memory. Tried to allocate", "max_model_len (4096) is greater than", "No such file"):
        assert cannot_run(other) is None
