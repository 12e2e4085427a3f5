"""Prefill and decode apart: what a request becomes for the replica that reads its prompt, and for the one that answers.

The protocol is vLLM's NixlConnector's (vllm/distributed/kv_transfer/kv_connector/v1/nixl), shaped as Ray 2.60 shapes it
(ray/llm/_internal/serve/engines/vllm/kv_transfer/base.py): the first reads the prompt, gives one token that nobody
sees, and says where its KV cache lies; the second fetches it from there. Docs/decisions/0028.
"""

from __future__ import annotations

from typing import Any

from berth.engines.errors import ApiError

METHODS = ("chat", "completions")
PARAMS = "kv_transfer_params"
PRODUCE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""Asks an engine to keep the KV cache of a prompt for another one."""
TRANSFER_CONFIG = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    # A cache that does not come, of a replica that died meanwhile, is computed anew instead of failing the request.
    "kv_load_failure_policy": "recompute",
}
"""vLLM's kv_transfer_config of both, where the app list has none."""
ALONE = ("echo", "prompt_logprobs", "use_beam_search", "prompt_embeds")
"""What the prompt's logits are needed for, or several sequences over one cache."""


def refuse_params(asked: Any) -> None:
    """
    Raises:
        ApiError: 400 for a request that brings transfer parameters: an engine would connect to the address in them.
    """
    extra = _field(asked, "vllm_xargs")
    if _field(asked, PARAMS) is not None or (isinstance(extra, dict) and PARAMS in extra):
        message = f"`{PARAMS}` is set by the gateway, between engines of one model; leave it out."
        raise ApiError(400, message, code="unsupported_parameter", param=PARAMS)


def for_prefill(request: Any, method: str, model: str) -> Any:
    """The request as the replicas of ``model`` read its prompt; None where one replica should do it all."""
    prompt = _field(request, "prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    copies = max(_field(request, "n") or 1, _field(request, "best_of") or 1)
    if method not in METHODS or several or copies > 1 or any(_field(request, name) for name in ALONE):
        return None
    changes = {"model": model, "max_tokens": 1, "min_tokens": 0, "stream": False, "stream_options": None}
    if method == "chat":
        changes["max_completion_tokens"] = 1
    return _with(request, changes | {PARAMS: dict(PRODUCE)})


def for_decode(request: Any, answer: Any) -> Any:
    """The request with what ``answer``, the prefill's, says of the KV cache; None when that says nothing."""
    params = _field(answer[0] if isinstance(answer, list) else answer, PARAMS)
    return _with(request, {PARAMS: params}) if params else None


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _with(request: Any, changes: dict[str, Any]) -> Any:
    return {**request, **changes} if isinstance(request, dict) else request.model_copy(update=changes)
