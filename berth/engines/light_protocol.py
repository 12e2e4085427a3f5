"""Request and response models for an environment without an inference engine (runtime-light.txt).

ray.serve.llm's ingress takes its OpenAI models from vLLM, else from SGLang, and cannot be imported without either
(Ray 2.60, ``openai_api_models.py``). The light engine needs neither, and the gateway in front of it should be the very
class that runs in front of vLLM. So where neither is installed these models stand under SGLang's name: the fields that
the ingress reads, everything else kept as it came.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

_MODULE = "sglang.srt.entrypoints.openai.protocol"


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Request(_Open):
    model: str | None = None
    stream: bool = False


class ChatCompletionRequest(_Request):
    messages: list[dict[str, Any]]


class CompletionRequest(_Request):
    prompt: str | list[Any]


class EmbeddingRequest(_Request):
    input: str | list[Any]


class ScoringRequest(_Request):
    text_1: str | list[Any]
    text_2: str | list[Any]


class TokenizeRequest(_Request):
    pass


class DetokenizeRequest(_Request):
    tokens: list[int]


_REQUESTS = (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    ScoringRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
_RESPONSES = (
    "ChatCompletionResponse",
    "ChatCompletionStreamResponse",
    "CompletionResponse",
    "CompletionStreamResponse",
    "EmbeddingResponse",
    "ScoringResponse",
    "TokenizeResponse",
    "DetokenizeResponse",
)


def stand_in() -> bool:
    """Offer these models to ray.serve.llm in this process; whether they are what it uses.

    Nothing where vLLM or SGLang is installed. Called before the first import of ``ray.llm``; a second call changes
    nothing.
    """
    if _MODULE in sys.modules:
        return getattr(sys.modules[_MODULE], "__doc__", None) == __doc__
    if any(find_spec(engine) is not None for engine in ("vllm", "sglang")):
        return False
    protocol = ModuleType(_MODULE, __doc__)
    for model in _REQUESTS:
        setattr(protocol, model.__name__, model)
    for name in _RESPONSES:
        setattr(protocol, name, type(name, (_Open,), {"__module__": _MODULE}))
    parents = _MODULE.split(".")
    for depth in range(1, len(parents)):
        parent = ".".join(parents[:depth])
        sys.modules[parent] = ModuleType(parent)
    sys.modules[_MODULE] = protocol
    return True
