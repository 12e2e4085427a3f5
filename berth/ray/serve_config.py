"""Plan + app list -> Serve's declarative config: one app per berth or pool, and the gateway's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from berth.codec import STRICT
from berth.errors import BerthError
from berth.plan.apps import AppSpec, prefill_name
from berth.plan.pools import Pool, pools_of
from berth.plan.types import POOL, Berth, Plan, PlannedFootprint, Slot

GATEWAY = "berth-gateway"
BUILD = "berth.engines.app:build"
BUILD_GATEWAY = "berth.engines.app:build_gateway"
GATEWAY_REQUESTS = 10_000
"""Requests that a gateway holds, and as many again that a proxy keeps for it. What is asked of models ends much sooner,
at the limits of their berths; this is the end of everything else."""
GATEWAY_ENV = {
    # The gateway only hands on, and never blocks its loop: a thread of its own for Serve's router and one for the
    # user's code cost a change of threads at every part of every stream (decision 22).
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
PLAIN_ENGINES = ("light", "transformers", "vllm_server")
"""Those that read JSON. vLLM's own, and so one that may have a fallback in its place, takes ray.serve.llm's classes."""
MAX_BODY_VARIABLE = "BERTH_GATEWAY_MAX_BODY_MIB"
NODE_PATIENCE_S = 30.0
"""How much longer than the replica that leads a node of its team may take to stop: it stops after it."""
SHARED_GPU = 0.01
"""Share of Ray's GPU that a replica on a shared slot asks for: a token, so that Ray sets its devices; VRAM_MB binds."""


@dataclass(frozen=True)
class ServeOptions:
    """Where Serve listens, how patiently it stops replicas (seconds), and the largest body of a request."""

    __pydantic_config__ = STRICT
    host: str
    port: int
    route_prefix: str = "/"
    gateway_replicas: int = 1
    drain_s: float = 60.0
    env: dict[str, str] = field(default_factory=dict)
    max_body_mib: int = 64


NODE = "~"
"""Between a model's name and a slot's, in the name of the deployment of a slot that does not lead its team."""


def node_name(model: str, slot: str) -> str:
    """The deployment of ``model`` on a slot that does not lead its team."""
    return f"{model}{NODE}{slot}"


def slots_of(app: str, deployments: Iterable[str]) -> tuple[str, ...]:
    """The slots of a berth's app, from its name and its deployments' names."""
    first = app.rpartition("@")[2]
    return (first, *(name.partition(NODE)[2] for name in deployments if NODE in name))


def berth_app(
    spec: AppSpec,
    berth: Berth,
    slot: Slot,
    options: ServeOptions,
    footprint: PlannedFootprint | None = None,
    team: Sequence[Slot] = (),
) -> dict[str, Any]:
    """The Serve app of one berth; ``footprint`` is its predicted one, whose KV budget is then set. ``team`` are all
    slots of a replica that is over several, ``slot`` the first of them.

    Counts stand in ``deployments`` only: a change of ``args`` restarts replicas, a change of ``num_replicas`` does not
    (Ray 2.60, serve/_private/version.py).
    """
    gpus = len(slot.gpu_uuids)
    env = {**options.env, **spec.env}
    budget = footprint.kv_cache_memory_bytes if footprint else None
    # Cards of one product may differ by some MiB; each of a team's keeps within the footprint.
    largest = max(item.total_mib for item in team or (slot,))
    return {
        "name": berth.name,
        "route_prefix": None,
        "import_path": BUILD,
        "args": {
            "model": spec.name,
            "engine": spec.engine,
            "source": spec.model,
            "engine_args": {**spec.engine_args, **({"kv_cache_memory_bytes": budget} if budget else {})},
            "gpus": gpus,
            "vram_mib": berth.vram_mib,
            # vLLM checks total x utilization against what is free, even when the KV budget is given in bytes.
            "gpu_memory_utilization": math.floor(10_000 * berth.vram_mib / largest) / 10_000,
            **({"adapters": dict(spec.adapters)} if spec.adapters else {}),
            **({"fallback": spec.fallback} if spec.fallback else {}),
            **({"team": [item.name for item in team], "across_slots": spec.across_slots} if team else {}),
            **({"prefill": prefill_name(spec.name)} if spec.prefill is not None else {}),
            **({"prefill_of": spec.prefill_of} if spec.prefill_of else {}),
            **({"sleep": {"after_s": spec.sleep.after_s}} if spec.sleep else {}),
        },
        "runtime_env": {"env_vars": env} if env else {},
        "deployments": [
            {
                "name": spec.name,
                **_scale(spec, berth),
                "max_ongoing_requests": spec.max_ongoing_requests,
                # Serve counts a request as queued while it looks for a replica, so that a burst would be refused that
                # the replicas could take (Ray 2.60, serve/_private/router.py): its limit is on both together.
                "max_queued_requests": max(
                    1, (berth.replicas + berth.reserved) * spec.max_ongoing_requests + spec.max_queued_requests
                ),
                "graceful_shutdown_timeout_s": options.drain_s,
                "ray_actor_options": _actor(spec, berth, slot),
            },
            *(_node(spec, berth, item, options) for item in team[1:]),
        ],
    }


