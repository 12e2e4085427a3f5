"""After the first run: the driver of the branch, held, served; the adopted one untouched."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import ROOT, held, library, loaded, name, would_change

testinfra_hosts = ["ansible://gpu01", "ansible://gpu02", "ansible://gpu04"]
RELEASE = "580.159.04"
CORE = {
    "debian": ["nvidia-kernel-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced", "libcuda1", "libnvidia-ml1"],
    "ubuntu": ["nvidia-dkms-580-open", "libnvidia-compute-580", "nvidia-compute-utils-580", "nvidia-utils-580"],
}


def test_kernel_module_and_library_are_of_one_version(host: Any) -> None:
    assert f" {RELEASE} " in loaded(host)
    assert "Open Kernel Module" in loaded(host)
    assert library(host) == RELEASE


def test_every_package_is_of_that_version_and_held(host: Any) -> None:
    family = "ubuntu" if name(host) == "gpu04" else "debian"
    for package in CORE[family]:
        assert host.package(package).version.startswith(RELEASE), package
        assert package in held(host)


def test_the_distribution_upgrade_leaves_it_alone(host: Any) -> None:
    assert would_change(host) == []


def test_the_persistence_daemon_runs_and_comes_back(host: Any) -> None:
    service = host.service("nvidia-persistenced")
    assert service.is_running, host.check_output("journalctl --unit nvidia-persistenced --lines 20")
    assert service.is_enabled


def test_fabric_manager_is_there_where_switches_are(host: Any) -> None:
    package = host.package("nvidia-fabricmanager")
    assert package.is_installed == (name(host) == "gpu02")
    if package.is_installed:
        assert package.version.startswith(RELEASE)
        running = host.service("nvidia-fabricmanager").is_running
        assert running, host.check_output("journalctl --unit nvidia-fabricmanager --lines 20")


def test_nouveau_is_off(host: Any) -> None:
    assert not host.file(f"{ROOT}/sys/module/nouveau").exists
    assert "blacklist nouveau" in host.file("/etc/modprobe.d/berth-nvidia.conf").content_string


@pytest.mark.parametrize("pattern", ["^nvidia-", "^libnvidia-"])
def test_unattended_upgrades_know_it(host: Any, pattern: str) -> None:
    shown = host.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert f'"{pattern}"' in shown
