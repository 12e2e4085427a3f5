"""Convergence of site.yml on lab hosts, against the same steps typed by hand: ``python -m bench.bench_convergence``

For each number of GPU hosts: the first run of site.yml on fresh hosts, a run that changes nothing, the verification
alone, gathering facts; and on fresh hosts again `by_hand.sh`: ssh, pip, ray start, a PUT of the same Serve
config. Needs a Docker engine (make lab-engine) and the wheelhouse (make wheelhouse); removes its hosts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from bench.record import RESULTS, Target, finish, show

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LAB = ROOT / "inventories/lab"
INVENTORY = ROOT / ".berth/lab-bench"
WHEELHOUSE = ROOT / ".berth/wheelhouse"
NAME, NETWORK = "berth-bench", "172.31.79"
PROFILES = ("l40s-x2", "h100-x2")
MOST_NO_CHANGE = 1.5
"""A run that changes nothing may take this much of verification and fact gathering together."""


@dataclass(frozen=True)
class Figures:
    """Seconds for ``hosts`` GPU hosts and a head; ``no_change_s``, ``verify_s`` and ``facts_s`` are medians."""

    hosts: int
    first_s: float
    by_hand_s: float
    no_change_s: float
    verify_s: float
    facts_s: float

    @property
    def first_ratio(self) -> float:
        return self.first_s / self.by_hand_s

    @property
    def no_change_ratio(self) -> float:
        return self.no_change_s / (self.verify_s + self.facts_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the results; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4], help="numbers of GPU hosts")
    parser.add_argument("--repeat", type=int, default=3, help="runs of what changes nothing (the median counts)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = [measure(hosts, options.repeat) for hosts in options.hosts]
    rows = [
        (
            item.hosts,
            f"{item.first_s:.1f}",
            f"{item.by_hand_s:.1f}",
            f"{item.first_ratio:.2f}",
            f"{item.no_change_s:.1f}",
            f"{item.verify_s:.1f}",
            f"{item.facts_s:.1f}",
            f"{item.no_change_ratio:.2f}",
        )
        for item in found
    ]
    titles = ("GPU hosts", "first s", "by hand s", "ratio", "no change s", "verify s", "facts s", "ratio")
    show("Convergence on lab hosts, and a head", titles, rows)
    worst = max(item.no_change_ratio for item in found)
    targets = [
        Target(
            f"a run that changes nothing takes at most {MOST_NO_CHANGE} x verification and facts",
            f"{worst:.2f} x at most",
            worst <= MOST_NO_CHANGE,
        )
    ]
    first, last = found[0], found[-1]
    if last.hosts > first.hosts:
        growth = (last.no_change_s - first.no_change_s) / (last.hosts - first.hosts)
        print(f"each further host adds {growth:.2f} s to a run that changes nothing")
    figures = {"runs": [asdict(item) | {"no_change_ratio": item.no_change_ratio} for item in found]}
    told = [] if arguments is None else list(arguments)
    return finish("convergence", told or sys.argv[1:], figures, targets, options.results)


def measure(hosts: int, repeat: int) -> Figures:
    """Everything for one number of GPU hosts, on fresh hosts twice."""
    write_inventory(hosts)
    try:
        lab("destroy")
        lab("create")
        first = timed(lambda: playbook("site.yml", "-e", "strategy=pack"))
        no_change = statistics.median(timed(lambda: playbook("site.yml", unchanged=True)) for _ in range(repeat))
        verify = statistics.median(timed(lambda: playbook("playbooks/verify.yml")) for _ in range(repeat))
        facts = statistics.median(timed(gather_facts) for _ in range(repeat))
        work = prepare_by_hand(hosts)
        lab("destroy")
        lab("create")
        ssh = str(INVENTORY / "lab/ssh/config")
        gpu = [f"gpu{n + 1:02}={address(21 + n)}={PROFILES[n % 2]}" for n in range(hosts)]
        by_hand = timed(lambda: call(["bench/by_hand.sh", str(work), ssh, address(10), *gpu]))
        return Figures(hosts, first, by_hand, no_change, verify, facts)
    finally:
        lab("destroy")
        shutil.rmtree(INVENTORY, ignore_errors=True)


def address(number: int) -> str:
    return f"{NETWORK}.{number}"


def write_inventory(hosts: int) -> None:
    """An inventory like the lab's with ``hosts`` GPU hosts, its own name and network."""
    shutil.rmtree(INVENTORY, ignore_errors=True)
    shutil.copytree(LAB / "group_vars", INVENTORY / "group_vars")
    own = {"lab_name": NAME, "lab_network": NETWORK, "lab_dir": str(INVENTORY / "lab")}
    gpu = {
        f"gpu{n + 1:02}": {"lab_host_number": 21 + n, "nvidia_driver_sim_profile": PROFILES[n % 2]}
        for n in range(hosts)
    }
    groups = {
        "ray_head": {"hosts": {"head01": {"lab_host_number": 10}}},
        "ray_slots": {"hosts": gpu},
    }
    (INVENTORY / "hosts.yml").write_text(yaml.safe_dump({"berth": {"children": groups}}), encoding="utf-8")
    lab_file = INVENTORY / "group_vars/all/lab.yml"
    data = yaml.safe_load(lab_file.read_text(encoding="utf-8"))
    lab_file.write_text(yaml.safe_dump(data | own), encoding="utf-8")
    apps = [
        {"name": "chat", "engine": "light", "replicas": 2, "vram_mib": 20_000},
        {"name": "embedding", "engine": "light", "replicas": 2, "vram_mib": 4_000},
    ]
    (INVENTORY / "group_vars/all/apps.yml").write_text(yaml.safe_dump({"serve_apps_list": apps}), encoding="utf-8")


