"""The three witnesses compared: what the plan says, what Ray says, what the driver says. All memory is in MiB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from berth.gpu.types import Gpu, GpuProcess, HostGpus
from berth.host.environment import Difference
from berth.plan.pools import Pool, pools_of
from berth.plan.reasons import listed
from berth.plan.slots import UNACCOUNTED_TOLERANCE_MIB, driver_versions
from berth.plan.types import POOL, Berth, Plan, Slot
from berth.ray.serve_config import NODE
from berth.ray.types import RayNode, RayState, Replica, ServeApp

Severity = Literal["drift", "unknown", "note"]

GATEWAY_APP = "berth-gateway"
RUNBOOK = "docs/GPU_PLACEMENT_PLAYBOOK.md"

OVER_FOOTPRINT_MIB = 256
"""What a replica may hold beyond its footprint: the driver counts its CUDA context and rounds up every allocation."""

LEAK_MIB = 256
"""What a GPU may hold beyond all its processes. Higher than the planner's tolerance: a planner that is cautious costs
some MiB, a checker that is nervous costs a night's sleep."""

CRITICAL_XIDS = {
    46: "GPU stopped processing",
    48: "double bit ECC error",
    62: "internal micro-controller halt",
    64: "memory remapping failure",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "GSP RPC timeout",
    120: "GSP error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "GPU initialization error",
    156: "resource retirement event",
    158: "GPU fatal timeout",
}
"""XIDs after which the GPU needs a reset or its host a restart: those whose immediate action in NVIDIA's catalogue is
RESET_GPU or RESTART_BM, or a workflow that ends there (48, 74).
Source: docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html.
Left out on purpose: 63 and 92 (IGNORE: the driver has dealt with it), 94 (RESTART_APP: contained to one process, which
Ray has restarted), 155 (also raised when a link goes down by intention), 144-150 (depend on their sub-code)."""

_SITE = "ansible-playbook site.yml"
_VERIFY = "ansible-playbook playbooks/verify.yml"
_MENDS = {
    "host_unreachable": f"make the host reachable, then {_VERIFY}",
    "pids_hidden": f"run the agent in the host's pid namespace, then {_VERIFY}",
    "app_unplanned": f"{_SITE} (it stops what the plan does not name)",
    "gpu_duplicate": f"take out of the inventory all hosts but the one that the GPU is in, then {_SITE}",
    "driver_mismatch": "bring the hosts to one driver version, one host at a time",
    "gpu_lost": f"reset the GPU or restart its host, then {_SITE}",
    "gpu_missing": f"if the card is gone for good {_SITE} plans without it; else bring it back, then {_VERIFY}",
    "gpu_xid": f"drain the host, reset the GPU or restart the host, then {_SITE}",
    "vram_unaccounted": f"restart what leaked it or reset the GPU, then {_VERIFY}",
    "foreign_process": f"stop that process, or let the plan go round it: {_SITE}",
    "orphan_process": f"stop that pid, then {_VERIFY}",
    "vram_over_footprint": f"raise vram_mib of the model in serve_apps_list, then {_SITE}",
}


@dataclass(frozen=True)
class Finding:
    """One difference between witnesses, or one thing that could not be told.

    ``kind`` is the anchor of its runbook entry, ``object`` what it is about, ``mend`` the command that mends it.
    """

    kind: str
    severity: Severity
    object: str
    gpu_uuid: str | None
    found: str
    wanted: str
    mend: str
    text: str


@dataclass(frozen=True)
class RowReplica:
    """A replica that Ray says is on a GPU: its berth or pool, Serve's state of it, its pid once it has one.

    ``vram_mib`` is what the driver says its processes hold on this GPU, None where the driver does not tell.
    """

    berth: str
    state: str
    pid: int | None
    vram_mib: int | None = None


@dataclass(frozen=True)
class Row:
    """One GPU through three pairs of eyes, in MiB.

    ``ray_mib`` (footprints of RUNNING replicas) and ``nvml_mib`` (in use) are None where that witness is silent.
    ``slot`` is empty for a GPU that is in no slot.
    """

    slot: str
    host: str
    index: int
    uuid: str
    product: str
    total_mib: int
    planned_mib: int
    ray_mib: int | None
    nvml_mib: int | None
    replicas: tuple[RowReplica, ...] = ()


