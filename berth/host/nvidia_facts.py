"""Reads what role nvidia_driver decides by: files, package databases and systemd. Changes nothing, needs no root."""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from berth.errors import BerthError, CouldNotTell
from berth.host import nvidia_gpus, nvidia_packages
from berth.host.nvidia_types import Found, PciDevice, Service, Wanted

SERVICES = ("berth-nvidia-mps", "nvidia-dcgm", "nvidia-fabricmanager", "nvidia-persistenced")
_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_SIGNING_KEYS = ("var/lib/shim-signed/mok/MOK.der", "var/lib/dkms/mok.pub")
_LIBRARY_DIRS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib")
_MODULE_STATE = "etc/dnf/modules.d/nvidia-driver.module"
_VERSION = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)*)")
_BESIDE = re.compile(
    r"^(linux-headers-|kernel-devel|datacenter-gpu-manager|nvlsm$|dkms$|python3-dnf-plugin-versionlock$)"
)
_COMMAND_TIMEOUT_S = 180


def read_found(host: str, wanted: Wanted, kernel_root: Path = Path("/"), root: Path = Path("/")) -> Found:
    """The host named ``host`` as it is.

    ``kernel_root`` is where the kernel's ``proc`` and ``sys`` are; another one stands for hardware that is not there.

    Raises:
        CouldNotTell: a package manager or systemd did not answer.
    """
    release = os_release((root / "etc/os-release").read_text(encoding="utf-8"))
    kernel = platform.release()
    version_text = _text(kernel_root / "proc/driver/nvidia/version")
    packages, held = _packages(root)
    secure_boot = secure_boot_state(kernel_root / _SECURE_BOOT)
    found = Found(
        host=host,
        distribution=release.get("ID", "unknown"),
        version=release.get("VERSION_ID", ""),
        arch=platform.machine(),
        kernel=kernel,
        root=os.geteuid() == 0,
        devices=pci_devices(kernel_root / "sys/bus/pci/devices"),
        headers=(root / "lib/modules" / kernel / "build").exists(),
        packages=packages,
        held=held,
        files={path: text for path in nvidia_packages.FILES if (text := _text(root / path.lstrip("/"))) is not None},
        module_stream=enabled_stream(_text(root / _MODULE_STATE)),
        loaded=loaded_version(version_text),
        loaded_open="Open Kernel Module" in version_text if version_text else None,
        library=library_version(root),
        nouveau=(kernel_root / "sys/module/nouveau").exists(),
        secure_boot=secure_boot,
        key_enrolled=_key_enrolled(root) if secure_boot else None,
        systemd=_has_systemd(),
        services=_services(SERVICES) if _has_systemd() else {},
    )
    return _with_available(found, wanted)


def os_release(text: str) -> dict[str, str]:
    """os-release as a dict, quotes taken off."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def loaded_version(text: str | None) -> str | None:
    """The version in /proc/driver/nvidia/version, of the open and of the proprietary kernel module."""
    match = _VERSION.search(text or "")
    return match.group(1) if match else None


def library_version(root: Path) -> str | None:
    """The version of libnvidia-ml.so.1, from the name of the file that the link leads to."""
    for directory in _LIBRARY_DIRS:
        link = root / directory / "libnvidia-ml.so.1"
        if link.exists():
            version = link.resolve().name.removeprefix("libnvidia-ml.so.")
            return version if version != "1" else None
    return None


def pci_devices(directory: Path) -> tuple[PciDevice, ...]:
    """NVIDIA's PCI functions, in bus order."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        vendor, device, kind = (_text(path / name) for name in ("vendor", "device", "class"))
        if vendor and device and kind and int(vendor, 16) == nvidia_gpus.NVIDIA_VENDOR:
            found.append(PciDevice(path.name, int(device, 16), int(kind, 16) >> 8))
    return tuple(found)


def secure_boot_state(variable: Path) -> bool | None:
    """The UEFI variable: four bytes of attributes, then the value. None without UEFI."""
    try:
        return variable.read_bytes()[4:5] == b"\x01"
    except OSError:
        return None


def enabled_stream(text: str | None) -> str | None:
    """The stream that dnf's own file says is enabled."""
    if text is None:
        return None
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    section = parser["nvidia-driver"] if parser.has_section("nvidia-driver") else None
    return section.get("stream") or None if section and section.get("state") == "enabled" else None


