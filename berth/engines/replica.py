"""One replica: one actor in one slot, whatever engine runs inside.

The methods are ray.serve.llm's LLMServer protocol, handed on to the engine's own server, so that ray.serve.llm's
ingress talks to a berth as it would to its own deployments.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from typing import Any

from berth.engines.fallback import ASKED_FOR, NOT_INSTALLED, CannotRun
from berth.engines.gpu_lock import gpu_locks
from berth.engines.log_handlers import handlers_kept
from berth.engines.sleep import Sleeper
from berth.engines.start_errors import Printed, explain, planned_of
from berth.engines.team import Team
from berth.errors import BerthError


class Replica:
    """The Serve deployment class of every berth.

    The engine starts behind a lock per GPU: two engines that start together on one GPU measure each other's memory
    (vLLM profiles free memory at start).
    """

    async def __init__(self, config: dict[str, Any], *nodes: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """``nodes``: handles of the other slots' deployments, of a replica over several (berth.engines.team)."""
        begun = time.monotonic()
        self._team = Team(config, nodes) if nodes else None
        if self._team is not None:
            config = {**config, "node": await self._team.gather()}
        self._server = _server(config)
        async with gpu_locks():
            try:
                await _started(self._server, config)
            except CannotRun as refused:
                self._server = _instead(config, str(refused))
                await _started(self._server, config)
            except Exception as error:
                if self._team is None or self._team.failed is None:
                    raise
                raise RuntimeError(self._team.failed) from error
        if self._team is not None:
            self._team.ready()
        _report_start(str(config["model"]), time.monotonic() - begun)
        self._sleeper = _sleeper(self._server, config)

    async def about(self) -> AsyncIterator[dict[str, str]]:
        """The engine that runs here and, where it is not the one that was asked for, why."""
        yield self._server.about() if hasattr(self._server, "about") else {"engine": "vllm"}

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._ask(self._server.chat, request, raw_request_info)

    async def completions(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._ask(self._server.completions, request, raw_request_info)

    async def responses(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._ask(self._server.responses, request, raw_request_info)

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._ask(self._server.embeddings, request, raw_request_info)

    async def score(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._ask(self._server.score, request, raw_request_info)

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._server.tokenize(request, raw_request_info)

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> Any:
        return await self._server.detokenize(request, raw_request_info)

    async def check_health(self) -> None:
        if self._team is not None:
            self._team.check()
        if self._sleeper is not None:
            self._sleeper.check()
        await self._server.check_health()

    async def _ask(self, method: Callable[..., Awaitable[Any]], *asked: Any) -> Any:
        if self._sleeper is None:
            return await method(*asked)
        return self._sleeper.during(lambda: method(*asked))


def _report_start(model: str, seconds: float) -> None:
    """How long a user waits whose request wakes a model: in the replica's log and among Ray's metrics."""
    from ray.util.metrics import Gauge

    slot = os.environ.get("BERTH_SLOT", "")
    gauge = Gauge(
        "berth_replica_start_seconds",
        description="From the start of the replica's constructor until its engine was ready, waiting for the GPU's "
        "lock included.",
        tag_keys=("model", "slot"),
    )
    gauge.set(seconds, tags={"model": model, "slot": slot})
    logging.getLogger("ray.serve").info(f"{model} on {slot or 'no slot'} is ready after {seconds:.1f} s")


def _sleeper(server: Any, config: dict[str, Any]) -> Sleeper | None:
    """What sends the engine to sleep, where the app list wants it."""
    if "sleep" not in config:
        return None
    from ray.util.metrics import Gauge

    gauge = Gauge(
        "berth_replica_asleep",
        description="1 while the engine sleeps: its memory on the GPU is free, and reserved all the same.",
        tag_keys=("model", "slot"),
    )
    tags = {"model": str(config["model"]), "slot": os.environ.get("BERTH_SLOT", "")}

    def tell(asleep: bool) -> None:
        gauge.set(float(asleep), tags=tags)

    tell(False)
    return Sleeper(tags["model"], server, float(config["sleep"]["after_s"]), tell)


async def _started(server: Any, config: dict[str, Any]) -> None:
    """Start an engine.

    Raises:
        BerthError: it failed for want of memory: which term of its footprint was wrong.
        CannotRun: vLLM cannot run the model or the machine.
    """
    printed = Printed()
    try:
        await server.start()
    except (BerthError, CannotRun):
        raise
    except Exception as error:
        told = explain(f"{printed.text()}\n{traceback.format_exc()}", planned_of(config))
        if told is None:
            raise
        # Serve carries the last line to whoever asks why the app is not up.
        raise told from error


def _server(config: dict[str, Any]) -> Any:
    if config["engine"] == "light":
        from berth.engines.light import LightServer

        return LightServer(config)
    if config["engine"] == "vllm_server":
        from berth.engines.vllm_server import ExternalServer

        return ExternalServer(config)
    if config["engine"] == "transformers":
        return _transformers(config, ASKED_FOR)
    if find_spec("vllm") is None:
        return _instead(config, NOT_INSTALLED)
    with handlers_kept():
        from berth.engines.llm import slot_server

    return slot_server(config)


def _instead(config: dict[str, Any], reason: str) -> Any:
    """The engine in vLLM's place, where the app list allows one.

    Raises:
        BerthError: it does not.
    """
    if config.get("fallback") != "transformers":
        allow = "set fallback: transformers of the app in serve_apps_list (slower), or another model"
        raise BerthError(
            f"app {config['model']}: vLLM cannot run it",
            found=reason,
            mend=allow if config["engine"] == "llm" else "another model, or a runtime lock with vLLM",
        )
    return _transformers(config, reason)


def _transformers(config: dict[str, Any], reason: str) -> Any:
    with handlers_kept():
        from berth.engines.transformers_server import TransformersServer

    return TransformersServer(config, reason)
