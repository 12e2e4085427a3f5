"""How vLLM 0.29 sorts layers into KV cache groups and sizes the block they share (v1/core/kv_cache_utils.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from berth.footprint.architecture_types import CacheKind


@dataclass(frozen=True)
class Spec:
    """The cache of one layer on one rank: bytes of a page, tokens of a block, and what it is told apart by.

    ``shape`` tells specs with equal pages apart (heads and sizes); ``stage`` is the layer's pipeline stage.
    """

    kind: CacheKind
    page_bytes: int
    block_size: int
    window: int = 0
    shape: tuple[int, ...] = ()
    stage: int = 0

    @property
    def identity(self) -> tuple[object, ...]:
        """What vLLM compares: everything but the place."""
        return (self.kind, self.page_bytes, self.block_size, self.window, self.shape)


@dataclass(frozen=True)
class Group:
    """Layers that share a block table. ``specs`` are its distinct specs, ``members`` every layer's (page, stage)."""

    kind: CacheKind
    block_size: int
    layers: int
    specs: tuple[Spec, ...]
    members: tuple[tuple[int, int], ...]


def groups_of(specs: list[Spec]) -> tuple[Group, ...]:
    """The KV cache groups of a model's layers.

    Layers that all need the same token slots make one group; others get equal pages (larger blocks, or padding) and
    groups of equal size.
    """
    if _uniform(specs):
        return (_group(specs),)
    return _equal_groups(_equal_pages(specs))


def pool_bytes(groups: tuple[Group, ...], stages: int) -> int:
    """Bytes of one block of the pool on the pipeline stage that needs most: its widest group's pages."""
    widest = 0
    for stage in range(stages):
        widest = max(widest, *(sum(page for page, at in group.members if at == stage) for group in groups))
    return widest


def _uniform(specs: list[Spec]) -> bool:
    """All full attention (or all latent), all one window, or all states of one size; with one block size."""
    families = {spec.kind for spec in specs}
    if families == {"full", "mla"}:
        families = {"full"}  # a latent is full attention to the allocator
    if len(families) > 1 or len({spec.block_size for spec in specs}) > 1 or len({spec.window for spec in specs}) > 1:
        return False
    return families != {"state"} or len({spec.page_bytes for spec in specs}) == 1


def _group(specs: list[Spec]) -> Group:
    distinct = {spec.identity: spec for spec in specs}
    return Group(
        specs[0].kind,
        specs[0].block_size,
        len(specs),
        tuple(distinct.values()),
        tuple((spec.page_bytes, spec.stage) for spec in specs),
    )


def _equal_pages(specs: list[Spec]) -> list[Spec]:
    """Raise every page to the largest: by larger blocks where it divides, by padding elsewhere."""
    largest = max(spec.page_bytes for spec in specs)
    equal = []
    for spec in specs:
        ratio, rest = divmod(largest, spec.page_bytes)
        if spec.kind == "state" or rest:
            equal.append(replace(spec, page_bytes=largest))
        else:
            equal.append(replace(spec, page_bytes=largest, block_size=spec.block_size * ratio))
    return equal


def _equal_groups(specs: list[Spec]) -> tuple[Group, ...]:
    """Groups of as many layers as the rarest kind has, or as the commonest where they differ by less than half."""
    buckets: dict[tuple[object, ...], list[Spec]] = {}
    for spec in specs:
        buckets.setdefault(spec.identity, []).append(spec)
    counts = Counter({key: len(found) for key, found in buckets.items()})
    size, most = min(counts.values()), max(counts.values())
    if most < size * 1.5:
        size = most
    groups = []
    for found in buckets.values():
        number = -(-len(found) // size)
        groups += [_group(found[index::number]) for index in range(number)]
    return tuple(groups)
