"""The app list: what the model owner writes, read once and strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from berth.codec import STRICT, dump, load
from berth.errors import BerthError
from berth.plan.types import Affinity, Deployment, DomainName, PlacementName, StrategyName

Engine = Literal["llm", "embedding", "rerank", "transformers", "vllm_server", "light"]
MIB = 1 << 20
NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
OWNED_ENGINE_ARGS = {
    "gpu_memory_utilization": "vram_mib (Berth sets it from the footprint)",
    "tensor_parallel_size": "gpus_per_replica",
    "pipeline_parallel_size": "slots_per_replica",
    "nnodes": "slots_per_replica",
    "node_rank": "slots_per_replica (the plan orders the slots)",
    "master_addr": "slots_per_replica (the plan names the first slot)",
    "master_port": "nothing: the replica finds a free one",
    "data_parallel_size": "replicas, or slots_per_replica with across_slots: data",
    "num_gpu_blocks_override": "concurrency, or engine_args.kv_cache_memory_bytes",
    "distributed_executor_backend": "nothing: inside a slot vLLM uses its own executor",
    "model": "model",
    "served_model_name": "name",
    "runner": "engine",
    "lora_modules": "adapters",
}
"""vLLM engine arguments that Berth decides, and the key of the app list that decides each."""
TRANSFORMERS_ARGS = (
    "dtype",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_seqs",
    "revision",
    "seed",
    "tokenizer",
    "trust_remote_code",
)
"""Engine arguments that the transformers engine has."""


PREFILL_KEYS = (
    "replicas", "vram_mib", "config", "concurrency", "gpus_per_replica", "strategy", "products", "num_cpus",
    "max_ongoing_requests", "max_queued_requests", "prefix_affinity", "min_available", "engine_args", "env", "priority",
    "spread_over", "min_compute_capability", "require_nvlink", "pins", "affinity", "anti_affinity", "load",
)  # fmt: skip
"""What the replicas that only read prompts may have otherwise than the model's own."""
DERIVED_KEYS = ("prefill_of",)
"""Set by load_apps, written by nobody."""
SAME_CACHE = ("dtype", "kv_cache_dtype", "block_size")
"""Engine arguments without which one engine cannot read the KV cache of another (vLLM 0.29 compares them as well)."""


AcrossSlots = Literal["pipeline", "tensor", "data"]


def parallel_sizes(gpus_per_slot: int, slots: int, across: AcrossSlots = "pipeline") -> dict[str, int]:
    """vLLM's parallel sizes, those that are not 1: tensor parallel within a slot; over several slots a stage of the
    pipeline each, or (``across`` "tensor") one tensor parallel group over all of their GPUs, or ("data") a rank of its
    own each, with experts over all of them where ``enable_expert_parallel`` is set."""
    sizes = {
        "tensor_parallel_size": gpus_per_slot * (slots if across == "tensor" else 1),
        "pipeline_parallel_size": slots if across == "pipeline" else 1,
        "data_parallel_size": slots if across == "data" else 1,
    }
    return {name: size for name, size in sizes.items() if size > 1}


@dataclass(frozen=True)
class Autoscaling:
    """Ray Serve's own autoscaling of a model, inside room that the plan reserves; Ray's names and meanings.

    Between the app's ``replicas`` (0: down to nothing while nobody asks) and ``max_replicas``, so that each has
    ``target_ongoing_requests`` (half of what it works on at once when None): more after ``upscale_delay_s`` above that,
    fewer after ``downscale_delay_s`` below, both of the mean over ``look_back_period_s``. All in seconds.
    """

    __pydantic_config__ = STRICT
    max_replicas: int
    target_ongoing_requests: float | None = None
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 600.0
    look_back_period_s: float = 30.0


@dataclass(frozen=True)
class Sleep:
    """An engine that nobody has asked for ``after_s`` seconds gives its memory on the GPU back and keeps its weights in
    the host's, until the next request (berth.engines.sleep). The plan reserves its memory as ever."""

    __pydantic_config__ = STRICT
    after_s: float


