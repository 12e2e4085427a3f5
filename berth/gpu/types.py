"""GPUs of one host as the driver shows them. All memory is in MiB (2**20 bytes)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuProcess:
    """A process that the driver says holds memory on a GPU.

    ``vram_mib`` is None where the driver does not say. ``ancestors`` are the pids above this one, nearest
    first, up to pid 1. ``cluster`` and ``slot`` are BERTH_CLUSTER and BERTH_SLOT from its environment (None:
    not Berth's, or not readable by us).
    """

    pid: int
    vram_mib: int | None
    user: str | None = None
    command: str | None = None
    cluster: str | None = None
    slot: str | None = None
    ancestors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One GPU or MIG instance that work can be placed on.

    ``total_mib`` is what the driver calls total, ``reserved_mib`` what it keeps for itself out of that,
    ``used_mib`` what is in use now (without the reserved part). ``lost`` is why it cannot be used
    ("GPU is lost"), None when it can. ``processes`` is None where the driver does not show any (some
    containers and hypervisors): then nothing can be said about who holds what.
    """

    uuid: str
    index: int
    product: str
    total_mib: int
    reserved_mib: int = 0
    used_mib: int = 0
    compute_capability: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    nvlink_peers: tuple[str, ...] = ()
    mig_parent: str | None = None
    lost: str | None = None
    xid: int | None = None
    processes: tuple[GpuProcess, ...] | None = ()


@dataclass(frozen=True)
class HostGpus:
    """Every GPU of one host, ordered by index (MIG instances after their parent's index, in driver order).

    ``vram_scale`` is 1.0 on a real driver; on the simulated one, simulated MiB per MiB really held.
    """

    host: str
    driver_version: str
    gpus: tuple[Gpu, ...]
    simulated: bool = False
    vram_scale: float = 1.0
