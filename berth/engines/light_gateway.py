"""The gateway of a runtime without vLLM: light replicas behind the same table, the same addresses, plain JSON.

ray.serve.llm's ingress needs vLLM's classes, some gigabytes of packages that a lab host has no use for.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import Body, FastAPI, HTTPException
from ray import serve
from starlette.responses import JSONResponse

from berth.engines.routes import Routes, choose_or_http, serve_handle

app = FastAPI()


@app.exception_handler(HTTPException)  # type: ignore[untyped-decorator]
async def _error(_request: Any, error: HTTPException) -> JSONResponse:
    """OpenAI's shape of an error."""
    body = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)


@serve.ingress(app)
class LightGateway:
    """/v1/models, /v1/chat/completions, /v1/completions and /healthz over light berths."""

    def __init__(self) -> None:
        self._routes = Routes(serve_handle)
        self._started = int(time.time())

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the new table; never an error."""
        self._routes.take(user_config)

    @app.get("/v1/models")  # type: ignore[untyped-decorator]
    async def models(self) -> JSONResponse:
        card = {"object": "model", "owned_by": "berth", "created": self._started}
        return JSONResponse({"object": "list", "data": [{"id": model} | card for model in self._routes.models()]})

    @app.post("/v1/chat/completions")  # type: ignore[untyped-decorator]
    async def chat(self, body: dict[str, Any] = Body()) -> JSONResponse:  # noqa: B008  # FastAPI's way to say it
        return await self._answer("chat", body)

    @app.post("/v1/completions")  # type: ignore[untyped-decorator]
    async def completions(self, body: dict[str, Any] = Body()) -> JSONResponse:  # noqa: B008
        return await self._answer("completions", body)

    @app.get("/healthz")  # type: ignore[untyped-decorator]
    async def healthz(self) -> JSONResponse:
        """200 while every model of the table has a berth."""
        models = self._routes.models()
        return JSONResponse({"models": models}, status_code=200 if all(models.values()) else 503)

    async def _answer(self, method: str, body: dict[str, Any]) -> JSONResponse:
        if body.get("stream"):
            raise HTTPException(400, "a light replica does not stream; found: stream: true; allowed: false")
        handle, name = choose_or_http(self._routes, str(body.get("model", "")))
        parts = [part async for part in self._routes.call(handle, name, method, body)]
        return JSONResponse(parts[0])
