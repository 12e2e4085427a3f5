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


def replaced(host: Any) -> tuple[int, int]:
    """When the host's packages changed, and when it had booted; seconds since 1970."""
    changed = host.check_output("stat --format %Y /var/lib/dpkg/info/nvidia-driver-cuda.list")
    booted = host.check_output('date +%s --date "$(systemctl show --property=UserspaceTimestamp --value)"')
    return int(changed), int(booted)


def test_one_host_at_a_time(host: Any) -> None:
    """Whichever came first: the other one was changed only after it had booted."""
    if name(host) == "gpu02":
        inventory = host.backend.ansible_inventory
        other = host.get_host(f"ansible://gpu01?force_ansible=True&ansible_inventory={inventory}")
        (changed, booted), (other_changed, other_booted) = replaced(host), replaced(other)
        assert booted <= other_changed or other_booted <= changed