@dataclass(frozen=True)
class AppSpec:
    """One model of the app list.

    ``vram_mib`` is the footprint of one replica on each of its GPUs, in MiB: a number, or one per GPU product with
    ``default`` for the rest; without it, it is predicted from ``config``, a ``config.json`` or a directory with one on
    the controller (``model`` when not given), for ``concurrency`` requests of ``max_model_len`` tokens at once.
    ``model`` is a local directory or a hub id. ``engine_args`` go to vLLM as they are;
    ``env`` is the environment of the replica's process. ``num_cpus`` is what Ray books per replica.
    A replica works on ``max_ongoing_requests`` at once; ``max_queued_requests`` more may wait at each of the model's
    berths, and when all are full the API answers 429. ``prefix_affinity``: a prompt goes to a berth that has seen its
    beginning while that has at most so many outstanding requests per replica more than the least loaded; 0 is off.
    ``adapters``: LoRA adapters by name, each a directory; asked for as ``name:adapter``.
    ``fallback``: the engine in vLLM's place where vLLM cannot run the model or the machine; none, and the start fails.
    With ``autoscaling``, ``replicas`` are the fewest. ``min_available`` replicas stay up while the model changes or
    moves; without it at least half of its berths, where it has more than one.
    A model larger than a host takes ``slots_per_replica`` slots of ``gpus_per_replica`` GPUs each; ``across_slots``
    says how vLLM spreads it: a stage of the pipeline on each slot, one tensor parallel group over all their GPUs, or a
    data parallel rank on each (with ``engine_args.enable_expert_parallel``, a mixture's experts over all GPUs).
    ``placement`` "pool": one Serve deployment over several slots instead of a berth on each; Serve chooses among them.
    With ``prefill``, replicas of their own read the prompts and hand the KV cache over; it has those keys of the app
    (PREFILL_KEYS) that are otherwise for them, and ``load_apps`` makes an app of its own of it, which ``prefill_of``
    names.
    With ``sleep``, an engine that nobody asks gives its memory back until somebody does.
    From ``priority`` on, the planner's words: see ``berth.plan.types.Deployment``.
    """

    __pydantic_config__ = STRICT
    name: str
    engine: Engine
    replicas: int
    vram_mib: int | dict[str, int] | None = None
    model: str = ""
    config: str = ""
    concurrency: float | None = None
    gpus_per_replica: int = 1
    strategy: StrategyName | None = None
    products: tuple[str, ...] = ()
    num_cpus: float = 0.1
    max_ongoing_requests: int = 64
    max_queued_requests: int = 64
    prefix_affinity: float = 0.0
    adapters: dict[str, str] = field(default_factory=dict)
    autoscaling: Autoscaling | None = None
    min_available: int | None = None
    fallback: Literal["", "transformers"] = ""
    engine_args: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    spread_over: DomainName | None = None
    min_compute_capability: str = ""
    require_nvlink: bool = False
    pins: tuple[str, ...] = ()
    affinity: tuple[Affinity, ...] = ()
    anti_affinity: tuple[Affinity, ...] = ()
    load: float = 1.0
    slots_per_replica: int = 1
    across_slots: AcrossSlots = "pipeline"
    placement: PlacementName = "berths"
    prefill: dict[str, Any] | None = None
    prefill_of: str = ""
    sleep: Sleep | None = None

    @property
    def given_mib(self) -> dict[str, int] | None:
        """The footprints that the app list gives, per product; None when they are to be predicted."""
        if self.vram_mib is None or isinstance(self.vram_mib, dict):
            return self.vram_mib
        return {"default": self.vram_mib}

    def deployment(self, vram_mib: Mapping[str, int] | None = None) -> Deployment:
        """The planner's view of this model; ``vram_mib`` are the predicted footprints where none are given."""
        return Deployment(
            name=self.name,
            replicas=self.replicas,
            vram_mib=dict(self.given_mib or vram_mib or {}),
            gpus_per_replica=self.gpus_per_replica,
            max_replicas=self.autoscaling.max_replicas if self.autoscaling else None,
            placement=self.placement,
            slots_per_replica=self.slots_per_replica,
            # Its parts talk at every token.
            strategy="pack" if self.slots_per_replica > 1 else self.strategy,
            products=self.products,
            min_compute_capability=self.min_compute_capability,
            require_nvlink=self.require_nvlink,
            spread_over=self.spread_over,
            affinity=self.affinity,
            anti_affinity=self.anti_affinity,
            pins=self.pins,
            priority=self.priority,
            load=self.load,
            min_available=self.min_available,
        )


