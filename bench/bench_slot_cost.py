"""What one more slot costs a host that is idle: ``python -m bench.bench_slot_cost``

A head and one slot, then three slots more, on this machine, as Berth starts them and as plain ``ray start`` does (a
node per GPU by hand). The cost of a slot is a third of the difference: memory as PSS, pages that are shared counted by
share, and CPU over a while in which nothing is asked of the cluster. Needs a runtime environment (make up, or
BERTH_RUNTIME_PYTHON).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import requests

from bench.record import RESULTS, Target, finish, show
from berth.codec import dump
from berth.ray.ports import slot_ports
from berth.ray.start import NodeConfig, command, environment, slot_fields

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / ".berth/runtime/current/bin/python"
KNOWN_PSS_MIB, KNOWN_CPU_PERCENT = 131.0, 1.5
"""One more idle raylet as measured when Berth was designed; CPU at the upper end of 1.2 to 1.5 percent of a core."""
KINDS = {
    "raylet": "raylet/raylet",
    "runtime env agent": "ray::RuntimeEnvAgent",
    "dashboard agent": "ray::DashboardAgent",
    "log monitor": "log_monitor.py",
    "ray start --block": "--block",
    "berth.ray.keep": "berth/ray/keep.py",
}
"""Processes by what stands in their command line."""
PORT, DASHBOARD_PORT = 26390, 28275
MIB = 1024**2


@dataclass(frozen=True)
class Cost:
    """Of one more slot; ``pss_mib_of`` says which process takes how much of the memory."""

    way: str
    pss_mib: float
    cpu_percent: float
    pss_mib_of: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the results; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime-python", default=os.environ.get("BERTH_RUNTIME_PYTHON", str(RUNTIME)))
    parser.add_argument("--settle-s", type=float, default=40.0, help="seconds until a node has settled")
    parser.add_argument("--watch-s", type=float, default=60.0, help="seconds over which CPU is counted")
    parser.add_argument("--slots", type=int, default=3, help="slots added")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    ray = Path(options.runtime_python).with_name("ray")
    if not ray.exists():
        sys.exit(f"no runtime environment with Ray at {ray}; mend: make up, or set BERTH_RUNTIME_PYTHON")
    found = [measure(way, str(ray), options) for way in ("plain ray start", "berth")]
    plain, ours = found
    rows = [(item.way, f"{item.pss_mib:.0f}", f"{item.cpu_percent:.2f}", shares(item)) for item in found]
    rows += [("ratio", f"{ours.pss_mib / plain.pss_mib:.2f}", f"{ours.cpu_percent / plain.cpu_percent:.2f}", "")]
    show("One more idle slot", ("way", "PSS MiB", "CPU % of a core", "of which, MiB"), rows)
    targets = [
        Target(
            f"memory no more than measured before ({KNOWN_PSS_MIB:.0f} MiB)",
            f"{ours.pss_mib:.0f} MiB",
            ours.pss_mib <= KNOWN_PSS_MIB,
        ),
        Target(
            f"CPU no more than measured before ({KNOWN_CPU_PERCENT} % of a core)",
            f"{ours.cpu_percent:.2f} %",
            ours.cpu_percent <= KNOWN_CPU_PERCENT,
        ),
        Target(
            "less of both than plain ray start",
            f"{ours.pss_mib / plain.pss_mib:.2f} x the memory, {ours.cpu_percent / plain.cpu_percent:.2f} x the CPU",
            ours.pss_mib < plain.pss_mib and ours.cpu_percent < plain.cpu_percent,
        ),
    ]
    told = [] if arguments is None else list(arguments)
    figures = {"ways": [asdict(item) for item in found]}
    return finish("slot_cost", told or sys.argv[1:], figures, targets, options.results)


def measure(way: str, ray: str, options: argparse.Namespace) -> Cost:
    """One cluster of a way, with one slot and with ``options.slots`` more; removed afterwards."""
    work = Path(tempfile.mkdtemp(prefix="slot-"))
    token = work / "token"
    token.write_text("0123456789abcdef" * 4)
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        head = head_node(ray, work)
        nodes.append(start(way, head, work))
        wait_for_nodes(token, 1)
        nodes.append(start(way, slot_node(ray, work, 0), work))
        wait_for_nodes(token, 2)
        before = watch(nodes, options)
        for number in range(1, options.slots + 1):
            nodes.append(start(way, slot_node(ray, work, number), work))
        wait_for_nodes(token, 2 + options.slots)
        after = watch(nodes, options)
    finally:
        stop(nodes)
        shutil.rmtree(work, ignore_errors=True)
    of = {kind: (after[0][kind] - before[0].get(kind, 0.0)) / options.slots for kind in sorted(after[0])}
    # What the head alone has: shared pages are divided among more, so its share falls with every slot.
    of = {kind: round(mib, 1) for kind, mib in of.items()}
    return Cost(way, round(sum(of.values()), 1), round((after[1] - before[1]) / options.slots, 3), of)


def shares(cost: Cost) -> str:
    ordered = sorted(cost.pss_mib_of.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {mib:.0f}" for kind, mib in ordered if mib >= 1)


def head_node(ray: str, work: Path) -> NodeConfig:
    return NodeConfig(
        kind="head",
        name="head",
        cluster=f"bench-{os.getpid()}",
        ray=ray,
        node_ip="127.0.0.1",
        gcs_address=f"127.0.0.1:{PORT}",
        temp_dir=str(work / "head"),
        token_file=str(work / "token"),
        dashboard_agent_port=DASHBOARD_PORT + 1,
        metrics_port=DASHBOARD_PORT + 2,
        node_port_base=28400,
        node_port_count=100,
        num_cpus=0,
        memory_bytes=1024 * MIB,
        object_store_bytes=80 * MIB,
        dashboard_port=DASHBOARD_PORT,
        client_port=DASHBOARD_PORT + 3,
    )


def slot_node(ray: str, work: Path, number: int) -> NodeConfig:
    name = f"here-{number}"
    return replace(
        head_node(ray, work),
        kind="slot",
        name=name,
        temp_dir=str(work / name),
        **slot_fields(slot_ports(name, 28300, 28350, 28600, 100)),
        dashboard_port=0,
        client_port=0,
        num_cpus=8,
        log_monitor=number == 0,
        labels={"berth.host": "here"},
    )


def start(way: str, node: NodeConfig, work: Path) -> subprocess.Popen[bytes]:
    """A node in the foreground, in its own session: as a unit of Berth starts it, or as ``ray start --block`` does
    without what Berth adds or leaves out."""
    if way == "berth":
        nodes = work / f"{node.name}.json"
        nodes.write_text(json.dumps({node.name: dump(node)}))
        words = [str(Path(node.ray).with_name("python")), "-m", "berth.ray.launch", str(nodes), node.name]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
    else:
        words = [word for word in command(node) if not word.startswith(("--include-log-monitor", "--block"))]
        words.append("--block")
        kept = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "CUDA_VISIBLE_DEVICES", "BERTH_CLUSTER"}
        env = {key: value for key, value in environment(node, ()).items() if key in kept or key in os.environ}
    with (work / f"{node.name}.log").open("wb") as log:
        return subprocess.Popen(
            words, env=env, cwd=work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait_for_nodes(token: Path, count: int, timeout_s: float = 120.0) -> None:
    """Until the head counts that many nodes alive."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = requests.get(
                f"http://127.0.0.1:{DASHBOARD_PORT}/api/v0/nodes",
                headers={"Authorization": f"Bearer {token.read_text()}"},
                timeout=5,
            ).json()
            alive = [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
        except (requests.RequestException, ValueError, KeyError, TypeError):
            alive = []
        if len(alive) == count:
            return
        if time.monotonic() > deadline:
            sys.exit(f"{len(alive)} of {count} nodes came up within {timeout_s:.0f} s")
        time.sleep(1)


def watch(nodes: Sequence[subprocess.Popen[bytes]], options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """PSS in MiB by kind of process, and CPU in percent of a core, of the whole cluster once it has settled."""
    time.sleep(options.settle_s)
    first = {process.pid: cpu_s(process) for process in family(nodes)}
    begun = time.monotonic()
    time.sleep(options.watch_s)
    took = time.monotonic() - begun
    members = family(nodes)
    busy = sum(cpu_s(process) - first.get(process.pid, 0.0) for process in members)
    pss: Counter[str] = Counter()
    for process in members:
        pss[kind_of(process)] += pss_mib(process.pid)
    return dict(pss), 100 * busy / took


def kind_of(process: psutil.Process) -> str:
    try:
        words = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "ended"
    return next((kind for kind, sign in KINDS.items() if sign in words), "others")


def family(nodes: Iterable[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """Every process of the nodes; those whose parent ended stay in their session."""
    sessions = {node.pid for node in nodes}
    return [process for process in psutil.process_iter() if session(process.pid) in sessions]


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def pss_mib(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:"))) / 1024


def stop(nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every process of every node; slots first."""
    members = family(nodes)
    for node in reversed(nodes):
        node.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(members, timeout=20)
    for process in alive:
        process.kill()
    for node in nodes:
        node.wait()


if __name__ == "__main__":
    sys.exit(main())
