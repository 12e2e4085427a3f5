"""MIG layouts: which instances a GPU shall have, what it has, and nvidia-smi's commands in between.

A layout is changed only on a GPU that nobody uses: destroying an instance takes its memory from whoever holds it.
Commands and their order: NVIDIA's MIG User Guide (compute instances go before GPU instances, mode last).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pynvml

from berth.codec import STRICT
from berth.errors import BerthError, CouldNotTell
from berth.host.nvidia_types import Finding, Step

_PROFILE = re.compile(r"MIG (\S+)$")
_GONE = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED)


@dataclass(frozen=True)
class MigGpu:
    """A GPU as NVML shows it. ``enabled`` is None where it has no MIG; ``pending`` is the mode after a reset."""

    uuid: str
    index: int
    product: str
    enabled: bool | None = None
    pending: bool | None = None
    instances: tuple[tuple[str, str], ...] = ()
    """Profile and UUID of each instance."""
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class MigWanted:
    """The instances that one GPU (UUID or index) shall have; none means that MIG is off."""

    gpu: str
    profiles: tuple[str, ...] = ()

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MigDecision:
    """``commands`` bring every GPU to its layout, in order; with a finding there are none for any GPU."""

    steps: tuple[Step, ...] = ()
    findings: tuple[Finding, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()


def decide(gpus: Sequence[MigGpu], layout: Sequence[MigWanted], occupied: Mapping[str, Sequence[str]]) -> MigDecision:
    """What to do for ``layout``; ``occupied`` tells the berths of the plan by the UUID of a GPU or an instance."""
    steps: list[Step] = []
    findings: list[Finding] = []
    commands: list[tuple[str, ...]] = []
    for wanted in layout:
        gpu = next((gpu for gpu in gpus if wanted.gpu in (gpu.uuid, str(gpu.index))), None)
        if gpu is None:
            findings.append(_unknown(wanted, gpus))
            continue
        has, wants = sorted(profile for profile, _ in gpu.instances), sorted(wanted.profiles)
        if has == wants and bool(gpu.enabled) == bool(wants):
            continue
        findings += _refusals(gpu, wanted, occupied)
        steps.append(
            Step(f"MIG of {gpu.uuid}", _shown(has, gpu.enabled), _shown(wants, bool(wants)), "nvidia_driver_mig")
        )
        commands += _commands(gpu, wanted.profiles)
    return MigDecision(tuple(steps), tuple(findings), () if findings else tuple(commands))


def _commands(gpu: MigGpu, profiles: Sequence[str]) -> list[tuple[str, ...]]:
    mig = ("nvidia-smi", "mig", "-i", gpu.uuid)
    commands: list[tuple[str, ...]] = [(*mig, "-dci"), (*mig, "-dgi")] if gpu.instances else []
    if profiles and not gpu.enabled:
        commands.append(("nvidia-smi", "-i", gpu.uuid, "-mig", "1"))
    if profiles:
        commands.append((*mig, "-cgi", ",".join(profiles), "-C"))
    elif gpu.enabled:
        commands.append(("nvidia-smi", "-i", gpu.uuid, "-mig", "0"))
    return commands


def _refusals(gpu: MigGpu, wanted: MigWanted, occupied: Mapping[str, Sequence[str]]) -> list[Finding]:
    label = f"GPU {gpu.index} ({gpu.product}, {gpu.uuid})"
    if gpu.enabled is None:
        return [Finding("mig-not-supported", f"{label} has no MIG", gpu.product, "take it out of nvidia_driver_mig")]
    if gpu.enabled != gpu.pending:
        state = f"now {'on' if gpu.enabled else 'off'}, after a reset {'on' if gpu.pending else 'off'}"
        mend = f"nvidia-smi --gpu-reset -i {gpu.uuid} while nobody uses it, or reboot the host"
        return [Finding("mig-reset-needed", f"{label}: the MIG mode was changed and waits for a reset", state, mend)]
    berths = sorted({name for uuid in (gpu.uuid, *(u for _, u in gpu.instances)) for name in occupied.get(uuid, ())})
    users = [*(f"berth {name}" for name in berths), *(f"pid {pid}" for pid in gpu.pids)]
    if not users:
        return []
    mend = "drain its slots and plan without it (placement_cordoned), end foreign processes, then run again"
    what = f"{label} is in use, so its MIG layout stays as it is"
    return [Finding("mig-gpu-in-use", what, ", ".join(users), mend)]


def _unknown(wanted: MigWanted, gpus: Sequence[MigGpu]) -> Finding:
    names = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus) or "no GPU"
    what = f"nvidia_driver_mig names GPU {wanted.gpu}, which the driver does not show"
    return Finding("mig-gpu-unknown", what, names, "name a GPU by UUID or index, as nvidia-smi --list-gpus does")


def _shown(profiles: Sequence[str], enabled: bool | None) -> str:
    return ", ".join(profiles) or ("on, no instance" if enabled else "off")


def read_gpus() -> tuple[MigGpu, ...]:
    """Every GPU of this machine with its instances and whoever uses it.

    Raises:
        CouldNotTell: NVML does not answer.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise CouldNotTell(f"NVML does not answer: {error}", mend="look at: nvidia-smi") from None
    try:
        return tuple(_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        raise CouldNotTell(f"NVML does not answer: {error}", mend="look at: nvidia-smi") from None
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(index: int) -> MigGpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    uuid, product = str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle))
    pids = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    try:
        enabled, pending = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError as error:
        if error.value not in _GONE:
            raise
        return MigGpu(uuid, index, product, pids=tuple(sorted(pids)))
    instances = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if enabled else 0):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError as error:
            if error.value in _GONE:
                continue
            raise
        name = str(pynvml.nvmlDeviceGetName(instance))
        match = _PROFILE.search(name)
        instances.append((match.group(1) if match else name, str(pynvml.nvmlDeviceGetUUID(instance))))
        pids |= {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(instance)}
    return MigGpu(uuid, index, product, bool(enabled), bool(pending), tuple(instances), tuple(sorted(pids)))


def refuse(decision: MigDecision) -> None:
    """Stops at the first thing that forbids the layout, naming all of them.

    Raises:
        BerthError: with every finding.
    """
    if decision.findings:
        raise BerthError("; ".join(str(finding) for finding in decision.findings))
