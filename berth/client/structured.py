"""Answers that are Pydantic models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class InvalidAnswer(Exception):
    """An answer that is not what was asked for; ``raw`` is its text as it came."""

    def __init__(self, why: str, raw: str) -> None:
        super().__init__(f"{why}; found: {raw!r}")
        self.why, self.raw = why, raw


def parse(client: OpenAI, kind: type[Model], *, model: str, messages: Iterable[Any], **options: Any) -> Model:
    """A chat answer as a ``kind``: the engine is held to its JSON schema, and what comes is validated all the same.

    ``options`` are those of ``chat.completions.create``.

    Raises:
        InvalidAnswer: the answer was cut off, refused, or is no ``kind``.
        openai.OpenAIError: the cluster refused the request.
    """
    answer = client.chat.completions.create(
        model=model, messages=list(messages), response_format=response_format(kind), **options
    )
    return _read(answer, kind)


async def aparse(
    client: AsyncOpenAI, kind: type[Model], *, model: str, messages: Iterable[Any], **options: Any
) -> Model:
    """As ``parse``, for asyncio."""
    answer = await client.chat.completions.create(
        model=model, messages=list(messages), response_format=response_format(kind), **options
    )
    return _read(answer, kind)


def response_format(kind: type[BaseModel]) -> Any:
    """OpenAI's ``response_format`` for a Pydantic model."""
    return {
        "type": "json_schema",
        "json_schema": {"name": kind.__name__, "schema": kind.model_json_schema(), "strict": True},
    }


def _read(answer: Any, kind: type[Model]) -> Model:
    choice = answer.choices[0]
    raw = choice.message.content or ""
    if choice.finish_reason == "length":
        raise InvalidAnswer("the answer was cut off; mend: a larger max_tokens", raw)
    if refused := getattr(choice.message, "refusal", None):
        raise InvalidAnswer("the model refused to answer", refused)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or kind.__name__
        raise InvalidAnswer(f"the answer is no {kind.__name__}: {where}: {first['msg']}", raw) from error
