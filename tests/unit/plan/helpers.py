"""Small builders, so that a test shows only what it is about."""

from __future__ import annotations

from berth.gpu.types import Gpu, GpuProcess, HostGpus
from berth.plan.types import Deployment, Plan, Slot, StrategyName

L40S = "NVIDIA L40S"
T4 = "Tesla T4"
A100 = "NVIDIA A100-SXM4-80GB"


def slot(
    name: str,
    vram: int = 44_000,
    *,
    product: str = L40S,
    gpus: int = 1,
    foreign: int = 0,
    rack: str = "",
    zone: str = "",
    total: int | None = None,
) -> Slot:
    host, number = name.rsplit("-", 1)
    return Slot(
        name=name,
        host=host,
        gpu_uuids=tuple(f"GPU-{name}-{i}" for i in range(gpus)),
        gpu_indices=tuple(int(number) * gpus + i for i in range(gpus)),
        product=product,
        vram_mib=vram,
        total_mib=vram + 1_000 if total is None else total,
        foreign_mib=foreign,
        rack=rack,
        zone=zone,
    )


def grid(hosts: int, gpus: int, vram: int = 44_000, *, product: str = L40S) -> tuple[Slot, ...]:
    return tuple(slot(f"gpu{h:02}-{g}", vram, product=product) for h in range(hosts) for g in range(gpus))


def model(
    name: str,
    replicas: int,
    vram: int | dict[str, int],
    *,
    gpus: int = 1,
    strategy: StrategyName | None = None,
    products: tuple[str, ...] = (),
) -> Deployment:
    sizes = {"default": vram} if isinstance(vram, int) else vram
    return Deployment(name, replicas, sizes, gpus, strategy, products)


def where(plan: Plan, name: str) -> dict[str, int]:
    return {berth.slot: berth.replicas for berth in plan.berths if berth.deployment == name}


def used_slots(plan: Plan) -> set[str]:
    return {berth.slot for berth in plan.berths}


def promised(plan: Plan, name: str) -> int:
    return sum(berth.replicas * berth.vram_mib for berth in plan.berths if berth.slot == name)


def gpu(
    uuid: str,
    index: int,
    *,
    total: int = 46_068,
    reserved: int = 600,
    used: int = 0,
    product: str = L40S,
    lost: str | None = None,
    processes: tuple[GpuProcess, ...] | None = (),
    mig_parent: str | None = None,
    xid: int | None = None,
) -> Gpu:
    return Gpu(
        uuid=uuid,
        index=index,
        product=product,
        total_mib=total,
        reserved_mib=reserved,
        used_mib=used,
        lost=lost,
        processes=processes,
        mig_parent=mig_parent,
        xid=xid,
    )


def host(name: str, *gpus: Gpu) -> HostGpus:
    return HostGpus(host=name, driver_version="570.124.06", gpus=gpus)
