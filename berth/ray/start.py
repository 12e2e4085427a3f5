"""The command line and environment of one Ray node: the head, or one slot. Pure functions over plain data.

Why each option is given: several raylets share a host, and Ray's defaults assume that each has the host alone
(memory, object store, ports, temporary directory).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from berth.codec import STRICT
from berth.errors import BerthError
from berth.ray.ports import NodePorts, slot_number, slot_ports, uses


@dataclass(frozen=True)
class NodeConfig:
    """One ``ray start``. Memory in bytes; ``vram_mib`` is what each GPU of the slot can promise (0 for the head).

    ``gpu_uuids`` are resolved to indices when the node starts, never before: indices change with the driver's mood.
    ``tls_dir`` holds node.crt, node.key and ca.crt; "" where Ray's connections are not encrypted.
    """

    __pydantic_config__ = STRICT
    kind: Literal["head", "slot"]
    name: str
    cluster: str
    ray: str
    node_ip: str
    gcs_address: str
    temp_dir: str
    token_file: str
    dashboard_agent_port: int
    metrics_port: int
    node_port_base: int
    node_port_count: int
    num_cpus: float
    memory_bytes: int
    object_store_bytes: int
    tls_dir: str = ""
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = 0
    client_port: int = 0
    log_monitor: bool = True
    gcs_storage_dir: str = ""
    gpu_uuids: tuple[str, ...] = ()
    vram_mib: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


def node_ports(node: NodeConfig) -> NodePorts:
    """The node's ports, for ``berth.ray.ports``."""
    return ports_of(asdict(node))


def ports_of(node: Mapping[str, Any]) -> NodePorts:
    """The ports of a NodeConfig that is plain data."""
    head = node["kind"] == "head"
    return NodePorts(
        dashboard_agent_port=int(node["dashboard_agent_port"]),
        metrics_port=int(node["metrics_port"]),
        node_port_base=int(node["node_port_base"]),
        node_port_count=int(node["node_port_count"]),
        gcs_port=int(str(node["gcs_address"]).rpartition(":")[2]) if head else 0,
        client_port=int(node["client_port"]) if head else 0,
        dashboard_port=int(node["dashboard_port"]) if head else 0,
    )


def slot_nodes(
    slots: Iterable[Mapping[str, Any]],
    common: Mapping[str, Any],
    run_dir: str,
    agent_base: int,
    metrics_base: int,
    node_base: int,
    node_count: int,
) -> dict[str, dict[str, Any]]:
    """The NodeConfig, as plain data, of each slot of one host, by the slot's name.

    ``slots`` are the plan's (berth.plan.types.Slot) that stand on the host, ``common`` what all its nodes share.

    Raises:
        BerthError: a slot's name has no number.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for slot in sorted(slots, key=lambda item: slot_number(str(item["name"]))):
        name = str(slot["name"])
        places = {"host": slot["host"], "rack": slot["rack"], "zone": slot["zone"]}
        product = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(slot["product"]))
        nodes[name] = {
            **common,
            "kind": "slot",
            "name": name,
            "temp_dir": f"{run_dir}/{name}",
            **slot_fields(slot_ports(name, agent_base, metrics_base, node_base, node_count)),
            # One log monitor per host is enough.
            "log_monitor": bool(common.get("log_monitor", True)) and not nodes,
            # Not list(): it copies what Ansible has not rendered yet.
            "gpu_uuids": [str(uuid) for uuid in slot["gpu_uuids"]],
            "vram_mib": int(slot["vram_mib"]),
            "labels": {f"berth.{key}": str(value) for key, value in places.items()} | {"berth.product": product},
        }
    return nodes


def slot_fields(ports: NodePorts) -> dict[str, int]:
    """What of a slot's NodeConfig is ports."""
    own = ("dashboard_agent_port", "metrics_port", "node_port_base", "node_port_count")
    return {name: getattr(ports, name) for name in own}


def digest(node: Mapping[str, Any]) -> str:
    """SHA-1 of a node's configuration: a unit whose digest is another than its file's runs an old configuration."""
    return hashlib.sha1(json.dumps(node, sort_keys=True).encode()).hexdigest()


