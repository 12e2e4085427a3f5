"""What is on a host of NVIDIA's driver, what is wanted, and what follows: plain data, read and written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from berth.codec import STRICT

Choice = Literal["auto", "true", "false"]
Modules = Literal["auto", "open", "proprietary"]
Action = Literal["nothing", "adopt", "install"]
Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class PciDevice:
    """A PCI function of NVIDIA's (vendor 10de); ``class_code`` without the programming interface (0x0302, 0x0680)."""

    address: str
    device: int
    class_code: int


@dataclass(frozen=True)
class Service:
    """A systemd service; a unit that is not there is neither enabled nor active."""

    enabled: bool
    active: bool


@dataclass(frozen=True)
class Found:
    """A host as it is. Nothing here was asked of NVML: the driver may not be there yet."""

    host: str
    distribution: str
    """``ID`` of os-release."""
    version: str
    """``VERSION_ID`` of os-release."""
    arch: str
    """As ``uname -m``."""
    kernel: str
    """As ``uname -r``."""
    root: bool
    devices: tuple[PciDevice, ...] = ()
    headers: bool = False
    """Whether DKMS can build for the running kernel."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed packages of NVIDIA's and what its kernel module is built with: name to full version."""
    held: tuple[str, ...] = ()
    available: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Full versions by name, newest first; of the driver only those of the repository that Berth wrote."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Content of the files that Berth may write, those that are there."""
    module_stream: str | None = None
    """The enabled stream of dnf's module nvidia-driver."""
    loaded: str | None = None
    """Version of the kernel module that runs."""
    loaded_open: bool | None = None
    library: str | None = None
    """Version of libnvidia-ml.so.1 on disk."""
    nouveau: bool = False
    """Whether nouveau is loaded."""
    secure_boot: bool | None = None
    """None where the host has no UEFI variables."""
    key_enrolled: bool | None = None
    """Whether the key that DKMS signs with is enrolled; None where that cannot be told."""
    systemd: bool = True
    services: Mapping[str, Service] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What the variables of role nvidia_driver say."""

    install: Choice = "auto"
    branch: int = 580
    version: str = ""
    """A full version, ``latest`` of the branch, or empty: what is installed stays."""
    minimum_branch: int = 570
    enforce_branch: bool = False
    modules: Modules = "auto"
    repository_url: str = ""
    repository_key: str = ""
    repository_unsigned: bool = False
    allow_reboot: bool = False
    secure_boot_signed: bool = False
    kernel_headers: str = ""
    persistence: bool = True
    fabric_manager: Choice = "auto"
    dcgm: bool = False
    container_toolkit: bool = False
    mps: bool = False
    berths: tuple[str, ...] = ()
    """Names of the berths that the plan has on the host; not a variable, and empty once the host is drained."""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Step:
    """One difference between what is and what is wanted."""

    name: str
    current: str
    desired: str
    why: str


@dataclass(frozen=True)
class Finding:
    """Something wrong that a person must decide; ``kind`` is a heading of docs/driver.md."""

    kind: str
    what: str
    found: str
    mend: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.what}; found: {self.found}; mend: {self.mend} [{self.kind}]"


@dataclass(frozen=True)
class File:
    """A file that Berth writes whole."""

    path: str
    content: str


@dataclass(frozen=True)
class Decision:
    """What to do on a host; the role does it in the order of the fields.

    ``packages`` and ``remove`` are arguments of the package manager, exact where the repository was read.
    ``disruptive`` says that a running driver is replaced, so that whoever uses the GPUs must be gone before.
    """

    action: Action
    family: str = ""
    steps: tuple[Step, ...] = ()
    findings: tuple[Finding, ...] = ()
    target: str | None = None
    open_modules: bool | None = None
    repository: File | None = None
    repository_key: str = ""
    """Where the signing key is fetched from (a URL, or a path on the controller); empty for an unsigned repository."""
    repository_keyring: str = ""
    module_stream: str = ""
    remove: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()
    lock: tuple[str, ...] = ()
    """Lines for dnf's version lock."""
    files: tuple[File, ...] = ()
    services: tuple[str, ...] = ()
    load: bool = False
    reboot: bool = False
    disruptive: bool = False
