"""What the scenarios of molecule/ ask with: the plan here, Ray on the head, systemd and NVML on every host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[1]
JOURNAL_LINES = 40
READ_GPUS = """
import json
from berth.codec import dump
from berth.gpu.nvml import read_host
print(json.dumps(dump(read_host("{name}"))))
"""


def ansible_inventory(*args: str) -> Any:
    command = [sys.executable, "-m", "ansible", "inventory", "-i", os.environ["LAB_INVENTORY"], *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


class Lab:
    """The cluster of the lab as its three witnesses show it."""

    @cached_property
    def variables(self) -> dict[str, dict[str, Any]]:
        """The inventory's variables by host."""
        return dict(ansible_inventory("--list")["_meta"]["hostvars"])

    @property
    def plan(self) -> dict[str, Any]:
        """The plan in force."""
        return dict(json.loads((ROOT / ".berth/lab/controller/plan.json").read_text(encoding="utf-8")))

    def slots_of(self, host: str) -> list[dict[str, Any]]:
        return [slot for slot in self.plan["slots"] if slot["host"] == host]

    def berths_on(self, slot: str) -> list[dict[str, Any]]:
        return [berth for berth in self.plan["berths"] if berth["slot"] == slot]

    def verify(self) -> dict[str, Any]:
        """``berth verify --json``: its object and, as ``rc``, its exit code."""
        command = [str(Path(sys.executable).parent / "berth"), "verify", "-i", os.environ["LAB_INVENTORY"], "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        return {**json.loads(done.stdout), "rc": done.returncode}


def name_of(host: Host) -> str:
    """The host's name in the inventory."""
    return str(host.backend.get_hostname())


def gpus_of(host: Host) -> list[dict[str, Any]]:
    """The GPUs of a host as NVML shows them there, asked in the agent's environment."""
    python = host.check_output("ls -d /var/lib/berth/agent/*/bin/python | tail -1")
    script = READ_GPUS.format(name=name_of(host))
    command = "LD_LIBRARY_PATH=/var/lib/berth/gpu-sim/lib BERTH_GPU_SIM=/var/lib/berth/gpu-sim %s -c %s"
    return list(json.loads(host.check_output(command, python, script))["gpus"])


def ray(host: Host, path: str) -> Any:
    """What Ray's dashboard answers on the head, asked with the cluster's token."""
    command = 'curl -sS --fail -H "Authorization: Bearer $(cat /etc/berth/ray-token)" http://127.0.0.1:8275%s'
    return json.loads(host.check_output(command % path))


def unit(host: Host, name: str) -> dict[str, str]:
    """What systemd has loaded for a unit, by property."""
    shown = host.check_output("systemctl show %s", name)
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
