"""The light engine's side of OpenAI's responses API: the least object and the events that its clients wait for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from berth.engines.light_answers import count


@dataclass(frozen=True)
class Response:
    """One answer in words. ``about``: id, created, model."""

    about: dict[str, Any]
    prompt_tokens: int

    def whole(self, words: Sequence[str], finish: str) -> dict[str, Any]:
        """OpenAI's response object; ``finish`` as chat has it, ``length`` makes it incomplete."""
        cut = finish == "length"
        return self._object(
            status="incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=[self._message("".join(words), "incomplete" if cut else "completed")],
            usage=self._usage(len(words)),
        )

    def opening(self) -> Iterator[dict[str, Any]]:
        """The events before the first word."""
        begun = self._object(status="in_progress", output=[])
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        item = self._message("", "in_progress") | {"content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield self._in_item("response.content_part.added", part=_text(""))

    def delta(self, word: str) -> dict[str, Any]:
        return self._in_item("response.output_text.delta", delta=word, logprobs=[])

    def closing(self, words: Sequence[str], finish: str) -> Iterator[dict[str, Any]]:
        """The events after the last word; the very last has the whole answer."""
        text, whole = "".join(words), self.whole(words, finish)
        yield self._in_item("response.output_text.done", text=text, logprobs=[])
        yield self._in_item("response.content_part.done", part=_text(text))
        yield {"type": "response.output_item.done", "output_index": 0, "item": whole["output"][0]}
        yield {"type": f"response.{whole['status']}", "response": whole}

    def _in_item(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self._item, "output_index": 0, "content_index": 0, **more}

    def _object(self, **more: Any) -> dict[str, Any]:
        return {
            "id": self.about["id"],
            "object": "response",
            "created_at": self.about["created"],
            "model": self.about["model"],
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            **more,
        }

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": [_text(text)]}

    @property
    def _item(self) -> str:
        return f"msg_{self.about['id']}"

    def _usage(self, answered: int) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + answered,
        }


def event(number: int, body: dict[str, Any]) -> str:
    """A server-sent event, named as its type; ``number`` counts those of one answer."""
    return f"event: {body['type']}\ndata: {json.dumps({**body, 'sequence_number': number})}\n\n"


def as_chat(asked: dict[str, Any]) -> dict[str, Any]:
    """The request in chat's words, as far as the light engine reads it."""
    form = (asked.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {"name": form.get("name"), "schema": form.get("schema")}}
    return {**asked, "max_tokens": asked.get("max_output_tokens"), "response_format": form or None}


def prompt_tokens(asked: dict[str, Any]) -> int:
    """Words of the instructions and of the input, a text or a list of messages."""
    given = asked["input"]
    texts = [given] if isinstance(given, str) else [_content(item) for item in given]
    return count(str(asked.get("instructions") or "")) + sum(map(count, texts))


def _content(item: Any) -> str:
    content = item.get("content", "") if isinstance(item, dict) else item
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
