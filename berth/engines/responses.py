"""OpenAI's responses API over berths: each request brings all that it needs, since replicas share no store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response, StreamingResponse

from berth.engines.errors import ApiError
from berth.engines.prefill import refuse_params

STORED = {
    "previous_response_id": "send the whole conversation as `input`",
    "conversation": "send the whole conversation as `input`",
    "background": "ask with `stream`, or wait for the answer",
}
"""What would need a store of answers that every replica reads, and what to do instead."""


class ResponsesBody(BaseModel):
    """What routing needs of a request is checked here, the rest by the engine that answers it."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    input: str | list[Any]
    stream: bool | None = None


def asked_of(body: ResponsesBody) -> dict[str, Any]:
    """The request as it goes to a berth. ``store`` is as in vLLM: taken, and nothing is kept.

    Raises:
        ApiError: 400 where it refers to an answer that was kept, wants to be answered later, or names an engine.
    """
    asked = body.model_dump(exclude_unset=True)
    refuse_params(asked)
    for name, instead in STORED.items():
        if asked.get(name):
            message = f"`{name}` is not supported: no answers are kept here; {instead}."
            raise ApiError(400, message, code="unsupported_parameter", param=name)
    return asked


def no_responses(model: str) -> ApiError:
    """The engine of ``model`` has none."""
    message = f"The engine of the model `{model}` does not answer /v1/responses; ask /v1/chat/completions."
    return ApiError(400, message, code="unsupported_endpoint", param="model")


async def told(parts: AsyncIterator[Any]) -> Response:
    """JSON in one piece, or server-sent events; its status is known when its first part is. Unlike chat's, these
    streams have no ``[DONE]``: their last event is named."""
    first = await anext(parts)
    if isinstance(first, dict):
        return JSONResponse(first)
    return StreamingResponse(_events(first, parts), media_type="text/event-stream")


async def _events(first: str | list[str], rest: AsyncIterator[str | list[str]]) -> AsyncIterator[str]:
    yield "".join(first)
    async for part in rest:
        yield "".join(part)