def call(command: Sequence[str]) -> str:
    """Run a command; its output.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def lab(verb: str) -> None:
    call([str(BIN / "ansible-playbook"), "-i", str(INVENTORY), f"molecule/shared/{verb}.yml"])


def playbook(name: str, *arguments: str, unchanged: bool = False) -> None:
    output = call([str(BIN / "ansible-playbook"), "-i", str(INVENTORY), name, *arguments])
    if unchanged and output.count("changed=0") != output.count("changed="):
        sys.exit(f"{name} changed something where nothing was to be done:\n{output[-4000:]}")


def gather_facts() -> None:
    call([str(BIN / "ansible"), "-i", str(INVENTORY), "berth", "-m", "ansible.builtin.setup"])


def timed(action: object) -> float:
    assert callable(action)
    start = time.perf_counter()
    action()
    return round(time.perf_counter() - start, 2)


def prepare_by_hand(hosts: int) -> Path:
    """What the script needs, read off the cluster that site.yml made: the same apps on the same slots."""
    work = INVENTORY / "hand"
    work.mkdir()
    ssh = ["ssh", "-F", str(INVENTORY / "lab/ssh/config")]
    asked = (
        'curl -sS -H "Authorization: Bearer $(cat /etc/berth/ray-token)" http://127.0.0.1:8275/api/serve/applications/'
    )
    told = json.loads(call([*ssh, "head01", f"sudo sh -c '{asked}'"]))
    apps = [item["deployed_app_config"] for item in told["applications"].values()]
    config = {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": apps}
    (work / "serve.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (ROOT / ".berth/dist").glob("berth-*.whl"):
        shutil.copy(path, work)
    shutil.copy(WHEELHOUSE / "runtime-light.tar", work)
    lock = ROOT / "roles/ray_runtime/files/runtime-light.txt"
    with tarfile.open(work / "lock.tar", "w") as tar:
        tar.add(lock, "lock.txt")
    return work


if __name__ == "__main__":
    sys.exit(main())