def parse_dpkg(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Installed packages and held ones, of lines ``name, version, want, status`` parted by tabs."""
    packages, held = {}, []
    for line in text.splitlines():
        name, version, want, status = line.split("\t")
        if status == "installed" and _of_interest(name, version):
            packages[name] = version
            if want == "hold":
                held.append(name)
    return packages, tuple(sorted(held))


def parse_rpm(text: str) -> dict[str, str]:
    """Installed packages, of lines ``name, epoch, version-release, arch`` parted by tabs; an epoch of 0 is left out."""
    packages = {}
    for line in text.splitlines():
        name, epoch, version, arch = line.split("\t")
        full = version if epoch in ("(none)", "0") else f"{epoch}:{version}"
        if _of_interest(name, full):
            packages[name] = full
            if name == "kernel-devel":
                packages[f"{name}-{version}.{arch}"] = full
    return packages


def parse_madison(text: str, names: Iterable[str], url: str) -> dict[str, tuple[str, ...]]:
    """Available versions, newest first, of ``apt-cache madison``; of the driver only what comes from ``url``."""
    asked, offered = set(names), dict[str, list[str]]()
    for line in text.splitlines():
        name, version, source = (part.strip() for part in line.split("|", 2))
        own = nvidia_packages.is_driver_package(name, version)
        if name in asked and (not own or _same_place(source.split()[0], url)):
            versions = offered.setdefault(name, [])
            if version not in versions:
                versions.append(version)
    return _newest_first(offered)


def parse_repoquery(text: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Available versions, newest first, of lines ``name|epoch|version-release|arch|repository``."""
    asked, offered = set(names), dict[str, list[str]]()
    for line in text.splitlines():
        if line.count("|") != 4:
            continue
        name, epoch, version, arch, repository = line.split("|")
        full = version if epoch == "0" else f"{epoch}:{version}"
        if nvidia_packages.is_driver_package(name, full) and repository != "berth-nvidia":
            continue
        for key in (name, f"{name}-{version}.{arch}"):
            if key in asked and full not in offered.setdefault(key, []):
                offered[key].append(full)
    return _newest_first({key: versions for key, versions in offered.items() if versions})


def _newest_first(offered: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(sorted(versions, key=lambda version: (nvidia_packages.order(version), version), reverse=True))
        for name, versions in sorted(offered.items())
    }


def _same_place(source: str, url: str) -> bool:
    """apt writes file:///x as file:/x."""
    return re.sub(r"^file:/+", "/", source).rstrip("/") == re.sub(r"^file:/+", "/", url).rstrip("/")


def _of_interest(name: str, version: str) -> bool:
    names = ("nvidia-container-toolkit",)
    return nvidia_packages.is_driver_package(name, version) or bool(_BESIDE.match(name)) or name in names


def _packages(root: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    if shutil.which("dpkg-query"):
        form = r"${Package}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n"
        return parse_dpkg(_run(["dpkg-query", f"--admindir={root / 'var/lib/dpkg'}", "-W", f"-f={form}"]))
    if shutil.which("rpm"):
        form = r"%{NAME}\t%{EPOCH}\t%{VERSION}-%{RELEASE}\t%{ARCH}\n"
        return parse_rpm(_run(["rpm", "--root", str(root), "-qa", "--qf", form])), ()
    return {}, ()


def _with_available(found: Found, wanted: Wanted) -> Found:
    """Asks the package sources, once Berth's is among them; before, nothing exact could be known."""
    try:
        family = nvidia_packages.family_of(found)
    except BerthError:
        return found
    repository = nvidia_packages.repository_file(family, found, wanted)
    if found.files.get(repository.path) != repository.content:
        return found
    names = nvidia_packages.asked_for(found, wanted)
    if family.manager == "apt":
        url = nvidia_packages.repository_url(family, found, wanted)
        offered = parse_madison(_run(["apt-cache", "madison", *names]), names, url)
    else:
        form = "%{name}|%{epoch}|%{version}-%{release}|%{arch}|%{repoid}"
        arguments = ["--quiet", "--available", "--showduplicates", "--qf", f"{form}\n"]
        offered = parse_repoquery(_run(["dnf", "repoquery", *arguments, *names]), names)
    return Found(**{**found.__dict__, "available": offered})


def _key_enrolled(root: Path) -> bool | None:
    keys = [root / path for path in _SIGNING_KEYS if (root / path).is_file()]
    if not keys or not shutil.which("mokutil"):
        return None
    done = subprocess.run(
        ["mokutil", "--test-key", str(keys[0])], capture_output=True, text=True, check=False, env=_environment()
    )
    return "is already enrolled" in done.stdout


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


def _services(names: Iterable[str]) -> dict[str, Service]:
    units = [f"{name}.service" for name in names]
    text = _run(["systemctl", "show", "--property=Id,LoadState,UnitFileState,ActiveState", *units])
    return parse_services(text)


def parse_services(text: str) -> dict[str, Service]:
    """Services of ``systemctl show``: one block of properties each, parted by an empty line."""
    services = {}
    for block in text.strip().split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        if values.get("LoadState") == "loaded":
            enabled = values.get("UnitFileState") in ("enabled", "enabled-runtime", "static", "indirect", "alias")
            name = values["Id"].removesuffix(".service")
            services[name] = Service(enabled, values.get("ActiveState") in ("active", "activating"))
    return services


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=_environment(), timeout=_COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CouldNotTell(f"{command[0]} does not answer: {error}", mend=f"run it on the host: {command[0]}") from None
    if done.returncode:
        shown = " ".join(command[:3])
        raise CouldNotTell(f"{shown} failed", found=done.stderr.strip()[-300:], mend=f"run it on the host: {shown}")
    return done.stdout
