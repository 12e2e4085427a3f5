"""OpenAI's objects and events around a text, for engines that are not vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The answer to one request, whole or in events. ``about`` is what all of them share: id, created, model."""

    about: dict[str, Any]
    kind: str
    response: str
    """The class of ray.serve.llm's that a whole answer is."""
    prompt_tokens: int
    cached: bool = False
    """The prompt had not to be read here."""

    def whole(self, words: list[str], finish: str, tokens: int | None = None) -> dict[str, Any]:
        """The answer in one piece; ``tokens``: how many it took, where that is not one for each of ``words``."""
        text = "".join(words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {
            **self.about,
            "object": self.kind,
            "choices": [choice],
            "usage": self._usage(len(words) if tokens is None else tokens),
        }

    def event(self, word: str, first: bool = False, finish: str | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self._chat:
            choice["delta"] = {"role": "assistant", "content": ""} if first else {"content": word} if word else {}
        else:
            choice["text"] = word
        return self._event([choice])

    def usage_event(self, count: int) -> str:
        """The last event where ``stream_options.include_usage`` is set: no choice, the usage alone."""
        return self._event([], usage=self._usage(count))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._chat else self.kind
        return f"data: {json.dumps({**self.about, 'object': kind, 'choices': choices, **more})}\n\n"

    def _usage(self, count: int) -> dict[str, Any]:
        details = {"prompt_tokens_details": {"cached_tokens": self.prompt_tokens}} if self.cached else {}
        return usage(self.prompt_tokens, count) | details

    @property
    def _chat(self) -> bool:
        return self.kind == "chat.completion"


def usage(prompt: int, answered: int = 0) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


RESPONSES = {
    "chat": "ChatCompletionResponse",
    "completions": "CompletionResponse",
    "embeddings": "EmbeddingResponse",
    "score": "ScoreResponse",
    "tokenize": "TokenizeResponse",
    "detokenize": "DetokenizeResponse",
}
"""The class of ray.serve.llm's that a whole answer is, by the method of the replica."""


def plain(request: Any) -> dict[str, Any]:
    """A request as JSON, which the light gateway has anyway; ray.serve.llm's has its classes."""
    if isinstance(request, dict):
        return request
    found: dict[str, Any] = request.model_dump(exclude_unset=True, by_alias=True)
    return found


def in_kind(body: dict[str, Any], request: Any, response: str) -> Any:
    """An answer in the kind of the question."""
    if isinstance(request, dict):
        return body
    from ray.llm._internal.serve.core.configs import openai_api_models as shapes

    return getattr(shapes, response)(**body)
