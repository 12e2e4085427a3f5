"""The app list: what the model owner writes, read once and strictly."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from berth.codec import STRICT, load
from berth.errors import BerthError
from berth.plan.types import Deployment, StrategyName

Engine = Literal["llm", "embedding", "rerank", "light"]
NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
OWNED_ENGINE_ARGS = {
    "gpu_memory_utilization": "vram_mib (Berth sets it from the footprint)",
    "tensor_parallel_size": "gpus_per_replica",
    "distributed_executor_backend": "nothing: inside a slot vLLM uses its own executor",
    "model": "model",
    "served_model_name": "name",
    "runner": "engine",
}
"""vLLM engine arguments that Berth decides, and the key of the app list that decides each."""


@dataclass(frozen=True)
class AppSpec:
    """One model of the app list.

    ``vram_mib`` is the footprint of one replica on each of its GPUs, in MiB: a number, or one per GPU product with
    ``default`` for the rest. ``model`` is a local directory or a hub id. ``engine_args`` go to vLLM as they are;
    ``env`` is the environment of the replica's process. ``num_cpus`` is what Ray books per replica.
    """

    __pydantic_config__ = STRICT
    name: str
    engine: Engine
    replicas: int
    vram_mib: int | dict[str, int]
    model: str = ""
    gpus_per_replica: int = 1
    strategy: StrategyName | None = None
    products: tuple[str, ...] = ()
    num_cpus: float = 0.1
    max_ongoing_requests: int = 64
    engine_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def deployment(self) -> Deployment:
        """The planner's view of this model."""
        vram = self.vram_mib if isinstance(self.vram_mib, dict) else {"default": self.vram_mib}
        return Deployment(
            name=self.name,
            replicas=self.replicas,
            vram_mib=dict(vram),
            gpus_per_replica=self.gpus_per_replica,
            strategy=self.strategy,
            products=self.products,
        )


def load_apps(data: object) -> tuple[AppSpec, ...]:
    """Read the app list (``serve_apps_list``), ordered by name.

    Raises:
        BerthError: for an unknown key or value, a duplicate name, or an engine argument that Berth owns.
    """
    mend = "correct the entry in serve_apps_list"
    apps = load(tuple[AppSpec, ...], data, "app list", mend)
    seen: set[str] = set()
    for app in apps:
        if not NAME.match(app.name):
            raise BerthError(
                "app list: a name cannot be used in a Serve app's name",
                found=repr(app.name),
                allowed="lower-case letters, digits and . _ - (63 at most, no @ or /)",
                mend=mend,
            )
        if app.name in seen:
            raise BerthError("app list: two apps have the same name", found=app.name, allowed="unique names", mend=mend)
        seen.add(app.name)
        _check(app, mend)
    return tuple(sorted(apps, key=lambda app: app.name))


def _check(app: AppSpec, mend: str) -> None:
    for key, low in (("replicas", 0), ("gpus_per_replica", 1), ("max_ongoing_requests", 1), ("num_cpus", 0)):
        if getattr(app, key) < low:
            raise BerthError(
                f"app {app.name}: {key} is too small", found=getattr(app, key), allowed=f">= {low}", mend=mend
            )
    sizes = app.vram_mib if isinstance(app.vram_mib, dict) else {"default": app.vram_mib}
    for product, size in sizes.items():
        if size < 1:
            raise BerthError(
                f"app {app.name}: vram_mib for {product} is not a footprint", found=size, allowed=">= 1 MiB", mend=mend
            )
    if not sizes:
        raise BerthError(
            f"app {app.name}: vram_mib names no GPU product", allowed="a number, or default: MiB", mend=mend
        )
    if app.engine != "light" and not app.model:
        raise BerthError(
            f"app {app.name}: engine {app.engine} needs a model", allowed="a local directory or a hub id", mend=mend
        )
    for key, instead in OWNED_ENGINE_ARGS.items():
        if key in app.engine_args:
            raise BerthError(
                f"app {app.name}: engine_args.{key} would break the placement's promise",
                found=app.engine_args[key],
                mend=f"remove it and use {instead}",
            )
