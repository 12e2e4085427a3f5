"""The gateway's table: who answers, who does not, and how requests spread; with handles that are no Serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from berth.engines.affinity import ADAPTER_SLACK, BLOCK_CHARS
from berth.engines.errors import DOWN_RETRY_S, FULL_RETRY_S, ApiError
from berth.engines.prefill import PARAMS, refuse_params
from berth.engines.routes import Routes


class BackPressureError(Exception):
    """Named as Serve's."""


class RayActorError(Exception):
    """Named as Ray's."""


class ActorDiedError(RayActorError):
    """Named as Ray's."""


class RequestCancelledError(Exception):
    """Named as Serve's."""


class RayTaskError(Exception):
    """Ray's envelope of what a replica raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("traceback of the replica")
        self.cause = cause


class Response:
    """What ``remote`` gives: parts, then perhaps an error; it knows whether it was cancelled."""

    def __init__(self, parts: list[Any], error: Exception | None = None) -> None:
        self.cancelled = False
        self._parts, self._error = parts, error

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._run()

    async def _run(self) -> AsyncIterator[Any]:
        for part in self._parts:
            yield part
        if self._error:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A berth that answers with its own name unless told otherwise."""

    def __init__(self, name: str) -> None:
        self.chat = self
        self.name = name
        self.asked: list[Any] = []
        self.running: int | None = None
        self.give: Callable[[], Response] = lambda: Response([self.name])

    def remote(self, *args: Any) -> Response:
        self.asked.append(args)
        self.last = self.give()
        return self.last


def table(**models: dict[str, int]) -> dict[str, Any]:
    return {
        "models": {
            model: {"berths": [{"app": app, "replicas": replicas} for app, replicas in berths.items()]}
            for model, berths in models.items()
        }
    }


class Scene:
    """Routes over handles by name."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.handles: dict[str, Handle] = {}
        self.routes = Routes(
            lambda _model, app: self.handles.setdefault(app, Handle(app)), lambda handle: handle.running
        )
        self.routes.take(config)

    def ask(self, model: str | None = "chat", request: Any = None, session: str = "") -> list[Any]:
        async def run() -> list[Any]:
            return [part async for part in self.routes.answer(model, "chat", request or {}, session=session)]

        return asyncio.run(run())

    def refused_by(self, model: str) -> ApiError:
        """What choosing a berth is refused with."""
        with pytest.raises(ApiError) as refused:
            self.routes.choose(model)
        return refused.value

    def refused(self, model: str | None = "chat") -> ApiError:
        with pytest.raises(ApiError) as refused:
            self.ask(model)
        assert self.routes.outstanding() == {}
        return refused.value


def test_a_berth_that_may_run_another_engine_is_asked_once_and_the_model_says_so() -> None:
    config = table(chat={"chat@a": 1, "chat@b": 1}, other={"other@a": 1})
    for berth in config["models"]["chat"]["berths"]:
        berth["may_differ"] = True
    scene = Scene(config)
    instead = {"engine": "transformers", "engine_reason": "vLLM says: no"}
    given = {"chat@a": instead, "chat@b": {"engine": "vllm"}, "other@a": instead}
    for app, about in given.items():
        scene.handles[app].about = scene.handles[app]
        scene.handles[app].give = lambda about=about: Response([about])
    asyncio.run(scene.routes.ask_engines())
    asyncio.run(scene.routes.ask_engines())
    assert {app: len(handle.asked) for app, handle in scene.handles.items()} == {"chat@a": 1, "chat@b": 1, "other@a": 0}
    assert scene.routes.engines("chat") == {"chat@a": instead}
    assert scene.routes.engines("other") == {}
    assert scene.routes.health()[1]["engines"] == {"chat@a": instead}
    scene.routes.take(config)
    assert scene.routes.engines() == {}, "a berth of the same name may be another one"


def test_an_engine_that_reads_json_gets_json_and_nothing_else() -> None:
    class Request:
        """As pydantic's."""

        def model_dump(self, **_how: Any) -> dict[str, Any]:
            return {"model": "chat"}

    config = table(chat={"chat@a": 1}, other={"other@a": 1})
    config["models"]["chat"]["berths"][0]["plain"] = True
    scene, request, info = Scene(config), Request(), object()

    async def ask(model: str) -> None:
        async for _ in scene.routes.answer(model, "chat", request, info):
            pass

    asyncio.run(ask("chat"))
    asyncio.run(ask("other"))
    assert scene.handles["chat@a"].asked == [({"model": "chat"},)]
    assert scene.handles["other@a"].asked == [(request, info)]


