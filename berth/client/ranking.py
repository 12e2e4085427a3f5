"""The common rerank API (Cohere's and Jina's shape), which OpenAI's has not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from openai import AsyncOpenAI, OpenAI


@dataclass(frozen=True)
class Ranked:
    """A document by its place in what was given, and how relevant it is: more is better, the scale is the model's."""

    index: int
    score: float
    document: str


def rerank(
    client: OpenAI, *, model: str, query: str, documents: Sequence[str], top_n: int | None = None
) -> list[Ranked]:
    """``documents`` by relevance to ``query``, the best first; ``top_n`` of them, or all.

    Raises:
        openai.OpenAIError: the cluster refused the request.
    """
    answer = client.post("/rerank", body=_body(model, query, documents, top_n), cast_to=object)
    return _read(answer, documents)


async def arerank(
    client: AsyncOpenAI, *, model: str, query: str, documents: Sequence[str], top_n: int | None = None
) -> list[Ranked]:
    """As ``rerank``, for asyncio."""
    answer = await client.post("/rerank", body=_body(model, query, documents, top_n), cast_to=object)
    return _read(answer, documents)


def _body(model: str, query: str, documents: Sequence[str], top_n: int | None) -> dict[str, Any]:
    body = {"model": model, "query": query, "documents": list(documents), "return_documents": False}
    return body if top_n is None else {**body, "top_n": top_n}


def _read(answer: object, documents: Sequence[str]) -> list[Ranked]:
    rows = cast(dict[str, Any], answer)["results"]
    return [Ranked(row["index"], row["relevance_score"], documents[row["index"]]) for row in rows]
