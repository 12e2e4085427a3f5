"""Small builders for plans, apps and what Serve's REST says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from berth.plan.apps import AppSpec, Autoscaling
from berth.plan.pools import Pool
from berth.plan.types import Berth, Plan, Slot
from berth.ray.rollout import Wanted
from berth.ray.serve_config import ServeOptions, berth_app, pool_app

L40S = "NVIDIA L40S"
OPTIONS = ServeOptions(host="127.0.0.1", port=8000)


def slot(name: str, vram: int = 8_000, gpus: int = 1, total: int | None = None) -> Slot:
    return Slot(
        name=name,
        host=name.rpartition("-")[0] or name,
        gpu_uuids=tuple(f"GPU-{name}-{i}" for i in range(gpus)),
        gpu_indices=tuple(range(gpus)),
        product=L40S,
        vram_mib=vram,
        total_mib=total or vram + 500,
    )


def spec(name: str, **changes: Any) -> AppSpec:
    fields: dict[str, Any] = {
        "engine": "llm",
        "replicas": 1,
        "vram_mib": 2_000,
        "num_cpus": 0.5,
        "model": f"org/{name}",
    }
    return AppSpec(name=name, **(fields | changes))


def app(model: str, slot_name: str, count: int = 1, vram: int = 2_000, version: int = 0) -> dict[str, Any]:
    """The Serve app of one berth; ``version`` is an engine argument, so another version is another process."""
    berth = Berth(model, slot_name, count, vram, "test")
    return berth_app(spec(model, engine_args={"version": version}), berth, slot(slot_name), OPTIONS)


def team_app(model: str, *slots: str, vram: int = 2_000) -> dict[str, Any]:
    """The Serve app of one replica over ``slots``."""
    berth, places = Berth(model, slots[0], 1, vram, "test", team=slots), [slot(name) for name in slots]
    return berth_app(spec(model, slots_per_replica=len(slots)), berth, places[0], OPTIONS, team=places)


def pooled(model: str, slots: Iterable[str], count: int, each: int = 1, vram: int = 2_000, most: int = 0) -> Pool:
    """A pool of ``count`` (up to ``most``) replicas, ``each`` per slot at most."""
    left, berths = count, []
    for name in slots:
        here = min(left, each)
        left -= here
        berths.append(Berth(model, name, here, vram, "test", each - here, pool=max(count, most)))
    return Pool(model, tuple(berths))


def pool(
    model: str, *slots: str, count: int = 2, each: int = 1, vram: int = 2_000, version: int = 0, most: int = 0
) -> dict[str, Any]:
    """The Serve app of a pool over ``slots``, scaled by Serve up to ``most``; ``version`` as in ``app``."""
    made = spec(
        model,
        placement="pool",
        engine_args={"version": version},
        autoscaling=Autoscaling(max_replicas=most) if most else None,
    )
    return pool_app(made, pooled(model, slots, count, each, vram, most), [slot(name) for name in slots], OPTIONS)


def wanted(
    apps: Iterable[Mapping[str, Any]],
    capacity: Mapping[str, int],
    models: Iterable[str] | None = None,
    options: ServeOptions = OPTIONS,
) -> Wanted:
    berths = {str(item["name"]): item for item in apps}
    named = {str(item["args"]["model"]) for item in berths.values()}
    return Wanted(berths, sorted(named if models is None else models), capacity, options)


def plan(slots: Iterable[Slot], berths: Iterable[tuple[str, str, int, int]]) -> Plan:
    return Plan("pack", tuple(slots), tuple(Berth(*berth, reason="test") for berth in berths))


def replica(name: str, state: str = "RUNNING", number: int = 0, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"replica_id": f"{name}{number}", "state": state, "actor_name": f"SERVE_REPLICA::{name}"}
    if state != "STARTING":
        log = f"/serve/replica_{name}{number}.log"
        fields |= {"node_id": "n1", "node_ip": "10.0.0.1", "pid": 4_000 + number, "log_file_path": log}
    return fields | more


def serve_app(
    config: Mapping[str, Any] | None,
    status: str = "RUNNING",
    replicas: Iterable[Mapping[str, Any]] | None = None,
    message: str = "",
    dead: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """One app as GET /api/serve/applications/ shows it."""
    details: dict[str, Any] = {
        "name": config.get("name", "default") if config else "",
        "route_prefix": config.get("route_prefix") if config else None,
        "docs_path": None,
        "status": status,
        "message": message,
        "last_deployed_time_s": 1_700_000_000.0,
        "deployed_app_config": dict(config) if config else None,
        "source": "declarative",
        "deployments": {},
    }
    if config and config.get("deployments"):
        deployment = config["deployments"][0]
        count = deployment.get("num_replicas", 1)
        shown = [replica(deployment["name"], number=i) for i in range(count)] if replicas is None else list(replicas)
        details["deployments"][deployment["name"]] = {
            "name": deployment["name"],
            "status": "HEALTHY" if status == "RUNNING" else "UPDATING",
            "status_trigger": "CONFIG_UPDATE_COMPLETED",
            "message": "",
            "deployment_config": {**deployment},
            "target_num_replicas": count,
            "required_resources": {},
            "replicas": shown,
            "recent_dead_replicas": list(dead),
        }
    return details


def node(slot_name: str, resources: Mapping[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """One node as GET /api/v0/nodes shows it."""
    return {
        "node_id": "n1",
        "node_ip": "10.0.0.1",
        "is_head_node": False,
        "state": "ALIVE",
        "state_message": None,
        "node_name": "10.0.0.1",
        "resources_total": {"CPU": 8.0, "GPU": 1.0, "VRAM_MB": 8_000.0} if resources is None else dict(resources),
        "labels": {"ray.io/node-id": "n1", "berth.role": "slot", "berth.slot": slot_name},
        "start_time_ms": 1,
        "end_time_ms": 0,
    } | more
