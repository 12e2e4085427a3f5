"""Memory on simulated GPUs, taken by the process that calls, through the simulated driver itself.

Devices are numbered as CUDA numbers them in this process, by its own ``CUDA_VISIBLE_DEVICES``. What a process holds
is freed when it ends, however it ends; a forked child starts with nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from berth.errors import BerthError

MIB = 2**20
# The codes of berth_sim_allocate in nvml.c.
_OUT_OF_MEMORY, _NO_SUCH_GPU, _LOST = 1, 2, 3


class SimulatedOutOfMemory(MemoryError):
    """The GPU has less free than was asked for. All figures in MiB; ``asked_mib`` includes a context that was due."""

    def __init__(self, uuid: str, asked_mib: float, free_mib: float, total_mib: float) -> None:
        self.uuid, self.asked_mib, self.free_mib, self.total_mib = uuid, asked_mib, free_mib, total_mib
        super().__init__(
            f"simulated GPU {uuid} is out of memory: asked {asked_mib:.0f} MiB, free {free_mib:.0f} MiB, "
            f"total {total_mib:.0f} MiB"
        )


class SimulatedGpuLost(BerthError):
    """The GPU has fallen off the bus; every call on it fails until the process is started anew."""


@dataclass(frozen=True)
class Device:
    """A GPU or MIG instance in the driver's order. ``in_mig_mode``: a GPU whose instances are used in its place."""

    index: int
    uuid: str
    parent: str | None = None
    lost: bool = False
    in_mig_mode: bool = False


@dataclass(frozen=True)
class Allocation:
    """Memory that this process holds; give it to ``free``."""

    handle: int
    uuid: str
    mib: float


class _Answer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("handle", "asked", "free", "total")]


def active() -> bool:
    """Whether a simulation is in force in this process's environment (``BERTH_GPU_SIM``)."""
    return bool(os.environ.get("BERTH_GPU_SIM"))


def allocate(bytes_really_held: int, device: int = 0) -> Allocation:
    """Take what ``bytes_really_held`` stands for (times the profile's ``vram_scale``) on CUDA device ``device``.

    The first allocation of a process on a GPU takes the profile's ``context_mib`` too.

    Raises:
        SimulatedOutOfMemory: the GPU has less free than that; nothing was taken.
        SimulatedGpuLost: the GPU is lost.
        BerthError: no simulation in force, or no such CUDA device in this process.
    """
    return _take(bytes_really_held, device, scaled=True)


def allocate_mib(mib: int, device: int = 0) -> Allocation:
    """Take ``mib`` MiB of simulated memory, unscaled; context and errors as for ``allocate``."""
    return _take(mib * MIB, device, scaled=False)


def free(allocation: Allocation) -> None:
    """Give memory back. The context stays until the process ends, as in CUDA.

    Raises:
        BerthError: this process does not hold it (freed before, or held by a parent).
    """
    if _library().berth_sim_free(ctypes.c_uint64(allocation.handle)):
        raise BerthError(f"this process holds no allocation {allocation.handle} on GPU {allocation.uuid}")


def check() -> None:
    """Raise if a GPU that this process sees is lost, as any CUDA call on it would.

    Raises:
        SimulatedGpuLost: naming the GPU.
    """
    for device in _process_devices():
        if any(now.uuid == device.uuid and now.lost for now in devices()):
            raise _lost(device.uuid)


def devices() -> tuple[Device, ...]:
    """Every GPU of the simulated host by index, each followed by its MIG instances.

    Raises:
        BerthError: no simulation in force.
    """
    library = _library()
    buffer = ctypes.create_string_buffer(64 * 1024)
    if library.berth_sim_list(buffer, ctypes.c_size_t(len(buffer))) < 0:
        raise BerthError(f"the simulation in {os.environ['BERTH_GPU_SIM']} has no profile", mend="install it again")
    found = []
    for line in buffer.value.decode().splitlines():
        index, uuid, parent, lost, in_mig_mode = line.split()
        found.append(Device(int(index), uuid, None if parent == "-" else parent, lost == "1", in_mig_mode == "1"))
    return tuple(found)


