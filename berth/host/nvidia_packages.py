"""Names, versions and repositories of NVIDIA's packages, per family of distributions.

Sources: NVIDIA's Driver Installation Guide (chapters Ubuntu, Debian, Red Hat Enterprise Linux, Version locking,
Recent updates), the Fabric Manager and DCGM guides, and the listings of the repositories themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from berth.errors import BerthError
from berth.host.nvidia_types import File, Found, Wanted

NVIDIA_URL = "https://developer.download.nvidia.com/compute/cuda/repos"
APT_SOURCE = "/etc/apt/sources.list.d/berth-nvidia.list"
APT_PIN = "/etc/apt/preferences.d/berth-nvidia"
APT_UNATTENDED = "/etc/apt/apt.conf.d/52berth-nvidia"
DNF_SOURCE = "/etc/yum.repos.d/berth-nvidia.repo"
DNF_LOCK = "/etc/dnf/plugins/versionlock.list"
NOUVEAU = "/etc/modprobe.d/berth-nvidia.conf"
MPS_UNIT = "/etc/systemd/system/berth-nvidia-mps.service"
FILES = (APT_SOURCE, APT_PIN, APT_UNATTENDED, DNF_SOURCE, DNF_LOCK, NOUVEAU)

# The path that NVIDIA's own cuda-keyring uses: two sources of one repository must name the same key.
_CUDA_KEYRING = "/usr/share/keyrings/cuda-archive-keyring.gpg"
_OWN_KEYRING = "/usr/share/keyrings/berth-nvidia.{suffix}"
_RPM_KEYS = {"9": "D42D0685.pub", "10": "CDF6BA43.pub"}
_UNSUFFIXED_SINCE = 590
_DCGM_CUDA13_SINCE = 580
_RHEL = ("rhel", "rocky", "almalinux", "centos")
_FIRST_BRANCH = 300
"""Packages named alike and with versions of their own (container toolkit, GPUDirect Storage) count from 1."""
_STACK = re.compile(
    r"^(lib(nvidia(?!-container)|cuda1|nvcuvid|nvsdm)|nvidia-(?!settings)|kmod-nvidia|cuda-drivers|firmware-nvidia"
    r"|xserver-xorg-video-nvidia|xorg-x11-nvidia|nvlink5)"
)


@dataclass(frozen=True)
class Family:
    """Distributions that take the same packages."""

    name: str
    manager: str
    repository: str
    """Name of the distribution in NVIDIA's repository."""

    def __str__(self) -> str:
        return self.name


SUPPORTED: Mapping[tuple[str, str], Family] = {
    ("ubuntu", "22.04"): Family("ubuntu", "apt", "ubuntu2204"),
    ("ubuntu", "24.04"): Family("ubuntu", "apt", "ubuntu2404"),
    ("debian", "12"): Family("debian", "apt", "debian12"),
    ("debian", "13"): Family("debian", "apt", "debian13"),
    **{(name, "9"): Family("rhel9", "dnf", "rhel9") for name in _RHEL},
    **{(name, "10"): Family("rhel10", "dnf", "rhel10") for name in _RHEL},
}


def family_of(found: Found) -> Family:
    """The family of a host.

    Raises:
        BerthError: the distribution or its version is not one that NVIDIA and Ansible both support.
    """
    version = found.version if found.distribution == "ubuntu" else found.version.split(".")[0]
    family = SUPPORTED.get((found.distribution, version))
    if family:
        return family
    hint = ""
    if found.distribution in _RHEL and version == "8":
        hint = " (8 has no Python that the Ansible of today can run its modules with)"
    raise BerthError(
        f"{found.host}: Berth installs no driver on this distribution{hint}",
        found=f"{found.distribution} {found.version}",
        allowed="Ubuntu 22.04 and 24.04, Debian 12 and 13, RHEL, Rocky, Alma 9 and 10",
        mend="install the driver by hand: Berth adopts a driver that is loaded; or set nvidia_driver_install: false",
    )


def upstream(version: str) -> str:
    """The driver's own version in a package's: ``3:580.95.05-1.el9`` and ``580.95.05-0ubuntu1`` give ``580.95.05``."""
    return version.rpartition(":")[2].partition("-")[0]


