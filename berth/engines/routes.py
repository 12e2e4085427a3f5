"""The gateway's table: which berths answer for a model, which of them takes the next request, and when none does."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from berth.engines.affinity import ADAPTER_SLACK, Affinity, home, keys_of
from berth.engines.answers import plain
from berth.engines.errors import ApiError, down, failure, full, refusal, unknown
from berth.engines.prefill import for_decode, for_prefill

UP_POLL_S = 0.25
ENGINE_TIMEOUT_S = 2.0
"""A berth that is full answers no sooner than its requests end: what engine it runs can wait."""


@dataclass(frozen=True)
class TableBerth:
    """A berth of the table. ``limit`` ends its queue: requests of this gateway that it may have outstanding at once,
    those that it works on and those that wait. ``replicas`` are the most that it may have.

    Where Serve scales it, ``wake_above`` is what all its replicas should have outstanding at most, beyond which another
    berth is woken; one that ``sleeps`` may be without a replica, and a request makes Serve start one.
    ``may_differ``: its engine may be another than vLLM, and is asked. ``works_on``: requests that its replicas work on
    at once, where they fetch prompts' KV caches from others. ``plain``: its engine reads JSON; to unpickle
    vLLM's classes its replicas would import vLLM, some 10 s of CPU time and 600 MB for nothing.
    """

    app: str
    handle: Any
    replicas: int
    limit: int | None
    adapters: frozenset[str]
    wake_above: float | None = None
    sleeps: bool = False
    may_differ: bool = False
    works_on: int | None = None
    plain: bool = False


@dataclass(frozen=True)
class _Model:
    berths: tuple[TableBerth, ...]
    prefix_slack: float
    """See berth.engines.affinity; 0: the beginning of a prompt does not count."""
    prefill_of: str = ""
    """The model whose prompts it reads; nobody asks for it by name."""


class Routes:
    """By model over that model's berths: the one with the fewest outstanding requests of ours for each of its replicas;
    among equals by chance. Two random choices are for who cannot look at all of them or looks at what is stale; each
    gateway knows what it has sent itself, so that several do not all run to one berth.

    ``get_handle(model, app)`` gives a handle to a berth's deployment and raises when there is none;
    ``runs(handle)`` tells how many of its replicas run, None where that cannot be told.
    """

    def __init__(
        self, get_handle: Callable[[str, str], Any], runs: Callable[[Any], int | None] = lambda _handle: None
    ) -> None:
        self._get_handle, self._runs = get_handle, runs
        self._models: dict[str, _Model] = {}
        self._outstanding: Counter[str] = Counter()
        self._affinity = Affinity()
        self._engines: dict[str, dict[str, str]] = {}
        self._prefills: dict[str, str] = {}
        """The model that reads its prompts, by model."""
        self._prefilled: Counter[tuple[str, str]] = Counter()

    def take(self, user_config: dict[str, Any]) -> None:
        """The new table. A berth that does not exist (yet, or any more) is left out, never an error: an exception
        in ``reconfigure`` would make Serve restart the gateway. Requests at a berth that left go on to their end."""
        self._models = {
            model: _Model(
                tuple(filter(None, (self._berth(model, berth) for berth in entry["berths"]))),
                float(entry.get("prefix_affinity", 0)),
                str(entry.get("prefill_of", "")),
            )
            for model, entry in sorted(user_config.get("models", {}).items())
        }
        self._prefills = {model.prefill_of: name for name, model in self._models.items() if model.prefill_of}
        self._engines.clear()
        self._affinity.forget({berth.app for model in self._models.values() for berth in model.berths})

    def _berth(self, model: str, berth: dict[str, Any]) -> TableBerth | None:
        try:
            handle = self._get_handle(model, berth["app"])
        except Exception:
            return None
        adapters = frozenset(berth.get("adapters", ()))
        return TableBerth(
            app=berth["app"],
            handle=handle,
            replicas=int(berth["replicas"]),
            limit=berth.get("limit"),
            adapters=adapters,
            wake_above=berth.get("wake_above"),
            sleeps=bool(berth.get("sleeps")),
            may_differ=bool(berth.get("may_differ")),
            works_on=berth.get("works_on"),
            plain=bool(berth.get("plain")),
        )

    def models(self) -> dict[str, list[str]]:
        """Names of the berths of every model that can answer, the models without any included; those that sleep can,
        once they are awake."""
        return {
            name: [berth.app for berth in model.berths if berth.sleeps or self._up(berth)]
            for name, model in self._models.items()
        }

    def asleep(self) -> list[str]:
        """Berths that Serve has scaled to nothing."""
        return sorted(berth.app for model in self._models.values() for berth in model.berths if self._asleep(berth))

    def ids(self) -> list[str]:
        """What a request may ask for: every model, then its adapters as ``model:adapter``."""
        found = []
        for name, model in self._models.items():
            if model.prefill_of:
                continue
            adapters = sorted({adapter for berth in model.berths for adapter in berth.adapters})
            found += [name, *(f"{name}:{adapter}" for adapter in adapters)]
        return found

    async def ask_engines(self) -> None:
        """Ask the berths whose engine may be another than vLLM, each once, which one it is; see ``engines``."""
        for model in self._models.values():
            for berth in model.berths:
                if berth.may_differ and berth.app not in self._engines and self._up(berth) and not self._asleep(berth):
                    # A berth that does not answer now is asked again the next time.
                    with suppress(Exception):
                        async with asyncio.timeout(ENGINE_TIMEOUT_S):
                            async for about in berth.handle.about.remote():
                                self._engines[berth.app] = dict(about)

    def engines(self, asked: str = "") -> dict[str, dict[str, str]]:
        """What berths (of one model) said of their engine (``engine``, ``engine_reason``), by berth; those alone that
        run none of vLLM."""
        berths = {berth.app for name, model in self._models.items() if asked in ("", name) for berth in model.berths}
        return {
            app: about
            for app, about in sorted(self._engines.items())
            if app in berths and about.get("engine") != "vllm"
        }

    def outstanding(self) -> dict[str, int]:
        """Requests of this gateway that each berth has and has not answered to the end."""
        return {name: count for name, count in sorted(self._outstanding.items()) if count > 0}

    def health(self) -> tuple[int, dict[str, Any]]:
        """200 while every model of the table has a berth that can answer, and what there is to see."""
        models = self.models()
        found: dict[str, Any] = {"models": models, "asleep": self.asleep(), "outstanding": self.outstanding()}
        if engines := self.engines():
            found["engines"] = engines
        if self._prefills:
            found["prefill"] = {
                model: {word: self._prefilled[model, word] for word in ("apart", "alone")} for model in self._prefills
            }
        # Without those that read its prompts, a model still answers.
        up = all(berths for name, berths in models.items() if not self._models[name].prefill_of)
        return 200 if up else 503, found

    def named(self, asked: str | None) -> str:
        """The model that a request means: what it asks for, or the only one there is.

        Raises:
            ApiError: 404 for a model or adapter that is not in the table, 400 when it names none of several.
        """
        known = self.ids()
        if not asked:
            if len(models := [name for name, model in self._models.items() if not model.prefill_of]) == 1:
                return models[0]
            raise ApiError(400, f"You must provide a model parameter; there are: {', '.join(known)}.", param="model")
        if asked not in known:
            raise unknown(asked)
        return asked

    def choose(
        self, asked: str, keys: Sequence[int] = (), without: Collection[str] = (), session: str = ""
    ) -> TableBerth:
        """The berth that takes the next request; ``keys``, ``session``: see berth.engines.affinity.

        A berth in ``without`` is out, unless a replica of it other than the one that failed may be left.

        Raises:
            ApiError: 404 for a model that is not in the table, 503 without a berth that runs, 429 when all are full.
        """
        name, _, adapter = asked.partition(":")
        model = self._models.get(name)
        if model is None:
            raise unknown(asked)
        able = [berth for berth in model.berths if not adapter or adapter in berth.adapters]
        asleep = [berth for berth in able if self._asleep(berth) and berth.app not in without]
        up = [berth for berth in able if self._up(berth) and not self._asleep(berth)]
        others = [berth for berth in up if berth.app not in without] or [berth for berth in up if berth.replicas > 1]
        if not others and not asleep:
            raise down(asked)
        free = [berth for berth in others if self._room(berth)]
        if asleep and (waking := self._wakes(others, asleep)):
            return waking
        if not free:
            raise full(asked)
        if keys:
            load = {berth.app: self._load(berth) for berth in free}
            slack = model.prefix_slack or ADAPTER_SLACK
            known = self._affinity.find(keys, load, slack) or (home(session, load, slack) if session else None)
            if known is not None:
                return next(berth for berth in free if berth.app == known)
        least = min(map(self._load, free))
        equal = [berth for berth in free if self._load(berth) == least]
        return random.choices(equal, weights=[berth.replicas for berth in equal])[0]

    async def answer(
        self, asked: str | None, method: str, request: Any, *more: Any, session: str = ""
    ) -> AsyncGenerator[Any]:
        """The parts of the answer of a berth to ``method(request, *more)``; requests of a ``session`` stay together.

        A berth that was full or died before the first part came is left for another one, once: requests to an engine
        change nothing, but one that kills its engine shall not go through them all. After the first part a failure
        is the last part, an event for the stream that has begun.

        Raises:
            ApiError: nobody answers, or the engine refuses the request; only before the first part.
        """
        async with aclosing(self._answer(self.named(asked), method, request, *more, session=session)) as parts:
            async for part in parts:
                yield part

    async def _answer(self, name: str, method: str, request: Any, *more: Any, session: str) -> AsyncGenerator[Any]:
        keys = self._keys(name, request, session)
        berth = self.choose(name, keys, session=session)
        try:
            async with aclosing(self._parts(berth, name, keys, session, method, request, *more)) as parts:
                async for part in parts:
                    yield part
            return
        except _Elsewhere as left:
            first = left.error
        try:
            berth = self.choose(name, keys, without=(berth.app,), session=session)
        except ApiError:
            raise first from None
        try:
            async with aclosing(self._parts(berth, name, keys, session, method, request, *more)) as parts:
                async for part in parts:
                    yield part
        except _Elsewhere as left:
            raise left.error from None

    async def _parts(
        self, berth: TableBerth, asked: str, keys: Sequence[int], session: str, method: str, request: Any, *more: Any
    ) -> AsyncGenerator[Any]:
        """One berth's answer, counted as outstanding until its last part has come or nobody waits for it any more; from
        before its prompt is read elsewhere, so that it has a place when that is done."""
        self._outstanding[berth.app] += 1
        self._affinity.remember(keys, berth.app)
        begun = ended = False
        response = None
        try:
            if asked.partition(":")[0] in self._prefills:
                request = await self._read_apart(berth, asked, session, method, request, *more)
            asks = (plain(request),) if berth.plain else (request, *more)
            response = getattr(berth.handle, method).remote(*asks)
            async for part in response:
                if not begun and (error := refusal(part)) is not None:
                    raise error
                begun = True
                yield part
            ended = True
        except Exception as raised:
            found = failure(raised, asked)
            if begun:
                yield found.error.event()
            elif found.elsewhere:
                raise _Elsewhere(found.error) from raised
            else:
                raise found.error from raised
        finally:
            self._outstanding[berth.app] -= 1
            if not ended and response is not None:
                # Who hung up in mid-stream may have done so while we waited for him, not for the berth.
                with suppress(Exception):
                    response.cancel()

    async def _read_apart(
        self, berth: TableBerth, asked: str, session: str, method: str, request: Any, *more: Any
    ) -> Any:
        """The request with the KV cache of its prompt, which a berth of another model has read; as it was where that is
        not possible, or would not be used at once: an engine that waited longer than the cache is kept would read
        what is there by then (vLLM 0.29 does not look)."""
        name, _, adapter = asked.partition(":")
        prefill = self._prefills[name]
        found, busy = None, berth.works_on is not None and self._outstanding[berth.app] > berth.works_on
        reader = f"{prefill}:{adapter}" if adapter else prefill
        shaped = for_prefill(request, method, reader)
        if shaped is not None and not busy and not self._asleep(berth):
            # Whatever goes wrong there does not here: the berth reads the prompt itself, or says what is wrong with it.
            with suppress(ApiError, StopAsyncIteration):
                async with aclosing(self._answer(reader, method, shaped, *more, session=session)) as parts:
                    found = for_decode(request, await self._while_up(prefill, anext(parts)))
        self._prefilled[name, "apart" if found is not None else "alone"] += 1
        return request if found is None else found

    async def _while_up(self, name: str, part: Awaitable[Any]) -> Any:
        """``part``, unless every replica of model ``name`` is gone: Serve would wait until one has started again.

        Raises:
            ApiError: they are gone.
        """
        waiting = asyncio.ensure_future(part)
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=UP_POLL_S)
                if not waiting.done() and not any(map(self._up, self._berths(name))):
                    raise down(name)
            return await waiting
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])

    def _wakes(self, awake: Sequence[TableBerth], asleep: Sequence[TableBerth]) -> TableBerth | None:
        """The sleeping berth that this request wakes, if it should.

        With none awake all wait at one, so that one start serves them. Else a single request is sent ahead to wake it,
        once every berth that is awake has all that its replicas should have.
        """
        if not awake:
            return next((berth for berth in asleep if self._room(berth)), None)
        if any(berth.wake_above is None or self._outstanding[berth.app] < berth.wake_above for berth in awake):
            return None
        return next((berth for berth in asleep if not self._outstanding[berth.app]), None)

    def _berths(self, name: str) -> tuple[TableBerth, ...]:
        return self._models[name].berths if name in self._models else ()

    def _room(self, berth: TableBerth) -> bool:
        return berth.limit is None or self._outstanding[berth.app] < berth.limit

    def _asleep(self, berth: TableBerth) -> bool:
        # Serve's router says None until it has heard of a replica, which of these may take until the first request.
        return berth.sleeps and not self._runs(berth.handle)

    def _keys(self, asked: str, request: Any, session: str = "") -> list[int]:
        name, _, adapter = asked.partition(":")
        return keys_of(request, name, adapter, self._models[name].prefix_slack > 0, session)

    def _up(self, berth: TableBerth) -> bool:
        # To a berth without a replica Serve would let requests wait until there is one, which may take minutes.
        return self._runs(berth.handle) != 0

    def _load(self, berth: TableBerth) -> float:
        return self._outstanding[berth.app] / berth.replicas


class _Elsewhere(Exception):
    """A berth failed before it answered, in a way that another one may not."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error)
        self.error = error


def serve_handle(model: str, app: str) -> Any:
    """Serve's streaming handle to the deployment ``model`` of ``app``."""
    from ray import serve

    return serve.get_deployment_handle(model, app_name=app).options(stream=True)


def serve_runs(handle: Any) -> int | None:
    """How many replicas Serve's router may send to; None before it has heard of any.

    Serve shows it nowhere (Ray 2.60, serve/_private/router.py); another Ray that hides it elsewhere means None.
    """
    try:
        if not handle.running_replicas_populated():
            return None
        return len(handle._router._asyncio_router.request_router.curr_replicas)
    except AttributeError:
        return None