def _node(spec: AppSpec, berth: Berth, slot: Slot, options: ServeOptions) -> dict[str, Any]:
    return {
        "name": node_name(spec.name, slot.name),
        "num_replicas": 1,
        # The replica that leads keeps one request open; another is there while one that ended is not yet noticed.
        "max_ongoing_requests": 8,
        "graceful_shutdown_timeout_s": options.drain_s + NODE_PATIENCE_S,
        "ray_actor_options": _actor(spec, berth, slot),
    }


def _actor(spec: AppSpec, berth: Berth, slot: Slot) -> dict[str, Any]:
    gpus = len(slot.gpu_uuids)
    return {
        "num_cpus": spec.num_cpus,
        "num_gpus": SHARED_GPU if gpus == 1 else gpus,
        "resources": {"VRAM_MB": berth.vram_mib * gpus},
        "label_selector": {"berth.slot": slot.name},
    }


def pool_app(
    spec: AppSpec, pool: Pool, slots: Sequence[Slot], options: ServeOptions, footprint: PlannedFootprint | None = None
) -> dict[str, Any]:
    """The Serve app of a pool over ``slots``: that of a berth, but for where Serve may put the replicas.

    ``max_replicas_per_node`` keeps Serve from filling a slot with what the others have reserved there. It and the
    selector restart replicas when they change (Ray 2.60, serve/_private/version.py).
    """
    place = Berth(
        pool.deployment,
        POOL,
        pool.fewest,
        max(berth.vram_mib for berth in pool.berths),
        "",
        pool.most - pool.fewest,
    )
    # Cards of one product may differ by some MiB; an engine on the largest keeps within the footprint too.
    app = berth_app(spec, place, max(slots, key=lambda slot: slot.total_mib), options, footprint)
    deployment = app["deployments"][0]
    deployment["max_replicas_per_node"] = pool.each
    deployment["ray_actor_options"]["label_selector"] = {"berth.slot": f"in({','.join(pool.slots)})"}
    return app


def selected(deployment: Mapping[str, Any]) -> tuple[str, ...]:
    """The slots that a deployment of ours may be on."""
    text = str((deployment.get("ray_actor_options") or {}).get("label_selector", {}).get("berth.slot", ""))
    return tuple(text.removeprefix("in(").removesuffix(")").split(",")) if text else ()


def is_pool(app: Mapping[str, Any]) -> bool:
    """Whether an app of ours is a pool's."""
    return str(app["name"]).rpartition("@")[2] == POOL


