"""vLLM inside one slot, through ray.serve.llm's server: its protocol, metrics and LoRA loading, but our placement.

Stock ray.serve.llm asks for a placement group and hands vLLM to Ray's executor. Inside a slot both are in the way:
the replica already holds the GPU, an inner reservation would wait for it for ever (ray #59064, vllm #14610). So the
engine here uses vLLM's own executors over the GPUs the slot sees.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest, ErrorResponse
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine, _normalize_vllm_engine_kwargs
from ray.llm._internal.serve.engines.vllm.vllm_models import FrontendArgs
from ray.serve.llm import LLMConfig, LLMServer
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from berth.engines.batches import Batches
from berth.engines.defaults import with_defaults
from berth.engines.errors import invalid
from berth.engines.fallback import NO_PLATFORM, CannotRun, cannot_run
from berth.engines.prefill import TRANSFER_CONFIG
from berth.engines.responses import no_responses
from berth.engines.sleep import LEVEL
from berth.engines.team import free_port, own_address
from berth.plan.apps import parallel_sizes

RUNNERS = {"llm": "generate", "embedding": "pooling", "rerank": "pooling"}
"""vLLM's runner for each engine of the app list."""


def engine_arguments(llm_config: LLMConfig) -> AsyncEngineArgs:
    """vLLM's arguments of a model, with vLLM's own executor instead of Ray's."""
    config = llm_config.get_engine_config()
    kwargs = config.get_initialization_kwargs()
    kwargs["distributed_executor_backend"] = "uni" if config.num_devices == 1 else "mp"
    return AsyncEngineArgs(**_normalize_vllm_engine_kwargs(kwargs))


class SlotEngine(VLLMEngine):  # type: ignore[misc]
    """ray.serve.llm's vLLM engine without its remote configuration task and without Ray's executor."""

    async def start(self) -> None:
        await super().start()
        # vLLM 0.29 renamed what Ray 2.60 looks for, and /tokenize would say that the model cannot (vllm #46022).
        self._oai_serving_tokenization: Any = getattr(self._app_state, "serving_tokenization", None)
        self._oai_serving_responses: Any = getattr(self._app_state, "openai_serving_responses", None)

    async def responses(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any]:
        """vLLM's answer to a ResponsesRequest: a dict, its error, or its events as text."""
        serving = self._oai_serving_responses
        raw_request = RawRequestInfo.to_starlette_request_optional(raw_request_info)
        try:
            answer = await serving.create_responses(request, raw_request)
        except (ValueError, VLLMClientError) as error:
            answer = serving.create_error_response(error)
        if isinstance(answer, AsyncGenerator):
            async for event in answer:
                yield f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"
        else:
            yield answer.model_dump(mode="json", by_alias=True)

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        if current_platform.is_unspecified():
            raise CannotRun(NO_PLATFORM)
        config = self.llm_config.get_engine_config()
        args = engine_arguments(self.llm_config)
        try:
            vllm_config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except Exception as error:
            if reason := cannot_run(str(error)):
                raise CannotRun(reason) from None
            # vLLM's validation errors cannot be pickled, and Serve has to carry the text to whoever asks why.
            raise RuntimeError(f"vLLM refuses the engine arguments of {self.llm_config.model_id}: {error}") from None
        return args, FrontendArgs(**config.frontend_kwargs), vllm_config