def test_a_berth_that_does_not_say_which_engine_it_runs_is_asked_again() -> None:
    config = table(chat={"chat@a": 1})
    config["models"]["chat"]["berths"][0]["may_differ"] = True
    scene = Scene(config)
    handle = scene.handles["chat@a"]
    handle.about = handle
    handle.give = lambda: Response([], RayActorError("gone"))
    asyncio.run(scene.routes.ask_engines())
    assert "engines" not in scene.routes.health()[1]
    handle.give = lambda: Response([{"engine": "transformers"}])
    asyncio.run(scene.routes.ask_engines())
    assert scene.routes.engines() == {"chat@a": {"engine": "transformers"}}


def test_an_unknown_model_is_404_and_one_without_a_berth_503() -> None:
    scene = Scene(table(chat={}))
    unknown = scene.refused("nope")
    assert (unknown.status, unknown.body()["error"]["code"], unknown.param) == (404, "model_not_found", "model")
    empty = scene.refused()
    assert (empty.status, empty.headers()) == (503, {"Retry-After": str(DOWN_RETRY_S)})


def test_a_request_that_names_no_model_means_the_only_one() -> None:
    assert Scene(table(chat={"a": 1})).ask(None) == ["a"]
    refused = Scene(table(chat={"a": 1}, code={"b": 1})).refused(None)
    assert (refused.status, refused.param) == (400, "model")
    assert "chat, code" in refused.message


def test_a_berth_that_is_not_there_is_left_out() -> None:
    def get(_model: str, app: str) -> Handle:
        if app == "gone":
            raise RuntimeError("no such app")
        return Handle(app)

    made = Routes(get)
    made.take(table(chat={"gone": 1, "here": 1}))
    assert made.models() == {"chat": ["here"]}


def test_requests_go_where_fewer_are_outstanding() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1}))

    async def ask() -> Counter[str]:
        seen: Counter[str] = Counter()
        open_calls = []
        for _ in range(200):
            call = scene.routes.answer("chat", "chat", {})
            seen[await anext(call)] += 1
            open_calls.append(call)
        for call in open_calls:
            await call.aclose()
        return seen

    seen = asyncio.run(ask())
    assert abs(seen["a"] - seen["b"]) <= 20
    assert scene.routes.outstanding() == {}


def test_what_is_held_at_once_is_spread_evenly_by_replicas() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1, "c": 2}))

    async def run() -> None:
        held = []
        for more in range(1, 6):
            for _ in range(4):
                held.append(scene.routes.answer("chat", "chat", {}))
                await anext(held[-1])
            assert scene.routes.outstanding() == {"a": more, "b": more, "c": 2 * more}

    asyncio.run(run())


def test_full_berths_answer_429_and_a_place_that_is_free_is_used() -> None:
    config = table(chat={"a": 1, "b": 1})
    for berth in config["models"]["chat"]["berths"]:
        berth["limit"] = 3
    scene = Scene(config)

    async def run() -> None:
        calls = [scene.routes.answer("chat", "chat", {}) for _ in range(6)]
        for call in calls:
            await anext(call)
        assert scene.routes.outstanding() == {"a": 3, "b": 3}
        with pytest.raises(ApiError) as refused:
            await anext(scene.routes.answer("chat", "chat", {}))
        assert (refused.value.status, refused.value.code) == (429, "overloaded")
        assert refused.value.headers() == {"Retry-After": str(FULL_RETRY_S)}
        await calls[0].aclose()
        await anext(scene.routes.answer("chat", "chat", {}))

    asyncio.run(run())


