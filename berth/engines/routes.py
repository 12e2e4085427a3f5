"""The gateway's table: which berths answer for a model, and which of them takes the next request."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from typing import Any

RETRY_AFTER_S = 5


class NoBerthError(Exception):
    """Nobody answers for a model: the HTTP ``status`` (404 unknown, 503 none runs now), its detail and headers."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class Routes:
    """By model over that model's berths: two random choices, then the fewer outstanding requests of ours, each berth
    weighted by its replicas (the power of two choices, Mitzenmacher 2001).

    ``get_handle(model, app)`` gives a handle to a berth's deployment and raises when there is none.
    """

    def __init__(self, get_handle: Callable[[str, str], Any]) -> None:
        self._get_handle = get_handle
        self._berths: dict[str, list[tuple[Any, int, str]]] = {}
        self._outstanding: dict[str, int] = {}

    def take(self, user_config: dict[str, Any]) -> None:
        """The new table. A berth that does not exist (yet, or any more) is left out, never an error: an exception
        in ``reconfigure`` would make Serve restart the gateway."""
        berths: dict[str, list[tuple[Any, int, str]]] = {}
        for model, entry in sorted(user_config.get("models", {}).items()):
            berths[model] = []
            for berth in entry["berths"]:
                try:
                    handle = self._get_handle(model, berth["app"])
                except Exception:
                    continue
                berths[model].append((handle, int(berth["replicas"]), berth["app"]))
        self._berths = berths
        self._outstanding = {name: n for name, n in self._outstanding.items() if n > 0}

    def models(self) -> dict[str, list[str]]:
        """Names of the berths of every model, the models without any included."""
        return {model: [name for _, _, name in berths] for model, berths in self._berths.items()}

    def choose(self, model: str) -> tuple[Any, str]:
        """A handle and its berth's name.

        Raises:
            NoBerthError: 404 for a model that is not in the table, 503 for one without a berth.
        """
        berths = self._berths.get(model)
        if berths is None:
            raise NoBerthError(404, f'Could not find model with id "{model}".')
        if not berths:
            raise NoBerthError(
                503,
                f'Model "{model}" has no berth that runs now; try again shortly.',
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        pair = random.choices(berths, weights=[replicas for _, replicas, _ in berths], k=2)
        handle, _, name = min(pair, key=lambda berth: self._outstanding.get(berth[2], 0) / berth[1])
        return handle, name

    async def call(self, handle: Any, name: str, method: str, *args: Any) -> AsyncIterator[Any]:
        """Call ``method`` of the berth and count the request as outstanding until its last part has come."""
        self._outstanding[name] = self._outstanding.get(name, 0) + 1
        try:
            async for part in getattr(handle, method).remote(*args):
                yield part
        finally:
            self._outstanding[name] = self._outstanding.get(name, 1) - 1


def choose_or_http(routes: Routes, model: str) -> tuple[Any, str]:
    """``routes.choose``, its refusal as FastAPI's exception."""
    from fastapi import HTTPException

    try:
        return routes.choose(model)
    except NoBerthError as error:
        raise HTTPException(error.status, error.detail, headers=error.headers) from None


def serve_handle(model: str, app: str) -> Any:
    """Serve's streaming handle to the deployment ``model`` of ``app``."""
    from ray import serve

    return serve.get_deployment_handle(model, app_name=app).options(stream=True)
