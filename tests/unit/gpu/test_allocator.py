"""Memory on simulated GPUs: never oversold, freed with its process, numbered as CUDA numbers devices."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest

from berth.errors import BerthError
from berth.gpu.sim import allocator
from berth.gpu.sim.allocator import Device, visible_devices

USED = "out = [n.nvmlDeviceGetMemoryInfo(h(i), n.nvmlMemory_v2).used >> 20 for i in range(3)]"
PRELUDE = "import json, os\nfrom berth.gpu.sim import allocator as a\nfrom berth.errors import BerthError\n"


def test_scale_and_context(simulate: Any) -> None:
    code = """
        first = a.allocate(100 * 2**20)
        second = a.allocate_mib(100)
        other = a.allocate_mib(100, device=2)
        a.free(second)
        print(json.dumps([first.mib, second.mib, other.mib, first.uuid == other.uuid]))
    """
    assert simulate().python(PRELUDE + textwrap.dedent(code)) == [300, 100, 200, False]


def test_out_of_memory_names_gpu_asked_free_and_total(simulate: Any) -> None:
    code = """
        held = a.allocate_mib(9000)
        try:
            a.allocate_mib(401)
        except MemoryError as e:
            named = [type(e).__name__, e.uuid == held.uuid, held.uuid in str(e)]
            print(json.dumps([*named, e.asked_mib, e.free_mib, e.total_mib]))
    """
    assert simulate().python(PRELUDE + textwrap.dedent(code)) == ["SimulatedOutOfMemory", True, True, 401, 400, 10000]


def test_the_last_mib_is_given_and_not_one_more(simulate: Any) -> None:
    code = """
        a.allocate_mib(9400)
        try: a.allocate(1)
        except MemoryError: print(json.dumps("full"))
    """
    assert simulate().python(PRELUDE + textwrap.dedent(code)) == "full"


def test_a_leak_takes_from_what_is_free(simulate: Any) -> None:
    sim = simulate()
    sim.inject("leak", "0", "9000")
    code = "try: a.allocate_mib(500)\nexcept MemoryError as e: print(json.dumps(e.free_mib))"
    assert sim.python(PRELUDE + code) == 500


def test_racing_processes_never_oversell(simulate: Any) -> None:
    """20 processes take 150 MiB at a time from one GPU of 9500 MiB until it is full, all at once."""
    sim = simulate()
    code = """
        go, ready = os.pipe(), os.pipe()
        done, keep = os.pipe(), os.pipe()
        for _ in range(20):
            if os.fork() == 0:
                os.close(go[1]); os.close(keep[1])
                os.read(go[0], 1)
                taken = 0.0
                try:
                    while True: taken += a.allocate_mib(150).mib
                except MemoryError:
                    pass
                os.write(done[1], b"%08d" % taken)
                os.read(keep[0], 1)
                os._exit(0)
        os.close(go[1])
        sums = [int(os.read(done[0], 8)) for _ in range(20)]
        import pynvml as n
        n.nvmlInit()
        d = n.nvmlDeviceGetHandleByIndex(0)
        used = n.nvmlDeviceGetMemoryInfo(d, n.nvmlMemory_v2).used >> 20
        listed = [p.usedGpuMemory >> 20 for p in n.nvmlDeviceGetComputeRunningProcesses(d)]
        os.close(keep[1])
        for _ in range(20): os.wait()
        after = n.nvmlDeviceGetMemoryInfo(d, n.nvmlMemory_v2).used
        print(json.dumps([sum(sums), used, sum(listed), after]))
    """
    held, used, listed, after = sim.python(PRELUDE + textwrap.dedent(code))
    assert held == used == listed
    # Less than one more allocation (context included) is left over, and nothing was sold twice.
    assert 9500 - 250 < used <= 9500
    assert after == 0


def test_sigkill_frees_at_once_and_before_the_parent_reaps(simulate: Any) -> None:
    sim = simulate()
    holder = sim.hold(5000, device=1)
    assert sim.nvml(USED) == [0, 5100, 0]
    holder.send_signal(signal.SIGKILL)
    # Not waited for: a zombie by now.
    while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    assert sim.nvml(USED) == [0, 0, 0]
    assert sim.python(PRELUDE + "print(json.dumps(a.allocate_mib(9400, 1).mib))") == 9500
    holder.communicate()


def test_a_forked_child_starts_with_nothing_and_frees_nothing_of_its_parent(simulate: Any) -> None:
    code = """
        held = a.allocate_mib(1000)
        if os.fork() == 0:
            try: a.free(held)
            except BerthError: os._exit(0 if a.allocate_mib(10).mib == 110 else 2)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.wait()[1])
        import pynvml as n
        n.nvmlInit()
        used = n.nvmlDeviceGetMemoryInfo(n.nvmlDeviceGetHandleByIndex(0), n.nvmlMemory_v2).used >> 20
        a.free(held)
        try: a.free(held)
        except BerthError as e: print(json.dumps([code, used, "holds no allocation" in str(e)]))
    """
    assert simulate().python(PRELUDE + textwrap.dedent(code)) == [0, 1100, True]


def test_the_state_file_does_not_grow_with_every_process(simulate: Any) -> None:
    sim = simulate()
    for _ in range(3):
        sim.python(PRELUDE + "a.allocate_mib(1)\nprint(1)")
    assert (sim.dir / "state").stat().st_size == 3 * 96


def test_lost_gpu_refuses_and_check_tells(simulate: Any) -> None:
    sim = simulate()
    code = f"""
        from pathlib import Path
        from berth.gpu.sim import build
        a.allocate_mib(1)
        a.check()
        build.inject_card(Path({str(sim.dir)!r}), "0", lost=True)
        out = []
        for call in (a.check, lambda: a.allocate_mib(1)):
            try: call()
            except a.SimulatedGpuLost as e: out.append("is lost" in str(e))
        print(json.dumps(out))
    """
    assert sim.python(PRELUDE + textwrap.dedent(code)) == [True, True]


@pytest.mark.parametrize(
    ("visible", "shown"), [("2", [2]), ("1,0", [1, 0]), ("0,7,1", [0]), ("", []), ("-1", []), (None, [0, 1, 2])]
)
def test_devices_are_numbered_by_cuda_visible_devices(visible: str | None, shown: list[int], simulate: Any) -> None:
    sim = simulate()
    code = """
        uuids, out = [d.uuid for d in a.devices()], []
        try:
            while True: out.append(uuids.index(a.allocate_mib(1, len(out)).uuid))
        except BerthError: print(json.dumps(out))
    """
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert sim.python(PRELUDE + textwrap.dedent(code), **env) == shown


def test_the_variable_is_read_once_like_cuda_does(simulate: Any) -> None:
    code = """
        first = a.allocate_mib(1).uuid
        os.environ["CUDA_VISIBLE_DEVICES"] = "2"
        print(json.dumps(a.allocate_mib(1).uuid == first))
    """
    assert simulate().python(PRELUDE + textwrap.dedent(code), CUDA_VISIBLE_DEVICES="1") is True


PRESENT = (
    Device(0, "GPU-aa11"),
    Device(1, "GPU-aa22"),
    Device(2, "GPU-bb33", in_mig_mode=True),
    Device(2, "MIG-cc44", parent="GPU-bb33"),
    Device(2, "MIG-cc55", parent="GPU-bb33"),
)


@pytest.mark.parametrize(
    ("value", "uuids"),
    [
        ("GPU-aa22", ["GPU-aa22"]),
        ("GPU-aa2,GPU-aa1", ["GPU-aa22", "GPU-aa11"]),
        ("GPU-aa", []),
        ("0,GPU-zz,1", ["GPU-aa11"]),
        ("1,1,0", ["GPU-aa22"]),
        (" 1 , 0 ", ["GPU-aa22", "GPU-aa11"]),
        ("0,x", ["GPU-aa11"]),
        ("NoDevFiles", []),
        ("MIG-cc55", ["MIG-cc55"]),
        ("MIG-cc55,MIG-cc44", ["MIG-cc55"]),
        ("MIG-cc", []),
        ("2", ["MIG-cc44"]),
        ("GPU-bb33", ["MIG-cc44"]),
        ("MIG-cc44,0", ["MIG-cc44"]),
        (None, ["GPU-aa11", "GPU-aa22"]),
    ],
)
def test_cuda_visible_devices(value: str | None, uuids: list[str]) -> None:
    assert [device.uuid for device in visible_devices(value, PRESENT)] == uuids


def test_a_mig_instance_is_held_by_its_uuid(simulate: Any) -> None:
    sim = simulate("a100-mig")
    code = "out = n.nvmlDeviceGetUUID(n.nvmlDeviceGetMigDeviceHandleByIndex(h(0), 1))"
    uuid = sim.nvml(code)
    holder = sim.hold(1000, CUDA_VISIBLE_DEVICES=uuid)
    code = """
        m = [n.nvmlDeviceGetMigDeviceHandleByIndex(h(0), i) for i in range(3)]
        listed = lambda d: [p.gpuInstanceId for p in n.nvmlDeviceGetComputeRunningProcesses(d)]
        out = [[n.nvmlDeviceGetMemoryInfo(d).used >> 20, listed(d)] for d in (*m, h(0), h(1))]
    """
    try:
        assert sim.nvml(code) == [[0, []], [1400, [2]], [0, []], [1400 + 768, [2]], [768, []]]
    finally:
        holder.kill()
        holder.communicate()


def test_without_a_simulation_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BERTH_GPU_SIM", raising=False)
    assert not allocator.active()
    with pytest.raises(BerthError, match="no GPU simulation is in force"):
        allocator.allocate(1)
