"""The gateway of a runtime without vLLM: light replicas behind the same table, the same addresses, plain JSON.

ray.serve.llm's ingress needs vLLM's classes, some gigabytes of packages that a lab host has no use for.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.responses import JSONResponse, Response

from berth.engines.http import RerankRequest, add_error_handlers, answered, model_list, one_model, ranked, session
from berth.engines.prefill import refuse_params
from berth.engines.responses import ResponsesBody, asked_of, told
from berth.engines.routes import Routes, serve_handle, serve_runs

app = FastAPI()
add_error_handlers(app)


class _Body(BaseModel):
    """What the light engine reads is checked; the rest goes by, as with engines that know more."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None


class _Generation(_Body):
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: dict[str, Any] | None = None


class ChatBody(_Generation):
    messages: list[dict[str, Any]]


class CompletionBody(_Generation):
    prompt: str | list[str] | list[int]


class EmbeddingBody(_Body):
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: str = Field(default="float", pattern="^(float|base64)$")
    dimensions: int | None = Field(default=None, ge=1)


class ScoreBody(_Body):
    text_1: str
    text_2: list[str]


@serve.ingress(app)
class LightGateway:
    """The addresses of berth.engines.gateway over light berths."""

    def __init__(self) -> None:
        self._routes = Routes(serve_handle, serve_runs)
        self._started = int(time.time())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the new table; never an error."""
        self._routes.take(user_config)

    @app.get("/v1/models")  # type: ignore[untyped-decorator]
    async def models(self) -> JSONResponse:
        return await model_list(self._routes, self._started)

    @app.get("/v1/models/{model:path}")  # type: ignore[untyped-decorator]
    async def model_data(self, model: str) -> JSONResponse:
        return await one_model(self._routes, model, self._started)

    @app.post("/v1/chat/completions")  # type: ignore[untyped-decorator]
    async def chat(self, body: ChatBody) -> Response:
        return await self._answer("chat", body)

    @app.post("/v1/completions")  # type: ignore[untyped-decorator]
    async def completions(self, body: CompletionBody) -> Response:
        return await self._answer("completions", body)

    @app.post("/v1/responses")  # type: ignore[untyped-decorator]
    async def responses(self, body: ResponsesBody) -> Response:
        return await told(self._routes.answer(body.model, "responses", asked_of(body), session=session()))

    @app.post("/v1/embeddings")  # type: ignore[untyped-decorator]
    async def embeddings(self, body: EmbeddingBody) -> Response:
        return await self._answer("embeddings", body)

    @app.post("/v1/score")  # type: ignore[untyped-decorator]
    async def score(self, body: ScoreBody) -> Response:
        return await self._answer("score", body)

    @app.post("/v1/rerank")  # type: ignore[untyped-decorator]
    async def rerank(self, body: RerankRequest) -> JSONResponse:
        """Documents ordered by relevance, from the model's scores."""
        request = {"model": body.model, "text_1": body.query, "text_2": body.documents}
        result = await anext(self._routes.answer(body.model, "score", request))
        scores = [(item["index"], item["score"]) for item in result["data"]]
        return ranked(body, scores, {"id": result["id"], "usage": result["usage"]})

    @app.get("/healthz")  # type: ignore[untyped-decorator]
    async def healthz(self) -> JSONResponse:
        """See berth.engines.routes.Routes.health."""
        status, body = self._routes.health()
        return JSONResponse(body, status_code=status)

    async def _answer(self, method: str, body: _Body) -> Response:
        asked = body.model_dump(exclude_unset=True)
        refuse_params(asked)
        return await answered(self._routes.answer(body.model, method, asked, session=session()))