def load_apps(data: object) -> tuple[AppSpec, ...]:
    """Read the app list (``serve_apps_list``), ordered by name; an app's ``prefill`` is an app beside it.

    Raises:
        BerthError: for an unknown key or value, a duplicate name, or an engine argument that Berth owns.
    """
    mend = "correct the entry in serve_apps_list"
    listed = load(tuple[AppSpec, ...], data, "app list", mend)
    for app in listed:
        if written := [key for key in DERIVED_KEYS if getattr(app, key)]:
            raise BerthError(f"app {app.name}: {written[0]}: unknown key", mend="write prefill into the app it is for")
    apps = [*listed, *(_prefill(app, mend) for app in listed if app.prefill is not None)]
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


def prefill_name(app: str) -> str:
    """The app whose replicas read the prompts of ``app``."""
    return f"{app}-prefill"


def _prefill(app: AppSpec, mend: str) -> AppSpec:
    """The app of ``app.prefill``: as the model's own, but for its keys, and for what names single replicas or GPUs.

    Raises:
        BerthError: for keys that it cannot have, or a KV cache that the model's own replicas could not read.
    """
    own = app.prefill or {}
    if unknown := sorted(own.keys() - set(PREFILL_KEYS)):
        raise BerthError(
            f"app {app.name}: prefill: unknown key",
            found=", ".join(unknown),
            allowed=", ".join(PREFILL_KEYS),
            mend=mend,
        )
    for key, value, allowed in (
        ("engine", app.engine, ("llm", "light")),
        ("slots_per_replica", app.slots_per_replica, (1,)),
        ("fallback", app.fallback, ("",)),
    ):
        if value not in allowed:
            raise BerthError(
                f"app {app.name}: {key} is not for a model with prefill apart",
                found=value,
                allowed=" or ".join(str(item) or "not set" for item in allowed),
                mend=mend,
            )
    engine_args = own.get("engine_args") or {}
    for key in SAME_CACHE:
        if key in engine_args and engine_args[key] != app.engine_args.get(key):
            raise BerthError(
                f"app {app.name}: prefill.engine_args.{key}: the model's own replicas could not read its KV cache",
                found=engine_args[key],
                allowed=app.engine_args.get(key, "not set"),
                mend="set it in the app's own engine_args, for both",
            )
    shared: dict[str, Any] = {key: value for key, value in dump(app).items() if key in PREFILL_KEYS}
    shared |= {"replicas": 1, "min_available": None, "pins": (), "affinity": (), "anti_affinity": ()}
    if "vram_mib" in own:
        shared |= {"concurrency": None, "config": ""}
    elif "concurrency" in own:
        shared["vram_mib"] = None
    made = shared | own | {"name": prefill_name(app.name), "engine": app.engine, "model": app.model}
    made |= {"engine_args": {**app.engine_args, **engine_args}, "adapters": app.adapters, "prefill_of": app.name}
    found: AppSpec = load(AppSpec, made, f"app {app.name}: prefill", mend)
    if found.replicas < 1:
        raise BerthError(
            f"app {app.name}: prefill.replicas is too small", found=found.replicas, allowed=">= 1", mend=mend
        )
    return found