@dataclass(frozen=True)
class Report:
    """What verification found. ``ok`` is True only when every witness was heard and none disagrees."""

    ok: bool
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]

    @property
    def exit_code(self) -> int:
        """0 as wanted, 1 drift, 2 could not tell. Drift that is seen outweighs what is not."""
        severities = {finding.severity for finding in self.findings}
        return 1 if "drift" in severities else 2 if "unknown" in severities else 0


def verify(
    plan: Plan,
    ray: RayState,
    hosts: Mapping[str, HostGpus | str],
    cluster: str,
    runtimes: Sequence[Difference] = (),
) -> Report:
    """Compare plan, Ray and driver.

    ``hosts`` gives for each host its GPUs, or in words why it could not be asked; ``cluster`` is the BERTH_CLUSTER that
    marks our own processes; ``runtimes`` is how the hosts' runtime environments differ. Raises nothing: what cannot be
    told is a finding.
    """
    scene = _scene(plan, ray, hosts, cluster)
    findings = [
        *_ray_reach(scene),
        *_slots(scene),
        *_apps(scene),
        *_gateway(scene),
        *_strange_apps(scene),
        *_hosts(scene),
        *_duplicates(scene),
        *_drivers(scene),
        *_gpus(scene),
        *_promises(scene),
        *_replica_memory(scene),
        *_other_memory(scene),
        *_runtimes(runtimes),
    ]
    order = ("drift", "unknown", "note")
    ordered = tuple(sorted(findings, key=lambda item: (order.index(item.severity), item.kind, item.object, item.found)))
    report = Report(False, ordered, _rows(scene))
    return Report(report.exit_code == 0, ordered, report.rows)


# --- The scene: everything looked up once -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Standing:
    """A replica of one of our apps, with where Ray says it is.

    ``app`` is the name of its berth: of a replica over several slots each part has its own, and of a pool's it is the
    berth that it stands on, or the pool's where that is none of its. ``pool`` is the name of its pool, "" for none.
    """

    app: str
    replica: Replica
    slot: str | None
    host: str | None
    pool: str = ""

    @property
    def label(self) -> str:
        return f"{self.pool or self.app} replica {self.replica.replica_id}"


@dataclass(frozen=True)
class _Scene:
    plan: Plan
    ray: RayState
    hosts: Mapping[str, HostGpus | str]
    cluster: str
    slots: Mapping[str, Slot]
    berths: Mapping[str, Berth]
    nodes: Mapping[str, RayNode]
    apps: Mapping[str, ServeApp]
    pools: Mapping[str, Pool]
    standing: tuple[_Standing, ...]

    @property
    def ray_heard(self) -> bool:
        return self.ray.unreachable is None

    def gpus(self, host: str) -> tuple[Gpu, ...]:
        """What the driver of ``host`` shows; empty when it could not be asked."""
        seen = self.hosts.get(host)
        return seen.gpus if isinstance(seen, HostGpus) else ()

    def heard(self, host: str) -> bool:
        return isinstance(self.hosts.get(host), HostGpus)

    def gpu(self, slot: Slot, uuid: str) -> Gpu | None:
        return next((gpu for gpu in self.gpus(slot.host) if gpu.uuid == uuid), None)

    def slot_gpus(self, slot: Slot) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus(slot.host) if gpu.uuid in slot.gpu_uuids)

    def ours(self, app: str) -> bool:
        """An app of this cluster by its name: ``model@slot`` with a slot that is or was ours, or ``model@pool``."""
        _, at, slot = app.partition("@")
        return bool(at) and (slot == POOL or slot in self.slots or slot in self.plan.retired.values())

    def planned_mib(self, slot: str) -> int:
        here = (berth for berth in self.plan.berths if berth.slot == slot)
        return sum((berth.replicas + berth.reserved) * berth.vram_mib for berth in here)

    def footprint_mib(self, app: str, slot: Slot) -> int:
        """Per GPU: the berth's own, else what the same model takes on the same product elsewhere, else 0."""
        if app in self.berths:
            return self.berths[app].vram_mib
        model = app.partition("@")[0]
        same = (b.vram_mib for b in self.plan.berths if b.deployment == model and self._product(b) == slot.product)
        return next(same, 0)

    def _product(self, berth: Berth) -> str:
        return self.slots[berth.slot].product if berth.slot in self.slots else ""

    def ray_mib(self, slot: Slot) -> int:
        return sum(
            self.footprint_mib(item.app, slot)
            for item in self.standing
            if item.slot == slot.name and item.replica.state == "RUNNING"
        )