def needs(app: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What an app asks Ray for on each slot, with all the replicas that Serve may make of it there."""
    found: dict[str, dict[str, float]] = {}
    for deployment in app["deployments"]:
        actor = deployment["ray_actor_options"]
        count = deployment.get("max_replicas_per_node") or most({"deployments": [deployment]})
        here = {"VRAM_MB": actor["resources"]["VRAM_MB"], "GPU": actor["num_gpus"], "CPU": actor["num_cpus"]}
        for slot in selected(deployment):
            found[slot] = {key: value * count for key, value in here.items()}
    return found


def _scale(spec: AppSpec, berth: Berth) -> dict[str, Any]:
    """How many replicas: a number, or the bounds of Serve's autoscaling where the plan keeps room at this berth."""
    scaling = spec.autoscaling
    if scaling is None or not berth.reserved:
        return {"num_replicas": berth.replicas}
    target = scaling.target_ongoing_requests
    return {
        "autoscaling_config": {
            "min_replicas": berth.replicas,
            "max_replicas": berth.replicas + berth.reserved,
            "target_ongoing_requests": spec.max_ongoing_requests / 2 if target is None else target,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": scaling.look_back_period_s,
            # Ray 2.60 wants the replicas' reports no rarer than what is looked back on.
            "metrics_interval_s": min(10.0, scaling.look_back_period_s),
        }
    }


def fewest(app: Mapping[str, Any]) -> int:
    """Replicas that Serve keeps of an app at least."""
    deployment = app["deployments"][0]
    scaling = deployment.get("autoscaling_config")
    return int(scaling["min_replicas"] if scaling else deployment["num_replicas"])


def at_least(app: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """The app with no fewer than ``count`` replicas where Serve scales it, and as it is where it does not."""
    deployment = app["deployments"][0]
    scaling = deployment.get("autoscaling_config")
    if not scaling or scaling["min_replicas"] >= count:
        return app
    scaled = {**deployment, "autoscaling_config": {**scaling, "min_replicas": count}}
    return {**app, "deployments": [scaled, *app["deployments"][1:]]}


def most(app: Mapping[str, Any]) -> int:
    """Replicas that Serve may make of an app, all of which have their room."""
    deployment = app["deployments"][0]
    scaling = deployment.get("autoscaling_config")
    return int(scaling["max_replicas"] if scaling else deployment["num_replicas"])


def gateway_app(table: Mapping[str, Any], options: ServeOptions) -> dict[str, Any]:
    """The gateway's app with its table; it lives on slots, so that it outlives the head."""
    return {
        "name": GATEWAY,
        "route_prefix": options.route_prefix,
        "import_path": BUILD_GATEWAY,
        "args": {},
        "runtime_env": {"env_vars": {**GATEWAY_ENV, MAX_BODY_VARIABLE: str(options.max_body_mib)}},
        "deployments": [
            {
                "name": "gateway",
                "num_replicas": options.gateway_replicas,
                "max_ongoing_requests": GATEWAY_REQUESTS,
                "max_queued_requests": GATEWAY_REQUESTS,
                "backpressure_config": {"status_code": 429, "retry_after_s": 1},
                "user_config": dict(table),
                "ray_actor_options": {"num_cpus": 0.1, "label_selector": {"berth.role": "slot"}},
            }
        ],
    }


def gateway_table(
    models: Iterable[str], berths: Iterable[Mapping[str, Any]], prefix_affinity: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """``user_config`` of the gateway: for each model the berths (their app configs) it may use, by name,
    ``prefix_affinity`` where it is on, and ``prefill_of`` where it reads prompts for another model, and for nobody
    else."""
    table: dict[str, Any] = {model: {"berths": []} for model in sorted(models)}
    for app in sorted(berths, key=lambda app: str(app["name"])):
        entry = table.setdefault(app["args"]["model"], {"berths": []})
        entry["berths"].append(_table_berth(app))
        if "prefill_of" in app["args"]:
            entry["prefill_of"] = app["args"]["prefill_of"]
    for model, slack in sorted((prefix_affinity or {}).items()):
        if model in table and slack:
            table[model]["prefix_affinity"] = slack
    return {"models": table}


def _table_berth(app: Mapping[str, Any]) -> dict[str, Any]:
    deployment = app["deployments"][0]
    found = {"app": app["name"], "replicas": most(app)}
    if scaling := deployment.get("autoscaling_config"):
        # What its replicas may have in all before another berth should wake.
        found["wake_above"] = scaling["target_ongoing_requests"] * most(app)
        found["sleeps"] = not fewest(app)
    # A berth that an earlier version made has no limit, and Serve shows none as -1.
    if (limit := deployment.get("max_queued_requests", -1)) > 0:
        found["limit"] = limit
    if "prefill" in app["args"]:
        # More than they work on would wait in Serve, and the KV cache of a prompt is kept for who comes at once.
        found["works_on"] = deployment["max_ongoing_requests"] * most(app)
    if adapters := app["args"].get("adapters"):
        found["adapters"] = sorted(adapters)
    engine = app["args"].get("engine")
    if engine == "transformers" or app["args"].get("fallback"):
        found["may_differ"] = True
    if engine in PLAIN_ENGINES:
        found["plain"] = True
    return found


def berth_apps(plan: Plan, specs: Sequence[AppSpec], options: ServeOptions) -> dict[str, dict[str, Any]]:
    """Every berth and every pool of the plan as a Serve app, by name.

    Raises:
        BerthError: the plan names a deployment that the app list no longer has.
    """
    by_name = {spec.name: spec for spec in specs}
    slots = {slot.name: slot for slot in plan.slots}
    apps = {}
    pools = pools_of(plan)
    for berth in plan.berths:
        if not berth.leads or berth.app in apps:
            continue
        if berth.deployment not in by_name:
            raise BerthError(
                f"the plan places {berth.deployment}, which the app list does not have",
                allowed=", ".join(sorted(by_name)),
                mend="ansible-playbook site.yml --tags plan,serve",
            )
        spec, slot = by_name[berth.deployment], slots[berth.slot]
        footprint = plan.footprints.get(berth.deployment, {}).get(slot.product)
        if pool := pools.get(berth.app):
            places = [slots[name] for name in pool.slots]
            apps[berth.app] = pool_app(spec, pool, places, options, footprint)
        else:
            team = [slots[name] for name in berth.team]
            apps[berth.app] = berth_app(spec, berth, slot, options, footprint, team)
    return apps
