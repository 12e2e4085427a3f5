"""Which berth has seen a prompt's beginning, or an adapter, before: its caches make the next answer cheaper.

The idea of Ray's PrefixCacheAffinityRouter, bounded as consistent hashing with bounded loads is (Mirrokni, Thorup,
Zadimoghaddam 2016): a berth is preferred only while it has at most ``slack`` more outstanding requests per replica
than the least loaded one. Instead of a tree of texts in an actor, each gateway keeps hashes of whole blocks, each
with all that stands before it, as vLLM's own prefix cache does: no call per request, some 100 bytes per block.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BLOCK_CHARS = 256
"""Some 64 tokens, four blocks of vLLM's cache; what is shorter is not worth a detour."""
MAX_BLOCKS = 64
SIZE = 1 << 16
ADAPTER_SLACK = 8.0
"""Loading an adapter from a host's memory costs less than waiting behind eight answers; so does a session's prompt."""


class Affinity:
    """The berths that each key went to, the least recently used keys forgotten."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._seen: OrderedDict[int, dict[str, None]] = OrderedDict()

    def find(self, keys: Sequence[int], load: Mapping[str, float], slack: float) -> str | None:
        """Of the berths in ``load`` (outstanding requests per replica), the one that has seen most of ``keys``."""
        bound = min(load.values(), default=0.0) + slack
        for key in reversed(keys):
            known = [name for name in self._seen.get(key, ()) if load.get(name, bound + 1) <= bound]
            if known:
                return min(known, key=lambda name: (load[name], name))
        return None

    def remember(self, keys: Sequence[int], berth: str) -> None:
        for key in keys:
            self._seen.setdefault(key, {})[berth] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._size:
            self._seen.popitem(last=False)

    def forget(self, berths: set[str]) -> None:
        """Drop what is known of every berth that is not among ``berths``: a new one of that name starts empty."""
        for key, names in list(self._seen.items()):
            for name in names.keys() - berths:
                del names[name]
            if not names:
                del self._seen[key]


def home(session: str, load: Mapping[str, float], slack: float) -> str:
    """Where a session begins that no berth is known to have had: every gateway says the same, each session another
    berth (highest random weight, Thaler and Ravishankar 1996), among those that are not busier than the bound."""
    bound = min(load.values()) + slack
    near = sorted(name for name, found in load.items() if found <= bound)
    return max(near, key=lambda name: hashlib.blake2b(f"{session}\0{name}".encode(), digest_size=8).digest())


def keys_of(request: Any, model: str, adapter: str, prefix: bool, session: str = "") -> list[int]:
    """What a berth may know of a request, what says most last: its adapter, its beginning from the shortest to the
    longest (``prefix``: its text counts), its ``session``."""
    key = hash((model, adapter))
    keys = [key] if adapter else []
    if prefix:
        text = _text(request)
        for start in range(0, min(len(text) // BLOCK_CHARS, MAX_BLOCKS) * BLOCK_CHARS, BLOCK_CHARS):
            key = hash((key, text[start : start + BLOCK_CHARS]))
            keys.append(key)
    return [*keys, hash((model, adapter, "session", session))] if session else keys


def _text(request: Any) -> str:
    """The prompt of a request, plain JSON or one of vLLM's classes; no more of it than counts."""
    parts, length = [], 0
    prompt = _field(request, "messages") or _field(request, "prompt")
    for piece in _pieces(prompt or [_field(request, "instructions"), _field(request, "input")]):
        parts.append(piece)
        length += len(piece)
        if length >= MAX_BLOCKS * BLOCK_CHARS:
            break
    return "".join(parts)


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, int):
        yield f"{value} "
    elif isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    elif value is not None:
        for name in ("role", "content", "text"):
            yield from _pieces(_field(value, name))


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)
