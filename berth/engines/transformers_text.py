"""What the transformers engine reads from a request and how it writes text, without torch: prompts, limits, stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from berth.engines.errors import ApiError

COMPLETION_TOKENS = 16
"""OpenAI's default length of a completion; a chat goes on to its end."""

_ABSENT: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None,),
    "tools": (None, []),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "min_p": (None, 0, 0.0),
    "min_tokens": (None, 0),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "use_beam_search": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
}
"""Parameters that vLLM has and this engine has not, and the values that ask for nothing."""


@dataclass(frozen=True)
class Limits:
    """How an answer is made: OpenAI's sampling parameters. ``max_tokens`` is what fits when none is asked for."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool


def refuse_unknown(asked: Mapping[str, Any]) -> None:
    """Never ignored in silence: who asks for a JSON schema and gets prose finds out at night.

    Raises:
        ApiError: 400, naming the parameter.
    """
    for name, nothing in _ABSENT.items():
        if asked.get(name) not in nothing:
            raise _absent(name)
    if (asked.get("response_format") or {}).get("type", "text") != "text":
        raise _absent("response_format")


def _absent(name: str) -> ApiError:
    message = f"`{name}` is not supported: this model runs on the transformers engine, not on vLLM."
    return ApiError(400, message, code="unsupported_parameter", param=name)


def limits(asked: Mapping[str, Any], defaults: Any, prompt_tokens: int, longest: int, chat: bool) -> Limits:
    """``defaults`` is the model's own generation config, ``longest`` its context in tokens.

    Raises:
        ApiError: 400 for a prompt that leaves no room, or a value out of range; in vLLM's words.
    """
    given = asked.get("max_completion_tokens") or asked.get("max_tokens")
    room = longest - prompt_tokens
    wanted = given if given is not None else room if chat else min(COMPLETION_TOKENS, max(room, 1))
    if wanted > room or room < 1:
        message = (
            f"This model's maximum context length is {longest} tokens. However, you requested {max(wanted, 1)} output "
            f"tokens and your prompt contains {prompt_tokens} input tokens."
        )
        raise ApiError(400, message, code="context_length_exceeded", param="messages" if chat else "prompt")
    stop = asked.get("stop") or ()
    return Limits(
        max_tokens=wanted,
        temperature=_number(asked, defaults, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(asked, defaults, "top_p", 1.0, 0.0, 1.0),
        top_k=int(_number(asked, defaults, "top_k", 0, -1, 10**9)),
        repetition_penalty=_number(asked, defaults, "repetition_penalty", 1.0, 0.01, 100.0),
        seed=asked.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(asked.get("ignore_eos")),
    )


def _number(asked: Mapping[str, Any], defaults: Any, name: str, otherwise: float, low: float, high: float) -> float:
    value = asked.get(name)
    if value is None:
        value = getattr(defaults, name, None)
    if value is None:
        return otherwise
    if not low <= value <= high:
        raise ApiError(400, f"{name} must be in [{low:g}, {high:g}], got {value}.", param=name)
    return float(value)


def one_prompt(asked: Mapping[str, Any]) -> str | list[int]:
    """The prompt of a completion, text or token ids.

    Raises:
        ApiError: 400 for several of them, or for none.
    """
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
        return prompt
    message = "The transformers engine takes one prompt at a time, a text or a list of token ids."
    raise ApiError(400, message, param="prompt")


def flat_messages(asked: Mapping[str, Any]) -> list[dict[str, str]]:
    """Messages with their text alone.

    Raises:
        ApiError: 400 for an image or another part that is not text.
    """
    found = []
    for message in asked.get("messages") or ():
        content = message.get("content") or ""
        if not isinstance(content, str):
            for part in content:
                if part.get("type") != "text":
                    raise _absent(f"messages.content of type {part.get('type')}")
            content = "\n".join(str(part["text"]) for part in content)
        found.append({"role": str(message.get("role")), "content": content})
    if not found:
        raise ApiError(400, "messages is empty.", param="messages")
    return found


class Text:
    """Text from token ids as they come, up to a stop sequence.

    A token may be part of a character, and the end of the text part of a stop sequence: both wait for what follows.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [item for item in stop if item]
        self._ids: list[int] = []
        self._from = self._to = 0
        self._held = ""
        self.stopped = False
        self.tokens = 0

    def add(self, token: int) -> str:
        """The text that is sure now."""
        self.tokens += 1
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._to])
        after = self._decode(self._ids[self._from :])
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._until_stop(after[len(before) :], last=False)

    def end(self) -> str:
        """What was held back."""
        before = self._decode(self._ids[self._from : self._to])
        rest = self._decode(self._ids[self._from :])[len(before) :]
        return self._until_stop(rest, last=True)

    def _until_stop(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        self._held = ""
        ends = [at for at in (text.find(item) for item in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        if last:
            return text
        keep = max(
            (size for item in self._stop for size in range(1, len(item)) if text.endswith(item[:size])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Room:
    """Tokens that the KV cache has room for; who asks for more than is left waits, in the order of asking."""

    def __init__(self, tokens: int) -> None:
        self._free = tokens
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def free(self) -> int:
        return self._free

    async def take(self, tokens: int) -> None:
        async with self._turn:
            while self._free < tokens:
                self._freed.clear()
                await self._freed.wait()
            self._free -= tokens

    def give(self, tokens: int) -> None:
        self._free += tokens
        self._freed.set()
