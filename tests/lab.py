"""What the scenarios of molecule/ ask with: the plan here, Ray on the head, systemd and NVML on every host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LOG_CHARACTERS = 6000
JOURNAL_LINES = 40
"""Of each host, in the message of a test that failed."""
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


def container(host: str) -> str:
    """The container that is the host ``host`` of the lab."""
    return f"{ansible_inventory('--host', host)['lab_name']}-{host}"


def docker(*args: str) -> str:
    """The output of one docker command.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    return subprocess.run(["docker", *args], capture_output=True, text=True, check=True).stdout


def on(host: str, *command: str) -> str:
    """The output of a command on a lab host, run as root without SSH: for faults that SSH itself may have."""
    return docker("exec", container(host), *command)


def journals() -> str:
    """The ends of the journals of Berth's units, on every host that is up: for a failed test's message."""
    command = ["journalctl", "--no-pager", f"--lines={JOURNAL_LINES}", "--unit=berth-*"]
    parts = []
    for host in ansible_inventory("--list")["_meta"]["hostvars"]:
        done = subprocess.run(
            ["docker", "exec", container(host), *command], capture_output=True, text=True, check=False
        )
        parts.append(f"--- journal of {host}\n{done.stdout}{done.stderr}")
    return "\n".join(["", *parts])


@dataclass
class Run:
    """A playbook run that goes on in the background, its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def rc(self) -> int:
        """The exit code, waited for."""
        return self.process.wait()

    def ok(self) -> Run:
        """Itself, when it ended well."""
        assert self.rc == 0, self.output[-LOG_CHARACTERS:] + journals()
        return self

    def wait_for(self, text: str, timeout_s: float = 240.0) -> None:
        """Until ``text`` stands in the output."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None, self.output[-LOG_CHARACTERS:]
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.output[-LOG_CHARACTERS:]}"
            time.sleep(0.2)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stopped as by Ctrl-Z meanwhile: it is there and gets no further."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)


class Lab:
    """The cluster of the lab as its three witnesses show it, and the runs that change it."""

    def address(self, host: str) -> str:
        """Where the host is on the lab's network."""
        told = ansible_inventory("--host", host)
        return f"{told['lab_network']}.{told['lab_host_number']}"

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
        command = [str(BIN / "berth"), "verify", "-i", os.environ["LAB_INVENTORY"], "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        return {**json.loads(done.stdout), "rc": done.returncode}

    def wait_until_verified(self, timeout_s: float = 180.0) -> None:
        """Until the witnesses agree, as after a boot."""
        deadline = time.monotonic() + timeout_s
        while (report := self.verify())["rc"] != 0:
            assert time.monotonic() < deadline, report["failures"]
            time.sleep(3)

    def start(self, playbook: str, *args: str) -> Run:
        """Start a playbook; it goes on in the background."""
        # Whoever runs the tests in the background ignores Ctrl-C, and its children would.
        berth = [str(BIN / "ansible-playbook"), "-i", os.environ["LAB_INVENTORY"], playbook, *args]
        command = ["env", "--default-signal=INT", *berth]
        log = Path(tempfile.mkstemp(prefix="berth-lab-", suffix=".log")[1])
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return Run(process, log)

    def site(self, *args: str) -> Run:
        """site.yml, run to its end."""
        run = self.start("site.yml", *args)
        run.process.wait()
        return run

    def boot(self, host: str) -> None:
        """Start a host that is down, and wait until it has booted."""
        docker("start", container(host))
        subprocess.run(
            ["docker", "exec", container(host), "systemctl", "is-system-running", "--wait"],
            capture_output=True,
            check=False,
        )

    def reboot(self, host: str) -> None:
        """Restart a host as a power cycle does: its /run and /tmp are empty afterwards."""
        docker("kill", container(host))
        self.boot(host)

    def chat(self, host: str) -> int:
        """The status that the API on ``host`` answers a question with."""
        url = f"http://{self.address(host)}:8000/v1/chat/completions"
        return requests.post(url, json={"model": "chat", "messages": []}, timeout=20).status_code


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
