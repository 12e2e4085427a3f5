"""read_host against the simulated driver, in processes that see it through LD_LIBRARY_PATH alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from berth.codec import load
from berth.gpu.nvml import parse_xids
from berth.gpu.types import HostGpus

ROOT_ENV = {"PYTHONPATH": str(__import__("pathlib").Path(__file__).parents[3])}
READ = (
    "import json\nfrom berth.codec import dump\nfrom berth.gpu.nvml import read_host\n"
    "print(json.dumps(dump(read_host('gpu01', {known}))))"
)


def read(sim: Any, known: dict[int, str] | None = None, **env: str) -> HostGpus:
    return load(HostGpus, sim.python(READ.format(known=known), **env), "host")


def test_every_field(simulate: Any) -> None:
    sim = simulate("h100-x2-l40s-x2")
    host = read(sim)
    assert (host.host, host.driver_version, host.simulated, host.vram_scale) == ("gpu01", "580.95.05", True, 96.0)
    first, second, third, fourth = host.gpus
    assert (first.index, first.product, first.compute_capability) == (0, "NVIDIA H100 80GB HBM3", "9.0")
    assert (first.total_mib, first.reserved_mib, first.used_mib, first.numa_node) == (81559, 479, 0, 0)
    assert (first.pci_bus_id, first.mig_parent, first.lost, first.xid) == ("00000000:0B:00.0", None, None, None)
    assert (first.processes, third.numa_node, third.nvlink_peers) == ((), 1, ())
    assert (first.nvlink_peers, second.nvlink_peers) == ((second.uuid,), (first.uuid,))
    assert fourth.product == "NVIDIA L40S"


def test_processes_with_what_proc_tells_of_them(simulate: Any) -> None:
    sim = simulate()
    ours = sim.hold(1000, device=1, BERTH_CLUSTER="lab", BERTH_SLOT="gpu01-1")
    stranger = sim.hold(500, device=1)
    try:
        gpu = read(sim).gpus[1]
    finally:
        for process in (ours, stranger):
            process.kill()
            process.communicate()
    assert gpu.used_mib == 1700
    assert gpu.processes is not None
    by_pid = {process.pid: process for process in gpu.processes}
    assert set(by_pid) == {ours.pid, stranger.pid}
    mine, other = by_pid[ours.pid], by_pid[stranger.pid]
    assert (mine.vram_mib, mine.cluster, mine.slot) == (1100, "lab", "gpu01-1")
    assert (other.vram_mib, other.cluster, other.slot) == (600, None, None)
    assert mine.command is not None
    assert "berth.gpu.sim hold" in mine.command
    assert mine.user
    assert mine.ancestors[0] == os.getpid()
    assert mine.ancestors[-1] == 1


def test_memory_used_without_a_process_shown_is_not_nobody(simulate: Any) -> None:
    sim = simulate()
    sim.inject("hide-processes")
    holder = sim.hold(1000)
    try:
        first, second, _ = read(sim).gpus
    finally:
        holder.kill()
        holder.communicate()
    assert (first.used_mib, first.processes) == (1100, None)
    assert (second.used_mib, second.processes) == (0, ())


def test_a_little_used_by_the_driver_itself_is_nobody(simulate: Any) -> None:
    sim = simulate()
    sim.inject("leak", "0", "30")
    sim.inject("leak", "1", "900")
    assert [gpu.processes for gpu in read(sim).gpus] == [(), None, ()]


def test_used_is_without_the_reserve_where_the_driver_tells_it_apart(simulate: Any) -> None:
    sim = simulate()
    holder = sim.hold(1000)
    # An old driver knows the first version of the call only.
    old = (
        "import pynvml\nreal = pynvml.nvmlDeviceGetMemoryInfo\n"
        "def first_only(handle, version=None):\n"
        "    if version: raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)\n    return real(handle)\n"
        "pynvml.nvmlDeviceGetMemoryInfo = first_only\n"
    )
    try:
        new_gpu, old_gpu = read(sim).gpus[0], load(HostGpus, sim.python(old + READ.format(known=None)), "host").gpus[0]
    finally:
        holder.kill()
        holder.communicate()
    assert (new_gpu.total_mib, new_gpu.reserved_mib, new_gpu.used_mib) == (10000, 500, 1100)
    assert (old_gpu.total_mib, old_gpu.reserved_mib, old_gpu.used_mib) == (10000, 0, 1600)


def test_mig_instances_stand_for_their_parent(simulate: Any) -> None:
    sim = simulate("a100-mig")
    host = read(sim)
    name = "NVIDIA A100-SXM4-80GB"
    assert [(gpu.index, gpu.product, gpu.uuid[:4], gpu.total_mib) for gpu in host.gpus] == [
        (0, f"{name} MIG 3g.40gb", "MIG-", 40192),
        (0, f"{name} MIG 2g.20gb", "MIG-", 19968),
        (0, f"{name} MIG 1g.10gb", "MIG-", 9728),
        (1, name, "GPU-", 81920),
    ]
    parents = {gpu.mig_parent for gpu in host.gpus[:3]}
    assert len(parents) == 1
    assert parents.pop() not in {gpu.uuid for gpu in host.gpus}
    holder = sim.hold(1000, CUDA_VISIBLE_DEVICES=host.gpus[2].uuid)
    try:
        used = [(gpu.used_mib, [process.pid for process in gpu.processes or ()]) for gpu in read(sim).gpus]
    finally:
        holder.kill()
        holder.communicate()
    assert used == [(0, []), (0, []), (1400, [holder.pid]), (0, [])]


def test_lost_gpu_is_listed_and_its_uuid_taken_from_what_was_known(simulate: Any) -> None:
    sim = simulate()
    before = read(sim)
    sim.inject("lose", "1")
    lost = read(sim).gpus[1]
    assert (lost.uuid, lost.index, lost.lost, lost.processes) == ("lost-index-1", 1, "GPU is lost", None)
    # Where it sits only the kernel's log still tells.
    assert (lost.xid, lost.pci_bus_id) == (79, before.gpus[1].pci_bus_id)
    known = {gpu.index: gpu.uuid for gpu in before.gpus}
    assert [gpu.uuid for gpu in read(sim, known).gpus] == [gpu.uuid for gpu in before.gpus]
    sim.inject("renumber", "1,2,0")
    renumbered = [gpu.uuid for gpu in read(sim, known).gpus]
    assert renumbered == [before.gpus[position].uuid for position in (1, 2, 0)]
    # A stale memory never names two cards alike.
    assert read(sim, {0: before.gpus[2].uuid}).gpus[0].uuid == "lost-index-0"


def test_xid_of_the_gpu_that_had_it(simulate: Any) -> None:
    sim = simulate()
    sim.inject("xid", "2", "48")
    assert [gpu.xid for gpu in read(sim).gpus] == [None, None, 48]
    # A kernel log named outright comes first.
    other = sim.dir / "other.log"
    other.write_text("[1.0] NVRM: Xid (PCI:0000:0b:00): 13, pid=1\n[2.0] NVRM: Xid (PCI:0000:0b:00): 31, pid=1\n")
    assert [gpu.xid for gpu in read(sim, BERTH_GPU_KERNEL_LOG=str(other)).gpus] == [31, None, None]


def test_parse_xids() -> None:
    text = """
    Nov 21 gpu01 kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
    [ 12.3] NVRM: Xid (0000:d8:00): 31, Ch 00000008
    [ 12.4] NVRM: Xid (PCI:0001:d8:00 GPU-I:05): 45, pid=7, name=python
    [ 12.5] NVRM: Xid (PCI:0000:d8:00): 94, pid=8
    [ 12.6] NVRM: GPU at PCI:0000:17:00: GPU-1
    """
    assert parse_xids(text) == {"00000000:3B:00.0": 79, "00000000:D8:00.0": 94, "00000001:D8:00.0": 45}


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"LD_LIBRARY_PATH": ""}, ["libnvidia-ml.so.1 cannot be loaded", "nvidia_driver_simulate: true"]),
        ({"LD_LIBRARY_PATH": "{other}", "BERTH_GPU_SIM": "{sim}"}, ["another driver's", "LD_LIBRARY_PATH={sim}/lib"]),
        ({"LD_LIBRARY_PATH": "{sim}/lib", "BERTH_GPU_SIM": "/nowhere"}, ["NVML does not answer", "Driver Not Loaded"]),
    ],
)
def test_what_is_missing_is_told(env: dict[str, str], told: list[str], simulate: Any, tmp_path: Any) -> None:
    sim = simulate()
    source = "int nvmlInitWithFlags(unsigned f) { (void)f; return 0; }\nint nvmlShutdown(void) { return 0; }\n"
    (tmp_path / "other.c").write_text(source)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    filled = {key: value.format(sim=sim.dir, other=tmp_path) for key, value in env.items()}
    clean = {key: value for key, value in os.environ.items() if key not in ("LD_LIBRARY_PATH", "BERTH_GPU_SIM")}
    code = "from berth.gpu.nvml import read_host\nread_host('gpu01')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**clean, **ROOT_ENV, **filled}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for part in told:
        assert part.format(sim=sim.dir) in done.stderr


def test_show_and_remove_for_people(simulate: Any) -> None:
    sim = simulate()
    sim.inject("lose", "2")
    holder = sim.hold(1000)
    cli = [sys.executable, "-m", "berth.gpu.sim"]
    plain = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"} | ROOT_ENV

    def run(*words: str) -> Any:
        command = [*cli, *words, "--dir", str(sim.dir)]
        return subprocess.run(command, env=plain, capture_output=True, text=True, check=False)

    try:
        shown = run("show")
    finally:
        holder.kill()
        holder.communicate()
    assert shown.returncode == 0, shown.stderr
    for part in ("1100 of 9500 MiB used", f"pid {holder.pid}", "GPU is lost  XID 79", "NVIDIA L4"):
        assert part in shown.stdout
    full = run("hold", "--mib", "99999")
    assert full.returncode == 1
    assert "out of memory: asked 100099 MiB, free 9500 MiB" in full.stderr
    assert run("remove").stdout == "removed\n"
    assert run("show").returncode == 1