def visible_devices(value: str | None, present: tuple[Device, ...]) -> tuple[Device, ...]:
    """The devices that CUDA shows for this value of ``CUDA_VISIBLE_DEVICES`` (None: unset), in CUDA's order.

    Entries are indices or the starts of ``GPU-``/``MIG-`` UUIDs; the first that names no device, or more than one,
    or one named before, ends the list. A GPU in MIG mode stands for its first instance, and a process sees one
    instance at most, alone (CUDA C++ Programming Guide, "CUDA Environment Variables"; MIG User Guide, "CUDA Device
    Enumeration"). The driver's order is PCI order here, so ``CUDA_DEVICE_ORDER`` changes nothing.
    """
    gpus = [device for device in present if device.parent is None]
    entries = [str(gpu.index) for gpu in gpus] if value is None else value.split(",")
    seen: list[Device] = []
    for entry in entries:
        device = _named(entry.strip(), present)
        if device is None or device in seen:
            break
        if device.parent is not None:
            return tuple(seen) if seen else (device,)
        seen.append(device)
    return tuple(seen)


def _named(entry: str, present: tuple[Device, ...]) -> Device | None:
    if re.fullmatch(r"[0-9]+", entry):
        found = [device for device in present if device.parent is None and device.index == int(entry)]
    elif entry.startswith(("GPU-", "MIG-")) and len(entry) > 4:
        found = [device for device in present if device.uuid.startswith(entry)]
    else:
        return None
    if len(found) != 1:
        return None
    if not found[0].in_mig_mode:
        return found[0]
    return next((device for device in present if device.parent == found[0].uuid), None)


_frozen: tuple[int, str, tuple[Device, ...]] | None = None


def _process_devices() -> tuple[Device, ...]:
    """CUDA reads the variable once in a process, at its first use; what is set afterwards changes nothing."""
    global _frozen  # noqa: PLW0603 - as long as the process, like CUDA's own
    where = os.environ.get("BERTH_GPU_SIM", "")
    if _frozen is None or _frozen[:2] != (os.getpid(), where):
        _frozen = (os.getpid(), where, visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), devices()))
    return _frozen[2]


def _take(size: int, device: int, *, scaled: bool) -> Allocation:
    if not 0 <= size < 2**53:
        raise BerthError("an allocation has no such size", found=f"{size} bytes", allowed="0 to 2**53")
    present = _process_devices()
    if not 0 <= device < len(present):
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "(unset)")
        found = f"{len(present)} device(s) with CUDA_VISIBLE_DEVICES={given}"
        raise BerthError(f"this process has no CUDA device {device}", found=found)
    uuid, answer = present[device].uuid, _Answer()
    code = _library().berth_sim_allocate(uuid.encode(), ctypes.c_uint64(size), int(scaled), ctypes.byref(answer))
    if code == _OUT_OF_MEMORY:
        raise SimulatedOutOfMemory(uuid, answer.asked / MIB, answer.free / MIB, answer.total / MIB)
    if code == _LOST:
        raise _lost(uuid)
    if code == _NO_SUCH_GPU:
        raise BerthError(f"the simulated host has no GPU {uuid} any more")
    if code:
        raise BerthError(
            f"the simulation in {os.environ['BERTH_GPU_SIM']} cannot be written by this process",
            mend="install it again",
        )
    return Allocation(answer.handle, uuid, answer.asked / MIB)


def _lost(uuid: str) -> SimulatedGpuLost:
    return SimulatedGpuLost(f"simulated GPU {uuid} is lost", mend="reset or replace it, then start the process anew")


def _library() -> ctypes.CDLL:
    directory = os.environ.get("BERTH_GPU_SIM")
    if not directory:
        raise BerthError("no GPU simulation is in force here", mend="set BERTH_GPU_SIM to its directory")
    try:
        # By its path, so that it is found whatever LD_LIBRARY_PATH was when the process started.
        return ctypes.CDLL(str(Path(directory) / "lib" / "libnvidia-ml.so.1"))
    except OSError as error:
        raise BerthError(f"the simulation in {directory} has no library: {error}", mend="install it again") from None
