"""A Berth cluster of a test: its own state, ports and name; the environments of the checkout, which take minutes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from berth.host.processes import OwnProcess, own_processes

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LOG_BYTES = 6000


@dataclass
class Cluster:
    """``port_base`` keeps clusters apart: every port is counted from it."""

    name: str
    state: Path
    port_base: int
    extra: dict[str, Any] = field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        shared = ROOT / ".berth"
        return {
            "berth_cluster": self.name,
            "berth_state_dir": str(self.state),
            "berth_agent_root": str(shared / "agent"),
            "ray_runtime_root": str(shared / "runtime"),
            "serve_apps_model_dir": str(shared / "models"),
            "ray_slot_cache_dir": str(shared / "cache"),
            "nvidia_driver_simulate": "true",
            "ray_head_gcs_port": self.port_base,
            "ray_head_dashboard_port": self.port_base + 1,
            "ray_head_client_port": self.port_base + 2,
            "ray_head_dashboard_agent_port": self.port_base + 3,
            "ray_head_metrics_port": self.port_base + 4,
            "serve_apps_http_port": self.port_base + 5,
            # Another cluster starts beside it, on two cores.
            "serve_apps_slot_timeout_s": 600,
            "ray_slot_dashboard_agent_port_base": self.port_base + 20,
            "ray_slot_metrics_port_base": self.port_base + 40,
            "ray_head_node_port_base": self.port_base + 100,
            "ray_slot_node_port_base": self.port_base + 200,
            **self.extra,
        }

    def ansible(self, playbook: str, *args: str, extra: Mapping[str, Any] | None = None) -> Run:
        """Run a playbook; never raises for a failed one."""
        command = [
            str(BIN / "ansible-playbook"),
            playbook,
            "-e",
            json.dumps({**self.variables(), **(extra or {})}),
            *args,
        ]
        result = subprocess.run(
            command, cwd=ROOT, env=_env(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        return Run(self, result.returncode, result.stdout + result.stderr)

    def site(self, strategy: str = "pack", *args: str, extra: Mapping[str, Any] | None = None) -> Run:
        return self.ansible("site.yml", "-e", f"strategy={strategy}", *args, extra=extra)

    def verify(self) -> dict[str, Any]:
        """``berth verify --json``: its object, with the exit code it ended with as ``rc``."""
        command = [str(BIN / "berth"), "verify", "--json", "-e", json.dumps(self.variables())]
        result = subprocess.run(
            command, cwd=ROOT, env=_env(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        assert result.stdout.startswith("{"), result.stdout + result.stderr
        return {**json.loads(result.stdout), "rc": result.returncode}

    @property
    def identity(self) -> str:
        """``berth_cluster_id``, computed as the role does."""
        import hashlib

        return f"{self.name}-{hashlib.sha1(str(self.state).encode()).hexdigest()[:8]}"

    @property
    def run_dir(self) -> Path:
        return Path(f"/tmp/berth-{self.identity}")

    @property
    def sim_dir(self) -> Path:
        return self.state / "gpu-sim"

    def plan(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.state / "controller" / "plan.json").read_text())
        return data

    def processes(self, unit: str | None = None) -> list[OwnProcess]:
        return [item for item in own_processes(self.identity) if unit is None or item.unit == unit]

    def kill(self, unit: str) -> None:
        """SIGKILL every process of a unit."""
        victims = self.processes(unit)
        assert victims, f"no process of {unit}"
        for item in victims:
            os.kill(item.pid, signal.SIGKILL)

    def supervisord(self) -> int:
        return int((self.run_dir / "supervisord.pid").read_text())

    def serve(self) -> dict[str, Any]:
        """Serve's applications by name, asked of Ray directly."""
        token = (self.run_dir / "etc" / "ray-token").read_text().strip()
        url = f"http://127.0.0.1:{self.port_base + 1}/api/serve/applications/"
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        answer.raise_for_status()
        applications: dict[str, Any] = answer.json()["applications"]
        return applications

    def replicas(self) -> dict[str, dict[str, int]]:
        """Berth name -> replica id -> pid, of replicas that run."""
        return {
            name: {
                replica["replica_id"]: replica["pid"]
                for item in app["deployments"].values()
                for replica in item["replicas"]
                if replica["state"] == "RUNNING"
            }
            for name, app in self.serve().items()
        }

    def api(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> requests.Response:
        url = f"http://127.0.0.1:{self.port_base + 5}{path}"
        if body is None:
            return requests.get(url, timeout=120, **options)
        return requests.post(url, json=body, timeout=120, **options)

    def inject(self, *fault: str) -> None:
        """A fault of the simulated driver."""
        self._sim("inject", "--dir", str(self.sim_dir), *fault)

    def _sim(self, *args: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "berth.gpu.sim", *args],
            cwd=ROOT,
            env=_env(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def nvml(self) -> dict[str, dict[str, Any]]:
        """What the driver shows, read through pynvml in a process of its own: UUID -> used MiB, pid -> MiB."""
        code = (
            "import json, pynvml as n; n.nvmlInit(); out = {}\n"
            "for i in range(n.nvmlDeviceGetCount()):\n"
            "    h = n.nvmlDeviceGetHandleByIndex(i)\n"
            "    out[n.nvmlDeviceGetUUID(h)] = {'used': n.nvmlDeviceGetMemoryInfo(h).used >> 20, 'pids': "
            "{p.pid: p.usedGpuMemory >> 20 for p in n.nvmlDeviceGetComputeRunningProcesses(h)}}\n"
            "print(json.dumps(out))"
        )
        env = _env() | {"LD_LIBRARY_PATH": str(self.sim_dir / "lib"), "BERTH_GPU_SIM": str(self.sim_dir)}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        seen: dict[str, dict[str, Any]] = json.loads(result.stdout)
        return seen

    def teardown(self) -> Run:
        return self.ansible("playbooks/teardown.yml")

    def logs(self) -> str:
        """The ends of the units' and replicas' logs, for a failed test's message."""
        files = sorted((self.state / "log").glob("*.log"))
        files += sorted(self.run_dir.glob("*/session_latest/logs/serve/*.log"))
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-LOG_BYTES:]}" for file in files)


@dataclass
class Run:
    """A playbook run that ended."""

    cluster: Cluster
    rc: int
    output: str

    def ok(self) -> Run:
        """Fail the test, with every log, unless the run went through."""
        assert self.rc == 0, f"{self.output[-LOG_BYTES:]}\n{self.cluster.logs()}"
        return self

    def failed(self, *words: str) -> Run:
        """Fail the test unless the run failed and said ``words``."""
        assert self.rc != 0, f"it went through:\n{self.output[-LOG_BYTES:]}"
        text = " ".join(self.output.split())
        missing = [word for word in words if word not in text]
        assert not missing, f"not said: {missing}\n{self.output[-LOG_BYTES:]}"
        return self

    @property
    def changed(self) -> int:
        found = re.search(r"changed=(\d+)", self.output)
        assert found, self.output[-LOG_BYTES:]
        return int(found.group(1))


def _env() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1", "HF_HUB_OFFLINE": "1"}
