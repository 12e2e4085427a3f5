"""The token and the certificates on their way from the controller to a host: the role's own tasks, run by Ansible."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLES = ("berth", "ray_head", "ray_slot")


@dataclass(frozen=True)
class Site:
    """A controller and one host in one directory."""

    base: Path

    @property
    def source(self) -> Path:
        return self.base / "controller/secrets/ray-token"

    @property
    def token(self) -> Path:
        return self.base / "etc/ray-token"

    def run(self, *words: str, **variables: Any) -> tuple[int, str]:
        """Exit code and all that Ansible said, at its most talkative."""
        command = [sys.executable, "-m", "ansible", "playbook", "-vvv", "--diff", "-i", str(self.base / "hosts.json")]
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_LOCAL_TEMP": str(self.base / "local"),
            "ANSIBLE_REMOTE_TEMP": str(self.base / "remote"),
            "ANSIBLE_NOCOLOR": "1",
        }
        extra = ["-e", json.dumps(variables), *words, str(self.base / "play.yml")]
        done = subprocess.run(
            [*command, *extra], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def ok(self, *words: str, **variables: Any) -> int:
        """How many tasks changed something."""
        code, said = self.run(*words, **variables)
        assert code == 0, said
        found = re.search(r"changed=(\d+)", said)
        assert found, said
        return int(found.group(1))

    def refused(self, **variables: Any) -> str:
        code, said = self.run(**variables)
        assert code != 0, "it went through"
        return " ".join(said.replace("\\n", " ").split())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    defaults = {
        key: value
        for role in ROLES
        for key, value in yaml.safe_load((ROOT / "roles" / role / "defaults/main.yml").read_text()).items()
    }
    own = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "ansible_host": "192.0.2.21",
        "berth_controller_dir": str(tmp_path / "controller"),
        "berth_etc_dir": str(tmp_path / "etc"),
        "berth_service_manager": "supervisord",
    }
    hosts = {"gpu01": own}
    groups = {name: {"hosts": {"gpu01": {}}} for name in ("ray_head", "ray_slots")}
    (tmp_path / "hosts.json").write_text(json.dumps({"berth": {"hosts": hosts, "children": groups}}))
    play = {
        "hosts": "berth",
        "gather_facts": False,
        "vars": {key: value for key, value in defaults.items() if key not in own},
        "tasks": [
            {"ansible.builtin.include_vars": {"file": str(ROOT / "roles/berth/vars/main.yml")}},
            {
                "ansible.builtin.include_role": {"name": "ray_head", "tasks_from": "secrets"},
                "vars": {"ray_head_rotating": "{{ rotating | default(false) }}"},
            },
        ],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    (tmp_path / "etc").mkdir()
    return Site(tmp_path)


def modes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}


def test_made_once_brought_with_the_right_mode_and_never_said(site: Site) -> None:
    assert site.ok("--check") > 0
    assert not site.source.exists()
    assert not site.token.exists()
    code, said = site.run(ray_head_tls=True)
    assert code == 0, said
    token = site.source.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert site.token.read_text() == token
    assert token not in said
    assert "PRIVATE KEY" not in said
    assert {path.stat().st_mode & 0o777 for path in (site.source, site.token)} == {0o600}
    assert modes(site.base / "etc/tls") == {"ca.crt": 0o644, "node.crt": 0o644, "node.key": 0o600}
    assert not (site.base / "etc/tls/ca.key").exists(), "the authority's key stays on the controller"
    assert site.ok(ray_head_tls=True) == 0
    assert site.ok("--check", ray_head_tls=True) == 0
    assert site.source.read_text() == token


def test_a_token_lost_on_the_controller_is_explained_and_not_made_anew(site: Site) -> None:
    site.ok()
    token = site.token.read_text()
    site.source.unlink()
    said = site.refused()
    assert f"the controller has lost Ray's token ({site.source}), and gpu01 run with it" in said
    assert f"ansible gpu01 -m ansible.builtin.fetch -a 'src={site.token} dest={site.source} flat=true'" in said
    assert site.token.read_text() == token
    assert not site.source.exists()
    site.source.write_text(f"{token}\n")
    assert site.ok() == 0, "an end of line that an editor left is no other token"


def test_a_token_of_a_vault_leaves_no_file_on_the_controller(site: Site) -> None:
    token = "v" * 48
    code, said = site.run(ray_head_token=token)
    assert code == 0, said
    assert site.token.read_text() == token
    assert not site.source.exists()
    assert token not in said.replace(json.dumps({"ray_head_token": token}), ""), "only this test's command line has it"


def test_another_token_is_refused_beside_nodes_that_run(site: Site) -> None:
    site.ok(ray_head_token="v" * 48)
    said = site.refused(ray_head_token="w" * 48)
    assert "another token than the controller (ray_head_token)" in said
    assert "rotate_secrets.yml -e rotate=token" in said
    assert site.token.read_text() == "v" * 48
    assert site.ok(ray_head_token="w" * 48, rotating=True) == 1
    assert site.token.read_text() == "w" * 48


@pytest.mark.parametrize("token", ["short", "with a space" * 4])
def test_what_is_no_token_is_refused_without_saying_it(site: Site, token: str) -> None:
    said = site.refused(ray_head_token=token)
    assert f"found {len(token)} characters (not shown)" in said
    assert not site.token.exists()


def test_certificates_for_a_name_instead_of_an_address_are_refused(site: Site) -> None:
    said = site.refused(ray_head_tls=True, ray_slot_node_ip="gpu01.example")
    assert "need the IP address that each host's nodes really have" in said
    assert "found: gpu01: gpu01.example" in said
