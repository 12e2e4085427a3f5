"""The simulated libnvidia-ml.so.1, called through nvidia-ml-py as every tool calls the real one."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from berth.gpu.sim import build
from berth.gpu.sim.profile import expand, parse, read_yaml, shipped

EXPECTED = {
    "a100-mig": ["NVIDIA A100-SXM4-80GB"] * 2,
    "h100-x2": ["NVIDIA H100 80GB HBM3"] * 2,
    "h100-x2-l40s-x2": ["NVIDIA H100 80GB HBM3"] * 2 + ["NVIDIA L40S"] * 2,
    "h200-x8-nvlink": ["NVIDIA H200"] * 8,
    "l40s-x2": ["NVIDIA L40S"] * 2,
    "l40s-x4": ["NVIDIA L40S"] * 4,
}
EVERY_CARD = """
out = {"driver": n.nvmlSystemGetDriverVersion(), "cuda": n.nvmlSystemGetCudaDriverVersion(), "gpus": []}
for i in range(n.nvmlDeviceGetCount()):
    d = h(i)
    m1, m2, pci = n.nvmlDeviceGetMemoryInfo(d), n.nvmlDeviceGetMemoryInfo(d, n.nvmlMemory_v2), n.nvmlDeviceGetPciInfo(d)
    same = n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(d)))
    by_pci = n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByPciBusId(pci.busId))
    out["gpus"].append({"name": n.nvmlDeviceGetName(d), "uuid": n.nvmlDeviceGetUUID(d),
        "index": n.nvmlDeviceGetIndex(d),
        "v1": [m1.total, m1.free, m1.used], "v2": [m2.total, m2.reserved, m2.free, m2.used], "by": [same, by_pci],
        "pci": pci.busId, "legacy": pci.busIdLegacy, "cc": n.nvmlDeviceGetCudaComputeCapability(d),
        "numa": list(n.nvmlDeviceGetMemoryAffinity(d, 1, 0))})
