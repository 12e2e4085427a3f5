"""One host's GPUs as its driver shows them, read through NVML. The simulated driver is read by the same calls."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml

from berth.codec import replace
from berth.errors import BerthError, CouldNotTell
from berth.gpu import sim
from berth.gpu.types import Gpu, GpuProcess, HostGpus
from berth.host.processes import mark_of

MIB = 2**20
T = TypeVar("T")

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}:[0-9a-fA-F]{2})[^)]*\): (\d+)")
_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_COMMAND_LENGTH = 160
# With memory in use above this and no process listed, the driver hides processes from us. An idle driver uses a few
# MiB itself; where it cannot tell its reserve from use (NVML before 12), the reserve of several hundred counts as use.
_UNEXPLAINED_MIB = 64
_UNEXPLAINED_WITH_RESERVE_MIB = 1024
_UNTOLD = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NO_PERMISSION)
_GONE = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_RESET_REQUIRED)


def read_host(host: str, known_uuids: Mapping[int, str] | None = None) -> HostGpus:
    """Every GPU and MIG instance of this machine, under the name ``host``. All memory in MiB.

    A GPU in MIG mode is not listed, its instances are. A lost GPU is listed too; the driver may no longer tell its
    UUID: then it is taken from ``known_uuids`` (index -> UUID, as last seen) if that UUID is on no other GPU, else
    ``lost-index-N`` stands for it.

    Raises:
        CouldNotTell: NVML cannot be loaded, or has no driver under it.
        BerthError: BERTH_GPU_SIM is set and yet the driver loaded is another.
    """
    with _nvml():
        found: list[Gpu] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            found += _read_index(index)
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        peers = _nvlink_peers(len({gpu.index for gpu in found}))
    gpus = [replace(gpu, nvlink_peers=peers.get(gpu.uuid, ())) for gpu in found]
    gpus = _with_xids(_with_known_uuids(gpus, known_uuids or {}), parse_xids(_kernel_log()))
    return HostGpus(host, driver, tuple(gpus), simulated=sim.directory() is not None, vram_scale=sim.vram_scale())


def parse_xids(text: str) -> dict[str, int]:
    """The last XID of each PCI address in a kernel log, addresses as NVML writes them (``00000000:3B:00.0``)."""
    return {f"{domain:0>8}:{rest}.0".upper(): int(xid) for domain, rest, xid in _XID.findall(text)}


@contextmanager
def _nvml() -> Iterator[None]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _unheard(error) from None
    try:
        if sim.directory() and not hasattr(pynvml.nvmlLib, "berth_sim_list"):
            raise BerthError(
                "BERTH_GPU_SIM is set, but the NVML that was loaded is another driver's",
                found=os.environ.get("LD_LIBRARY_PATH", "no LD_LIBRARY_PATH"),
                allowed=f"LD_LIBRARY_PATH={sim.environment(Path(os.environ['BERTH_GPU_SIM']))['LD_LIBRARY_PATH']}",
            )
        yield
    except pynvml.NVMLError as error:
        raise _unheard(error) from None
    finally:
        pynvml.nvmlShutdown()


def _unheard(error: Any) -> CouldNotTell:
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return CouldNotTell(
            "libnvidia-ml.so.1 cannot be loaded: this host has no NVIDIA driver, or not on its library path",
            mend="install the driver (nvidia-smi must work), or set nvidia_driver_simulate: true for simulated GPUs",
        )
    if error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return CouldNotTell(
            "the NVIDIA driver was upgraded under a running kernel module",
            mend="restart the host, or reload the nvidia kernel modules",
        )
    return CouldNotTell(f"NVML does not answer: {error}", mend="look at: nvidia-smi; journalctl -k | grep NVRM")


def _read_index(index: int) -> list[Gpu]:
    """One GPU, or its MIG instances. A GPU may be lost before the first call or between two."""
    uuid, product = f"lost-index-{index}", "unknown"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        product = str(pynvml.nvmlDeviceGetName(handle))
        whole = _read_gpu(handle, uuid, index, product)
        return _read_instances(handle, whole) if _in_mig_mode(handle) else [whole]
    except pynvml.NVMLError as error:
        if error.value not in _GONE:
            raise
        why = "GPU is lost" if error.value == pynvml.NVML_ERROR_GPU_IS_LOST else str(error)
        return [Gpu(uuid, index, product, 0, lost=why, processes=None)]


def _read_gpu(handle: Any, uuid: str, index: int, product: str) -> Gpu:
    memory = _memory(handle)
    major_minor = _told(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    pci = _told(pynvml.nvmlDeviceGetPciInfo, handle)
    return Gpu(
        uuid=uuid,
        index=index,
        product=product,
        total_mib=memory.total,
        reserved_mib=memory.reserved,
        used_mib=memory.used,
        compute_capability=f"{major_minor[0]}.{major_minor[1]}" if major_minor else None,
        pci_bus_id=_text(pci.busId).upper() if pci else None,
        numa_node=_numa_node(handle),
        processes=_processes(handle, memory),
    )


def _read_instances(parent: Any, whole: Gpu) -> list[Gpu]:
    instances = []
    for number in range(_told(pynvml.nvmlDeviceGetMaxMigDeviceCount, parent) or 0):
        try:
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, number)
        except pynvml.NVMLError_NotFound:
            continue
        memory = _memory(handle)
        instance = replace(
            whole,
            uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
            product=str(pynvml.nvmlDeviceGetName(handle)),
            total_mib=memory.total,
            reserved_mib=memory.reserved,
            used_mib=memory.used,
            mig_parent=whole.uuid,
            processes=_processes(handle, memory),
        )
        instances.append(instance)
    return instances


def _in_mig_mode(handle: Any) -> bool:
    mode = _told(pynvml.nvmlDeviceGetMigMode, handle)
    return bool(mode and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE)


@dataclass(frozen=True)
class _Memory:
    """In MiB. ``reserve_known``: the driver's reserve is not in ``used``."""

    total: int
    reserved: int
    used: int
    reserve_known: bool


