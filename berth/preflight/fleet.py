"""What the hosts said of themselves, held against each other. Pure. Memory in MiB."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from berth.plan.types import Plan
from berth.preflight.facts import Answer, Expectation, HostFacts
from berth.preflight.hosts import check_host, simulated
from berth.preflight.problem import Problem, Severity


@dataclass(frozen=True)
class _Host:
    facts: HostFacts
    wanted: Expectation

    @property
    def name(self) -> str:
        return self.wanted.host


def check_hosts(
    answers: Mapping[str, Answer], wanted: Mapping[str, Expectation], plan: Plan | None = None
) -> list[Problem]:
    """Every problem of every host that was asked, alone and together; ``plan`` is the one in force, if any."""
    alone = [problem for name, answer in sorted(answers.items()) for problem in check_host(answer, wanted[name])]
    hosts = [_Host(answer.facts, wanted[name]) for name, answer in sorted(answers.items()) if answer.facts is not None]
    return [*alone, *_together(hosts), *_vanished(hosts, plan)]


def _together(hosts: Sequence[_Host]) -> Iterator[Problem]:
    yield from _one_python(hosts)
    yield from _same_machine(hosts)
    yield from _same_gpu(hosts)
    yield from _one_mtu(hosts)
    real = [host for host in hosts if host.facts.nvidia.driver and not simulated(host.facts, host.wanted)]
    yield from _one_value(
        real,
        lambda host: host.facts.nvidia.driver,
        "driver",
        "warning",
        "the hosts have different NVIDIA drivers: engines may hold more VRAM, or fail, on some of them",
        "one version",
        "bring them to one version, one host at a time",
    )
    yield from _one_value(
        hosts,
        lambda host: host.facts.architecture,
        "architecture",
        "error",
        "the hosts have different architectures, and a cluster has one lock",
        "one architecture",
        "take the others out of the inventory",
    )


def _one_python(hosts: Sequence[_Host]) -> Iterator[Problem]:
    """Ray refuses a node whose Python has another minor version than the head's."""

    def minor(host: _Host) -> str:
        found = host.facts.interpreters.get(host.wanted.runtime_python)
        return found.minor if found else ""

    yield from _one_value(
        [host for host in hosts if minor(host)],
        minor,
        "python",
        "error",
        "the hosts' Python differs in its minor version, and Ray takes one per cluster",
        "one minor version on all hosts",
        "set berth_agent_base_python (or ray_runtime_base_python) to one that every host has, such as python3.12",
    )


def _one_value(
    hosts: Sequence[_Host],
    value: Callable[[_Host], str],
    kind: str,
    severity: Severity,
    what: str,
    allowed: str,
    mend: str,
) -> Iterator[Problem]:
    seen: dict[str, list[str]] = {}
    for host in hosts:
        seen.setdefault(value(host), []).append(host.name)
    if len(seen) > 1:
        found = "; ".join(f"{key}: {', '.join(names)}" for key, names in sorted(seen.items()))
        yield Problem(kind, severity, tuple(host.name for host in hosts), what, found, allowed, mend)


def _same_machine(hosts: Sequence[_Host]) -> Iterator[Problem]:
    names: dict[str, list[_Host]] = {}
    for host in hosts:
        names.setdefault(host.facts.hostname, []).append(host)
    for hostname, same in sorted(names.items()):
        if len(same) < 2:
            continue
        machines = {host.facts.machine_id for host in same}
        one = len(machines) == 1 and machines != {""}
        yield Problem(
            "hostname",
            "error",
            tuple(host.name for host in same),
            "two inventory names for one machine" if one else "several hosts call themselves by the same name",
            f"hostname {hostname}" + (f", machine-id {machines.pop()}" if one else ""),
            "a host name of its own for each",
            "remove one from the inventory" if one else "hostnamectl set-hostname NAME on all but one",
        )


def _same_gpu(hosts: Sequence[_Host]) -> Iterator[Problem]:
    owners: dict[str, list[str]] = {}
    for host in hosts:
        for gpu in host.facts.nvidia.gpus:
            if gpu.uuid:
                owners.setdefault(gpu.uuid, []).append(host.name)
    for uuid, names in sorted(owners.items()):
        if len(names) > 1:
            yield Problem(
                "gpu",
                "error",
                tuple(names),
                f"GPU {uuid} is shown by several hosts",
                ", ".join(names),
                "a GPU is in one host",
                "two inventory names for one machine, or a card shared by virtual machines: remove all but one",
            )


def _one_mtu(hosts: Sequence[_Host]) -> Iterator[Problem]:
    def mtu(host: _Host) -> str:
        found = sorted({item.mtu for item in host.facts.addresses.values() if item.mtu and item.interface != "lo"})
        return "/".join(map(str, found))

    known = [host for host in hosts if mtu(host)]
    if len(known) > 1:
        yield from _one_value(
            known,
            mtu,
            "mtu",
            "warning",
            "the interfaces that carry the node addresses have different MTUs: large packets may be lost between them",
            "one MTU",
            "ip link set dev INTERFACE mtu N on the hosts that differ, and in their network configuration",
        )
    for host in known:
        own = max(item.mtu or 0 for item in host.facts.addresses.values() if item.interface != "lo")
        for probe in host.facts.peers:
            if probe.answered and probe.mtu is not None and 0 < probe.mtu < own:
                yield Problem(
                    "mtu",
                    "warning",
                    (host.name,),
                    f"the path to {probe.host} carries less than its interface",
                    f"{probe.mtu} bytes",
                    f"{own} bytes",
                    "raise the MTU on the way, or lower the interface's",
                )


def _vanished(hosts: Sequence[_Host], plan: Plan | None) -> Iterator[Problem]:
    """GPUs that the plan in force uses and their hosts' drivers no longer show."""
    if plan is None:
        return
    owner = {gpu.uuid: host.name for host in hosts for gpu in host.facts.nvidia.gpus if gpu.uuid}
    busy = {berth.slot for berth in plan.berths if berth.replicas}
    for host in hosts:
        shown = [gpu.uuid for gpu in host.facts.nvidia.gpus]
        if not host.facts.nvidia.driver or "" in shown or simulated(host.facts, host.wanted):
            continue
        for slot in plan.slots:
            for uuid in slot.gpu_uuids:
                # A MIG instance is not among what /proc shows.
                if slot.host != host.wanted.slot_host or uuid in shown or not uuid.startswith("GPU-"):
                    continue
                moved = f"it is in {owner[uuid]} now" if uuid in owner else "its driver does not show it"
                stands = ", with replicas on it" if slot.name in busy else ""
                yield Problem(
                    "gpu",
                    "warning",
                    (host.name,),
                    f"GPU {uuid} of slot {slot.name} has vanished since the last plan{stands}",
                    moved,
                    "",
                    "bring the card back; else this run plans without it, and its replicas go elsewhere where they fit",
                )
