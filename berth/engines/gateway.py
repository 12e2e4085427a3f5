"""The gateway: ray.serve.llm's OpenAI ingress over berths, with a table that changes without a restart."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ModelCard,
    OpenAIHTTPException,
    ScoreRequest,
    TokenizeRequest,
)
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, OpenAiIngress, make_fastapi_ingress
from ray.llm._internal.serve.core.ingress.middleware import SetRequestIdMiddleware
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.observability.metrics.fast_api_metrics import (
    add_http_metrics_middleware,
    metrics_lifespan,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from berth.engines.answers import RESPONSES, in_kind
from berth.engines.errors import ApiError
from berth.engines.http import RerankRequest, add_error_handlers, error_response, model_list, one_model, ranked, session
from berth.engines.prefill import refuse_params
from berth.engines.responses import ResponsesBody, asked_of, told
from berth.engines.routes import Routes, serve_handle, serve_runs


class Gateway(OpenAiIngress):  # type: ignore[misc]
    """Every route of ray.serve.llm's ingress, answered by the berth that berth.engines.routes chooses."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self._routes = Routes(serve_handle, serve_runs)
        self._started = int(time.time())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the new table; never an error."""
        self._routes.take(user_config)
        self._model_cards = {
            model: ModelCard(id=model, object="model", owned_by="berth", permission=[], metadata={})
            for model in self._routes.ids()
        }

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        return self._routes.choose(model_id).handle

    async def _get_response(self, *, body: Any, call_method: str, raw_request: Any = None) -> Any:
        refuse_params(body)
        if hasattr(body, "messages"):
            try:
                body = _sanitize_chat_completion_request(body)
            except ValueError as error:
                raise ApiError(400, str(error), param="messages") from None
        info = RawRequestInfo.from_starlette_request(raw_request) if raw_request is not None else None
        async for response in self._routes.answer(body.model, call_method, body, info, session=session()):
            # From an engine that reads and writes JSON.
            yield in_kind(response, body, RESPONSES[call_method]) if isinstance(response, dict) else response

    async def models(self) -> JSONResponse:
        return await model_list(self._routes, self._started)

    async def model_data(self, model: str) -> JSONResponse:
        return await one_model(self._routes, model, self._started)

    async def responses(self, body: ResponsesBody, request: Request) -> Response:
        """OpenAI's responses, which ray.serve.llm does not have."""
        info = RawRequestInfo.from_starlette_request(request)
        parts = self._routes.answer(body.model, "responses", asked_of(body), info, session=session())
        return await told(parts)

    async def rerank(self, body: RerankRequest) -> JSONResponse:
        """Documents ordered by relevance, from the model's scores."""
        request = ScoreRequest(model=body.model, text_1=body.query, text_2=body.documents)
        result = await anext(self._get_response(body=request, call_method="score"))
        scores = [(item.index, item.score) for item in result.data]
        return ranked(body, scores, {"id": result.id, "usage": result.usage.model_dump()})

    async def tokenize(self, body: TokenizeRequest, request: Request) -> JSONResponse:
        """Tokens of a prompt, or of messages in the model's chat template, which ray.serve.llm's own leaves out."""
        result = await anext(self._get_response(body=body, call_method="tokenize", raw_request=request))
        return JSONResponse(result.model_dump())

    async def healthz(self) -> JSONResponse:
        """See berth.engines.routes.Routes.health."""
        status, body = self._routes.health()
        return JSONResponse(body, status_code=status)


async def _ray_error(_request: Any, error: OpenAIHTTPException) -> JSONResponse:
    if error.status_code == 408:
        # Ray's limit on the first part, RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT: the client was not slow, the engine was.
        return error_response(ApiError(504, "The model did not answer in time.", code="timeout"))
    return error_response(ApiError(error.status_code, error.message))


def gateway_class() -> Any:
    """The gateway with its routes, ready for ``serve.deployment``.

    The app is ray.serve.llm's (``init``) without its middleware for errors: our handlers answer those, and Starlette's
    BaseHTTPMiddleware takes every part of a stream through a queue and a task of its own (decision 22).
    """
    app = FastAPI(lifespan=metrics_lifespan)
    add_error_handlers(app)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    add_http_metrics_middleware(app)
    # Last, so that it is the outermost: the others look at what it sets.
    app.add_middleware(SetRequestIdMiddleware)
    app.add_exception_handler(OpenAIHTTPException, _ray_error)
    routes = dict(DEFAULT_ENDPOINTS)
    routes["models"] = lambda app: app.get("/v1/models")
    routes["model_data"] = lambda app: app.get("/v1/models/{model:path}")
    routes["responses"] = lambda app: app.post("/v1/responses")
    routes["rerank"] = lambda app: app.post("/v1/rerank")
    routes["healthz"] = lambda app: app.get("/healthz")
    return make_fastapi_ingress(Gateway, endpoint_map=routes, app=app)
