"""Every port that a node of Ray listens on, and for whom: the one place that says so.

``ray start`` gets them as options (``berth.ray.start``), the port check asks whether they are free, the firewall guards
them. What cannot be fixed is named in ``RANDOM``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from berth.codec import STRICT
from berth.errors import BerthError

Audience = Literal["cluster", "metrics", "dashboard"]
"""Who has business at a port: the cluster's own hosts; whoever scrapes metrics; whoever looks at the dashboard."""

WORKERS_FROM = 8
"""A node's block of ports: the first eight are the node's own processes', the rest its workers'."""
RANDOM = "a Serve replica's gRPC server and NCCL listen on ports that the kernel chooses"
"""Why a firewall guards the kernel's range of ephemeral ports as well (Ray 2.60, serve/_private/replica.py)."""


@dataclass(frozen=True)
class NodePorts:
    """The ports of one node as ``berth.ray.start.NodeConfig`` has them; 0 where the node has no such port."""

    __pydantic_config__ = STRICT
    dashboard_agent_port: int
    metrics_port: int
    node_port_base: int
    node_port_count: int
    gcs_port: int = 0
    client_port: int = 0
    dashboard_port: int = 0

    @property
    def node_manager(self) -> int:
        return self.node_port_base

    @property
    def object_manager(self) -> int:
        return self.node_port_base + 1

    @property
    def runtime_env_agent(self) -> int:
        return self.node_port_base + 2

    @property
    def agent_grpc(self) -> int:
        return self.node_port_base + 3

    @property
    def autoscaler_metrics(self) -> int:
        return self.node_port_base + 4

    @property
    def dashboard_metrics(self) -> int:
        return self.node_port_base + 5

    @property
    def workers(self) -> tuple[int, int]:
        """The first and the last port of the node's workers."""
        return self.node_port_base + WORKERS_FROM, self.node_port_base + self.node_port_count - 1


@dataclass(frozen=True)
class PortUse:
    """``first`` to ``last`` (the same for one port), TCP."""

    name: str
    first: int
    last: int
    audience: Audience


def uses(ports: NodePorts) -> tuple[PortUse, ...]:
    """Every port of a node, by port.

    Raises:
        BerthError: the block is too small or leaves the range of ports.
    """
    first, last = ports.workers
    if last < first or ports.node_port_base < 1024 or last > 65535:
        raise BerthError(
            "a node's block of ports is too small or out of range",
            found=f"{ports.node_port_count} ports from {ports.node_port_base} on",
            allowed=f"more than {WORKERS_FROM} ports between 1024 and 65535",
            mend="set ray_head_node_port_base, ray_slot_node_port_base or ray_slot_node_port_count",
        )
    single: list[tuple[str, int, Audience]] = [
        ("GCS", ports.gcs_port, "cluster"),
        ("Ray client server", ports.client_port, "cluster"),
        ("dashboard", ports.dashboard_port, "dashboard"),
        ("dashboard agent", ports.dashboard_agent_port, "cluster"),
        ("metrics", ports.metrics_port, "metrics"),
        ("node manager", ports.node_manager, "cluster"),
        ("object manager", ports.object_manager, "cluster"),
        ("runtime env agent", ports.runtime_env_agent, "cluster"),
        ("dashboard agent gRPC", ports.agent_grpc, "cluster"),
    ]
    if ports.gcs_port:
        single += [
            ("autoscaler metrics", ports.autoscaler_metrics, "metrics"),
            ("dashboard metrics", ports.dashboard_metrics, "metrics"),
        ]
    found = [PortUse(name, port, port, audience) for name, port, audience in single if port]
    return tuple(sorted([*found, PortUse("workers", first, last, "cluster")], key=lambda use: use.first))


def slot_number(name: str) -> int:
    """The n of a slot's name ``<host>-<n>``: what its ports are counted by.

    Raises:
        BerthError: the name has no number.
    """
    tail = name.rpartition("-")[2]
    if not tail.isdigit():
        raise BerthError("a slot's name has no number", found=name, allowed="<host>-<n>")
    return int(tail)


def slot_ports(name: str, agent_base: int, metrics_base: int, node_base: int, node_count: int) -> NodePorts:
    """The ports of the slot ``name``."""
    n = slot_number(name)
    return NodePorts(agent_base + n, metrics_base + n, node_base + n * node_count, node_count)


def fixed(nodes: dict[str, NodePorts]) -> dict[str, int]:
    """Every single port of ``nodes`` (by node's name), by what to call it in an error.

    Raises:
        BerthError: two nodes' blocks overlap, or a single port lies in one.
    """
    singles: dict[str, int] = {}
    blocks: list[tuple[str, PortUse]] = []
    for name, ports in nodes.items():
        for use in uses(ports):
            if use.first == use.last:
                singles[f"{use.name} of {name}"] = use.first
            else:
                blocks.append((name, use))
    for name, block in blocks:
        inside = sorted(label for label, port in singles.items() if block.first <= port <= block.last)
        inside += sorted(
            f"workers of {other}" for other, use in blocks if other != name and use.first <= block.last <= use.last
        )
        if inside:
            raise BerthError(
                f"the workers of {name} have ports {block.first}-{block.last}, and so have: {', '.join(inside)}",
                mend="set ray_head_node_port_base and ray_slot_node_port_base apart from each other and the rest",
            )
    return singles


def ranges(nodes: Iterable[NodePorts], audience: Audience) -> list[str]:
    """The ports that ``audience`` has business at, as nftables writes them: ``8500`` or ``12108-12199``, by port."""
    found = sorted({(use.first, use.last) for node in nodes for use in uses(node) if use.audience == audience})
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]
