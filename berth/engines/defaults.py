"""Engine arguments that Berth sets where the app list is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOWHERE = "no-domain-in-allowed_media_domains"
"""No host has this name (RFC 1123 has no underscores). vLLM 0.29 takes an empty list for no limit
(multimodal/media/connector.py), and by that a client could have a replica fetch any URL that the host reaches."""


def with_defaults(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """An app's ``engine_args``, pictures by URL from nowhere unless it says from where."""
    return {"allowed_media_domains": [NOWHERE], **engine_args}
