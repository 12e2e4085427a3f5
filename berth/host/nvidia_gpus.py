"""What a PCI device id says of an NVIDIA GPU: its generation, and so which kernel modules can drive it.

Ids grow with the generations (the PCI ID database; the table of supported GPUs in NVIDIA's open-gpu-kernel-modules):
Turing begins at 1E00, everything below is Volta or older; Blackwell begins at 2900. Hopper is 2300 to 23FF, of which
Grace Hopper (GH200) is told by its ids or by the Arm processor beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

from berth.host.nvidia_types import PciDevice

NVIDIA_VENDOR = 0x10DE
_TURING = 0x1E00
_BLACKWELL = 0x2900
_GRACE_HOPPER = frozenset({0x2342, 0x2345, 0x2348})
# B200 and B300 on an HGX board: their switches are no PCI functions of NVIDIA's, but bridges behind ConnectX devices.
_HGX_BLACKWELL = frozenset({0x2901, 0x3182})
_DISPLAY, _DISPLAY_3D, _BRIDGE = 0x0300, 0x0302, 0x0680

LAST_BRANCH_BEFORE_TURING = 580
"""Branch 590 dropped Maxwell, Pascal and Volta."""
LAST_PROPRIETARY_BRANCH = 615
"""Branch 620 has the open kernel modules only (its release notes, "Proprietary Kernel Modules Removed")."""


def gpus(devices: Iterable[PciDevice]) -> tuple[PciDevice, ...]:
    """The display and 3D controllers among ``devices``, in bus order."""
    found = (device for device in devices if device.class_code in (_DISPLAY, _DISPLAY_3D))
    return tuple(sorted(found, key=lambda device: device.address))


def switches(devices: Iterable[PciDevice]) -> tuple[PciDevice, ...]:
    """The NVSwitches among ``devices``: NVIDIA's bridges of class 0680."""
    found = (device for device in devices if device.class_code == _BRIDGE)
    return tuple(sorted(found, key=lambda device: device.address))


def before_turing(device: PciDevice) -> bool:
    """Whether the open kernel modules cannot drive this GPU."""
    return device.device < _TURING


def needs_open(device: PciDevice, arch: str) -> bool:
    """Whether only the open kernel modules can drive this GPU: Blackwell and later, Grace Hopper."""
    grace = device.device in _GRACE_HOPPER or (arch == "aarch64" and 0x2300 <= device.device < 0x2400)
    return device.device >= _BLACKWELL or grace


def has_hgx_blackwell(devices: Iterable[PciDevice]) -> bool:
    """Whether a GPU sits on an HGX Blackwell board, whose NVSwitches need the NVLink Subnet Manager as well."""
    return any(device.device in _HGX_BLACKWELL for device in gpus(devices))


def needs_fabric_manager(devices: Iterable[PciDevice]) -> bool:
    """Whether CUDA refuses to start (error 802) until Fabric Manager has set the NVSwitches up."""
    known = tuple(devices)
    return bool(switches(known)) or has_hgx_blackwell(known)


def name(device: PciDevice) -> str:
    """How people look it up: address and vendor:device."""
    return f"{device.address} [{NVIDIA_VENDOR:04x}:{device.device:04x}]"