def _scene(plan: Plan, ray: RayState, hosts: Mapping[str, HostGpus | str], cluster: str) -> _Scene:
    slots = {slot.name: slot for slot in plan.slots}
    berths = {berth.name: berth for berth in plan.berths}
    nodes = {node.node_id: node for node in ray.nodes if node.alive}
    apps, pools = {app.name: app for app in ray.apps}, pools_of(plan)
    scene = _Scene(plan, ray, hosts, cluster, slots, berths, nodes, apps, pools, ())
    standing = tuple(
        _locate(scene, app.name, deployment.name, replica)
        for app in sorted(ray.apps, key=lambda app: app.name)
        if app.name in berths or scene.ours(app.name)
        for deployment in app.deployments
        for replica in deployment.replicas
    )
    return _Scene(plan, ray, hosts, cluster, slots, berths, nodes, apps, pools, standing)


def _berth(app: str, deployment: str) -> str:
    """The name of the berth that the replicas of ``deployment`` belong to."""
    model, node, slot = deployment.partition(NODE)
    return f"{model}@{slot}" if node else app


def _locate(scene: _Scene, app: str, deployment: str, replica: Replica) -> _Standing:
    node = scene.nodes.get(replica.node_id or "")
    slot = node.slot if node else None
    known = scene.slots.get(slot or "")
    host = known.host if known else None
    if pool := scene.pools.get(app):
        return _Standing(f"{pool.deployment}@{slot}" if slot in pool.slots else app, replica, slot, host, app)
    return _Standing(_berth(app, deployment), replica, slot, host)


def _finding(
    kind: str, severity: Severity, thing: str, found: object, wanted: object, *, gpu_uuid: str | None = None
) -> Finding:
    mend = f"{_MENDS.get(kind, _SITE)} ({RUNBOOK}#{kind})"
    gpu = f" [{gpu_uuid}]" if gpu_uuid else ""
    text = f"{kind}: {thing}{gpu}: found {found}; wanted {wanted}; mend: {mend}"
    return Finding(kind, severity, thing, gpu_uuid, str(found), str(wanted), mend, text)


# --- Ray against the plan ---------------------------------------------------------------------------------------------


def _ray_reach(scene: _Scene) -> Iterator[Finding]:
    if scene.ray.unreachable is not None:
        # Nobody listening is a fact about the cluster; a timeout or a refused token only about our ignorance.
        severity: Severity = "drift" if scene.ray.refused else "unknown"
        yield _finding("ray_unreachable", severity, "Ray", scene.ray.unreachable, "an answer from its dashboard")


def _slots(scene: _Scene) -> Iterator[Finding]:
    if not scene.ray_heard:
        return
    by_slot: dict[str, list[RayNode]] = {}
    for node in scene.nodes.values():
        if node.slot is not None:
            by_slot.setdefault(node.slot, []).append(node)
    for slot in scene.plan.slots:
        nodes = by_slot.pop(slot.name, [])
        if not nodes:
            yield _finding(
                "slot_missing", "drift", slot.name, "no alive Ray node", "one Ray node", gpu_uuid=slot.gpu_uuids[0]
            )
        if len(nodes) > 1:
            ids = ", ".join(sorted(node.node_id for node in nodes))
            yield _finding("slot_unplanned", "drift", slot.name, f"{len(nodes)} alive Ray nodes: {ids}", "one Ray node")
        for node in nodes:
            yield from _node(slot, node)
    for name, nodes in sorted(by_slot.items()):
        ids = ", ".join(sorted(node.node_id for node in nodes))
        yield _finding("slot_unplanned", "drift", name, f"Ray node {ids}", "no such slot in the plan")