def test_a_berth_without_a_replica_is_not_asked() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1}))
    scene.handles["a"].running = 0
    assert {part for _ in range(20) for part in scene.ask()} == {"b"}
    assert scene.routes.health()[0] == 200
    scene.handles["b"].running = 0
    assert scene.refused().status == 503
    assert scene.routes.health() == (503, {"models": {"chat": []}, "asleep": [], "outstanding": {}})


@pytest.mark.parametrize(
    ("error", "status"),
    [(BackPressureError("full"), 429), (ActorDiedError("died"), 503), (RayTaskError(ActorDiedError("died")), 503)],
)
def test_a_berth_that_fails_before_its_first_part_is_left_for_one_other(error: Exception, status: int) -> None:
    scene = Scene(table(chat={"a": 1, "b": 1, "c": 1}))
    scene.handles["a"].give = lambda: Response([], error)
    scene.handles["b"].give = lambda: Response([], error)

    def outcome() -> Any:
        try:
            return scene.ask()[0]
        except ApiError as refused:
            return refused.status

    assert {outcome() for _ in range(60)} == {"c", status}, "once, not until somebody answers"
    assert scene.routes.outstanding() == {}


def test_the_only_berth_is_asked_again_only_if_it_has_another_replica() -> None:
    for replicas, asked in ((1, 1), (2, 2)):
        scene = Scene(table(chat={"a": replicas}))
        scene.handles["a"].give = lambda: Response([], ActorDiedError("died"))
        assert scene.refused().status == 503
        assert len(scene.handles["a"].asked) == asked


def test_after_the_first_part_nothing_is_asked_again_and_the_error_is_the_last_event() -> None:
    scene = Scene(table(chat={"a": 2}))
    scene.handles["a"].give = lambda: Response(["data: 1\n\n"], ActorDiedError("died"))
    parts = scene.ask()
    assert parts[0] == "data: 1\n\n"
    assert parts[1].startswith('data: {"error": {"message": "The model `chat` has no berth')
    assert len(scene.handles["a"].asked) == 1
    assert scene.routes.outstanding() == {}


def test_what_the_request_is_to_blame_for_is_not_asked_again() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1}))
    answers = {
        "engine": (Response([{"error": {"message": "no", "type": "x", "param": "p", "code": 400}}]), 400),
        "stream": (Response([['data: {"error": {"message": "no", "code": 422}}\n\n']]), 422),
        "ours": (Response([], RayTaskError(ApiError(400, "no"))), 400),
        "cancelled": (Response([], RequestCancelledError()), 499),
        "bug": (Response([], KeyError("inside")), 500),
    }
    for name, (response, status) in answers.items():
        for handle in scene.handles.values():
            handle.asked.clear()
            handle.give = lambda response=response: response
        refused = scene.refused()
        assert refused.status == status, name
        assert sum(len(handle.asked) for handle in scene.handles.values()) == 1, name
        assert "inside" not in refused.message


def test_who_hangs_up_ends_the_request_of_the_berth() -> None:
    scene = Scene(table(chat={"a": 1}))
    scene.handles["a"].give = lambda: Response(["1", "2"])

    async def run() -> None:
        call = scene.routes.answer("chat", "chat", {})
        await anext(call)
        assert scene.routes.outstanding() == {"a": 1}
        await call.aclose()

    asyncio.run(run())
    assert scene.handles["a"].last.cancelled
    assert scene.routes.outstanding() == {}


def test_a_berth_that_leaves_the_table_ends_what_it_began() -> None:
    scene = Scene(table(chat={"a": 1}))
    scene.handles["a"].give = lambda: Response(["1", "2"])

    async def run() -> list[str]:
        call = scene.routes.answer("chat", "chat", {})
        parts = [await anext(call)]
        scene.routes.take(table(chat={"b": 1}))
        assert scene.routes.outstanding() == {"a": 1}
        parts += [part async for part in call]
        return parts

    assert asyncio.run(run()) == ["1", "2"]
    assert scene.routes.outstanding() == {}
    assert not scene.handles["a"].last.cancelled
    assert scene.ask() == ["b"]


