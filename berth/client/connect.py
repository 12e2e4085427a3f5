"""OpenAI's clients, pointed at a cluster."""

from __future__ import annotations

import os
from typing import Any

from openai import AsyncOpenAI, OpenAI

BASE_URL = "http://127.0.0.1:8000/v1"
"""The gateway of the local inventory."""
NO_KEY = "none"
"""OpenAI's clients want a key, also where the cluster asks for none."""
RETRIES = 5
"""Of 429, 503 and broken connections, as the openai package does it: after ``Retry-After`` where the answer says it
(60 s at most), else after 0.5 s and twice as long each time (8 s at most)."""


def client(base_url: str | None = None, api_key: str | None = None, **options: Any) -> OpenAI:
    """A client of the cluster at ``base_url``.

    Without arguments from the environment: ``BERTH_BASE_URL`` (with its ``/v1``), ``BERTH_API_KEY``. ``options`` are
    those of ``openai.OpenAI``; ``timeout`` is in seconds.
    """
    return OpenAI(**_options(base_url, api_key, options))


def async_client(base_url: str | None = None, api_key: str | None = None, **options: Any) -> AsyncOpenAI:
    """As ``client``, for asyncio."""
    return AsyncOpenAI(**_options(base_url, api_key, options))


def _options(base_url: str | None, api_key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    # Not OPENAI_API_KEY, which the package would read: a cluster is not to be sent somebody else's key.
    return {
        "base_url": base_url or os.environ.get("BERTH_BASE_URL") or BASE_URL,
        "api_key": api_key or os.environ.get("BERTH_API_KEY") or NO_KEY,
        "max_retries": RETRIES,
        **options,
    }
