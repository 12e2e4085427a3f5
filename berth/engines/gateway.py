"""The gateway: ray.serve.llm's OpenAI ingress over berths, with a table that changes without a restart."""

from __future__ import annotations

import random
from typing import Any

from fastapi import HTTPException
from pydantic import BaseModel, Field
from ray import serve
from starlette.responses import JSONResponse

from berth.engines.light_protocol import stand_in

stand_in()  # Before ray.llm, which looks for an engine's models when it is imported.

from ray.llm._internal.serve.core.configs.openai_api_models import (  # noqa: E402
    ErrorResponse,
    ModelCard,
    ScoreRequest,
)
from ray.llm._internal.serve.core.ingress.ingress import (  # noqa: E402
    DEFAULT_ENDPOINTS,
    OpenAiIngress,
    make_fastapi_ingress,
)

RETRY_AFTER_S = 5


class RerankRequest(BaseModel):
    """The common rerank API (Cohere's and Jina's shape)."""

    model: str
    query: str
    documents: list[str] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True


class Gateway(OpenAiIngress):  # type: ignore[misc]
    """Routes by model over that model's berths: two random choices, then the fewer outstanding requests of ours,
    each berth weighted by its replicas (the power of two choices, Mitzenmacher 2001)."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self._berths: dict[str, list[tuple[Any, int, str]]] = {}
        self._outstanding: dict[str, int] = {}

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the new table. A berth that does not exist (yet, or any more) is left out, never an error: an
        exception here would make Serve restart the gateway."""
        berths: dict[str, list[tuple[Any, int, str]]] = {}
        cards: dict[str, ModelCard] = {}
        for model, entry in sorted(user_config.get("models", {}).items()):
            berths[model] = []
            cards[model] = ModelCard(id=model, object="model", owned_by="berth", permission=[], metadata={})
            for berth in entry["berths"]:
                try:
                    handle = serve.get_deployment_handle(model, app_name=berth["app"])
                except Exception:
                    continue
                berths[model].append((handle.options(stream=True), int(berth["replicas"]), berth["app"]))
        self._berths, self._model_cards = berths, cards
        self._outstanding = {name: n for name, n in self._outstanding.items() if n > 0}

    def _choose(self, model_id: str) -> tuple[Any, str]:
        berths = self._berths.get(model_id)
        if berths is None:
            raise HTTPException(404, f'Could not find model with id "{model_id}".')
        if not berths:
            raise HTTPException(
                503,
                f'Model "{model_id}" has no berth that runs now; try again shortly.',
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        pair = random.choices(berths, weights=[replicas for _, replicas, _ in berths], k=2)
        handle, _, name = min(pair, key=lambda berth: self._outstanding.get(berth[2], 0) / berth[1])
        return handle, name

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        return self._choose(model_id)[0]

    async def _get_response(self, *, body: Any, call_method: str, raw_request: Any = None) -> Any:
        from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
        from ray.llm._internal.serve.core.protocol import RawRequestInfo

        model_id = await self._get_model_id(body.model)
        handle, name = self._choose(model_id)
        if call_method == "chat":
            body = _sanitize_chat_completion_request(body)
        info = RawRequestInfo.from_starlette_request(raw_request) if raw_request is not None else None
        self._outstanding[name] = self._outstanding.get(name, 0) + 1
        try:
            async for response in getattr(handle, call_method).remote(body, info):
                yield response
        finally:
            self._outstanding[name] = self._outstanding.get(name, 1) - 1

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
        models = {model: [name for _, _, name in berths] for model, berths in self._berths.items()}
        return JSONResponse({"models": models}, status_code=200 if all(models.values()) else 503)


def gateway_class() -> Any:
    """The gateway with its routes, ready for ``serve.deployment``."""
    routes = dict(DEFAULT_ENDPOINTS)
    routes["rerank"] = lambda app: app.post("/v1/rerank")
    routes["healthz"] = lambda app: app.get("/healthz")
    return make_fastapi_ingress(Gateway, endpoint_map=routes)
