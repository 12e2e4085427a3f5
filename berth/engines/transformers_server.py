"""A model that vLLM cannot run, on Hugging Face's transformers: slower, one sequence at a time in each thread, and
with the same API. What it lacks it refuses by name; docs/decisions/0020.

``engine_args`` are vLLM's that mean the same here: ``dtype``, ``max_model_len``, ``max_num_seqs`` (answers at once: 4),
``kv_cache_memory_bytes``, ``trust_remote_code``, ``revision``, ``tokenizer``, ``seed``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from berth.engines import transformers_text as text
from berth.engines.answers import Answer, in_kind, plain
from berth.engines.errors import ApiError
from berth.engines.responses import no_responses
from berth.errors import BerthError
from berth.gpu.sim import allocator

logger = logging.getLogger("ray.serve")
MIB = 1 << 20
MAX_SEQS = 4
CONTEXT_MIB = 600
"""What CUDA's context and kernels take beside what torch counts (berth.footprint.runtime)."""


class TransformersServer:
    """The part of LLMServer's protocol that the gateway uses. ``reason``: why it runs in place of vLLM."""

    def __init__(self, config: dict[str, Any], reason: str) -> None:
        self._name = str(config["model"])
        self._source = str(config["source"])
        self._args = dict(config["engine_args"])
        self._vram_mib = int(config["vram_mib"])
        self.reason = reason
        self._threads = ThreadPoolExecutor(int(self._args.get("max_num_seqs") or MAX_SEQS))
        self._model: Any = None
        self._own: Any = None
        self._tokenizer: Any = None
        self._room = text.Room(0)
        self.longest = 0

    def about(self) -> dict[str, str]:
        return {"engine": "transformers", "engine_reason": self.reason}

    async def start(self) -> None:
        """Load the model and answer once.

        Raises:
            BerthError: the KV budget does not hold one request of ``max_model_len`` tokens.
        """
        logger.warning("%s runs on the transformers engine, not on vLLM: %s", self._name, self.reason)
        # Named as vLLM's, by which berth.engines.start_errors tells the term that was wrong.
        await asyncio.to_thread(self.load_model)
        await asyncio.to_thread(self.initialize_kv_cache)
        self._room = text.Room(self._kv_tokens())
        async for _ in await self.completions({"model": self._name, "prompt": "a", "max_tokens": 2}):
            pass

    def load_model(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        source, args = self._source, self._args
        common = {"trust_remote_code": bool(args.get("trust_remote_code")), "revision": args.get("revision") or "main"}
        device = "cuda" if torch.cuda.is_available() and not allocator.active() else "cpu"
        if device == "cuda":
            # torch's own limit stands in for vLLM's budget: a request too many fails here, not at a neighbour's.
            total_mib = torch.cuda.get_device_properties(0).total_memory / MIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, (self._vram_mib - CONTEXT_MIB) / total_mib), 0)
        self._tokenizer = AutoTokenizer.from_pretrained(args.get("tokenizer") or source, **common)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=args.get("dtype", "auto"), **common)
        # Its own defaults are read from here; left in place, they would come in wherever a request says nothing.
        self._own, model.generation_config = model.generation_config, GenerationConfig()
        self._model = model.to(device).eval()
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        self.longest = int(args.get("max_model_len") or own)
        if allocator.active():
            allocator.allocate(sum(p.untyped_storage().nbytes() for p in _apart(model)))

    def initialize_kv_cache(self) -> None:
        """On a simulated GPU the budget is taken at once, as vLLM takes it; on a real one it is a limit on requests."""
        if allocator.active():
            allocator.allocate(self._kv_bytes())

    def _kv_bytes(self) -> int:
        """The budget, or without one what a single request of full length takes."""
        return int(self._args.get("kv_cache_memory_bytes") or self.longest * self._bytes_per_token())

    def _kv_tokens(self) -> int:
        tokens = self._kv_bytes() // self._bytes_per_token()
        if tokens < self.longest:
            raise BerthError(
                f"app {self._name}: term kv_cache: the KV cache does not hold one request of {self.longest} tokens",
                found=f"{self._kv_bytes()} bytes, {tokens} tokens",
                mend=f"set engine_args.max_model_len to {tokens} or less, or engine_args.kv_cache_memory_bytes higher",
            )
        return tokens

    def _bytes_per_token(self) -> int:
        """What transformers keeps of a token: a key and a value in each layer."""
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        return int(2 * config.num_hidden_layers * kept * size * self._model.dtype.itemsize)

    async def check_health(self) -> None:
        if allocator.active():
            allocator.check()

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = plain(request)
        text.refuse_unknown(asked)
        ids = self._chat_ids(asked)
        answer = Answer(self._about(asked, "chatcmpl"), "chat.completion", "ChatCompletionResponse", len(ids))
        return self._answer(answer, ids, asked, request)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        asked = plain(request)
        text.refuse_unknown(asked)
        prompt = text.one_prompt(asked)
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        answer = Answer(self._about(asked, "cmpl"), "text_completion", "CompletionResponse", len(ids))
        return self._answer(answer, list(ids), asked, request)

    async def responses(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        raise no_responses(self._name)

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        raise _no("embeddings")

    async def score(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        raise _no("scores")

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        raise _no("tokenization")

    async def detokenize(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        raise _no("tokenization")

    def _chat_ids(self, asked: dict[str, Any]) -> list[int]:
        messages = text.flat_messages(asked)
        if not self._tokenizer.chat_template:
            message = f"The model `{self._name}` has no chat template; ask /v1/completions."
            raise ApiError(400, message, param="messages")
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def _about(self, asked: dict[str, Any], prefix: str) -> dict[str, Any]:
        model = asked.get("model") or self._name
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def _answer(self, answer: Answer, ids: list[int], asked: dict[str, Any], request: Any) -> AsyncIterator[Any]:
        chat = answer.kind == "chat.completion"
        limits = text.limits(asked, self._own, len(ids), self.longest, chat)
        return self._told(answer, ids, limits, asked, request)

    async def _told(
        self, answer: Answer, ids: list[int], limits: text.Limits, asked: dict[str, Any], request: Any
    ) -> AsyncIterator[Any]:
        made = text.Text(lambda some: str(self._tokenizer.decode(some, skip_special_tokens=True)), limits.stop)
        stream, pieces = bool(asked.get("stream")), []
        if stream:
            yield answer.event("", first=True)
        async with aclosing(self._pieces(ids, limits, made)) as found:
            async for piece in found:
                if stream:
                    yield answer.event(piece)
                else:
                    pieces.append(piece)
        finish = "length" if made.tokens >= limits.max_tokens and not made.stopped else "stop"
        if not stream:
            yield in_kind(answer.whole(pieces, finish, made.tokens), request, answer.response)
            return
        yield answer.event("", finish=finish)
        if (asked.get("stream_options") or {}).get("include_usage"):
            yield answer.usage_event(made.tokens)

    async def _pieces(self, ids: list[int], limits: text.Limits, made: text.Text) -> AsyncGenerator[str]:
        """The text as it is made, in a thread; nobody listening any more ends it at the next token."""
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        over = threading.Event()
        booked = len(ids) + limits.max_tokens
        await self._room.take(booked)

        def work() -> None:
            try:
                if not over.is_set():
                    self._generate(ids, limits, over, lambda token: loop.call_soon_threadsafe(tokens.put_nowait, token))
            finally:
                # The room is free when the thread is through with it, not when its reader has gone.
                loop.call_soon_threadsafe(self._room.give, booked)
                loop.call_soon_threadsafe(tokens.put_nowait, None)

        done = loop.run_in_executor(self._threads, work)
        try:
            while (token := await tokens.get()) is not None:
                if piece := made.add(token):
                    yield piece
                if made.stopped:
                    return
            if piece := made.end():
                yield piece
            await done
        finally:
            over.set()

    def _generate(self, ids: list[int], limits: text.Limits, over: threading.Event, put: Any) -> None:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        from berth.engines.transformers_sampling import Hook, sampler

        prompt = torch.tensor([ids], device=self._model.device)
        ends = self._own.eos_token_id if self._own.eos_token_id is not None else self._tokenizer.eos_token_id
        ends = None if limits.ignore_eos else ends
        pad = self._tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=limits.max_tokens,
            do_sample=False,
            repetition_penalty=limits.repetition_penalty,
            eos_token_id=ends,
            pad_token_id=pad if pad is not None else 0,
        )
        hook = Hook(put, over, {ends} if isinstance(ends, int) else set(ends or ()))
        with torch.inference_mode():
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                logits_processor=sampler(limits, self._args.get("seed"), self._model.device),
                stopping_criteria=StoppingCriteriaList([hook]),
            )


def _apart(model: Any) -> list[Any]:
    """Parameters with a memory of their own: tied ones count once."""
    return list({parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}.values())


def _no(what: str) -> ApiError:
    return ApiError(400, f"This model runs on the transformers engine, which has no {what}.", code="unsupported")
