"""Whether an app of engine ``llm`` runs on transformers instead of vLLM: vLLM itself is asked; docs/decisions/0020.

An app falls back only where its entry says ``fallback: transformers``, and only because vLLM cannot run the model or
the machine at all: never because of memory, of a wrong argument or of a crash, which another engine would hide.
"""

from __future__ import annotations

import re

_NOT_THE_MODEL = (
    "are not supported for now",
    "is not supported anymore",
    "is not supported in-tree anymore",
    "is not compatible with vLLM",
)
"""How vLLM 0.29 refuses an architecture that neither it nor its transformers backend can run
(model_executor/models/registry.py)."""
NO_PLATFORM = "vLLM has no platform for what this host computes on"
NOT_INSTALLED = "vLLM is not installed in the runtime"
ASKED_FOR = "the app list asks for it"


class CannotRun(RuntimeError):
    """vLLM cannot run the model or the machine; its message is the reason."""


def cannot_run(error: str) -> str | None:
    """The reason, when vLLM refused the model's architecture; None when it refused something else."""
    for words in _NOT_THE_MODEL:
        subject = "Model architecture|The Transformers implementation"
        if (found := re.search(rf"(?:{subject})[^\n]*?{re.escape(words)}", error)) is not None:
            return f"vLLM says: {found[0]}"
    return None