def _memory(handle: Any) -> _Memory:
    """The second version of the call tells the driver's reserve apart from use; the first counts it as used."""
    second = _told(lambda given: pynvml.nvmlDeviceGetMemoryInfo(given, version=pynvml.nvmlMemory_v2), handle)
    if second is not None:
        return _Memory(_mib(second.total), _mib(second.reserved), _mib(second.used), True)
    first = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return _Memory(_mib(first.total), 0, _mib(first.used), False)


def _mib(size: int) -> int:
    return round(size / MIB)


def _numa_node(handle: Any) -> int | None:
    """The node whose memory is nearest. (nvmlDeviceGetNumaNodeId is another thing: the node that a GPU *is*.)"""
    masks = _told(lambda given: pynvml.nvmlDeviceGetMemoryAffinity(given, 4, pynvml.NVML_AFFINITY_SCOPE_NODE), handle)
    nodes = [64 * word + bit for word, mask in enumerate(masks or ()) for bit in range(64) if mask >> bit & 1]
    return nodes[0] if len(nodes) == 1 else None


def _processes(handle: Any, memory: _Memory) -> tuple[GpuProcess, ...] | None:
    listed = _told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if listed is None:
        return None
    listed = [*listed, *(_told(pynvml.nvmlDeviceGetGraphicsRunningProcesses, handle) or ())]
    tolerated = _UNEXPLAINED_MIB if memory.reserve_known else _UNEXPLAINED_WITH_RESERVE_MIB
    if not listed and memory.used > tolerated:
        # Inside a container or a guest the driver answers with an empty list although others hold memory: that is
        # not "nobody".
        return None
    # A process that both computes and draws is listed twice with the same memory.
    held = {int(entry.pid): entry.usedGpuMemory for entry in reversed(listed)}
    return tuple(_describe(pid, None if held[pid] is None else _mib(held[pid])) for pid in sorted(held))


