"""A good inventory and a good host to spoil, one thing at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from berth.preflight.facts import (
    Address,
    Answer,
    Expectation,
    FileSystem,
    HostFacts,
    Interpreter,
    Nvidia,
    NvidiaGpu,
    OsRelease,
    Probe,
)
from berth.preflight.inventory import Inventory, InventoryHost
from berth.preflight.options import read_roles
from berth.preflight.problem import Problem

ROOT = Path(__file__).resolve().parents[3]
ROLES = read_roles(ROOT)
STATE, CACHE, RUN = "/var/lib/berth", "/var/lib/berth/cache", "/run/berth"
DISK = FileSystem(STATE, "/", "ext4", ("rw",), 900_000, 500_000, 1_000_000, 900_000)


def values(**changes: Any) -> dict[str, Any]:
    """Every default that needs no template, and what a host must say for itself."""
    plain = {
        option.name: option.default for role in ROLES for option in role.options if "{{" not in str(option.default)
    }
    own = {"placement_strategy": "pack", "berth_cluster_id": "c-1", "ray_slot_cache_dir": CACHE}
    return {**plain, **own, **changes}


def host(name: str, given: tuple[str, ...] = (), **changes: Any) -> InventoryHost:
    own = {
        "placement_host_name": name,
        "ray_head_node_ip": f"10.0.0.{name[-1]}",
        "ray_slot_node_ip": f"10.0.0.{name[-1]}",
    }
    return InventoryHost(name, values(**{**own, **changes}), frozenset(given) | frozenset(changes))


def inventory(*hosts: InventoryHost, **changes: Any) -> Inventory:
    """The first host is the head as well; every host has GPUs."""
    names = tuple(item.name for item in hosts)
    good = Inventory(
        hosts=hosts,
        groups={"berth": names, "ray_head": names[:1], "ray_slots": names},
        roles=tuple(role.name for role in ROLES),
        options=frozenset(option.name for role in ROLES for option in role.options),
        derived=frozenset(name for role in ROLES for name in role.derived),
    )
    return replace(good, **changes)


def wanted(name: str = "gpu1", **changes: Any) -> Expectation:
    good = Expectation(
        host=name,
        slot_host=name,
        head=False,
        slots=True,
        cluster="c-1",
        state_dir=STATE,
        run_dir=RUN,
        cache_dir=CACHE,
        systemd=True,
        simulate="false",
        runtime=f"{STATE}/runtime/current",
        agent_python="python3.12",
        runtime_python="python3.12",
        disk_mib=20_480,
        inodes=20_000,
        nofile=65_536,
        clock_offset_s=5,
        slot_memory_mib=16_384,
        slot_object_store_mib=512,
        head_memory_mib=0,
        ports={"serve_apps_http_port": 8000, "ray_slot_metrics_port_base + 1": 8501},
    )
    return replace(good, **changes)


def facts(name: str = "gpu1", **changes: Any) -> HostFacts:
    number = int(name[-1])
    good = HostFacts(
        system="Linux",
        hostname=name,
        machine_id=f"id-{name}",
        kernel="6.8.0-60-generic",
        architecture="x86_64",
        os=OsRelease("ubuntu", "24.04", "Ubuntu 24.04.2 LTS"),
        python="3.12.3",
        euid=0,
        memory_mib=500_000,
        nofile_hard=1_048_576,
        nr_open=1_048_576,
        time_start=1000.2,
        time_end=1000.6,
        clock_synchronised=True,
        time_daemons=("chronyd",),
        interpreters={"python3.12": Interpreter("3.12.3", True)},
        commands={},
        exists={f"{STATE}/runtime/current": False},
        filesystems={
            STATE: DISK,
            CACHE: DISK,
            RUN: FileSystem(RUN, "/run", "tmpfs", ("rw", "noexec"), 50_000, 49_000, 900_000, 890_000),
            "/tmp": DISK,
            "/dev/shm": FileSystem("/dev/shm", "/dev/shm", "tmpfs", ("rw",), 250_000, 250_000, 900_000, 890_000),
        },
        addresses={f"10.0.0.{number}": Address(f"10.0.0.{number}", True, "eth0", 9000)},
        nvidia=Nvidia("580.95.05", tuple(NvidiaGpu(f"GPU-{name}-{i}", "NVIDIA L40S") for i in range(4)), 4),
    )
    return replace(good, **changes)


def answer(name: str = "gpu1", **changes: Any) -> Answer:
    return Answer(facts(name, **changes), before=1000.0, after=1001.0)


def probe(to: str, port: int = 22, state: str = "open", mtu: int | None = 9000) -> Probe:
    return Probe(to, f"10.0.0.{to[-1]}", port, state, mtu)


def said(problems: list[Problem]) -> list[tuple[str, str, tuple[str, ...]]]:
    return sorted((item.severity, item.kind, item.objects) for item in problems)


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]