"""


def test_every_shipped_profile_is_expected() -> None:
    assert set(shipped()) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_profile_is_what_the_driver_shows(name: str, simulate: Any) -> None:
    seen = simulate(name).nvml(EVERY_CARD)
    profile = expand(parse(read_yaml(shipped()[name]), name), "host1", name)
    assert [gpu["name"] for gpu in seen["gpus"]] == EXPECTED[name]
    assert (seen["driver"], seen["cuda"]) == (profile.driver_version, 13000)
    for index, (gpu, card) in enumerate(zip(seen["gpus"], profile.gpus, strict=True)):
        total, reserved = card.memory_mib * 2**20, card.reserved_mib * 2**20
        assert gpu["v1"] == [total, total - reserved, reserved]
        assert gpu["v2"] == [total, reserved, total - reserved, 0]
        assert (gpu["index"], gpu["uuid"], gpu["by"]) == (index, card.uuid, [card.uuid] * 2)
        assert gpu["pci"] == card.pci_bus_id
        assert gpu["legacy"] == card.pci_bus_id[4:]
        assert ".".join(map(str, gpu["cc"])) == card.compute_capability
        assert gpu["numa"] == [1 << card.numa_node]


def test_no_two_hosts_share_a_uuid_and_a_host_keeps_its_own() -> None:
    data = read_yaml(shipped()["h200-x8-nvlink"])
    uuids = [[gpu.uuid for gpu in expand(parse(data, "p"), host, "p").gpus] for host in ("a", "b", "a")]
    assert uuids[0] == uuids[2]
    assert not set(uuids[0]) & set(uuids[1])


def test_soname_is_the_drivers(built_library: Path) -> None:
    shown = subprocess.run(
        ["readelf", "-d", built_library / "libnvidia-ml.so.1"], capture_output=True, text=True, check=True
    )
    assert "soname: [libnvidia-ml.so.1]" in shown.stdout


def test_a_call_before_init_is_uninitialized(simulate: Any) -> None:
    code = """
        out = [err(n.nvmlDeviceGetName, h(0))]
        n.nvmlShutdown()
        out += [err(n.nvmlDeviceGetCount), err(n.nvmlDeviceGetHandleByIndex, 0), err(n.nvmlSystemGetDriverVersion)]
        out += [err(n.nvmlDeviceGetSerial, None), err(n.nvmlShutdown)]
    """
    assert simulate().nvml(code) == [None] + ["NVMLError_Uninitialized"] * 5


def test_what_is_not_simulated_never_succeeds(simulate: Any) -> None:
    calls = {
        "nvmlDeviceGetSerial(d)": "NVMLError_NotSupported",
        "nvmlDeviceGetNumaNodeId(d)": "NVMLError_NotSupported",
        "nvmlDeviceGetMigMode(d)": "NVMLError_NotSupported",
        "nvmlDeviceGetNvLinkState(d, 0)": "NVMLError_NotSupported",
        "nvmlDeviceSetPowerManagementLimit(d, 1)": "NVMLError_NotSupported",
        "nvmlDeviceGetTemperature(d, 0)": "NVMLError_NotSupported",
        "nvmlDeviceGetAttributes(d)": "NVMLError_NotSupported",
        "nvmlDeviceGetAccountingMode(d)": "NVMLError_FunctionNotFound",
        "nvmlDeviceGetHandleByIndex(3)": "NVMLError_InvalidArgument",
        "nvmlDeviceGetHandleByUUID('GPU-none')": "NVMLError_NotFound",
        "nvmlSystemGetProcessName(2**30)": "NVMLError_NotFound",
    }
    code = f"d = h(0)\nout = [err(lambda c=c: eval('n.' + c)) for c in {list(calls)!r}]"
    assert simulate().nvml(code) == list(calls.values())


def test_every_exported_function_refuses_or_needs_init(built_library: Path) -> None:
    """No export reports success to a caller that never initialised it, but those that NVML lets answer then."""
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", built_library / "libnvidia-ml.so.1"], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in symbols.stdout.splitlines() if " T nvml" in line]
    before_init = ("nvmlInit", "nvmlErrorString", "nvmlSystemGetCudaDriverVersion")
    checked = [name for name in names if not name.startswith(before_init)]
    assert len(checked) > 90
    code = (
        f"import ctypes, sys\nlib = ctypes.CDLL({str(built_library / 'libnvidia-ml.so.1')!r})\n"
        "b = [ctypes.create_string_buffer(256) for _ in range(4)]\n"
        f"print([name for name in {checked!r} if getattr(lib, name)(*b) == 0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_version_mismatch_is_refused(simulate: Any) -> None:
    code = "out = err(lambda: n.nvmlDeviceGetMemoryInfo(h(0), version=0x01000028))"
    assert simulate().nvml(code) == "NVMLError_ArgumentVersionMismatch"


def test_without_a_profile_the_driver_is_not_loaded(simulate: Any) -> None:
    sim = simulate()
    (sim.dir / "profile.compiled").unlink()
    code = "import json, pynvml as n\ntry: n.nvmlInit()\nexcept n.NVMLError as e: print(json.dumps(e.value))"
    assert sim.python(code) == 9


def test_library_finds_its_profile_by_its_own_place(simulate: Any) -> None:
    assert simulate().nvml("out = n.nvmlDeviceGetCount()", BERTH_GPU_SIM="") == 3


def test_lost_gpu_is_counted_and_answers_nothing(simulate: Any) -> None:
    sim = simulate()
    code = f"""
        import subprocess, sys
        d, uuid = h(1), n.nvmlDeviceGetUUID(h(1))
        cli = [sys.executable, "-m", "berth.gpu.sim", "inject", "--dir", {str(sim.dir)!r}]
        subprocess.run([*cli, "lose", "1"], check=True)
        out = [n.nvmlDeviceGetCount(), err(h, 1), err(n.nvmlDeviceGetHandleByUUID, uuid), err(n.nvmlDeviceGetName, d),
               err(n.nvmlDeviceGetMemoryInfo, d), err(h, 0)]
        subprocess.run([*cli, "restore", "1"], check=True)
        out.append(n.nvmlDeviceGetUUID(d) == uuid)
    """
    assert sim.nvml(code) == [3] + ["NVMLError_GpuIsLost"] * 4 + [None, True]


def test_xid_is_an_event_of_its_gpu(simulate: Any) -> None:
    sim = simulate()
    sim.inject("xid", "0", "31")
    code = f"""
        import subprocess, sys, time
        s = n.nvmlEventSetCreate()
        for i in range(3):
            assert n.nvmlDeviceGetSupportedEventTypes(h(i)) == n.nvmlEventTypeXidCriticalError
            n.nvmlDeviceRegisterEvents(h(i), n.nvmlEventTypeXidCriticalError, s)
        begin = time.monotonic()
        out = [err(n.nvmlEventSetWait, s, 100), time.monotonic() - begin >= 0.1]
        cli = [sys.executable, "-m", "berth.gpu.sim", "inject", "--dir", {str(sim.dir)!r}, "xid", "2", "79"]
        subprocess.Popen(cli)
        e = n.nvmlEventSetWait(s, 10000)
        out += [n.nvmlDeviceGetIndex(e.device), e.eventType, e.eventData, err(n.nvmlEventSetWait, s, 50)]
        out += [err(n.nvmlDeviceRegisterEvents, h(0), n.nvmlEventTypeClock, s), n.nvmlEventSetFree(s)]
        out += [err(n.nvmlEventSetWait, s, 10)]
    """
    timeout, refused = "NVMLError_Timeout", "NVMLError_NotSupported"
    assert sim.nvml(code) == [timeout, True, 2, 8, 79, timeout, refused, None, "NVMLError_InvalidArgument"]
    assert "NVRM: Xid (PCI:0000:13:00): 79" in (sim.dir / "kernel.log").read_text()


def test_renumbered_cards_keep_uuid_and_address(simulate: Any) -> None:
    sim = simulate()
    code = "out = [[n.nvmlDeviceGetUUID(h(i)), n.nvmlDeviceGetPciInfo(h(i)).busId] for i in range(3)]"
    before = sim.nvml(code)
    sim.inject("renumber", "2,0,1")
    assert sim.nvml(code) == [before[2], before[0], before[1]]


def test_leak_is_used_memory_that_no_process_holds(simulate: Any) -> None:
    sim = simulate()
    sim.inject("leak", "1", "700")
    code = """
        out = [[n.nvmlDeviceGetMemoryInfo(h(i), n.nvmlMemory_v2).used >> 20 for i in range(3)],
               n.nvmlDeviceGetComputeRunningProcesses(h(1))]
    """
    assert sim.nvml(code) == [[0, 700, 0], []]


def test_processes_in_all_three_shapes(simulate: Any) -> None:
    sim = simulate()
    holders = [sim.hold(200), sim.hold(300)]
    code = """
        import ctypes
        from ctypes import c_uint, c_ulonglong
        class V1(ctypes.Structure): _fields_ = [("pid", c_uint), ("used", c_ulonglong)]
        out = {}
        lib = ctypes.CDLL("libnvidia-ml.so.1")
        for name, kind in (("", V1), ("_v2", n.c_nvmlProcessInfo_v2_t), ("_v3", n.c_nvmlProcessInfo_v3_t)):
            call, size = getattr(lib, "nvmlDeviceGetComputeRunningProcesses" + name), c_uint(0)
            codes = [call(h(0), ctypes.byref(size), None)]
            size.value, one = 1, (kind * 1)()
            codes += [call(h(0), ctypes.byref(size), one), size.value]
            many = (kind * size.value)()
            codes += [call(h(0), ctypes.byref(size), many)]
            out[name] = [codes, {p.pid: getattr(p, "used", None) or p.usedGpuMemory for p in many}]
    """
    try:
        seen = sim.nvml(code)
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    want = {str(holders[0].pid): 300 * 2**20, str(holders[1].pid): 400 * 2**20}
    assert seen == {name: [[7, 7, 2, 0], want] for name in ("", "_v2", "_v3")}


def test_hidden_processes_leave_memory_used(simulate: Any) -> None:
    sim = simulate()
    sim.inject("hide-processes")
    holder = sim.hold(200)
    code = """
        used = n.nvmlDeviceGetMemoryInfo(h(0), n.nvmlMemory_v2).used >> 20
        out = [n.nvmlDeviceGetComputeRunningProcesses(h(0)), used]
    """
    try:
        assert sim.nvml(code) == [[], 300]
    finally:
        holder.kill()
        holder.communicate()


def test_mig_instances(simulate: Any) -> None:
    sim = simulate("a100-mig")
    code = """
        out = {"modes": [n.nvmlDeviceGetMigMode(h(0)), n.nvmlDeviceGetMigMode(h(1))],
               "max": n.nvmlDeviceGetMaxMigDeviceCount(h(0)),
               "off": err(n.nvmlDeviceGetMigDeviceHandleByIndex, h(1), 0),
               "none": err(n.nvmlDeviceGetMigDeviceHandleByIndex, h(0), 3), "instances": []}
        for i in range(3):
            m = n.nvmlDeviceGetMigDeviceHandleByIndex(h(0), i)
            uuid, a = n.nvmlDeviceGetUUID(m), n.nvmlDeviceGetAttributes(m)
            parent = n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(n.nvmlDeviceGetHandleByUUID(uuid))
            out["instances"].append([n.nvmlDeviceGetName(m), n.nvmlDeviceGetMemoryInfo(m).total >> 20, uuid[:4],
                n.nvmlDeviceIsMigDeviceHandle(m).value, n.nvmlDeviceGetUUID(parent) == n.nvmlDeviceGetUUID(h(0)),
                n.nvmlDeviceGetGpuInstanceId(m), n.nvmlDeviceGetComputeInstanceId(m),
                a.gpuInstanceSliceCount, a.memorySizeMB])
    """
    name = "NVIDIA A100-SXM4-80GB MIG "
    assert sim.nvml(code) == {
        "modes": [[1, 1], [0, 0]],
        "max": 7,
        "off": "NVMLError_NotSupported",
        "none": "NVMLError_NotFound",
        "instances": [
            [name + "3g.40gb", 40192, "MIG-", 1, True, 1, 0, 3, 40192],
            [name + "2g.20gb", 19968, "MIG-", 1, True, 2, 0, 2, 19968],
            [name + "1g.10gb", 9728, "MIG-", 1, True, 3, 0, 1, 9728],
        ],
    }


def test_nvlink_direct_and_through_a_switch(simulate: Any) -> None:
    code = """
        count = n.nvmlDeviceGetCount()
        pairs = [[i, j] for i in range(count) for j in range(count) if i != j
                 and n.nvmlDeviceGetP2PStatus(h(i), h(j), 2) == n.NVML_P2P_STATUS_OK]
        links = lambda i: sum(n.nvmlDeviceGetNvLinkState(h(i), k) for k in range(18))
        active = [err(links, i) or links(i) for i in range(count)]
        kind = n.nvmlDeviceGetNvLinkRemoteDeviceType(h(0), 0)
        remote = n.nvmlDeviceGetNvLinkRemotePciInfo(h(0), 0).busId
        out = [pairs, active, kind, remote == n.nvmlDeviceGetPciInfo(h(1)).busId, n.nvmlDeviceGetNvLinkVersion(h(0), 0),
               [n.nvmlDeviceGetTopologyCommonAncestor(h(0), h(k)) for k in range(count)]]
    """
    none = "NVMLError_NotSupported"
    direct = simulate("h100-x2-l40s-x2", name="direct").nvml(code)
    assert direct == [[[0, 1], [1, 0]], [1, 1, none, none], 0, True, 4, [0, 40, 50, 50]]
    switched = simulate("h200-x8-nvlink", name="switched").nvml(code)
    everyone = [[i, j] for i in range(8) for j in range(8) if i != j]
    assert switched == [everyone, [18] * 8, 2, False, 4, [0] + [40] * 3 + [50] * 4]


def test_a_damaged_profile_leaves_the_last_good_one_in_force(simulate: Any) -> None:
    sim = simulate()
    code = f"""
        path = {str(sim.dir / "profile.compiled")!r}
        text = open(path).read()
        out = [n.nvmlDeviceGetCount()]
        for bad in (text[:200], text.replace("total_mib", "totl_mib"), "", "nonsense"):
            open(path, "w").write(bad)
            out.append(n.nvmlDeviceGetCount())
        open(path, "w").write(text.replace("580.95.05", "590.1"))
        out.append(n.nvmlSystemGetDriverVersion())
    """
    assert sim.nvml(code) == [3, 3, 3, 3, 3, "590.1"]


def test_a_reused_pid_is_not_its_predecessor(simulate: Any) -> None:
    sim = simulate()
    uuid = sim.nvml("out = n.nvmlDeviceGetUUID(h(0))")
    started = int(Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19])
    used = []
    for start in (started - 1, started):
        record = struct.pack("=iIQQQ64s", os.getpid(), 0, start, 1, 250 * 2**20, uuid.encode())
        header = (sim.dir / "state").read_bytes()[:96]
        (sim.dir / "state").write_bytes(header + record)
        used.append(sim.nvml("out = n.nvmlDeviceGetMemoryInfo(h(0), n.nvmlMemory_v2).used >> 20"))
    assert used == [0, 250]


def test_rebuild_only_when_the_source_changes(
    tmp_path: Path, built_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    for file in built_library.iterdir():
        (tmp_path / "lib" / file.name).write_bytes(file.read_bytes())
    assert not build.build_library(tmp_path)
    other = tmp_path / "nvml.c"
    other.write_text('__attribute__((visibility("default"))) int other_source(void) { return 7; }')
    monkeypatch.setattr(build, "SOURCE", other)
    assert build.build_library(tmp_path)
    assert ctypes.CDLL(str(tmp_path / "lib" / "libnvidia-ml.so.1")).other_source() == 7
    assert sorted(path.name for path in (tmp_path / "lib").iterdir()) == ["libnvidia-ml.so.1", "source.sha256"]


@pytest.mark.runtime
def test_ray_counts_and_names_the_simulated_gpus(simulate: Any, runtime_python: str) -> None:
    """Ray's own detection, with Ray's own copy of pynvml."""
    sim = simulate("l40s-x4")
    code = (
        "from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as m\n"
        "from ray.dashboard.modules.reporter.gpu_providers import NvidiaGpuProvider\n"
        "seen = NvidiaGpuProvider().get_gpu_utilization()\n"
        "print('RESULT', m.get_current_node_num_accelerators(), m.get_current_node_accelerator_type(), \n"
        "      [g['uuid'] for g in seen], sorted(p for g in seen for p in g['processes_pids'] or ()))"
    )
    holder = sim.hold(1000)
    try:
        done = subprocess.run(
            [runtime_python, "-c", code], env=sim.env(), capture_output=True, text=True, timeout=600, check=False
        )
    finally:
        holder.kill()
        holder.communicate()
    uuids = sim.nvml("out = [n.nvmlDeviceGetUUID(h(i)) for i in range(4)]")
    assert f"RESULT 4 L40S {uuids} [{holder.pid}]" in done.stdout, done.stdout + done.stderr


def test_many_reloads_while_reading_never_show_half_a_profile(simulate: Any, tmp_path: Path) -> None:
    sim, stop = simulate(), tmp_path / "stop"
    flipper = (
        "from pathlib import Path\nfrom berth.gpu.sim import build\n"
        f"d, stop = Path({str(sim.dir)!r}), Path({str(stop)!r})\ni = 0\n"
        "while not stop.exists():\n    i += 1\n    build.inject(d, order=((0, 1, 2), (2, 1, 0))[i % 2])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", flipper], env=sim.env())
    code = """
        import time
        begin, seen = time.monotonic(), set()
        # Until both orders were seen, however late the other process begins, and some while longer.
        while time.monotonic() < begin + (1.2 if len(seen) > 1 else 60):
            seen.add((n.nvmlDeviceGetCount(), n.nvmlDeviceGetUUID(h(0))))
        out = sorted(seen)
    """
    seen = sim.nvml(code)
    stop.touch()
    assert process.wait() == 0
    assert {count for count, _ in seen} == {3}
    assert len(seen) == 2