def branch_of(version: str) -> int:
    """580 of ``580.95.05``; 0 where the version has no number."""
    match = re.match(r"(\d+)", upstream(version))
    return int(match.group(1)) if match else 0


def order(version: str) -> tuple[int, ...]:
    """Sorts versions of the driver as numbers: 580.105.08 is newer than 580.95.05."""
    return tuple(int(part) for part in re.findall(r"\d+", upstream(version)))


def is_driver_package(name: str, version: str) -> bool:
    """Whether a package is part of the driver: such packages carry its version and move together."""
    return bool(_STACK.match(name)) and branch_of(version) >= _FIRST_BRANCH


def is_kernel_module(name: str) -> bool:
    """Whether a package is one that NVIDIA's kernel module comes from."""
    return name.startswith(("nvidia-dkms", "nvidia-kernel", "kmod-nvidia"))


def kernel_module(family: Family, branch: int, open_modules: bool) -> str:
    """The package that DKMS builds the kernel module from; its version is the driver's."""
    if family.manager == "dnf":
        return "kmod-nvidia-open-dkms" if open_modules else "kmod-nvidia-latest-dkms"
    if family.name == "debian":
        return "nvidia-kernel-open-dkms" if open_modules else "nvidia-kernel-dkms"
    suffix = "" if branch >= _UNSUFFIXED_SINCE else f"-{branch}"
    return f"nvidia-dkms{suffix}{'-open' if open_modules else ''}"


def library_package(family: Family, branch: int) -> str:
    """The package that brings CUDA's driver library (its NVML comes with it)."""
    if family.name != "ubuntu":
        return "nvidia-driver-cuda"
    return "libnvidia-compute" if branch >= _UNSUFFIXED_SINCE else f"libnvidia-compute-{branch}"


def core(family: Family, branch: int, open_modules: bool) -> tuple[str, ...]:
    """The compute-only driver: kernel module, CUDA's library, nvidia-smi and the persistence daemon."""
    module, library = kernel_module(family, branch, open_modules), library_package(family, branch)
    if family.name != "ubuntu":
        return (module, library, "nvidia-persistenced")
    if branch >= _UNSUFFIXED_SINCE:
        return (module, library, "libnvidia-cfg1", "nvidia-persistenced")
    return (module, library, f"libnvidia-cfg1-{branch}", f"nvidia-utils-{branch}", f"nvidia-compute-utils-{branch}")


def optional(family: Family, branch: int) -> tuple[str, ...]:
    """Taken where the repository has them: Ubuntu's packages of 590 and later moved nvidia-smi between releases."""
    if family.name == "ubuntu" and branch >= _UNSUFFIXED_SINCE:
        return ("nvidia-utils", "nvidia-compute-utils")
    return ()


def fabric_manager_names(branch: int) -> tuple[str, ...]:
    """Names it goes by, best first: it lost its suffix within branch 580."""
    return ("nvidia-fabricmanager", f"nvidia-fabricmanager-{branch}")


def dcgm_package(branch: int) -> str:
    """DCGM 4 comes per CUDA version; CUDA 13 needs driver 580."""
    return f"datacenter-gpu-manager-4-cuda{13 if branch >= _DCGM_CUDA13_SINCE else 12}"


def headers_package(family: Family, found: Found, wanted: Wanted) -> str:
    """What DKMS builds the module for the running kernel with."""
    if wanted.kernel_headers:
        return wanted.kernel_headers
    return f"linux-headers-{found.kernel}" if family.manager == "apt" else f"kernel-devel-{found.kernel}"


def module_stream(family: Family, branch: int, open_modules: bool) -> str:
    """The stream of dnf's module nvidia-driver; empty where the family has no modules."""
    return f"{branch}-{'open' if open_modules else 'dkms'}" if family.name == "rhel9" else ""


def asked_for(found: Found, wanted: Wanted) -> tuple[str, ...]:
    """Every package whose available versions a decision may look at, sorted."""
    try:
        family = family_of(found)
    except BerthError:
        return ()
    names = {headers_package(family, found, wanted), dcgm_package(wanted.branch), "nvidia-container-toolkit", "nvlsm"}
    names |= set(fabric_manager_names(wanted.branch)) | set(optional(family, wanted.branch))
    for open_modules in (True, False):
        names |= set(core(family, wanted.branch, open_modules))
    if family.manager == "dnf":
        names.add("dkms")
    return tuple(sorted(names))


