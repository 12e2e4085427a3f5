"""A lab of two hosts in which plan, Ray and driver agree; each test breaks one thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from berth.codec import replace
from berth.gpu.types import Gpu, GpuProcess, HostGpus
from berth.plan.planner import make_plan
from berth.plan.types import Plan
from berth.ray.types import RayNode, RayState, Replica, ServeApp, ServeDeployment
from berth.verify.compare import Finding, Report, verify
from tests.unit.plan.helpers import gpu, host, model, slot

CLUSTER = "lab"
CHAT, EMBED = 9_828, 1_965
A0, A1, B0 = "GPU-a-0-0", "GPU-a-1-0", "GPU-b-0-0"


def node(name: str, *, vram: int = 44_000) -> RayNode:
    return RayNode(
        f"node-{name}",
        True,
        {"berth.slot": name, "berth.gpu": f"GPU-{name}-0", "berth.role": "slot"},
        {"CPU": 4.0, "GPU": 1.0, "VRAM_MB": float(vram), f"node:{name}": 1.0},
    )


def app(name: str, *replicas: Replica, status: str = "RUNNING", message: str = "") -> ServeApp:
    return ServeApp(name, status, message, (ServeDeployment("Model", "HEALTHY", "", len(replicas), tuple(replicas)),))


def engine(pid: int, mib: int | None, slot_name: str, parent: int | None = None) -> GpuProcess:
    """A process of ours: the replica itself, or the engine core below it."""
    above = (parent, 900, 1) if parent else (900, 1)
    return GpuProcess(pid, mib, "berth", "VLLM::EngineCore", CLUSTER, slot_name, above)


def _plan() -> Plan:
    slots = [slot("a-0"), slot("a-1"), slot("b-0")]
    deployments = [model("chat", 3, CHAT, strategy="spread"), model("embed", 1, EMBED), model("idle", 0, CHAT)]
    plan = make_plan(slots, deployments, "pack")
    berths = tuple(
        replace(plan.berths[0], deployment=name, slot=where, replicas=replicas, vram_mib=mib, reason="test")
        for name, where, replicas, mib in (
            ("chat", "a-0", 2, CHAT),
            ("chat", "b-0", 1, CHAT),
            ("embed", "a-0", 1, EMBED),
        )
    )
    return replace(plan, berths=berths, retired={"GPU-old": "a-7"})


def _apps() -> dict[str, ServeApp]:
    apps = [
        app("chat@a-0", Replica("r1", "RUNNING", "node-a-0", 101), Replica("r2", "RUNNING", "node-a-0", 102)),
        app("chat@b-0", Replica("r3", "RUNNING", "node-b-0", 101)),
        app("embed@a-0", Replica("r4", "RUNNING", "node-a-0", 104)),
        app("berth-gateway", Replica("g1", "RUNNING", "node-head", 77)),
    ]
    return {item.name: item for item in apps}


def _hosts() -> dict[str, HostGpus | str]:
    on_a0 = (engine(101, 9_700, "a-0"), engine(202, 9_800, "a-0", parent=102), engine(104, 1_900, "a-0"))
    on_b0 = (engine(101, 9_750, "b-0"),)
    return {
        "a": host("a", _card(A0, 0, on_a0), _card(A1, 1, ())),
        "b": host("b", _card(B0, 0, on_b0)),
    }


def _card(uuid: str, index: int, processes: tuple[GpuProcess, ...]) -> Gpu:
    used = sum(process.vram_mib or 0 for process in processes) + 20
    return gpu(uuid, index, total=45_600, reserved=600, used=used, processes=processes)


@dataclass
class Lab:
    """chat runs on a-0 (two replicas, one with its engine in a child process) and b-0; embed on a-0; a-1 is free."""

    plan: Plan = field(default_factory=_plan)
    nodes: dict[str, RayNode] = field(default_factory=lambda: {name: node(name) for name in ("a-0", "a-1", "b-0")})
    apps: dict[str, ServeApp] = field(default_factory=_apps)
    hosts: dict[str, HostGpus | str] = field(default_factory=_hosts)
    ray: dict[str, Any] = field(default_factory=dict)

    def report(self) -> Report:
        head = RayNode("node-head", True, {"berth.role": "head"}, {"CPU": 2.0}, is_head=True)
        nodes = (head, *self.nodes.values())
        state = RayState(nodes, tuple(self.apps.values())) if not self.ray else RayState(**self.ray)
        return verify(self.plan, state, self.hosts, CLUSTER)

    def one(self, kind: str) -> Finding:
        """The single finding of ``kind``."""
        found = [finding for finding in self.report().findings if finding.kind == kind]
        assert len(found) == 1, [finding.text for finding in self.report().findings]
        return found[0]

    def kinds(self) -> list[str]:
        return [finding.kind for finding in self.report().findings]

    def gpu(self, uuid: str, **changes: Any) -> None:
        for name, seen in self.hosts.items():
            assert isinstance(seen, HostGpus)
            cards = tuple(replace(card, **changes) if card.uuid == uuid else card for card in seen.gpus)
            self.hosts[name] = replace(seen, gpus=cards)

    def process(self, uuid: str, *more: GpuProcess) -> None:
        """Adds processes and the memory they hold."""
        card = next(
            c for seen in self.hosts.values() if isinstance(seen, HostGpus) for c in seen.gpus if c.uuid == uuid
        )
        used = card.used_mib + sum(process.vram_mib or 0 for process in more)
        self.gpu(uuid, processes=(*(card.processes or ()), *more), used_mib=used)
