"""The units that the roles write: rendered by Ansible, read by the programs that will read them."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from supervisor.options import ServerOptions

from berth.ray.start import digest

ROOT = Path(__file__).resolve().parents[3]
UNITS = ("berth-ray-head", "berth-ray-slot@gpu01-0", "berth-ray-slot@gpu01-1")
NODES = {
    "head": {"head": {"kind": "head", "name": "head"}},
    "slot": {name: {"kind": "slot", "name": name} for name in ("gpu01-0", "gpu01-1")},
}
FILES = {"berth-ray-head": "berth-ray-head.service", "berth-ray-slot": "berth-ray-slot@.service"}
ENVIRONMENT = {"LD_LIBRARY_PATH": "/opt/one two/lib", "BERTH_RATE": "100%"}
UNKNOWN_TO_OLD_SYSTEMD = ("RestartSteps", "RestartMaxDelaySec")


class Rendered(NamedTuple):
    """Where one playbook run wrote everything."""

    etc: Path
    run: Path

    def program(self, unit: str) -> configparser.SectionProxy:
        parser = configparser.RawConfigParser()
        parser.read(self.etc / "units" / f"{unit.partition('@')[0]}.conf")
        return parser[f"program:{unit}"]

    def service(self, unit: str) -> list[tuple[str, str]]:
        """The unit's settings, the instance's name put in as systemd does."""
        kind, _, instance = unit.partition("@")
        text = (self.etc / FILES[kind]).read_text(encoding="utf-8").replace("%i", instance)
        pairs = (line.partition("=") for line in text.splitlines())
        return [(key, value) for key, _, value in pairs if key[:1] not in ("#", "[", "")]


def tasks(etc: Path) -> list[dict[str, Any]]:
    """Both managers' units of each kind, through the role's own entry point."""
    units = [
        {
            "ansible.builtin.include_role": {"name": "service_manager", "tasks_from": "units"},
            "vars": {
                "berth_service_manager": manager,
                "service_manager_unit_dir": str(etc if manager == "systemd" else etc / "units"),
                "service_manager_tmpfiles": str(etc / "tmpfiles.conf"),
                "service_manager_kind": kind,
            },
        }
        for manager in ("systemd", "supervisord")
        for kind in NODES
    ]
    templates = ROOT / "roles/service_manager/templates"
    files = [
        {"ansible.builtin.template": {"src": str(templates / f"{name}.j2"), "dest": str(etc / name), "mode": "0644"}}
        for name in ("supervisord.conf",)
    ]
    return [
        *units,
        {"ansible.builtin.include_vars": {"file": str(ROOT / "roles/service_manager/defaults/main.yml")}},
        *({**task, "vars": {"service_manager_unit_dir": str(etc / "units")}} for task in files),
    ]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    base = tmp_path_factory.mktemp("units")
    found = Rendered(base / "etc", base / "run")
    (found.etc / "units").mkdir(parents=True)
    (found.run / "tmp").mkdir(parents=True)
    book = [
        {
            "hosts": "localhost",
            "gather_facts": False,
            "connection": "local",
            "vars": {
                "berth_cluster_id": "test-1a2b",
                "berth_run_dir": str(found.run),
                "berth_etc_dir": str(found.etc),
                "berth_log_dir": str(found.run),
                "berth_state_dir": str(base / "state"),
                "berth_user": "root",
                "berth_service_manager": "supervisord",
                "berth_root": str(ROOT),
                "berth_seen": {},
                "nvidia_driver_simulated": True,
                "nvidia_driver_environment": ENVIRONMENT,
                "ray_head_node": NODES["head"]["head"],
                "ray_slot_nodes": NODES["slot"],
                "ray_runtime_dir": sys.prefix,
            },
            "tasks": tasks(found.etc),
        }
    ]
    (base / "play.yml").write_text(json.dumps(book))
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_LOCAL_TEMP": str(base / "local"),
        "ANSIBLE_REMOTE_TEMP": str(base / "remote"),
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", str(base / "play.yml")]
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return found


def environment_of_program(line: str) -> dict[str, str]:
    pairs = shlex.split(line.replace(",", " ").replace("%%", "%"))
    return dict(pair.split("=", 1) for pair in pairs)


def environment_of_service(lines: list[tuple[str, str]]) -> dict[str, str]:
    values = [shlex.split(value.replace("%%", "%")) for key, value in lines if key == "Environment"]
    return dict(pair.split("=", 1) for value in values for pair in value)


@pytest.mark.parametrize("unit", UNITS)
def test_both_managers_run_the_same(rendered: Rendered, unit: str) -> None:
    program, service = rendered.program(unit), rendered.service(unit)
    assert program["command"] == dict(service)["ExecStart"]
    kind, name = ("slot", unit.partition("@")[2]) if "@" in unit else ("head", "head")
    assert program["command"].endswith(f"-m berth.ray.launch {rendered.etc}/{kind}.json {name}")
    environment = environment_of_program(program["environment"])
    told = environment_of_service(service)
    # Each manager's own way to know a changed unit: supervisord compares programs, systemd_units digests.
    assert environment.pop("BERTH_CONFIG_SHA1") == digest(NODES[kind][name])
    sha1 = told.pop("BERTH_UNIT_SHA1")
    text = (rendered.etc / FILES[unit.partition("@")[0]]).read_text(encoding="utf-8")
    assert sha1 == hashlib.sha1(text.replace(sha1, "").encode()).hexdigest()
    assert environment == told
    assert (environment.items() >= ENVIRONMENT.items()) == (kind == "slot")
    assert environment["BERTH_CLUSTER"] == "test-1a2b"
    assert environment["BERTH_UNIT"] == unit.removeprefix("berth-ray-")
    assert program["directory"] == dict(service)["WorkingDirectory"]
    assert program["stopwaitsecs"] == dict(service)["TimeoutStopSec"]


def test_the_nodes_of_a_kind_are_in_one_file(rendered: Rendered) -> None:
    for kind, nodes in NODES.items():
        assert json.loads((rendered.etc / f"{kind}.json").read_text(encoding="utf-8")) == nodes


def test_supervisord_reads_its_configuration(rendered: Rendered) -> None:
    options = ServerOptions()
    options.realize(["-c", str(rendered.etc / "supervisord.conf")])
    assert sorted(group.name for group in options.process_group_configs) == sorted(UNITS)
    for group in options.process_group_configs:
        (process,) = group.process_configs
        assert (process.environment.items() >= ENVIRONMENT.items()) == ("slot@" in group.name)
        assert process.environment["BERTH_UNIT"] == group.name.removeprefix("berth-ray-")
        assert process.stopasgroup
        assert process.killasgroup


@pytest.mark.parametrize("file", FILES.values())
def test_systemd_reads_the_unit(rendered: Rendered, file: str) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    path = rendered.etc / file.replace("@.", "@gpu01-0.")
    if not path.exists():
        path.symlink_to(rendered.etc / file)
    command = [analyze, "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if str(rendered.etc) in line or path.name in line]
    assert not [line for line in told if not any(key in line for key in UNKNOWN_TO_OLD_SYSTEMD)], done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_service_is_kept_within_bounds(rendered: Rendered, unit: str) -> None:
    service = dict(rendered.service(unit))
    assert service["User"] == "root", "berth_user is what the unit runs as"
    assert service["NoNewPrivileges"] == "true"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert service["Restart"] == "always"
    assert int(service["RestartMaxDelaySec"]) > int(service["RestartSec"])
    assert int(service["LimitNOFILE"]) >= 65536
    assert service["PrivateTmp"] == "true"
    # Either would hide GPUs from the driver's library, which then numbers the rest anew.
    assert not {"PrivateDevices", "DeviceAllow"} & set(service)
