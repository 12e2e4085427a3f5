"""Ray's REST answers turned into the witness the rest of Berth reads (berth.ray.types)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from berth.errors import BerthError
from berth.ray.client import RayClient, Refused
from berth.ray.types import RayNode, RayState, Replica, ServeApp, ServeDeployment


def read_state(client: RayClient) -> RayState:
    """What Ray says now. Never raises: what cannot be read is told in ``unreachable``."""
    try:
        return parse_state(client.nodes(), client.serve())
    except Refused as error:
        return RayState(unreachable=str(error), refused=True)
    except BerthError as error:
        return RayState(unreachable=str(error))


def parse_state(nodes: Iterable[Mapping[str, Any]], serve: Mapping[str, Any]) -> RayState:
    """Nodes from ``/api/v0/nodes``, apps from ``/api/serve/applications/`` (Ray 2.60's shapes)."""
    return RayState(
        nodes=tuple(sorted((_node(node) for node in nodes), key=lambda node: node.node_id)),
        apps=tuple(_app(name, app) for name, app in sorted((serve.get("applications") or {}).items())),
    )


def _node(node: Mapping[str, Any]) -> RayNode:
    return RayNode(
        node_id=str(node["node_id"]),
        alive=node.get("state") == "ALIVE",
        labels={str(key): str(value) for key, value in (node.get("labels") or {}).items()},
        resources={str(key): float(value) for key, value in (node.get("resources_total") or {}).items()},
        is_head=bool(node.get("is_head_node")),
    )


def _app(name: str, app: Mapping[str, Any]) -> ServeApp:
    return ServeApp(
        name=name,
        status=str(app.get("status")),
        message=str(app.get("message") or ""),
        deployments=tuple(_deployment(item) for _, item in sorted((app.get("deployments") or {}).items())),
    )


def _deployment(item: Mapping[str, Any]) -> ServeDeployment:
    return ServeDeployment(
        name=str(item["name"]),
        status=str(item.get("status")),
        message=str(item.get("message") or ""),
        target_replicas=int(item.get("target_num_replicas") or 0),
        replicas=tuple(
            Replica(
                replica_id=str(replica["replica_id"]),
                state=str(replica.get("state")),
                node_id=replica.get("node_id"),
                pid=replica.get("pid"),
                log_file=replica.get("log_file_path"),
            )
            for replica in sorted(item.get("replicas") or [], key=lambda replica: str(replica["replica_id"]))
        ),
    )