def _check(app: AppSpec, mend: str) -> None:
    lowest = {
        "replicas": 0,
        "gpus_per_replica": 1,
        "slots_per_replica": 1,
        "max_ongoing_requests": 1,
        "max_queued_requests": 0,
        "prefix_affinity": 0,
        "num_cpus": 0,
    }
    for key, low in lowest.items():
        if getattr(app, key) < low:
            raise BerthError(
                f"app {app.name}: {key} is too small", found=getattr(app, key), allowed=f">= {low}", mend=mend
            )
    if app.min_available is not None and not 0 <= app.min_available <= app.replicas:
        raise BerthError(
            f"app {app.name}: min_available is more than it has",
            found=app.min_available,
            allowed=f"0 to replicas ({app.replicas})",
            mend=mend,
        )
    for product, size in (app.given_mib or {}).items():
        if size < 1:
            raise BerthError(
                f"app {app.name}: vram_mib for {product} is not a footprint", found=size, allowed=">= 1 MiB", mend=mend
            )
    if app.given_mib == {}:
        raise BerthError(
            f"app {app.name}: vram_mib names no GPU product", allowed="a number, or default: MiB", mend=mend
        )
    if app.engine == "light" and app.given_mib is None:
        raise BerthError(f"app {app.name}: a light app has no model to predict vram_mib from", mend="set its vram_mib")
    if app.given_mib is not None and (app.concurrency is not None or app.config):
        raise BerthError(
            f"app {app.name}: vram_mib is given, so nothing is predicted from concurrency or config",
            mend="remove vram_mib, or remove concurrency and config and set engine_args.kv_cache_memory_bytes",
        )
    if app.concurrency is not None and app.concurrency <= 0:
        raise BerthError(f"app {app.name}: concurrency is too small", found=app.concurrency, allowed="> 0", mend=mend)
    if app.engine != "light" and not app.model:
        raise BerthError(
            f"app {app.name}: engine {app.engine} needs a model", allowed="a local directory or a hub id", mend=mend
        )
    _check_adapters(app, mend)
    _check_autoscaling(app, mend)
    _check_team(app, mend)
    _check_pool(app, mend)
    _check_sleep(app, mend)
    _check_transformers(app, mend)
    _check_engine_args(app)


def _check_transformers(app: AppSpec, mend: str) -> None:
    if app.fallback and app.engine != "llm":
        raise BerthError(
            f"app {app.name}: only engine llm has a fallback", found=app.engine, allowed="engine llm", mend=mend
        )
    if (app.fallback or app.engine == "transformers") and app.gpus_per_replica > 1:
        raise BerthError(
            f"app {app.name}: the transformers engine does not split a model over GPUs",
            found=f"gpus_per_replica {app.gpus_per_replica}",
            allowed="1",
            mend="set gpus_per_replica to 1, or engine llm without fallback",
        )
    unknown = sorted(set(app.engine_args) - set(TRANSFORMERS_ARGS)) if app.engine == "transformers" else []
    if unknown:
        raise BerthError(
            f"app {app.name}: engine_args that the transformers engine does not have",
            found=", ".join(unknown),
            allowed=", ".join(TRANSFORMERS_ARGS),
            mend=mend,
        )


def _check_adapters(app: AppSpec, mend: str) -> None:
    for name in app.adapters:
        if not NAME.match(name):
            raise BerthError(
                f"app {app.name}: an adapter's name cannot be asked for",
                found=repr(name),
                allowed="lower-case letters, digits and . _ - (63 at most)",
                mend=mend,
            )
    if app.adapters and app.engine == "llm" and not app.engine_args.get("enable_lora"):
        raise BerthError(
            f"app {app.name}: adapters need room on the GPU, which its footprint does not have",
            found="no engine_args.enable_lora",
            mend="set engine_args.enable_lora: true, with max_loras and max_lora_rank",
        )
    if app.adapters and app.engine not in ("llm", "light"):
        raise BerthError(f"app {app.name}: engine {app.engine} takes no adapters", allowed="engine llm", mend=mend)