def repository_url(family: Family, found: Found, wanted: Wanted) -> str:
    """Where the packages come from, without a slash at its end: NVIDIA's, a mirror's, or ``file:///...``."""
    if wanted.repository_url:
        return wanted.repository_url.rstrip("/")
    arch = "sbsa" if found.arch == "aarch64" else "x86_64"
    return f"{NVIDIA_URL}/{family.repository}/{arch}"


def repository_key(family: Family, found: Found, wanted: Wanted) -> str:
    """Where its key is; empty for a repository that is said to be unsigned."""
    if wanted.repository_unsigned:
        return ""
    if wanted.repository_key:
        return wanted.repository_key
    url = repository_url(family, found, wanted)
    return f"{url}/cuda-archive-keyring.gpg" if family.manager == "apt" else f"{url}/{_RPM_KEYS[family.name[4:]]}"


def repository_keyring(family: Family, wanted: Wanted) -> str:
    """Where the key lies on a host of apt's; dnf imports keys by itself."""
    if family.manager == "dnf" or wanted.repository_unsigned:
        return ""
    if not wanted.repository_key:
        return _CUDA_KEYRING
    return _OWN_KEYRING.format(suffix="asc" if wanted.repository_key.endswith((".asc", ".pub", ".key")) else "gpg")


def repository_file(family: Family, found: Found, wanted: Wanted) -> File:
    """The repository's definition."""
    url, head = repository_url(family, found, wanted), "# Written by Berth (role nvidia_driver).\n"
    if family.manager == "apt":
        trust = "trusted=yes" if wanted.repository_unsigned else f"signed-by={repository_keyring(family, wanted)}"
        return File(APT_SOURCE, f"{head}deb [{trust}] {url} /\n")
    key = repository_key(family, found, wanted)
    lines = ["[berth-nvidia]", "name=NVIDIA driver (Berth)", f"baseurl={url}", "enabled=1"]
    lines += ["gpgcheck=1", f"gpgkey={key}"] if key else ["gpgcheck=0"]
    return File(DNF_SOURCE, head + "\n".join(lines) + "\n")


def pin_file(version: str) -> File:
    """apt's preference for one version of every package of the driver; containers' packages share a name's start only.

    1001 is above what allows a downgrade (1000), so that a host which moved comes back as well.
    """
    names = (
        "cuda-drivers* firmware-nvidia-* libcuda1 libcudadebugger1 libnvcuvid* libnvidia-* nvidia-compute-utils* "
        "nvidia-dkms* nvidia-driver* nvidia-fabricmanager* nvidia-firmware* nvidia-imex* nvidia-kernel-* "
        "nvidia-modprobe nvidia-open* nvidia-persistenced nvidia-smi nvidia-utils* xserver-xorg-video-nvidia*"
    )
    head = f"# Written by Berth (role nvidia_driver): {version} stays until nvidia_driver_version says otherwise.\n"
    return File(APT_PIN, f"{head}Package: {names}\nPin: version {version}-*\nPin-Priority: 1001\n")


def unattended_file() -> File:
    """unattended-upgrades looks at its own list beside holds and pins."""
    names = ("nvidia-", "libnvidia-", "libcuda1", "cuda-drivers", "linux-modules-nvidia-")
    lines = "".join(f'    "^{name}";\n' for name in names)
    head = (
        "// Written by Berth (role nvidia_driver): an upgrade under a running driver breaks every new CUDA process.\n"
    )
    return File(APT_UNATTENDED, f"{head}Unattended-Upgrade::Package-Blacklist {{\n{lines}}};\n")


def nouveau_file() -> File:
    """nouveau and nvidia cannot drive one GPU."""
    return File(NOUVEAU, "# Written by Berth (role nvidia_driver).\nblacklist nouveau\noptions nouveau modeset=0\n")


def lock_line(name: str, version: str) -> str:
    """A line of dnf's version lock: one version of one package, any architecture."""
    epoch, _, rest = version.rpartition(":")
    return f"{name}-{epoch or 0}:{rest}.*"