def unit_digests(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The unit of each node of a host (``berth-ray-head``, ``berth-ray-slot@gpu01-0``) and the digest of the node."""
    return {
        "berth-ray-head" if node["kind"] == "head" else f"berth-ray-slot@{name}": digest(node)
        for name, node in sorted(nodes.items())
    }


def command(node: NodeConfig) -> list[str]:
    """``ray start`` with everything that keeps nodes of one host apart (Ray 2.60); the head's with ``--block``.

    Raises:
        BerthError: the node's block of ports is out of range, or too small for its CPUs.
    """
    ports = node_ports(node)
    uses(ports)
    first, last = ports.workers
    if last - first + 1 < node.num_cpus:
        # A worker without a port never starts.
        raise BerthError(
            f"{node.name} has fewer ports for workers than CPUs",
            found=f"{last - first + 1} ports ({first}-{last}), {node.num_cpus:g} CPUs",
            mend="raise ray_slot_node_port_count or lower ray_slot_num_cpus",
        )
    common = [
        node.ray,
        "start",
        "--disable-usage-stats",
        "--log-color=false",
        f"--node-ip-address={node.node_ip}",
        f"--temp-dir={node.temp_dir}",
        f"--dashboard-agent-listen-port={node.dashboard_agent_port}",
        f"--metrics-export-port={node.metrics_port}",
        f"--node-manager-port={ports.node_manager}",
        f"--object-manager-port={ports.object_manager}",
        f"--runtime-env-agent-port={ports.runtime_env_agent}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--min-worker-port={first}",
        f"--max-worker-port={last}",
        f"--num-cpus={node.num_cpus:g}",
        f"--num-gpus={len(node.gpu_uuids)}",
        f"--memory={node.memory_bytes}",
        f"--object-store-memory={node.object_store_bytes}",
        f"--include-log-monitor={node.log_monitor}",
        f"--labels={json.dumps(labels(node), sort_keys=True)}",
    ]
    if node.kind == "head":
        return [
            *common,
            "--block",
            "--head",
            f"--port={node.gcs_address.rpartition(':')[2]}",
            "--include-dashboard=True",
            f"--dashboard-host={node.dashboard_host}",
            f"--dashboard-port={node.dashboard_port}",
            f"--ray-client-server-port={node.client_port}",
        ]
    # VRAM_MB is the name Ray's users give this resource; the unit is MiB, as the driver counts.
    resources = {"VRAM_MB": node.vram_mib * len(node.gpu_uuids)}
    return [
        *common,
        f"--address={node.gcs_address}",
        f"--resources={json.dumps(resources)}",
    ]


def labels(node: NodeConfig) -> dict[str, str]:
    """Ray node labels: what selectors match and what verification reads back."""
    own = {"berth.role": node.kind, "berth.cluster": node.cluster}
    if node.kind == "slot":
        # Label values allow neither commas nor slashes; a dot is in no UUID.
        own |= {"berth.slot": node.name, "berth.gpu": ".".join(node.gpu_uuids)}
    return {**{key: value for key, value in node.labels.items() if value}, **own}


NO_IDLE_WORKERS = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
"""Python workers kept ready are for tasks without an environment of their own; every replica brings one."""


def environment(node: NodeConfig, gpu_indices: tuple[str, ...]) -> dict[str, str]:
    """The environment of ``ray start``, inherited by every worker and replica of the node."""
    ours = {
        "BERTH_CLUSTER": node.cluster,
        "BERTH_UNIT": node.name if node.kind == "head" else f"slot@{node.name}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": node.token_file,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(gpu_indices),
        # Workers must outlive a head that is away for minutes; Ray's default is one minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        # Hosts get their security updates on different days; Ray's default is to refuse another patch level of Python.
        "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
        **NO_IDLE_WORKERS,
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if node.tls_dir:
        # Read by every process when it starts; gRPC only: docs/security.md.
        ours |= {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": f"{node.tls_dir}/node.crt",
            "RAY_TLS_SERVER_KEY": f"{node.tls_dir}/node.key",
            "RAY_TLS_CA_CERT": f"{node.tls_dir}/ca.crt",
        }
    if node.kind == "head":
        # No options of ray start: else 44217 and 44227, on every interface.
        ports = node_ports(node)
        ours |= {
            "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
            "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        }
    if node.kind == "slot":
        ours |= {"BERTH_SLOT": node.name, "BERTH_GPU_UUIDS": ",".join(node.gpu_uuids)}
    if node.gcs_storage_dir:
        # Serve's state survives a head restart without Redis (alpha in Ray 2.60, ray #63657).
        ours |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": node.gcs_storage_dir}
    return {**os.environ, **node.env, **ours}
