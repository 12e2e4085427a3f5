"""The gateway: ray.serve.llm's OpenAI ingress over berths, with a table that changes without a restart."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse, ModelCard, ScoreRequest
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, OpenAiIngress, make_fastapi_ingress
from starlette.responses import JSONResponse

from berth.engines.routes import Routes, choose_or_http, serve_handle


class RerankRequest(BaseModel):
    """The common rerank API (Cohere's and Jina's shape)."""

    model: str
    query: str
    documents: list[str] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True


class Gateway(OpenAiIngress):  # type: ignore[misc]
    """Every route of ray.serve.llm's ingress, answered by the berth that berth.engines.routes chooses."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self._routes = Routes(serve_handle)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the new table; never an error."""
        self._routes.take(user_config)
        self._model_cards = {
            model: ModelCard(id=model, object="model", owned_by="berth", permission=[], metadata={})
            for model in self._routes.models()
        }

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        return choose_or_http(self._routes, model_id)[0]

    async def _get_response(self, *, body: Any, call_method: str, raw_request: Any = None) -> Any:
        from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
        from ray.llm._internal.serve.core.protocol import RawRequestInfo

        model_id = await self._get_model_id(body.model)
        handle, name = choose_or_http(self._routes, model_id)
        if call_method == "chat":
            body = _sanitize_chat_completion_request(body)
        info = RawRequestInfo.from_starlette_request(raw_request) if raw_request is not None else None
        async for response in self._routes.call(handle, name, call_method, body, info):
            yield response

    async def rerank(self, body: RerankRequest) -> JSONResponse:
        """Documents ordered by relevance, from the model's scores."""
        request = ScoreRequest(model=body.model, text_1=body.query, text_2=body.documents)
        result = await anext(self._get_response(body=request, call_method="score"))
        if isinstance(result, ErrorResponse):
            return JSONResponse(result.model_dump(), status_code=int(result.error.code or 400))
        ranked = sorted(result.data, key=lambda item: (-item.score, item.index))[: body.top_n]
        rows = [
            {"index": item.index, "relevance_score": item.score}
            | ({"document": {"text": body.documents[item.index]}} if body.return_documents else {})
            for item in ranked
        ]
        return JSONResponse({"id": result.id, "model": body.model, "results": rows, "usage": result.usage.model_dump()})

    async def healthz(self) -> JSONResponse:
        """200 while every model of the table has a berth."""
        models = self._routes.models()
        return JSONResponse({"models": models}, status_code=200 if all(models.values()) else 503)


def gateway_class() -> Any:
    """The gateway with its routes, ready for ``serve.deployment``."""
    routes = dict(DEFAULT_ENDPOINTS)
    routes["rerank"] = lambda app: app.post("/v1/rerank")
    routes["healthz"] = lambda app: app.get("/healthz")
    return make_fastapi_ingress(Gateway, endpoint_map=routes)