class SlotServer(LLMServer):  # type: ignore[misc]
    """LLMServer that lives in a slot: no placement group, no download tasks on other nodes."""

    _default_engine_cls = SlotEngine
    _adapters: Mapping[str, str] = MappingProxyType({})
    """LoRA adapters by name, each a directory. vLLM keeps them in the host's memory and on the GPU as many as it has
    slots for; ray.serve.llm would fetch them from a bucket, which hosts without one cannot."""

    def _batch_output_stream(self, generator: Any) -> AsyncIterator[list[Any]]:
        return self._batches.of(generator)

    async def start(self) -> None:
        self._batches = Batches(self._get_batch_interval_ms() / 1000)
        self._llm_config._callback_instance = CallbackBase(
            llm_config=self._llm_config,
            ctx_kwargs={"placement_group": None, "runtime_env": {}, "run_init_node": False},
        )
        await super().start()
        for number, (name, directory) in enumerate(sorted(self._adapters.items()), 1):
            await self.engine.resolve_lora(
                DiskMultiplexConfig(
                    model_id=f"{self._llm_config.model_id}:{name}",
                    max_total_tokens=None,
                    local_path=directory,
                    lora_assigned_int_id=number,
                )
            )
        if self._llm_config.engine_kwargs["runner"] == "generate":
            await self._warm_up()

    async def responses(self, request: dict[str, Any], raw_request_info: Any = None) -> Any:
        """OpenAI's responses, from plain JSON: vLLM's class of the request does not come whole through Ray."""
        if self.engine._oai_serving_responses is None:
            raise no_responses(self._llm_config.model_id)
        try:
            asked = ResponsesRequest(**request)
        except ValidationError as error:
            raise invalid(error.errors()) from None
        return await self._run_request(
            asked, engine_method="responses", batch_output_stream=True, raw_request_info=raw_request_info
        )

    async def sleep(self) -> None:
        """Weights to the host's memory, the KV cache away (vLLM's sleep mode)."""
        await self.engine._engine_client.sleep(level=LEVEL)

    async def wake(self) -> None:
        await self.engine._engine_client.wake_up()

    async def _warm_up(self) -> None:
        """One short completion before Serve calls the replica ready: the first request compiles kernels, and no user
        should wait for that."""
        request = CompletionRequest(model=self._llm_config.model_id, prompt="a", max_tokens=2, temperature=0.7)
        async for answer in await self.completions(request):
            if isinstance(answer, ErrorResponse):
                raise RuntimeError(f"{self._llm_config.model_id}: the warm-up request failed: {answer.error.message}")


def llm_config_of(config: Mapping[str, Any]) -> LLMConfig:
    """ray.serve.llm's config of one engine; ``config`` as in berth.engines.app.build, with ``node`` (see
    berth.engines.team) where the engine is one of several that make a replica."""
    engine_args = with_defaults(config["engine_args"])
    engine_args["runner"] = RUNNERS[config["engine"]]
    engine_args |= parallel_sizes(
        config["gpus"], len(config.get("team", ())) or 1, config.get("across_slots", "pipeline")
    )
    engine_args |= config.get("node", {})
    if "prefill" in config or "prefill_of" in config:
        engine_args["kv_transfer_config"] = TRANSFER_CONFIG | dict(engine_args.get("kv_transfer_config") or {})
    if "sleep" in config:
        engine_args["enable_sleep_mode"] = True
    if config.get("gpu_memory_utilization") is not None:
        engine_args["gpu_memory_utilization"] = config["gpu_memory_utilization"]
    return LLMConfig(
        model_loading_config={"model_id": config["model"], "model_source": config["source"]},
        # Not "no GPU": it keeps ray.serve.llm from asking Ray for devices that the replica already has.
        accelerator_config={"kind": "cpu"},
        engine_kwargs=engine_args,
        log_engine_metrics=True,
    )


def _open_side_channel() -> None:
    """Where other engines ask for KV caches. Ray would count ports from 20000 by a replica's rank in its deployment,
    which is 0 in every berth of a host; the address goes with each request, so any free port does."""
    address = own_address()
    os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", address)
    os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port(address)))


def slot_server(config: dict[str, Any]) -> SlotServer:
    """The server of one replica, not yet started; ``config`` as in berth.engines.app.build."""
    llm_config = llm_config_of(config)
    if "kv_transfer_config" in llm_config.engine_kwargs:
        _open_side_channel()
    server: SlotServer = SlotServer.sync_init(llm_config)
    server._adapters = dict(config.get("adapters", {}))
    return server
