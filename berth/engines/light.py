"""A replica without a model: takes VRAM on a simulated GPU and answers in OpenAI's shape.

For the lab and for drills, where placement and the API are what is tried and not the engine. ``engine_args``:

``hold_mib``       what it takes on each GPU beside the context that the driver adds (default: eight tenths of its
                   footprint)
``start_s``        how long its start takes
``start_after``    a file that its start waits for
``crash``          a message with which its start fails
``tokens``         how long an answer is, where the request sets no ``max_tokens`` below it (default: 4)
``token_s``        seconds before each token
``dimensions``     of its embeddings (default: 16)
``max_model_len``  prompt and answer in tokens, which are words here; longer requests are refused as vLLM does
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from berth.engines import light_answers as answers
from berth.engines import light_responses
from berth.engines.answers import Answer, in_kind, plain
from berth.engines.errors import ApiError
from berth.engines.prefill import PARAMS
from berth.errors import BerthError
from berth.gpu.sim import allocator

START_POLL_S = 0.2


class LightServer:
    """The part of LLMServer's protocol that the gateway uses, without vLLM."""

    def __init__(self, config: dict[str, Any]) -> None:
        # A request from a gateway of before brings vLLM's classes with it, and their import would close Serve's log
        # (berth.engines.log_handlers); without an engine there is nothing of vLLM's to log.
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        self._model = str(config["model"])
        self._gpus = int(config["gpus"])
        self._args = dict(config["engine_args"])
        self._hold_mib = int(self._args.get("hold_mib", int(config["vram_mib"]) * 8 // 10))
        self._token_s = float(self._args.get("token_s", 0))
        self._held: list[allocator.Allocation] = []
        self.running = 0
        """Answers that are being given."""

    async def start(self) -> None:
        if not allocator.active():
            raise BerthError(
                "engine light holds VRAM on simulated GPUs only",
                mend="use engine llm, embedding or rerank on a real GPU",
            )
        if message := self._args.get("crash"):
            raise BerthError(f"light engine of {self._model}: {message}")
        await asyncio.sleep(float(self._args.get("start_s", 0)))
        while (awaited := self._args.get("start_after")) and not os.path.exists(awaited):
            await asyncio.sleep(START_POLL_S)
        await self.wake()

    async def wake(self) -> None:
        for device in range(self._gpus):
            self._held.append(allocator.allocate_mib(self._hold_mib, device))

    async def sleep(self) -> None:
        while self._held:
            allocator.free(self._held.pop())

    async def check_health(self) -> None:
        allocator.check()

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = plain(request)
        return self._generate(answers.chat(self._about(asked, "chatcmpl"), asked), asked, request)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = plain(request)
        return self._generate(answers.completion(self._about(asked, "cmpl"), asked), asked, request)

    async def responses(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = light_responses.as_chat(request)
        answer = light_responses.Response(self._about(asked, "resp"), light_responses.prompt_tokens(asked))
        return self._respond(answer, asked)

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = plain(request)
        dimensions = asked.get("dimensions") or int(self._args.get("dimensions", 16))
        whole = answers.embeddings(self._about(asked, "embd"), asked, dimensions)
        return self._once(in_kind(whole, request, "EmbeddingResponse"))

    async def score(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = plain(request)
        whole = answers.scores(self._about(asked, "score"), asked)
        return self._once(in_kind(whole, request, "ScoreResponse"))

    def _kept(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where the KV cache of a prompt lies, for who asked to keep it."""
        if not (asked.get(PARAMS) or {}).get("do_remote_decode"):
            return {}
        return {PARAMS: {"do_remote_prefill": True, "remote_engine_id": self._model}}

    def _about(self, asked: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.get("model")}

    async def _generate(self, answer: Answer, asked: dict[str, Any], request: Any) -> AsyncIterator[Any]:
        """Token by token, as an engine would; cancelled, it stops at once."""
        words, finish = self._words(answer.prompt_tokens, asked)
        self.running += 1
        try:
            if not asked.get("stream"):
                await asyncio.sleep(self._token_s * len(words))
                yield in_kind(answer.whole(words, finish) | self._kept(asked), request, answer.response)
                return
            # As OpenAI's streams, one without a word comes first: who asks knows that he is being answered.
            yield answer.event("", first=True)
            for word in words:
                await asyncio.sleep(self._token_s)
                yield answer.event(word)
            yield answer.event("", finish=finish)
            if (asked.get("stream_options") or {}).get("include_usage"):
                yield answer.usage_event(len(words))
        finally:
            self.running -= 1

    async def _respond(self, answer: light_responses.Response, asked: dict[str, Any]) -> AsyncIterator[Any]:
        """The same in the events of the responses API."""
        words, finish = self._words(answer.prompt_tokens, asked)
        number = itertools.count()
        self.running += 1
        try:
            if not asked.get("stream"):
                await asyncio.sleep(self._token_s * len(words))
                yield answer.whole(words, finish)
                return
            for body in answer.opening():
                yield light_responses.event(next(number), body)
            for word in words:
                await asyncio.sleep(self._token_s)
                yield light_responses.event(next(number), answer.delta(word))
            for body in answer.closing(words, finish):
                yield light_responses.event(next(number), body)
        finally:
            self.running -= 1

    def _words(self, prompt_tokens: int, asked: dict[str, Any]) -> tuple[list[str], str]:
        """The tokens of the answer and why it ends there.

        Raises:
            ApiError: 400 for a prompt that leaves no room, in vLLM's words.
        """
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
        longest = self._args.get("max_model_len")
        if longest is not None and prompt_tokens + (limit or 1) > longest:
            message = (
                f"This model's maximum context length is {longest} tokens. However, you requested {limit or 1} output "
                f"tokens and your prompt contains {prompt_tokens} input tokens."
            )
            raise ApiError(400, message, code="context_length_exceeded", param="messages")
        words = answers.words(self._model, asked, int(self._args.get("tokens", 4)))
        if limit is not None and limit < len(words):
            return words[:limit], "length"
        return words, "stop"

    async def _once(self, value: Any) -> AsyncIterator[Any]:
        yield value