def _node(slot: Slot, node: RayNode) -> Iterator[Finding]:
    label = node.labels.get("berth.gpu", "")
    # Ray's labels allow neither comma nor space, so the UUIDs of a slot are joined with dots.
    if label.split(".") != list(slot.gpu_uuids):
        wanted = ".".join(slot.gpu_uuids)
        yield _finding(
            "slot_wrong_gpu", "drift", slot.name, f"label berth.gpu={label}", wanted, gpu_uuid=slot.gpu_uuids[0]
        )
    # A node offers the memory of all its GPUs: a replica on k of them asks for k footprints.
    wanted_mib = slot.vram_mib * len(slot.gpu_uuids)
    found_mib = node.resources.get("VRAM_MB")
    if found_mib != wanted_mib:
        found = "no VRAM_MB" if found_mib is None else f"VRAM_MB {found_mib:.0f}"
        yield _finding("slot_wrong_vram", "drift", slot.name, found, f"{wanted_mib} MiB", gpu_uuid=slot.gpu_uuids[0])


def _apps(scene: _Scene) -> Iterator[Finding]:
    if not scene.ray_heard:
        return
    for pool in scene.pools.values():
        yield from _pool(scene, pool)
    for berth in scene.plan.berths:
        if berth.pool:
            continue
        slot = scene.slots.get(berth.slot)
        uuid = slot.gpu_uuids[0] if slot else None
        app = scene.apps.get(berth.app)
        if app is None:
            # A model scaled to nothing needs no app.
            if (berth.replicas or berth.reserved) and berth.leads:
                wanted = f"{_wanted(berth)} RUNNING on {berth.slot}"
                yield _finding("app_missing", "drift", berth.name, "no such Serve app", wanted, gpu_uuid=uuid)
            continue
        if app.status != "RUNNING" and berth.leads:
            message = f"{app.status}: {app.message}" if app.message else app.status
            yield _finding("app_not_running", "drift", berth.name, message, "RUNNING", gpu_uuid=uuid)
        yield from _replicas(scene, berth, uuid)


def _replicas(scene: _Scene, berth: Berth, uuid: str | None) -> Iterator[Finding]:
    mine = [item for item in scene.standing if item.app == berth.name]
    running = sum(1 for item in mine if item.replica.state == "RUNNING")
    if not berth.replicas <= running <= berth.replicas + berth.reserved:
        kind = "replica_missing" if running < berth.replicas else "replica_extra"
        yield _finding(kind, "drift", berth.name, f"{running} RUNNING", _wanted(berth), gpu_uuid=uuid)
    for item in mine:
        # Where Serve scales, replicas that come and go are as wanted.
        if item.replica.state != "RUNNING" and not berth.reserved:
            yield _finding("replica_not_running", "drift", item.label, item.replica.state, "RUNNING", gpu_uuid=uuid)
        if item.replica.node_id is not None and item.slot != berth.slot:
            wanted = f"slot {berth.slot}"
            yield _finding("replica_wrong_slot", "drift", item.label, _whereabouts(item), wanted, gpu_uuid=uuid)