def prompt(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def with_affinity(slack: float, **berths: int) -> Scene:
    config = table(chat=berths)
    config["models"]["chat"]["prefix_affinity"] = slack
    return Scene(config)


def test_a_prompt_goes_where_its_beginning_went() -> None:
    scene = with_affinity(2, a=1, b=1, c=1, d=1)
    begins = {letter: letter * (4 * BLOCK_CHARS) for letter in "uvwxyz"}
    first = {letter: scene.ask(request=prompt(text))[0] for letter, text in begins.items()}
    for letter, text in begins.items():
        for end in ("", " and on", text):
            assert scene.ask(request=prompt(text + end)) == [first[letter]]


def test_the_longest_known_beginning_wins() -> None:
    scene = with_affinity(100, a=1, b=1)
    scene.routes._affinity.remember(scene.routes._keys("chat", prompt("s" * BLOCK_CHARS)), "a")
    scene.routes._affinity.remember(scene.routes._keys("chat", prompt("s" * 2 * BLOCK_CHARS))[-1:], "b")
    assert {scene.ask(request=prompt("s" * 3 * BLOCK_CHARS))[0] for _ in range(9)} == {"b"}


def test_affinity_ends_where_the_load_is_uneven() -> None:
    scene = with_affinity(2, a=1, b=1)
    text = prompt("p" * 2 * BLOCK_CHARS)

    async def run() -> list[Any]:
        calls = [scene.routes.answer("chat", "chat", text) for _ in range(40)]
        return [await anext(call) for call in calls]

    seen = Counter(asyncio.run(run()))
    assert abs(seen["a"] - seen["b"]) <= 3, "slack 2, and one in between"


def test_a_session_stays_where_it_began_and_sessions_spread() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1, "c": 1}))
    names = [f"user-{number}" for number in range(60)]
    first = {name: scene.ask(session=name)[0] for name in names}
    assert min(Counter(first.values()).values()) >= 8, "60 sessions over three berths"
    assert {name: scene.ask(session=name)[0] for name in names} == first
    another = Scene(table(chat={"a": 1, "b": 1, "c": 1}))
    assert {name: another.ask(session=name)[0] for name in names} == first, "another gateway sends them elsewhere"
    scene.routes.take(table(chat={"a": 1, "b": 1, "c": 1, "d": 1}))
    assert {name: scene.ask(session=name)[0] for name in names} == first, "a new berth moved a session"
    scene.routes.take(table(chat={"b": 1, "c": 1}))
    now = {name: scene.ask(session=name)[0] for name in names}
    assert {name for name in names if now[name] != first[name]} == {name for name in names if first[name] == "a"}


def test_a_session_ends_where_the_load_is_uneven() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1}))

    async def run() -> list[Any]:
        calls = [scene.routes.answer("chat", "chat", prompt("hi"), session="one") for _ in range(40)]
        return [await anext(call) for call in calls]

    order = asyncio.run(run())
    most = int(ADAPTER_SLACK) + 1
    assert len(set(order[:most])) == 1
    assert order[most] != order[0], "it waits behind more than the slack"


def test_without_the_option_a_beginning_does_not_count() -> None:
    scene = Scene(table(chat={"a": 1, "b": 1}))
    assert {scene.ask(request=prompt("p" * 4 * BLOCK_CHARS))[0] for _ in range(60)} == {"a", "b"}


def test_an_adapter_goes_where_it_is_and_where_it_was() -> None:
    config = table(chat={"a": 1, "b": 1, "c": 1})
    for berth in config["models"]["chat"]["berths"][1:]:
        berth["adapters"] = ["sql"]
    scene = Scene(config)
    assert scene.routes.ids() == ["chat", "chat:sql"]
    (home,) = {scene.ask("chat:sql")[0] for _ in range(20)}
    assert home in ("b", "c")
    refused = scene.refused("chat:nope")
    assert (refused.status, refused.code) == (404, "model_not_found")
    assert {scene.ask()[0] for _ in range(60)} == {"a", "b", "c"}, "the model itself is everywhere"


