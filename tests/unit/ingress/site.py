"""The role's own tasks run by Ansible into one directory, and the nginx that takes what they wrote."""

from __future__ import annotations

import getpass
import grp
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
HOSTS = {"head01": "127.0.0.10", "gpu01": "127.0.0.21", "gpu02": "127.0.0.22"}
READY_S = 10.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Site:
    """A controller and the ingress ``edge01`` in one directory."""

    base: Path
    proxy_port: int
    options: dict[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def etc(self) -> Path:
        return self.base / "etc"

    @property
    def log(self) -> Path:
        return self.base / "access.log"

    def key(self, name: str) -> str:
        return (self.base / "controller/secrets/ingress-keys" / name).read_text().strip()

    def run(self, *words: str, **options: Any) -> tuple[int, str]:
        """The tasks that write; exit code and all that Ansible said, at its most talkative."""
        self._write_inventory()
        extra = {
            "ingress_dir": str(self.etc),
            "ingress_run_dir": str(self.base / "run"),
            "ingress_cache_dir": str(self.base / "cache"),
            "ingress_unit": str(self.base / "berth-ingress.service"),
            "ingress_log": str(self.log),
            # nginx takes the group of that name, or the one that follows.
            "ingress_user": f"{getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name}",
            "ingress_binary": NGINX,
            "ingress_address": "127.0.0.1",
            "ingress_port": self.port,
            "berth_cluster_id": "test-1a2b",
            "berth_controller_dir": str(self.base / "controller"),
            **self.options,
            **options,
        }
        command = [sys.executable, "-m", "ansible", "playbook", "-vvv", "--diff", "-i", str(self.base / "hosts.json")]
        (self.base / "extra.json").write_text(json.dumps(extra))
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_LOCAL_TEMP": str(self.base / "local"),
            "ANSIBLE_REMOTE_TEMP": str(self.base / "remote"),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            [*command, "-e", f"@{self.base / 'extra.json'}", *words, str(self.base / "play.yml")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def ok(self, *words: str, **options: Any) -> int:
        """How many tasks changed something."""
        code, said = self.run(*words, **options)
        assert code == 0, said
        found = re.search(r"changed=(\d+)", said)
        assert found, said
        return int(found.group(1))

    def _write_inventory(self) -> None:
        specs = yaml.safe_load((ROOT / "roles/ingress/defaults/main.yml").read_text())
        steps = ["new_keys", *(["tls"] if self.options.get("ingress_tls", "own") != "none" else []), "configure"]
        local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        common = {"serve_apps_http_host": "0.0.0.0", "serve_apps_http_port": self.proxy_port, **local}
        groups = {"ray_head": ["head01"], "ray_slots": ["gpu01", "gpu02"], "ray_ingress": ["edge01"]}
        hosts = {name: {"ansible_host": address} for name, address in HOSTS.items()}
        inventory = {
            "hosts": {**hosts, "edge01": {"ansible_host": "127.0.0.1"}},
            "vars": common,
            "children": {group: {"hosts": {name: {} for name in names}} for group, names in groups.items()},
        }
        include = "ansible.builtin.include_role"
        play = {
            "hosts": "ray_ingress",
            "gather_facts": False,
            "tasks": [
                {
                    include: {"name": "ingress", "tasks_from": step},
                    **({"when": "ingress_keys_missing | length > 0"} if step == "new_keys" else {}),
                }
                for step in steps
            ],
        }
        # A condition of include_role sees none of the role's variables.
        play["vars"] = {key: value for key, value in specs.items() if key not in self.options}
        derived = yaml.safe_load((ROOT / "roles/ingress/vars/main.yml").read_text())
        play["vars"]["ingress_keys_missing"] = derived["ingress_keys_missing"]
        (self.base / "hosts.json").write_text(json.dumps({"all": inventory}))
        (self.base / "play.yml").write_text(json.dumps([play]))

    # --- The nginx ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        command = [str(NGINX), "-c", str(self.etc / "nginx.conf"), "-g", "daemon off;"]
        with (self.base / "error.log").open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=errors, stderr=errors)
        deadline = time.monotonic() + READY_S
        while not (self.base / "run/status.sock").exists() or self.process.poll() is not None:
            assert time.monotonic() < deadline, (self.base / "error.log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)

    def reload(self) -> None:
        subprocess.run(
            [str(NGINX), "-q", "-c", str(self.etc / "nginx.conf"), "-s", "reload"], check=True, capture_output=True
        )

    def status(self, path: str) -> str:
        """What the socket of the host's root tells."""
        connection = http.client.HTTPConnection("ingress")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.base / "run/status.sock"))
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def connections(self) -> int:
        """Open connections of clients, the one that asks not counted."""
        found = re.search(r"Active connections: (\d+)", self.status("/status"))
        assert found
        return int(found.group(1)) - 1