def _pool(scene: _Scene, pool: Pool) -> Iterator[Finding]:
    """Serve chooses where a pool's replicas are, and where it scales, how many: bounds are all there is."""
    among = f"in the pool of {len(pool.slots)} slots ({listed(pool.slots)})"
    app = scene.apps.get(pool.app)
    if app is None:
        yield _finding("app_missing", "drift", pool.app, "no such Serve app", f"{pool.count} RUNNING {among}")
        return
    if app.status != "RUNNING":
        message = f"{app.status}: {app.message}" if app.message else app.status
        yield _finding("app_not_running", "drift", pool.app, message, "RUNNING")
    mine = [item for item in scene.standing if item.pool == pool.app]
    running = sum(item.replica.state == "RUNNING" for item in mine)
    if not pool.fewest <= running <= pool.most:
        kind = "replica_missing" if running < pool.fewest else "replica_extra"
        yield _finding(kind, "drift", pool.app, f"{running} RUNNING", f"{pool.count} {among}")
    for item in mine:
        if item.replica.state != "RUNNING" and pool.fewest == pool.most:
            yield _finding("replica_not_running", "drift", item.label, item.replica.state, "RUNNING")
        if item.replica.node_id is not None and item.slot not in pool.slots:
            yield _finding("replica_wrong_slot", "drift", item.label, _whereabouts(item), f"a slot {among}")
    for berth in pool.berths:
        here = sum(item.app == berth.name and item.replica.state == "RUNNING" for item in mine)
        if here > (most := berth.replicas + berth.reserved):
            slot = scene.slots.get(berth.slot)
            found, wanted = f"{here} RUNNING of the pool {pool.app}", f"{most} at most on this slot of the pool"
            uuid = slot.gpu_uuids[0] if slot else None
            yield _finding("replica_extra", "drift", berth.name, found, wanted, gpu_uuid=uuid)


def _whereabouts(item: _Standing) -> str:
    return f"on slot {item.slot}" if item.slot else f"on Ray node {item.replica.node_id}, which is no slot"


def _wanted(berth: Berth) -> str:
    """How many replicas the plan wants there: a number, or bounds."""
    return f"{berth.replicas} to {berth.replicas + berth.reserved}" if berth.reserved else f"{berth.replicas}"


def _gateway(scene: _Scene) -> Iterator[Finding]:
    if not scene.ray_heard or not any(berth.replicas + berth.reserved for berth in scene.plan.berths):
        return
    app = scene.apps.get(GATEWAY_APP)
    status = "no such Serve app" if app is None else app.status
    if status != "RUNNING":
        message = f": {app.message}" if app is not None and app.message else ""
        yield _finding("gateway_down", "drift", GATEWAY_APP, status + message, "RUNNING")


def _strange_apps(scene: _Scene) -> Iterator[Finding]:
    planned = {berth.app for berth in scene.plan.berths}
    for name in sorted(scene.apps):
        if name in planned or name == GATEWAY_APP:
            continue
        if scene.ours(name):
            yield _finding("app_unplanned", "drift", name, f"Serve app {scene.apps[name].status}", "not in the plan")
        else:
            yield _finding("app_foreign", "note", name, "a Serve app of somebody else", "left alone")


# --- The driver against the plan --------------------------------------------------------------------------------------


def _hosts(scene: _Scene) -> Iterator[Finding]:
    for host in sorted({slot.host for slot in scene.plan.slots} | set(scene.hosts)):
        seen = scene.hosts.get(host, "was not asked")
        if isinstance(seen, str):
            yield _finding("host_unreachable", "unknown", host, seen, "what its driver shows")


def _duplicates(scene: _Scene) -> Iterator[Finding]:
    """A GPU that several hosts show. Placeholders of lost cards are not compared: each host makes up the same ones."""
    owners: dict[str, list[str]] = {}
    for host in sorted(scene.hosts):
        for gpu in scene.gpus(host):
            if gpu.lost is None:
                owners.setdefault(gpu.uuid, []).append(host)
    for uuid, hosts in sorted(owners.items()):
        if len(hosts) > 1:
            found = f"shown by {', '.join(hosts)}"
            yield _finding("gpu_duplicate", "drift", ", ".join(hosts), found, "one host", gpu_uuid=uuid)


def _drivers(scene: _Scene) -> Iterator[Finding]:
    """A note: a fleet in the middle of an upgrade has two versions and is as planned."""
    versions = driver_versions(seen for seen in scene.hosts.values() if isinstance(seen, HostGpus))
    if len(versions) > 1:
        found = "; ".join(f"{version}: {', '.join(hosts)}" for version, hosts in versions.items())
        yield _finding("driver_mismatch", "note", "NVIDIA driver", found, "one version")


