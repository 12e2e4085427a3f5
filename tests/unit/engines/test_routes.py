"""The gateway's table: who answers, who does not, and how requests spread; with handles that are no Serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from berth.engines.routes import RETRY_AFTER_S, NoBerthError, Routes


class Handle:
    """A berth that answers with its own name."""

    def __init__(self, name: str) -> None:
        self.chat = self
        self.name = name

    async def remote(self, *_args: Any) -> AsyncIterator[str]:
        yield self.name


def table(**models: dict[str, int]) -> dict[str, Any]:
    return {
        "models": {
            model: {"berths": [{"app": app, "replicas": replicas} for app, replicas in berths.items()]}
            for model, berths in models.items()
        }
    }


def routes(**models: dict[str, int]) -> Routes:
    made = Routes(lambda _model, app: Handle(app))
    made.take(table(**models))
    return made


def test_an_unknown_model_is_404_and_one_without_a_berth_503() -> None:
    made = routes(chat={})
    with pytest.raises(NoBerthError) as unknown:
        made.choose("nope")
    assert unknown.value.status == 404
    with pytest.raises(NoBerthError) as empty:
        made.choose("chat")
    assert empty.value.status == 503
    assert empty.value.headers == {"Retry-After": str(RETRY_AFTER_S)}


def test_a_berth_that_is_not_there_is_left_out() -> None:
    def get(_model: str, app: str) -> Handle:
        if app == "gone":
            raise RuntimeError("no such app")
        return Handle(app)

    made = Routes(get)
    made.take(table(chat={"gone": 1, "here": 1}))
    assert made.models() == {"chat": ["here"]}


def test_requests_go_where_fewer_are_outstanding() -> None:
    made = routes(chat={"a": 1, "b": 1})

    async def ask() -> Counter[str]:
        seen: Counter[str] = Counter()
        open_calls = []
        for _ in range(200):
            handle, name = made.choose("chat")
            call = made.call(handle, name, "chat")
            seen[await anext(call)] += 1
            open_calls.append(call)
        for call in open_calls:
            await call.aclose()
        return seen

    seen = asyncio.run(ask())
    assert abs(seen["a"] - seen["b"]) <= 20
    assert set(made._outstanding.values()) == {0}
