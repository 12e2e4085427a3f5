"""Ray's own state as its REST API tells it: one witness."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RayNode:
    """One raylet. Berth's slots carry the label ``berth.slot``."""

    node_id: str
    alive: bool
    labels: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    is_head: bool = False

    @property
    def slot(self) -> str | None:
        return self.labels.get("berth.slot")


@dataclass(frozen=True)
class Replica:
    """One Serve replica; ``node_id`` and ``pid`` are None while it is starting."""

    replica_id: str
    state: str
    node_id: str | None = None
    pid: int | None = None
    log_file: str | None = None


@dataclass(frozen=True)
class ServeDeployment:
    name: str
    status: str
    message: str
    target_replicas: int
    replicas: tuple[Replica, ...] = ()


@dataclass(frozen=True)
class ServeApp:
    name: str
    status: str
    message: str
    deployments: tuple[ServeDeployment, ...] = ()


@dataclass(frozen=True)
class RayState:
    """``unreachable`` is why Ray could not be asked (then the rest is empty); ``refused`` tells that nobody
    listens at its address, which is a fact about the cluster and not about our ignorance."""

    nodes: tuple[RayNode, ...] = ()
    apps: tuple[ServeApp, ...] = ()
    unreachable: str | None = None
    refused: bool = False
