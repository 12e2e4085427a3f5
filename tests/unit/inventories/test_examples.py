"""The example inventories: preflight has nothing against them, and the clouds' own plugins take their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.inventory.data import InventoryData
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.inventory import BaseInventoryPlugin
from ansible.plugins.loader import init_plugin_loader, inventory_loader

from berth.plan.apps import load_apps

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
CLOUD = ROOT / "inventories/cloud"
AWS = {
    "InstanceId": "i-0abc",
    "InstanceType": "g6.12xlarge",
    "PrivateIpAddress": "10.1.0.21",
    "PrivateDnsName": "ip-10-1-0-21.internal",
    "Placement": {"AvailabilityZone": "eu-central-1a", "PartitionNumber": 2},
    "Tags": [{"Key": "Name", "Value": "gpu01"}, {"Key": "berth_role", "Value": "gpu"}],
}
"""The part of what DescribeInstances says that the file uses."""
GCP = {
    "name": "gpu01",
    "selfLink": "https://www.googleapis.com/compute/v1/projects/my-project/zones/europe-west4-a/instances/gpu01",
    "zone": "https://www.googleapis.com/compute/v1/projects/my-project/zones/europe-west4-a",
    "machineType": "https://www.googleapis.com/compute/v1/projects/my-project/zones/europe-west4-a/machineTypes/g2-standard-8",
    "networkInterfaces": [{"networkIP": "10.2.0.21"}],
    "labels": {"berth_cluster": "cloud", "berth_role": "head-and-gpu"},
    "status": "RUNNING",
}


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_TIMEOUT": "2", "ANSIBLE_INVENTORY_ENABLED": "yaml"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_onprem_lists_its_hosts() -> None:
    code, text = run("ansible-inventory", "-i", "inventories/onprem", "--list")
    assert code == 0, text
    found = json.loads(text)
    assert set(found["ray_slots"]["hosts"]) == {"gpu01", "gpu02"}
    racks = {name: values.get("placement_rack", "") for name, values in found["_meta"]["hostvars"].items()}
    assert racks == {"head01": "", "gpu01": "rack-a", "gpu02": "rack-b"}


def test_preflight_has_nothing_against_onprem_but_that_its_hosts_are_not_real() -> None:
    """Addresses from 192.0.2.0/24 belong to nobody (RFC 5737): no host answers, and nothing else is wrong."""
    code, text = run("ansible-playbook", "-i", "inventories/onprem", "playbooks/preflight.yml", "-e", "ansible_port=1")
    assert code != 0
    kinds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("kind ")]
    assert kinds == ["unreachable"] * 3, text


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("inventories/*/group_vars/**/*.yml")), ids=lambda path: path.parts[-3]
)
def test_every_example_of_an_app_list_is_one(file: Path) -> None:
    apps = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("serve_apps_list", [])
    assert len(load_apps(apps)) == len(apps)


@pytest.fixture(scope="module", autouse=True)
def collections() -> None:
    init_plugin_loader([])


def plugin(name: str, file: Path) -> Any:
    """The cloud's plugin with our file read as its options."""
    found = inventory_loader.get(name)
    if found is None:
        pytest.fail(f"{name} is not among the collections that come with the pinned ansible")
    found.inventory, found.loader = InventoryData(), DataLoader()
    BaseInventoryPlugin.parse(found, found.inventory, found.loader, str(file))
    assert found.verify_file(str(file))
    options = found._read_config_data(str(file))
    # Ansible itself lets an unknown key pass here.
    assert set(options) - {"plugin"} <= set(found.option_definitions)
    return found


def groups_of(found: Any, host: str) -> set[str]:
    return {group.name for group in found.inventory.hosts[host].get_groups()} - {"all", "ungrouped"}


def test_aws_puts_an_instance_where_its_tags_say() -> None:
    found = plugin("amazon.aws.aws_ec2", CLOUD / "aws_ec2.yml")
    found.inventory.add_group("aws_ec2")
    prefix = found.get_option("hostvars_prefix")
    found._add_hosts([AWS], "aws_ec2", found.get_option("hostnames"), hostvars_prefix=prefix)
    values = found.inventory.hosts["gpu01"].get_vars()
    assert values["ansible_host"] == "10.1.0.21"
    assert (values["placement_zone"], values["placement_rack"]) == ("eu-central-1a", "partition-2")
    assert groups_of(found, "gpu01") == {"aws_ec2", "ray_slots", "type_g6_12xlarge"}


def test_aws_without_partitions_has_no_racks() -> None:
    found = plugin("amazon.aws.aws_ec2", CLOUD / "aws_ec2.yml")
    found.inventory.add_group("aws_ec2")
    tags = [{"Key": "Name", "Value": "head01"}, {"Key": "berth_role", "Value": "head"}]
    plain = {**AWS, "Placement": {"AvailabilityZone": "eu-central-1b"}, "Tags": tags}
    found._add_hosts([plain], "aws_ec2", found.get_option("hostnames"), hostvars_prefix="aws_")
    assert found.inventory.hosts["head01"].get_vars()["placement_rack"] == ""
    assert groups_of(found, "head01") == {"aws_ec2", "ray_head", "type_g6_12xlarge"}


def test_google_cloud_puts_an_instance_where_its_labels_say() -> None:
    found = plugin("google.cloud.gcp_compute", CLOUD / "gcp_compute.yml")
    found._add_hosts([json.loads(json.dumps(GCP))], {}, project_disks={})
    values = found.inventory.hosts["gpu01"].get_vars()
    assert (values["ansible_host"], values["placement_zone"]) == ("10.2.0.21", "europe-west4-a")
    assert values["gcp_name"] == "gpu01"
    assert "name" not in values, "a reserved name of Ansible"
    assert groups_of(found, "gpu01") == {"ray_head", "ray_slots", "type_g2_standard_8"}


def test_both_clouds_groups_are_the_clusters() -> None:
    groups = yaml.safe_load((CLOUD / "groups.yml").read_text(encoding="utf-8"))
    assert set(groups["berth"]["children"]) == {"ray_head", "ray_slots"}
    for name in ("aws_ec2.yml", "gcp_compute.yml"):
        assert set(yaml.safe_load((CLOUD / name).read_text(encoding="utf-8"))["groups"]) == {"ray_head", "ray_slots"}


def test_the_collections_are_those_that_the_controller_has() -> None:
    code, text = run("ansible-galaxy", "collection", "list", "--format", "json")
    assert code == 0, text
    installed = {name: item["version"] for place in json.loads(text).values() for name, item in place.items()}
    wanted = yaml.safe_load((CLOUD / "requirements.yml").read_text(encoding="utf-8"))["collections"]
    assert {item["name"]: item["version"] for item in wanted} == {
        item["name"]: installed[item["name"]] for item in wanted
    }


def test_a_folder_may_hold_requirements_beside_its_inventory() -> None:
    code, text = run("ansible-inventory", "-i", "inventories/cloud", "--graph")
    assert code == 0, text
    assert "@ray_slots" in text
    assert "requirements.yml" not in text
