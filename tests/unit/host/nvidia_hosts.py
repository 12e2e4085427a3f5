"""Hosts for the tests of the driver's decisions, and what doing a decision does to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from berth.host import nvidia_packages
from berth.host.nvidia_packages import upstream
from berth.host.nvidia_types import Decision, Found, PciDevice, Service, Wanted

GPU, SWITCH = 0x0302, 0x0680
L40S, H200, B200, GH200, V100, GTX1080 = 0x26B9, 0x2335, 0x2901, 0x2342, 0x1DB6, 0x1B80
RELEASES = ("570.211.01", "580.95.05", "580.159.04", "580.178.04", "590.48.01", "620.24.02")
SYSTEMS = (
    ("ubuntu", "22.04"),
    ("ubuntu", "24.04"),
    ("debian", "12"),
    ("debian", "13"),
    ("rocky", "9.6"),
    ("rhel", "10"),
)
SUFFIX = {"apt": "-1ubuntu1", "dnf": "-1.el9"}


def gpu(device: int, address: str = "0000:3b:00.0") -> PciDevice:
    return PciDevice(address, device, GPU)


def fresh(system: tuple[str, str] = ("ubuntu", "24.04"), *devices: PciDevice, **changes: object) -> Found:
    """A host as its installer left it, with GPUs and no driver."""
    kernel = "6.8.0-90-generic" if system[0] in ("ubuntu", "debian") else "5.14.0-611.el9.x86_64"
    found = Found("gpu01", *system, "x86_64", kernel, root=True, devices=devices or (gpu(L40S),))
    return replace(found, **changes)  # type: ignore[arg-type]


def full(family: nvidia_packages.Family, version: str) -> str:
    return f"{'3:' if family.manager == 'dnf' else ''}{version}{SUFFIX[family.manager]}"


def repository(found: Found, wanted: Wanted, releases: tuple[str, ...] = RELEASES) -> Mapping[str, tuple[str, ...]]:
    """What the package sources offer: every release under the names of its branch, as NVIDIA's do."""
    family = nvidia_packages.family_of(found)
    offered: dict[str, set[str]] = {}
    for version in releases:
        branch = nvidia_packages.branch_of(version)
        names = {name for flavour in (True, False) for name in nvidia_packages.core(family, branch, flavour)}
        names.add(nvidia_packages.fabric_manager_names(branch)[0])
        for name in names:
            offered.setdefault(name, set()).add(full(family, version))
    beside = (nvidia_packages.headers_package(family, found, wanted), "dkms", "nvlsm", "nvidia-container-toolkit")
    offered |= {name: {"1.0-1"} for name in (*beside, nvidia_packages.dcgm_package(wanted.branch))}
    asked = nvidia_packages.asked_for(found, wanted)
    return {
        name: tuple(sorted(offered[name], key=nvidia_packages.order, reverse=True)) for name in asked if name in offered
    }


def apply(found: Found, wanted: Wanted, decision: Decision) -> Found:
    """The host after one pass of the role: sources, packages, holds, files, services, and the boot where allowed."""
    if decision.action == "nothing":
        return found
    files = dict(found.files)
    if decision.repository:
        files[decision.repository.path] = decision.repository.content
    packages = {name: version for name, version in found.packages.items() if name not in decision.remove}
    offered = found.available
    for spec in decision.packages if offered else ():
        name, version = _parse(spec, offered)
        packages[name] = version
    if decision.packages and not offered:
        return replace(found, files=files, module_stream=decision.module_stream or found.module_stream)
    files |= {file.path: file.content for file in decision.files}
    if decision.lock:
        files[nvidia_packages.DNF_LOCK] = "\n".join(decision.lock)
    libraries = ("libnvidia-compute", "nvidia-driver-cuda")
    library = next((upstream(v) for n, v in sorted(packages.items()) if n.startswith(libraries)), found.library)
    after = replace(
        found,
        files=files,
        packages=packages,
        held=tuple(sorted({*found.held, *decision.hold} & set(packages))),
        headers=found.headers or any("headers" in name or "kernel-devel" in name for name in packages),
        library=library,
        module_stream=decision.module_stream or found.module_stream,
    )
    return _serve(_boot(after, wanted, decision), decision)


def _boot(found: Found, wanted: Wanted, decision: Decision) -> Found:
    if decision.load:
        return replace(found, loaded=found.library, loaded_open=decision.open_modules)
    if decision.reboot and wanted.allow_reboot:
        return replace(found, loaded=found.library, loaded_open=decision.open_modules, nouveau=False)
    return found


def _serve(found: Found, decision: Decision) -> Found:
    running = found.loaded is not None
    return replace(found, services={**found.services, **{n: Service(True, running) for n in decision.services}})


def _parse(spec: str, offered: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """The name and version that the package manager makes of an argument: the newest where none is said."""
    name, _, version = spec.partition("=")
    if version:
        return name, version
    for candidate, versions in offered.items():
        for version in versions:
            if spec == f"{candidate}-{version}":
                return candidate, version
    return spec, offered.get(spec, ("1.0-1",))[0]


def settle(found: Found, wanted: Wanted, releases: tuple[str, ...] = RELEASES) -> tuple[Found, list[Decision]]:
    """Decides and does until nothing is left; the package sources answer once Berth's definition is there."""
    from berth.host.nvidia_checks import errors
    from berth.host.nvidia_driver import decide

    decisions: list[Decision] = []
    for _ in range(6):
        decision = decide(found, wanted)
        decisions.append(decision)
        if errors(decision.findings) or not decision.steps:
            break
        found = apply(found, wanted, decision)
        if decision.repository and found.files.get(decision.repository.path) == decision.repository.content:
            found = replace(found, available=repository(found, wanted, releases))
    return found, decisions