def _gpus(scene: _Scene) -> Iterator[Finding]:
    for host in sorted(host for host in scene.hosts if scene.heard(host)):
        gpus = scene.gpus(host)
        slots = [slot for slot in scene.plan.slots if slot.host == host]
        planned = {uuid: index for slot in slots for uuid, index in zip(slot.gpu_uuids, slot.gpu_indices, strict=True)}
        shown = {gpu.uuid: gpu for gpu in gpus}
        # A lost card may have no UUID left to show: a placeholder stands in its place, by index.
        nameless = [gpu for gpu in gpus if gpu.lost and gpu.uuid not in planned]
        for slot in slots:
            for uuid in slot.gpu_uuids:
                yield from _planned_gpu(slot, uuid, planned[uuid], shown.get(uuid), nameless)
        for gpu in nameless:
            yield _finding("gpu_lost", "note", f"{host} GPU {gpu.index}", gpu.lost, "nothing: no slot is on it")
        for gpu in gpus:
            if gpu.xid is not None:
                yield _xid(host, gpu, gpu.uuid in planned)


def _planned_gpu(slot: Slot, uuid: str, index: int, gpu: Gpu | None, nameless: list[Gpu]) -> Iterator[Finding]:
    """Takes out of ``nameless`` the lost card that explains a missing one."""
    if gpu is None and nameless:
        gpu = next((item for item in nameless if item.index == index), nameless[0])
        nameless.remove(gpu)
    thing = f"{slot.name} GPU {index}"
    if gpu is None:
        yield _finding("gpu_missing", "drift", thing, f"not shown by {slot.host}'s driver", "present", gpu_uuid=uuid)
    elif gpu.lost:
        found = f"the driver reports a lost GPU at index {gpu.index}: {gpu.lost}"
        yield _finding("gpu_lost", "drift", thing, found, "usable", gpu_uuid=uuid)


def _xid(host: str, gpu: Gpu, planned: bool) -> Finding:
    """A broken GPU that nothing is planned on is no drift: that is how a run without it heals the cluster."""
    critical = CRITICAL_XIDS.get(gpu.xid or 0)
    severity: Severity = "drift" if critical and planned else "note"
    found = f"XID {gpu.xid}" + (f" ({critical})" if critical else "")
    return _finding("gpu_xid", severity, f"{host} GPU {gpu.index}", found, "no XID", gpu_uuid=gpu.uuid)


def _promises(scene: _Scene) -> Iterator[Finding]:
    for slot in scene.plan.slots:
        sums = [("the plan", scene.planned_mib(slot.name)), ("Ray", scene.ray_mib(slot) if scene.ray_heard else 0)]
        for who, mib in sums:
            if mib > slot.vram_mib:
                found = f"{mib} MiB by {who}"
                wanted = f"{slot.vram_mib} MiB at most"
                yield _finding("gpu_oversold", "drift", slot.name, found, wanted, gpu_uuid=slot.gpu_uuids[0])
                break


# --- Ray against the driver -------------------------------------------------------------------------------------------


def _belongs(process: GpuProcess, replica: Replica) -> bool:
    """vLLM holds its memory in children of the replica (engine core, workers)."""
    return replica.pid is not None and (process.pid == replica.pid or replica.pid in process.ancestors)


def _held(scene: _Scene, item: _Standing) -> list[tuple[Gpu, GpuProcess]]:
    """Where on its host the driver sees this replica's processes."""
    return [
        (gpu, process)
        for gpu in scene.gpus(item.host or "")
        for process in gpu.processes or ()
        if _belongs(process, item.replica)
    ]


def _replica_memory(scene: _Scene) -> Iterator[Finding]:
    blind: dict[str, tuple[str, str]] = {}
    for item in scene.standing:
        slot = scene.slots.get(item.slot or "")
        if slot is None or item.replica.pid is None or not scene.heard(slot.host):
            continue
        gpus = scene.slot_gpus(slot)
        held = _held(scene, item)
        for gpu in gpus:
            reason = _blind(gpu, held)
            if reason:
                blind.setdefault(gpu.uuid, (slot.name, reason))
        yield from _wrong_gpu(item, slot, held)
        if item.replica.state == "RUNNING" and gpus and not held and not any(_blind(gpu, held) for gpu in gpus):
            found = f"pid {item.replica.pid} holds no memory on any GPU of {slot.host}"
            wanted = f"{scene.footprint_mib(item.app, slot)} MiB"
            yield _finding("replica_without_vram", "drift", item.label, found, wanted, gpu_uuid=slot.gpu_uuids[0])
        yield from _over_footprint(scene, item, slot, held)
    for uuid, (name, reason) in sorted(blind.items()):
        yield _finding("pids_hidden", "unknown", name, reason, "every process and its memory", gpu_uuid=uuid)


