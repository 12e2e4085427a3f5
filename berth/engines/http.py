"""What the two gateways share of HTTP: errors in OpenAI's shape, the list of models, the rerank API."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from berth.engines.errors import ApiError, invalid, unknown
from berth.engines.routes import Routes
from berth.ray.serve_config import MAX_BODY_VARIABLE, ServeOptions

MIB = 1 << 20
SESSION_HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
"""ray/serve/_private/constants.py."""
_session: ContextVar[str] = ContextVar("session", default="")


class BodyLimit:
    """Refuses what is too large with 413: before any of it is read where its length is given, else when it is over.

    Serve's proxies have no limit, and FastAPI holds a body in memory as a whole, several times over as JSON.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._most = int(os.environ.get(MAX_BODY_VARIABLE, ServeOptions.max_body_mib)) * MIB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"content-length", b"0")
        if given.isdigit() and int(given) > self._most:
            await error_response(ApiError(413, self._words))(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                # FastAPI makes 400 of any other class that is raised while it reads a body.
                raise HTTPException(413, self._words)
            return message

        await self._app(scope, counted, send)

    @property
    def _words(self) -> str:
        return f"The body of the request is larger than {self._most // MIB} MiB."


class Session:
    """Notes the session that a request belongs to, by the header that Ray Serve has for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _session.set(dict(scope["headers"]).get(SESSION_HEADER, b"").decode("latin-1"))
        await self._app(scope, receive, send)


def session() -> str:
    """The session of the request that is being answered, "" where it names none."""
    return _session.get()


class RerankRequest(BaseModel):
    """The common rerank API (Cohere's and Jina's shape)."""

    model: str | None = None
    query: str
    documents: list[str] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True


async def answered(parts: AsyncIterator[Any]) -> Response:
    """An answer in plain JSON whole, or event by event; its status is known when its first part is."""
    first = await anext(parts)
    if isinstance(first, dict):
        return JSONResponse(first)
    return StreamingResponse(_events(first, parts), media_type="text/event-stream")


async def _events(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event
    yield "data: [DONE]\n\n"


def ranked(body: RerankRequest, scores: Iterable[tuple[int, float]], about: dict[str, Any]) -> JSONResponse:
    """The answer to ``body`` from each document's index and score; ``about``: its id and usage."""
    rows = [
        {"index": index, "relevance_score": score}
        | ({"document": {"text": body.documents[index]}} if body.return_documents else {})
        for index, score in sorted(scores, key=lambda item: (-item[1], item[0]))[: body.top_n]
    ]
    return JSONResponse({**about, "model": body.model, "results": rows})


def model_card(routes: Routes, name: str, created: int) -> dict[str, Any]:
    """OpenAI's model object; with ``engine`` and ``engine_reason`` where a berth of it does not run vLLM."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "berth"}
    return card | next(iter(routes.engines(name.partition(":")[0]).values()), {})


async def model_list(routes: Routes, created: int) -> JSONResponse:
    """Models and adapters of the table; ``created``: seconds since 1970, of the gateway, for want of better."""
    await routes.ask_engines()
    return JSONResponse({"object": "list", "data": [model_card(routes, name, created) for name in routes.ids()]})


async def one_model(routes: Routes, name: str, created: int) -> JSONResponse:
    if name not in routes.ids():
        raise unknown(name)
    await routes.ask_engines()
    return JSONResponse(model_card(routes, name, created))


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def add_error_handlers(app: FastAPI) -> None:
    """Every refusal as OpenAI's: ours, Starlette's (unknown path, wrong method), FastAPI's of a body (400, not 422),
    and of a body that is too large."""
    app.add_middleware(BodyLimit)
    app.add_middleware(Session)
    app.add_exception_handler(ApiError, _ours)
    app.add_exception_handler(HTTPException, _starlette)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _bug)


async def _ours(_request: Any, error: ApiError) -> JSONResponse:
    return error_response(error)


async def _starlette(_request: Any, error: HTTPException) -> JSONResponse:
    return error_response(ApiError(error.status_code, str(error.detail)))


async def _invalid(_request: Any, error: RequestValidationError) -> JSONResponse:
    # FastAPI puts where it looked before the path (body).
    return error_response(invalid([{**item, "loc": item["loc"][1:]} for item in error.errors()]))


async def _bug(_request: Any, _error: Exception) -> JSONResponse:
    # Starlette logs it; a client gets no insides.
    return error_response(ApiError(500, "The gateway failed to answer.", code="internal_error"))
