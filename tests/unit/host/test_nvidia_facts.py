"""What is read of a host: the kernel's files, what package managers answer, a tree that stands for a host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from berth.host import nvidia_facts
from berth.host.nvidia_types import PciDevice, Service, Wanted

ROOT = Path(__file__).resolve().parents[3]
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)  Tue Sep 23\n"
    "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
)
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.247.01  Tue Mar 25 09:12:13 UTC 2025\n"


@pytest.mark.parametrize(
    ("text", "version"), [(OPEN, "580.95.05"), (PROPRIETARY, "535.247.01"), ("", None), (None, None)]
)
def test_the_version_that_runs(text: str | None, version: str | None) -> None:
    assert nvidia_facts.loaded_version(text) == version


def test_the_librarys_version_is_in_its_files_name(tmp_path: Path) -> None:
    assert nvidia_facts.library_version(tmp_path) is None
    directory = tmp_path / "usr/lib64"
    directory.mkdir(parents=True)
    (directory / "libnvidia-ml.so.580.95.05").touch()
    (directory / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.95.05")
    assert nvidia_facts.library_version(tmp_path) == "580.95.05"


def test_only_nvidias_devices_count(tmp_path: Path) -> None:
    for address, vendor, device, kind in (
        ("0000:00:1f.0", "0x8086", "0x7a04", "0x060100"),
        ("0000:05:00.0", "0x10de", "0x22a3", "0x068000"),
        ("0000:01:00.0", "0x10de", "0x2335", "0x030200"),
    ):
        (tmp_path / address).mkdir()
        for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
            (tmp_path / address / name).write_text(f"{value}\n")
    expected = (PciDevice("0000:01:00.0", 0x2335, 0x0302), PciDevice("0000:05:00.0", 0x22A3, 0x0680))
    assert nvidia_facts.pci_devices(tmp_path) == expected
    assert nvidia_facts.pci_devices(tmp_path / "none") == ()


@pytest.mark.parametrize(("data", "state"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\0", False), (None, None)])
def test_secure_boot(tmp_path: Path, data: bytes | None, state: bool | None) -> None:
    if data is not None:
        (tmp_path / "variable").write_bytes(data)
    assert nvidia_facts.secure_boot_state(tmp_path / "variable") is state


def test_dpkg_tells_versions_and_holds() -> None:
    text = (
        "bash\t5.2\tinstall\tinstalled\n"
        "libnvidia-compute-580\t580.95.05-0ubuntu1\thold\tinstalled\n"
        "nvidia-dkms-570\t570.1-1\tdeinstall\tconfig-files\n"
        "libnvidia-container1\t1.18.0-1\tinstall\tinstalled\n"
        "nvidia-container-toolkit\t1.18.0-1\tinstall\tinstalled\n"
    )
    packages, held = nvidia_facts.parse_dpkg(text)
    assert packages == {"libnvidia-compute-580": "580.95.05-0ubuntu1", "nvidia-container-toolkit": "1.18.0-1"}
    assert held == ("libnvidia-compute-580",)


def test_rpm_tells_epochs_and_the_running_kernels_package() -> None:
    text = (
        "nvidia-driver-cuda\t3\t580.95.05-1.el9\tx86_64\n"
        "kernel-devel\t(none)\t5.14.0-611.el9\tx86_64\n"
        "bash\t(none)\t5.1-9.el9\tx86_64\n"
    )
    assert nvidia_facts.parse_rpm(text) == {
        "nvidia-driver-cuda": "3:580.95.05-1.el9",
        "kernel-devel": "5.14.0-611.el9",
        "kernel-devel-5.14.0-611.el9.x86_64": "5.14.0-611.el9",
    }


def test_only_our_repositorys_driver_is_on_offer() -> None:
    text = (
        "nvidia-dkms-580-open | 580.95.05-0ubuntu1 | file:/opt/nvidia  Packages\n"
        "nvidia-dkms-580-open | 580.105.08-0ubuntu1 | file:/opt/nvidia  Packages\n"
        "nvidia-dkms-580-open | 580.173.02-0ubuntu0.24.04.1 | http://archive.ubuntu.com/ubuntu noble/restricted amd64\n"
        "linux-headers-6.8.0-90-generic | 6.8.0-90.91 | http://archive.ubuntu.com/ubuntu noble/main amd64 Packages\n"
    )
    names = ("nvidia-dkms-580-open", "linux-headers-6.8.0-90-generic")
    assert nvidia_facts.parse_madison(text, names, "file:///opt/nvidia/") == {
        "linux-headers-6.8.0-90-generic": ("6.8.0-90.91",),
        "nvidia-dkms-580-open": ("580.105.08-0ubuntu1", "580.95.05-0ubuntu1"),
    }


def test_dnf_offers_by_name_and_by_full_name() -> None:
    text = (
        "kmod-nvidia-open-dkms|3|580.95.05-1.el9|noarch|berth-nvidia\n"
        "kmod-nvidia-open-dkms|3|590.1.1-1.el9|noarch|rpmfusion\n"
        "kernel-devel|0|5.14.0-611.el9|x86_64|baseos\n"
        "Last metadata expiration check: 0:00:01 ago\n"
    )
    names = ("kmod-nvidia-open-dkms", "kernel-devel-5.14.0-611.el9.x86_64")
    assert nvidia_facts.parse_repoquery(text, names) == {
        "kernel-devel-5.14.0-611.el9.x86_64": ("5.14.0-611.el9",),
        "kmod-nvidia-open-dkms": ("3:580.95.05-1.el9",),
    }


def test_the_enabled_stream() -> None:
    text = "[nvidia-driver]\nname=nvidia-driver\nstream={}\nprofiles=\nstate={}\n"
    assert nvidia_facts.enabled_stream(text.format("580-open", "enabled")) == "580-open"
    assert nvidia_facts.enabled_stream(text.format("", "disabled")) is None
    assert nvidia_facts.enabled_stream(None) is None


def test_services() -> None:
    text = (
        "Id=nvidia-persistenced.service\nLoadState=loaded\nActiveState=active\nUnitFileState=static\n\n"
        "Id=nvidia-dcgm.service\nLoadState=not-found\nActiveState=inactive\nUnitFileState=\n\n"
        "Id=nvidia-fabricmanager.service\nLoadState=loaded\nActiveState=failed\nUnitFileState=disabled\n"
    )
    assert nvidia_facts.parse_services(text) == {
        "nvidia-persistenced": Service(True, True),
        "nvidia-fabricmanager": Service(False, False),
    }


def test_a_host_without_a_gpu_is_read_whole() -> None:
    found = nvidia_facts.read_found("here", Wanted())
    assert found.kernel
    assert found.distribution
    assert found.available == {}, "nothing is asked of package sources that Berth did not name"


def test_the_module_decides_as_the_role_asks_it(tmp_path: Path) -> None:
    version = tmp_path / "kernel/proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text(OPEN)
    tasks: list[dict[str, Any]] = []
    for name, wanted in (("good", {"branch": 580}), ("old", {"minimum_branch": 590}), ("typo", {"brunch": 580})):
        module = {"host": "gpu01", "wanted": wanted, "kernel_root": str(tmp_path / "kernel")}
        copy = {"content": "{{ __answer | to_json }}", "dest": f"{tmp_path}/{name}"}
        tasks += [
            {"nvidia_driver_info": module, "register": "__answer", "failed_when": False},
            {"ansible.builtin.copy": copy},
        ]
    interpreter = {"ansible_python_interpreter": sys.executable}
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": interpreter, "tasks": tasks}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    command = [str(Path(sys.executable).with_name("ansible-playbook")), str(tmp_path / "play.yml")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    good, old, typo = (json.loads((tmp_path / name).read_text()) for name in ("good", "old", "typo"))
    assert good["found"]["loaded"] == "580.95.05"
    assert good["decision"]["action"] == "adopt"
    assert good["errors"] == []
    assert "branch-too-old" in old["errors"][0]
    assert "brunch: unknown key" in typo["msg"]
