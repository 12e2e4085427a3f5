"""playbooks/preflight.yml as a person runs it: every fault of a spoiled inventory in one list, nothing changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.preflight.builders import ROOT

PLAYBOOK = str(Path(sys.executable).with_name("ansible-playbook"))
LIGHT = {"engine": "light", "replicas": 1, "vram_mib": 100}


def write(path: Path, hosts: Mapping[str, Mapping[str, Any]], everywhere: Mapping[str, Any], head: list[str]) -> Path:
    """An inventory of hosts that are all this machine."""
    here = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "berth_agent_base_python": sys.executable,
        "berth_service_manager": "supervisord",
        "berth_state_dir": str(path / "state"),
        "berth_run_dir": str(path / "run"),
        "berth_etc_dir": str(path / "etc"),
        "berth_log_dir": str(path / "log"),
        "preflight_disk_mib": 1,
    }
    groups = {"ray_head": {"hosts": dict.fromkeys(head)}, "ray_slots": {"hosts": dict(hosts)}}
    path.mkdir(exist_ok=True)
    (path / "hosts.yml").write_text(yaml.safe_dump({"berth": {"children": groups}}))
    (path / "group_vars").mkdir()
    (path / "group_vars/all.yml").write_text(yaml.safe_dump({**here, **everywhere}))
    return path


def run(inventory: Path, *args: str) -> tuple[int, str]:
    """Exit code and output with every run of spaces and line ends as one space."""
    done = subprocess.run(
        [PLAYBOOK, "-i", str(inventory), "playbooks/preflight.yml", *args],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def tree(path: Path) -> set[str]:
    return {str(item.relative_to(path)) for item in path.rglob("*")}


def test_a_good_inventory_goes_through_and_nothing_is_made(tmp_path: Path) -> None:
    inventory = write(tmp_path / "good", {"gpu01": {"ray_slot_node_ip": "127.0.0.1"}}, {}, ["gpu01"])
    before = tree(inventory)
    code, text = run(inventory, "-e", "ray_head_node_ip=127.0.0.1")
    assert code == 0, text
    assert "Preflight: the inventory and 1 of 1 hosts:" in text
    assert "ERROR" not in text
    assert "changed=0" in text
    assert tree(inventory) == before


SPOILED_EVERYWHERE = {
    "placement_strategy": "pakc",
    "ray_slot_num_cpu": 8,
    "ray_head_gcs_port": 70000,
    "preflight_disk_mib": "plenty",
    "ray_slot_cache_dir": "{{ my_fast_disk }}/cache",
    "ray_slot_slots": [],
    "preflight_commands": ["no-such-compiler"],
    "serve_apps_list": [
        {"name": "chat", "engine": "llm", "replicas": 2},
        {**LIGHT, "name": "typo", "replcias": 3},
        {**LIGHT, "name": "twin", "pins": ["GPU-1", "GPU-1"]},
        {**LIGHT, "name": "twin"},
    ],
}
SPOILED_HOSTS = {
    "gpu01": {
        "placement_host_name": "gpu",
        "placement_slot_shapes": [["GPU-a", "GPU-b"], ["GPU-a", 3]],
        "ray_head_client_port": 10500,
        "ray_slot_node_ip": "203.0.113.1",
    },
    "gpu02": {
        "placement_host_name": "gpu",
        "placement_cordoned_gpus": ["GPU-b"],
        "ray_slot_metrics_port_base": 8485,
        "ray_slot_node_ip": "127.0.0.1",
        "berth_agent_base_python": "no-such-python",
    },
}
FAULTS = [
    "ERROR inventory: the group ray_head must have one host found gpu01, gpu02",
    "ERROR inventory: app chat: engine llm needs a model",
    "typo: replcias: unknown key",
    "two apps have the same name found twin",
    "app twin: pins names GPU GPU-1 2 times",
    "ERROR gpu01, gpu02: unknown strategy found pakc allowed pack, spread, strict_pack, strict_spread, balanced",
    "ERROR gpu01, gpu02: no role takes the variable ray_slot_num_cpu mend did you mean ray_slot_num_cpus?",
    "ray_slot_slots is derived",
    "ray_head_gcs_port=70000",
    "argument 'preflight_disk_mib' is of type str",
    "ray_slot_cache_dir cannot be resolved found 'my_fast_disk' is undefined",
    "ERROR gpu01, gpu02: placement_host_name is the same on several hosts",
    "ERROR gpu01: placement_slot_shapes names GPU GPU-a 2 times",
    "ERROR gpu01, gpu02: several hosts name GPU GPU-b",
    "ray_head_client_port is in the range that Ray gives to workers found ray_head_client_port=10500",
    "ray_head_metrics_port and ray_slot_metrics_port_base claim the same port",
    "ERROR gpu02: ray_slot_node_ip is a loopback address",
    "ERROR controller: ray_head_token_source is empty",
    "has mode 0644",
    # Of the hosts themselves, in the same list.
    "ERROR gpu01: its node address 203.0.113.1 is on none of its interfaces",
    "ERROR gpu02: berth_agent_base_python does not run found no-such-python: not there",
    "two inventory names for one machine",
    "it lacks no-such-compiler",
]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    path = write(tmp_path_factory.mktemp("spoiled"), SPOILED_HOSTS, SPOILED_EVERYWHERE, ["gpu01", "gpu02"])
    token = path / ".berth/secrets/ray-token"
    token.parent.mkdir(parents=True)
    token.write_text("")
    token.chmod(0o644)
    before = tree(path)
    code, text = run(path)
    assert tree(path) == before
    return path, code, text


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_in_the_one_list(spoiled: tuple[Path, int, str], fault: str) -> None:
    _, code, text = spoiled
    assert code != 0
    assert text.count(fault) == 1, text


def test_it_ends_by_saying_how_many(spoiled: tuple[Path, int, str]) -> None:
    _, _, text = spoiled
    errors = text.count(" ERROR ")
    assert errors >= len(FAULTS)
    assert f"preflight: {errors} errors" in text
    assert "nothing was changed" in text
    assert "Traceback" not in text


def test_a_limit_looks_at_its_hosts_and_still_at_the_whole_inventory(spoiled: tuple[Path, int, str]) -> None:
    path, _, _ = spoiled
    _, text = run(path, "--limit", "gpu01")
    assert "the inventory and 1 of 2 hosts" in text
    assert "several hosts name GPU GPU-b" in text
    assert "no-such-python" not in text


def test_a_kind_that_is_accepted_is_a_warning(tmp_path: Path) -> None:
    everywhere = {"preflight_commands": ["no-such-compiler"], "preflight_accept": ["command"]}
    inventory = write(tmp_path / "accepted", {"gpu01": {"ray_slot_node_ip": "127.0.0.1"}}, everywhere, ["gpu01"])
    code, text = run(inventory, "-e", "ray_head_node_ip=127.0.0.1")
    assert code == 0, text
    assert "WARNING gpu01: it lacks no-such-compiler" in text


def test_a_host_that_cannot_be_reached_is_one_more_entry(tmp_path: Path) -> None:
    hosts = {
        "gpu01": {"ray_slot_node_ip": "127.0.0.1"},
        "gpu02": {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1},
    }
    inventory = write(tmp_path / "unreachable", hosts, {}, ["gpu01"])
    code, text = run(inventory, "-e", json.dumps({"ray_head_node_ip": "127.0.0.1"}))
    assert code != 0
    assert "ERROR gpu02: the host could not be looked at" in text
    assert "the inventory and 2 of 2 hosts" in text