def _check_autoscaling(app: AppSpec, mend: str) -> None:
    if app.autoscaling is None:
        return
    most, target = app.autoscaling.max_replicas, app.autoscaling.target_ongoing_requests
    if most <= app.replicas:
        raise BerthError(
            f"app {app.name}: autoscaling.max_replicas leaves nothing to scale",
            found=most,
            allowed=f"> replicas ({app.replicas})",
            mend=mend,
        )
    if target is not None and not 0 < target <= app.max_ongoing_requests:
        raise BerthError(
            f"app {app.name}: autoscaling.target_ongoing_requests is never reached, or always",
            found=target,
            allowed=f"> 0 and <= max_ongoing_requests ({app.max_ongoing_requests})",
            mend=mend,
        )
    for key in ("upscale_delay_s", "downscale_delay_s", "look_back_period_s"):
        if (value := getattr(app.autoscaling, key)) < 0 or (key == "look_back_period_s" and not value):
            raise BerthError(f"app {app.name}: autoscaling.{key} is no time", found=value, allowed=">= 0", mend=mend)


def _check_team(app: AppSpec, mend: str) -> None:
    if app.slots_per_replica == 1:
        return
    for key, found, allowed in (
        ("engine", app.engine, ("llm", "light")),
        ("strategy", app.strategy, (None, "pack")),
        ("autoscaling", app.autoscaling and "set", (None,)),
        ("fallback", app.fallback, ("",)),
    ):
        if found not in allowed:
            raise BerthError(
                f"app {app.name}: {key} is not for a model over {app.slots_per_replica} slots",
                found=found,
                allowed=", ".join(item or "not set" for item in allowed),
                mend=mend,
            )


def _check_pool(app: AppSpec, mend: str) -> None:
    if app.placement != "pool":
        return
    for key, found, allowed, why in (
        ("slots_per_replica", app.slots_per_replica, 1, "Serve would choose the slots of its parts one by one"),
        ("gpus_per_replica", app.gpus_per_replica, 1, "a replica that has a slot to itself is as exact in a berth"),
        ("prefix_affinity", app.prefix_affinity, 0, "inside a pool Serve chooses the replica, not the gateway"),
    ):
        if found != allowed:
            raise BerthError(
                f"app {app.name}: {key} is not for a pool: {why}",
                found=found,
                allowed=f"{allowed}, or placement: berths",
                mend=mend,
            )


def _check_sleep(app: AppSpec, mend: str) -> None:
    if app.sleep is None:
        return
    if app.sleep.after_s <= 0:
        raise BerthError(
            f"app {app.name}: sleep.after_s is no time", found=app.sleep.after_s, allowed="> 0 seconds", mend=mend
        )
    for key, found, allowed, why in (
        ("engine", app.engine, ("llm", "embedding", "rerank", "light"), "it has no sleep mode"),
        ("fallback", app.fallback, ("",), "the engine in vLLM's place has no sleep mode"),
        ("slots_per_replica", app.slots_per_replica, (1,), "nobody has tried it over several"),
        (
            "prefill",
            "set" if app.prefill is not None else None,
            (None,),
            "another replica may be about to fetch the KV cache",
        ),
    ):
        if found not in allowed:
            raise BerthError(
                f"app {app.name}: {key} is not for a model that sleeps: {why}",
                found=found,
                allowed=" or ".join(str(item or "not set") for item in allowed) + ", or no sleep",
                mend=mend,
            )


def _check_engine_args(app: AppSpec) -> None:
    for name, value in app.engine_args.items():
        # vLLM's own command line spells them with dashes.
        instead = OWNED_ENGINE_ARGS.get(name.lstrip("-").replace("-", "_"))
        if instead is not None:
            raise BerthError(
                f"app {app.name}: engine_args.{name} would break the placement's promise",
                found=value,
                mend=f"remove it and use {instead}",
            )
    least = min((app.given_mib or {}).values(), default=None)
    budget = app.engine_args.get("kv_cache_memory_bytes")
    if least is not None and isinstance(budget, int) and budget >= least * MIB:
        raise BerthError(
            f"app {app.name}: engine_args.kv_cache_memory_bytes alone is more than its footprint",
            found=budget,
            allowed=f"less than vram_mib, {least} MiB = {least * MIB} bytes",
            mend="set it lower, or vram_mib higher",
        )
