"""A vLLM server of its own beside the replica: the engine in a process tree that shares nothing with Ray's.

The replica is the server's supervisor and its door. It starts vLLM's OpenAI server on the slot's GPUs, listening on a
Unix socket that nobody else may open, hands requests on, and ends with it, so Ray's reservation and the memory on the
GPU have one life (docs/decisions/0025).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from berth.engines.answers import in_kind, plain
from berth.engines.child import TAIL_CHARACTERS, Child
from berth.engines.defaults import with_defaults
from berth.engines.errors import ApiError

MODULE = "vllm.entrypoints.openai.api_server"
POLL_S = 0.5
STOP_S = 20.0


def command(config: Mapping[str, Any], socket: Path) -> list[str]:
    """The server's command line; ``config`` as in berth.engines.app.build.

    vLLM's arguments by their names in Python: true becomes ``--name``, false ``--no-name``, a mapping JSON, a list one
    word an item; None is left out, as vLLM's default.
    """
    arguments = {
        **with_defaults(config["engine_args"]),
        "model": config["source"],
        "served_model_name": config["model"],
        "tensor_parallel_size": config["gpus"],
        "distributed_executor_backend": "uni" if config["gpus"] == 1 else "mp",
        "gpu_memory_utilization": config.get("gpu_memory_utilization"),
        "uds": str(socket),
    }
    words = [sys.executable, "-m", MODULE]
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, dict):
            words += [f"--{option}", json.dumps(value)]
        elif isinstance(value, list | tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


class ExternalServer:
    """LLMServer's protocol, answered by the server behind the socket."""

    def __init__(self, config: dict[str, Any], words: list[str] | None = None) -> None:
        """``words``: another command than vLLM's, which is then told the socket as its last argument."""
        self._model = str(config["model"])
        # Short, since a socket's path has 107 characters at most; unreadable for others, since nothing asks for a key.
        self._directory = Path(tempfile.mkdtemp(prefix="berth-"))
        self._socket = self._directory / "s"
        self._words = command(config, self._socket) if words is None else [*words, str(self._socket)]
        self._child = Child(self._directory / "log")
        self._session: httpx.AsyncClient | None = None

    async def start(self) -> None:
        """Start the server and wait until it is ready.

        Raises:
            RuntimeError: it ended instead; with the end of what it said.
        """
        await self._child.start(self._words)
        # The gateway and Serve limit how many there are and how long they take.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket), limits=limits)
        self._session = httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=None)
        while not await self._healthy():
            if (code := self._child.returncode) is not None:
                self._child.kill()
                raise RuntimeError(f"the vLLM server of {self._model} ended with {code}: {self._child.tail()}")
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """End the server, kindly first."""
        if self._session is not None:
            await self._session.aclose()
        await self._child.stop(STOP_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def check_health(self) -> None:
        """
        Raises:
            RuntimeError: the server is gone or says that its engine is; what is left of it is ended.
        """
        if not await self._healthy():
            code = self._child.returncode
            self._child.kill()
            raise RuntimeError(f"the vLLM server of {self._model} does not answer (exit code {code})")

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        return self._ask("/v1/chat/completions", request, "ChatCompletionResponse")

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        return self._ask("/v1/completions", request, "CompletionResponse")

    async def responses(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        return self._ask("/v1/responses", request, "")

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        return self._ask("/tokenize", request, "TokenizeResponse")

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        return self._ask("/detokenize", request, "DetokenizeResponse")

    async def _healthy(self) -> bool:
        assert self._session is not None
        try:
            return (await self._session.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    async def _ask(self, path: str, request: Any, response: str) -> AsyncIterator[Any]:
        """The server's answer, event by event where the request asks for a stream.

        Leaving the generator closes the connection, upon which vLLM drops the request from its engine.

        Raises:
            ApiError: the server's own refusal, with its status and words; 503 where it cannot be reached.
        """
        assert self._session is not None
        asked = plain(request)
        try:
            async with self._session.stream("POST", path, json=asked) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer.status_code, (await answer.aread()).decode(errors="replace"))
                if not asked.get("stream"):
                    yield in_kind(json.loads(await answer.aread()), request, response)
                    return
                async for event in _events(answer.aiter_raw()):
                    yield event
        except httpx.TransportError as error:
            raise ApiError(503, f"The engine of `{self._model}` went away: {error}.", code="unavailable") from None


async def _events(stream: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Server-sent events as they come, each with its blank line; the last, ``[DONE]``, is the gateway's to say."""
    event = b""
    async for chunk in stream:
        *whole, event = (event + chunk).split(b"\n\n")
        for one in whole:
            if one.strip() and one.strip() != b"data: [DONE]":
                yield one.decode() + "\n\n"


def _refusal(status: int, text: str) -> ApiError:
    """vLLM's error object (OpenAI's shape) as ours; whatever else came, as its text."""
    try:
        found = json.loads(text)
        error = found.get("error", found)
        message = error["message"]
        code, param = error.get("code"), error.get("param")
    except (ValueError, AttributeError, KeyError, TypeError):
        message, code, param = text[:TAIL_CHARACTERS], None, None
    # vLLM repeats the status in `code`, where OpenAI has a word.
    return ApiError(status, str(message), code=code if isinstance(code, str) else None, param=param)