def test_memory_of_beginnings_is_bounded_and_forgets_berths_that_left() -> None:
    from berth.engines.affinity import Affinity

    affinity = Affinity(size=3)
    affinity.remember([1, 2, 3, 4], "a")
    assert affinity.find([1], {"a": 0.0}, 1) is None
    assert affinity.find([4], {"a": 0.0}, 1) == "a"
    affinity.forget({"b"})
    assert affinity.find([4], {"a": 0.0}, 1) is None


def sleepy(**berths: dict[str, Any]) -> dict[str, Any]:
    made = [{"app": app, "replicas": 2, "wake_above": 2.0, **more} for app, more in berths.items()]
    return {"models": {"chat": {"berths": made}}}


def test_a_model_that_sleeps_is_woken_by_its_first_request_and_the_rest_wait_there() -> None:
    scene = Scene(sleepy(a={"sleeps": True, "limit": 2}, b={"sleeps": True, "limit": 2}))
    assert scene.routes.health() == (200, {"models": {"chat": ["a", "b"]}, "asleep": ["a", "b"], "outstanding": {}})
    assert {scene.routes.choose("chat").app for _ in range(20)} == {"a"}, "one start serves all who wait"
    scene.routes._outstanding["a"] = 2
    assert scene.routes.choose("chat").app == "b", "but a queue has an end"
    scene.routes._outstanding["b"] = 2
    assert scene.refused_by("chat").status == 429


def test_a_berth_that_is_up_is_asked_before_one_that_sleeps() -> None:
    scene = Scene(sleepy(a={}, b={"sleeps": True}))
    scene.handles["a"].running, scene.handles["b"].running = 1, 0
    assert scene.routes.asleep() == ["b"]
    assert {scene.routes.choose("chat").app for _ in range(20)} == {"a"}


def test_too_much_for_who_is_up_sends_one_request_ahead_to_wake_another() -> None:
    scene = Scene(sleepy(a={"limit": 10}, b={"sleeps": True}))
    scene.handles["a"].running, scene.handles["b"].running = 2, 0
    scene.routes._outstanding["a"] = 2
    assert scene.routes.choose("chat").app == "b"
    scene.routes._outstanding["b"] = 1
    assert {scene.routes.choose("chat").app for _ in range(20)} == {"a"}, "the others do not wait for the start"
    scene.handles["b"].running = 1
    assert scene.routes.asleep() == []
    assert scene.routes.choose("chat").app in {"a", "b"}


def test_a_berth_that_fell_is_not_one_that_sleeps() -> None:
    scene = Scene(sleepy(a={}))
    scene.handles["a"].running = 0
    assert scene.refused().status == 503
    assert scene.routes.health()[0] == 503


def apart(works_on: int = 2) -> dict[str, Any]:
    """chat, whose prompts two berths of another model read."""
    made = table(chat={"chat@a": 1}, reader={"reader@a": 1, "reader@b": 1})
    made["models"]["chat"]["berths"][0]["works_on"] = works_on
    made["models"]["reader"]["prefill_of"] = "chat"
    return made


def reading(scene: Scene) -> Scene:
    for name in ("reader@a", "reader@b"):
        scene.handles[name].give = lambda: Response([{"kv_transfer_params": {"remote_port": 7}}])
    return scene


ASKED = {"model": "chat", "prompt": "hi", "max_tokens": 9, "min_tokens": 3, "stream": True, "stream_options": {}}


def prefill_counts(scene: Scene) -> Any:
    return scene.routes.health()[1]["prefill"]["chat"]


