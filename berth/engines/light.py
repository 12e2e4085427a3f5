"""A replica without a model: takes VRAM on a simulated GPU and answers in OpenAI's shape.

For the lab and for drills, where placement is what is tried and not the engine. ``engine_args``:
``hold_mib`` is what it takes on each GPU beside the context that the driver adds (default: eight tenths of its
footprint), ``start_s`` how long its start takes, ``crash`` a message with which its start fails.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from berth.engines.light_protocol import stand_in
from berth.errors import BerthError
from berth.gpu.sim import allocator


class LightServer:
    """The part of LLMServer's protocol that the gateway uses, without vLLM."""

    def __init__(self, config: dict[str, Any]) -> None:
        # The first request brings vLLM's classes with it, and their import would close Serve's log
        # (berth.engines.log_handlers); without an engine there is nothing of vLLM's to log.
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        stand_in()
        self._model = str(config["model"])
        self._gpus = int(config["gpus"])
        self._args = dict(config["engine_args"])
        self._hold_mib = int(self._args.get("hold_mib", int(config["vram_mib"]) * 8 // 10))

    async def start(self) -> None:
        if not allocator.active():
            raise BerthError(
                "engine light holds VRAM on simulated GPUs only",
                mend="use engine llm, embedding or rerank on a real GPU",
            )
        if message := self._args.get("crash"):
            raise BerthError(f"light engine of {self._model}: {message}")
        await asyncio.sleep(float(self._args.get("start_s", 0)))
        for device in range(self._gpus):
            allocator.allocate_mib(self._hold_mib, device)

    async def check_health(self) -> None:
        allocator.check()

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse

        message = {"role": "assistant", "content": f"light replica of {self._model}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return _once(ChatCompletionResponse(**_body("chat.completion", self._model, choice)))

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse

        choice = {"index": 0, "text": f"light replica of {self._model}", "finish_reason": "stop"}
        return _once(CompletionResponse(**_body("text_completion", self._model, choice)))


def _body(kind: str, model: str, choice: dict[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {"object": kind, "created": int(time.time()), "model": model, "choices": [choice], "usage": usage}


async def _once(value: Any) -> AsyncIterator[Any]:
    yield value
