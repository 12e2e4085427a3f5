"""Ray Serve's own replica scheduler, driven in-process. Run by an interpreter that has Ray, JSON in, JSON out.

The class is Ray's (``DeploymentScheduler``), with its own data classes and its own batch; only what would need a
live cluster is replaced: the cache of nodes is filled by hand, and an actor that is created is written down.
In: ``[{"nodes": [{"id", "resources", "labels"}], "deployments": [{"name", "replicas", "ray_actor_options"}]}]``.
Out: for each job a list of ``[deployment, node id or null]`` in the order in which Serve hands its replicas to Ray's
core; null where Serve leaves the choice to the core. Serve's pack is switched by the environment
(``RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY=1``), as in production.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import ray
from ray.serve._private.cluster_node_info_cache import DefaultClusterNodeInfoCache
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import ReplicaConfig
from ray.serve._private.deployment_scheduler import (
    DeploymentScheduler,
    ReplicaSchedulingRequest,
    SpreadDeploymentSchedulingPolicy,
)


class _Nodes(DefaultClusterNodeInfoCache):  # type: ignore[misc]
    """The cache as ``update()`` would have left it, all nodes alive and idle."""

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        super().__init__(gcs_client=None)
        self._cached_alive_nodes = sorted((node["id"], node["id"], "") for node in nodes)
        self._cached_node_labels = {node["id"]: node["labels"] for node in nodes}
        self._cached_total_resources_per_node = {node["id"]: node["resources"] for node in nodes}
        self._cached_available_resources_per_node = {node["id"]: node["resources"] for node in nodes}

    def get_active_node_ids(self) -> Any:
        # A dict keeps the sorted order that a set of strings would lose: the same input, the same answer.
        return dict.fromkeys(node for node, _, _ in self._cached_alive_nodes)


class _Recorder:
    """Stands for the actor class of one replica: ``options().remote()`` writes down where it was sent."""

    def __init__(self, deployment: str, sent: list[tuple[str, str | None]]) -> None:
        self.deployment, self.sent, self.node = deployment, sent, None

    def options(self, scheduling_strategy: Any, **_: Any) -> _Recorder:
        self.node = getattr(scheduling_strategy, "node_id", None)
        return self

    def remote(self, *_: Any) -> None:
        self.sent.append((self.deployment, self.node))


def schedule(nodes: list[dict[str, Any]], deployments: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """One update cycle of Serve's controller in which every replica is new."""
    sent: list[tuple[str, str | None]] = []
    scheduler = DeploymentScheduler(_Nodes(nodes), head_node_id="", create_placement_group_fn=_no_group)
    upscales = {}
    for item in deployments:
        deployment_id = DeploymentID(name=item["name"], app_name="bench")
        config = ReplicaConfig.create(_replica, ray_actor_options=item["ray_actor_options"])
        scheduler.on_deployment_created(deployment_id, SpreadDeploymentSchedulingPolicy())
        scheduler.on_deployment_deployed(deployment_id, config)
        upscales[deployment_id] = [
            ReplicaSchedulingRequest(
                replica_id=ReplicaID(unique_id=f"{number:06}", deployment_id=deployment_id),
                actor_def=_Recorder(item["name"], sent),
                actor_resources=config.resource_dict,
                actor_options=dict(config.ray_actor_options),
                actor_init_args=(),
                on_scheduled=lambda *args, **kwargs: None,
            )
            for number in range(item["replicas"])
        ]
    scheduler.schedule(upscales, {})
    return sent


def _replica() -> None:
    """What a replica would run."""


def _no_group(*_: Any) -> None:
    raise AssertionError("no deployment of these benchmarks asks for a placement group")


if __name__ == "__main__":
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    jobs = json.load(sys.stdin)
    answer = {"ray": ray.__version__, "sent": [schedule(job["nodes"], job["deployments"]) for job in jobs]}
    json.dump(answer, sys.stdout)
