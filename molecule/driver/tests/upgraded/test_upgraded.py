"""The newest release of the branch was asked for."""

from __future__ import annotations

from typing import Any

from hosts import library, loaded, name, would_change

testinfra_hosts = ["ansible://gpu01", "ansible://gpu02", "ansible://gpu04"]


def test_the_branch_stayed_and_the_release_moved(host: Any) -> None:
    assert " 580.178.04 " in loaded(host)
    assert library(host) == "580.178.04"
    assert would_change(host) == []


def test_fabric_manager_moved_with_it(host: Any) -> None:
    if name(host) == "gpu02":
        assert host.package("nvidia-fabricmanager").version.startswith("580.178.04")
        assert host.service("nvidia-fabricmanager").is_running


def test_units_of_berth_came_back_with_the_boot(host: Any) -> None:
    if name(host) in ("gpu01", "gpu02"):
        assert host.service("berth-ray-slot@0").is_running


def test_one_host_at_a_time(host: Any) -> None:
    """The second host's units were stopped only after the first one had booted."""
    if name(host) == "gpu02":
        first = host.get_host(f"ansible://gpu01?force_ansible=True&ansible_inventory={host.backend.ansible_inventory}")
        stopped = host.check_output("stat --format %Y /var/lib/dpkg/info/nvidia-driver-cuda.list")
        booted = first.check_output("systemctl show --property=UserspaceTimestamp --value")
        assert int(stopped) > int(first.check_output(f"date --date '{booted}' +%s"))