def _describe(pid: int, vram_mib: int | None) -> GpuProcess:
    """What /proc tells of a process: nothing, if it has ended since or lives in another pid namespace."""
    try:
        process = psutil.Process(pid)
    except psutil.Error:
        return GpuProcess(pid, vram_mib)
    mark = mark_of(pid)
    command = " ".join(_of(process.cmdline) or ()).strip() or _of(process.name)
    return GpuProcess(
        pid=pid,
        vram_mib=vram_mib,
        user=_of(process.username),
        command=command[:_COMMAND_LENGTH] if command else None,
        cluster=mark.cluster if mark else None,
        slot=mark.slot if mark else None,
        ancestors=tuple(parent.pid for parent in _of(process.parents) or ()),
    )


def _of(question: Callable[[], T]) -> T | None:
    try:
        return question()
    except (psutil.Error, OSError):
        return None


def _told(question: Callable[..., Any], handle: Any) -> Any:
    """The driver's answer, or None where it has none to give; other errors are errors."""
    try:
        return question(handle)
    except pynvml.NVMLError as error:
        if error.value in _UNTOLD or error.value == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
            return None
        raise


def _nvlink_peers(count: int) -> dict[str, tuple[str, ...]]:
    """By UUID, the UUIDs reached over NVLink, directly or through NVSwitch (behind which single links name the
    switch, so that pairs have to be asked for)."""
    handles: dict[str, Any] = {}
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            handles[str(pynvml.nvmlDeviceGetUUID(handle))] = handle
        except pynvml.NVMLError:
            continue
    return {
        uuid: tuple(other for other in handles if other != uuid and _joined(handle, handles[other]))
        for uuid, handle in handles.items()
    }


def _joined(one: Any, other: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetP2PStatus(one, other, _NVLINK) == pynvml.NVML_P2P_STATUS_OK)
    except pynvml.NVMLError:
        return False


def _with_known_uuids(gpus: list[Gpu], known: Mapping[int, str]) -> list[Gpu]:
    seen = {gpu.uuid for gpu in gpus} | {gpu.mig_parent for gpu in gpus}
    missing = {index: uuid for index, uuid in known.items() if uuid not in seen}
    nameless = [gpu for gpu in gpus if gpu.uuid.startswith("lost-index-")]
    if len(nameless) == len(missing) == 1:
        # Whatever the cards' order is now, one is gone and one was lost.
        missing = {nameless[0].index: next(iter(missing.values()))}
    return [replace(gpu, uuid=missing.get(gpu.index, gpu.uuid)) if gpu in nameless else gpu for gpu in gpus]


def _with_xids(gpus: list[Gpu], xids: Mapping[str, int]) -> list[Gpu]:
    placed = {gpu.pci_bus_id for gpu in gpus}
    placeless = [gpu for gpu in gpus if gpu.lost and gpu.pci_bus_id is None]
    unclaimed = [address for address in sorted(xids) if address not in placed]
    if len(placeless) == len(unclaimed) == 1:
        # The driver no longer tells where a lost GPU sits; its last words in the kernel's log do.
        found = replace(placeless[0], pci_bus_id=unclaimed[0])
        gpus = [found if gpu is placeless[0] else gpu for gpu in gpus]
    return [replace(gpu, xid=xids.get(gpu.pci_bus_id or "")) for gpu in gpus]


def _kernel_log() -> str:
    """The kernel's messages since boot; empty when none may be read. NVML itself tells of an XID only as it happens."""
    path = os.environ.get("BERTH_GPU_KERNEL_LOG") or sim.kernel_log()
    if path:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    for command in (["journalctl", "--dmesg", "--boot", "--quiet", "--no-pager"], ["dmesg"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0 and done.stdout:
            return done.stdout
    return ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