def _blind(gpu: Gpu, held: Sequence[tuple[Gpu, GpuProcess]]) -> str | None:
    """Why the driver's list of processes proves nothing for this GPU, or None when it can be trusted."""
    if gpu.lost:
        return None
    if gpu.processes is None:
        return "the driver shows no processes"
    if not gpu.processes and gpu.used_mib > UNACCOUNTED_TOLERANCE_MIB:
        return f"{gpu.used_mib} MiB are in use and the driver shows no process"
    if any(process.vram_mib is None for where, process in held if where.uuid == gpu.uuid):
        return "the driver does not say how much each process holds"
    return None


def _wrong_gpu(item: _Standing, slot: Slot, held: Sequence[tuple[Gpu, GpuProcess]]) -> Iterator[Finding]:
    for gpu, process in held:
        if gpu.uuid not in slot.gpu_uuids:
            found = f"pid {process.pid} on GPU {gpu.index} ({gpu.uuid})"
            wanted = f"{slot.name}: {', '.join(slot.gpu_uuids)}"
            yield _finding("process_wrong_gpu", "drift", item.label, found, wanted, gpu_uuid=gpu.uuid)


def _over_footprint(
    scene: _Scene, item: _Standing, slot: Slot, held: Sequence[tuple[Gpu, GpuProcess]]
) -> Iterator[Finding]:
    berth = scene.berths.get(item.app)
    if berth is None:
        return
    for uuid in slot.gpu_uuids:
        mib = sum(process.vram_mib or 0 for gpu, process in held if gpu.uuid == uuid)
        if mib > berth.vram_mib + OVER_FOOTPRINT_MIB:
            wanted = f"{berth.vram_mib} MiB"
            yield _finding("vram_over_footprint", "drift", item.label, f"{mib} MiB", wanted, gpu_uuid=uuid)


def _other_memory(scene: _Scene) -> Iterator[Finding]:
    """What no replica explains: strangers, orphans, leaks."""
    slot_of = {uuid: slot for slot in scene.plan.slots for uuid in slot.gpu_uuids}
    for host in sorted(scene.hosts):
        # A replica on a node that is no slot of ours may be on any host.
        known = [item for item in scene.standing if item.host in (host, None)]
        for gpu in scene.gpus(host):
            if gpu.processes is None or gpu.lost:
                continue
            slot = slot_of.get(gpu.uuid)
            rest = [p for p in gpu.processes if not any(_belongs(p, item.replica) for item in known)]
            yield from _orphans(scene, gpu, slot, [p for p in rest if p.cluster == scene.cluster])
            yield from _strangers(scene, host, gpu, slot, [p for p in rest if p.cluster != scene.cluster])
            yield from _leak(scene, host, gpu, slot, gpu.processes)


def _orphans(scene: _Scene, gpu: Gpu, slot: Slot | None, processes: Sequence[GpuProcess]) -> Iterator[Finding]:
    if not scene.ray_heard:
        return
    # A replica that is starting has no pid in Ray's state yet, and may hold memory already.
    starting = {slot for item in scene.standing if item.replica.pid is None for slot in _may_be_on(scene, item)}
    for process in processes:
        if process.slot in starting or (slot is not None and slot.name in starting):
            continue
        thing = f"pid {process.pid} ({process.command or 'unknown command'})"
        found = f"holds {_mib(process.vram_mib)} for cluster {scene.cluster}, slot {process.slot or 'unknown'}"
        yield _finding("orphan_process", "drift", thing, found, "a replica that Ray knows", gpu_uuid=gpu.uuid)