def test_a_prompt_is_read_by_one_berth_and_answered_by_another() -> None:
    scene = reading(Scene(apart()))
    assert scene.ask(request=ASKED) == ["chat@a"]
    ((read,),) = scene.handles["reader@a"].asked + scene.handles["reader@b"].asked
    assert read["kv_transfer_params"]["do_remote_decode"] is True
    assert {key: read[key] for key in ("model", "max_tokens", "min_tokens", "stream", "stream_options")} == {
        "model": "reader",
        "max_tokens": 1,
        "min_tokens": 0,
        "stream": False,
        "stream_options": None,
    }
    assert scene.handles["chat@a"].asked == [(ASKED | {"kv_transfer_params": {"remote_port": 7}},)]
    assert "kv_transfer_params" not in ASKED
    assert prefill_counts(scene) == {"apart": 1, "alone": 0}
    assert scene.routes.outstanding() == {}


@pytest.mark.parametrize(
    "more", [{"n": 2}, {"best_of": 3}, {"echo": True}, {"prompt_logprobs": 1}, {"prompt": ["a", "b"]}], ids=str
)
def test_what_needs_the_prompt_itself_or_its_cache_twice_is_for_one_berth(more: dict[str, Any]) -> None:
    scene = reading(Scene(apart()))
    scene.ask(request=ASKED | more)
    assert scene.handles["chat@a"].asked == [(ASKED | more,)]
    assert prefill_counts(scene) == {"apart": 0, "alone": 1}


@pytest.mark.parametrize("more", [{PARAMS: {"remote_host": "10.0.0.1"}}, {"vllm_xargs": {PARAMS: "x"}}], ids=str)
def test_no_client_names_an_engine_to_connect_to(more: dict[str, Any]) -> None:
    refuse_params(ASKED | {"vllm_xargs": {"other": 1}})
    with pytest.raises(ApiError) as refused:
        refuse_params(ASKED | more)
    assert (refused.value.status, refused.value.param) == (400, PARAMS)


def test_token_ids_are_one_prompt() -> None:
    scene = reading(Scene(apart()))
    scene.ask(request=ASKED | {"prompt": [1, 2, 3]})
    assert prefill_counts(scene) == {"apart": 1, "alone": 0}


def test_whatever_goes_wrong_there_the_request_is_answered() -> None:
    scene = reading(Scene(apart()))
    for name in ("reader@a", "reader@b"):
        scene.handles[name].give = lambda: Response([], RayTaskError(ActorDiedError("gone")))
    assert scene.ask(request=ASKED) == ["chat@a"]
    for name in ("reader@a", "reader@b"):
        scene.handles[name].give = lambda: Response([{"object": "text_completion"}])
    assert scene.ask(request=ASKED) == ["chat@a"]
    for name in ("reader@a", "reader@b"):
        scene.handles[name].running = 0
    assert scene.ask(request=ASKED) == ["chat@a"]
    assert scene.handles["chat@a"].asked == [(ASKED,)] * 3
    assert prefill_counts(scene) == {"apart": 0, "alone": 3}
    assert scene.routes.health()[0] == 200, "the model answers without"


def test_a_berth_that_is_busy_would_come_too_late_for_the_cache() -> None:
    scene = reading(Scene(apart(works_on=0)))
    scene.ask(request=ASKED)
    assert prefill_counts(scene) == {"apart": 0, "alone": 1}


def test_nobody_asks_for_it_by_name() -> None:
    scene = reading(Scene(apart()))
    assert scene.routes.ids() == ["chat"]
    assert scene.routes.named(None) == "chat"
    assert scene.refused("reader").status == 404


def test_replicas_that_are_gone_are_not_waited_for() -> None:
    """Serve keeps a request until there is a replica again."""
    scene = reading(Scene(apart()))

    class Waits(Response):
        async def _run(self) -> AsyncIterator[Any]:
            for name in ("reader@a", "reader@b"):
                scene.handles[name].running = 0
            await asyncio.Event().wait()
            yield "never"

    for name in ("reader@a", "reader@b"):
        scene.handles[name].give = lambda: Waits([])
    assert scene.ask(request=ASKED) == ["chat@a"]
    (asked,) = [handle for handle in scene.handles.values() if handle.name != "chat@a" and handle.asked]
    assert asked.last.cancelled
    assert scene.routes.outstanding() == {}