def _may_be_on(scene: _Scene, item: _Standing) -> tuple[str, ...]:
    """The slots that a replica without a pid may be starting on."""
    pool = scene.pools.get(item.app)
    return pool.slots if pool else (item.app.partition("@")[2],)


def _strangers(
    scene: _Scene, host: str, gpu: Gpu, slot: Slot | None, processes: Sequence[GpuProcess]
) -> Iterator[Finding]:
    if not processes:
        return
    foreign = sum(process.vram_mib or 0 for process in processes)
    planned = scene.planned_mib(slot.name) if slot else 0
    usable = gpu.total_mib - gpu.reserved_mib
    who = ", ".join(f"pid {p.pid} {p.command or '?'} ({p.user or '?'}) {_mib(p.vram_mib)}" for p in processes)
    too_much = bool(planned) and planned + foreign > usable
    wanted = f"at most {usable - planned} MiB beside the {planned} MiB promised"
    thing = slot.name if slot else f"{host} GPU {gpu.index}"
    yield _finding("foreign_process", "drift" if too_much else "note", thing, who, wanted, gpu_uuid=gpu.uuid)


def _leak(scene: _Scene, host: str, gpu: Gpu, slot: Slot | None, processes: Sequence[GpuProcess]) -> Iterator[Finding]:
    if any(process.vram_mib is None for process in processes):
        return
    # With a replica there and nobody shown, the driver hides processes rather than leaks (pids_hidden says so).
    if not processes and slot is not None and any(item.slot == slot.name for item in scene.standing):
        return
    rest = gpu.used_mib - sum(process.vram_mib or 0 for process in processes)
    if rest > LEAK_MIB:
        thing = slot.name if slot else f"{host} GPU {gpu.index}"
        found = f"{rest} MiB in use that no process holds"
        yield _finding("vram_unaccounted", "drift", thing, found, f"at most {LEAK_MIB} MiB", gpu_uuid=gpu.uuid)


def _mib(value: int | None) -> str:
    return "an unknown amount" if value is None else f"{value} MiB"


def _runtimes(differences: Sequence[Difference]) -> Iterator[Finding]:
    for item in differences:
        yield _finding(
            "runtime_differs", "drift", f"{item.host} {item.what}", item.found or "missing", item.wanted or "none"
        )


# --- The picture ------------------------------------------------------------------------------------------------------


def _rows(scene: _Scene) -> tuple[Row, ...]:
    rows = [_row(scene, slot, at) for slot in scene.plan.slots for at in range(len(slot.gpu_uuids))]
    slotted = {row.uuid for row in rows}
    free = [
        Row("", host, gpu.index, gpu.uuid, gpu.product, gpu.total_mib, 0, None, gpu.used_mib)
        for host in sorted(scene.hosts)
        for gpu in scene.gpus(host)
        if gpu.uuid not in slotted and not gpu.lost
    ]
    return (*rows, *free)


def _measured(scene: _Scene, item: _Standing, gpu: Gpu | None) -> int | None:
    held = _held(scene, item)
    if gpu is None or gpu.lost or item.replica.pid is None or _blind(gpu, held):
        return None
    return sum(process.vram_mib or 0 for where, process in held if where.uuid == gpu.uuid)


def _row(scene: _Scene, slot: Slot, at: int) -> Row:
    uuid = slot.gpu_uuids[at]
    gpu = scene.gpu(slot, uuid)
    replicas = tuple(
        RowReplica(item.pool or item.app, item.replica.state, item.replica.pid, _measured(scene, item, gpu))
        for item in scene.standing
        if item.slot == slot.name
    )
    return Row(
        slot=slot.name,
        host=slot.host,
        # Cards are renumbered at boot: today's index is what a person finds in nvidia-smi.
        index=gpu.index if gpu else slot.gpu_indices[at],
        uuid=uuid,
        product=slot.product,
        total_mib=gpu.total_mib if gpu and gpu.total_mib else slot.total_mib,
        planned_mib=scene.planned_mib(slot.name),
        ray_mib=scene.ray_mib(slot) if scene.ray_heard else None,
        nvml_mib=gpu.used_mib if gpu and not gpu.lost else None,
        replicas=replicas,
    )
