"""What can be wrong with a host's NVIDIA driver, or with what is wanted of it: each with what was found and the mend.

The kinds are headings of docs/driver.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from berth.host import nvidia_gpus, nvidia_packages
from berth.host.nvidia_packages import Family, branch_of
from berth.host.nvidia_types import Decision, Finding, Found, PciDevice, Wanted

KINDS = (
    "adopted-without",
    "branch-too-new",
    "branch-too-old",
    "distribution",
    "dkms-missing",
    "driver-library-mismatch",
    "driver-not-loaded",
    "fabric-manager-mismatch",
    "fabric-manager-missing",
    "kernel-headers-missing",
    "kernel-modules",
    "mig-gpu-in-use",
    "mig-gpu-unknown",
    "mig-not-supported",
    "mig-reset-needed",
    "no-gpu",
    "not-in-repository",
    "not-root",
    "reboot-needed",
    "reboot-not-allowed",
    "replicas-on-host",
    "runfile",
    "secure-boot",
    "version-not-of-branch",
)
"""Every kind of finding, sorted."""


def errors(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings that a run stops at."""
    return tuple(finding for finding in findings if finding.severity == "error")


def lines(host: str, decision: Decision) -> list[str]:
    """Steps and findings for people, one line each."""
    steps = [f"{host}: {step.name}: {step.current} -> {step.desired} ({step.why})" for step in decision.steps]
    return steps + [f"{finding.severity}: {finding}" for finding in decision.findings]


def mismatch(found: Found, wanted: Wanted) -> tuple[Finding, ...]:
    """The kernel module that runs is not of the libraries on disk: an upgrade came without a reboot."""
    if not found.loaded or not found.library or found.loaded == found.library:
        return ()
    mend = "reboot the host"
    if not wanted.allow_reboot:
        mend += "; nvidia_driver_allow_reboot: true lets Berth do it, one host at a time, after stopping its units"
    what = (
        f"{found.host}: the driver's files were upgraded under the kernel module that runs, so new CUDA and NVML "
        "processes fail with 'Driver/library version mismatch'"
    )
    state = f"kernel module {found.loaded}, libnvidia-ml.so.1 {found.library}"
    severity = "warning" if wanted.allow_reboot else "error"
    return (Finding("driver-library-mismatch", what, state, mend, severity),)  # type: ignore[arg-type]


def adopted_findings(found: Found, wanted: Wanted) -> tuple[Finding, ...]:
    """What is wrong with a driver that somebody else installed; nothing of it is changed."""
    loaded = str(found.loaded)
    if branch_of(loaded) < wanted.minimum_branch:
        what = f"{found.host}: the driver that runs is older than branch {wanted.minimum_branch}"
        mend = (
            "upgrade it, lower nvidia_driver_minimum_branch, or let Berth replace it: "
            "nvidia_driver_enforce_branch: true with nvidia_driver_allow_reboot: true"
        )
        return (Finding("branch-too-old", what, loaded, mend),)
    if wanted.fabric_manager == "false" or not nvidia_gpus.needs_fabric_manager(found.devices):
        return ()
    names = [name for name in found.packages if name.startswith("nvidia-fabricmanager")]
    have = next((nvidia_packages.upstream(found.packages[name]) for name in sorted(names)), None)
    service = found.services.get("nvidia-fabricmanager")
    if have == loaded and service and service.active:
        return ()
    running = " not running" if have == loaded else ""
    kind = "fabric-manager-mismatch" if have not in (None, loaded) else "fabric-manager-missing"
    what = f"{found.host} has NVSwitches: CUDA gives error 802 until Fabric Manager of the driver's very version runs"
    mend = (
        f"install nvidia-fabricmanager {loaded} and systemctl enable --now nvidia-fabricmanager, or set "
        "nvidia_driver_fabric_manager: false"
    )
    return (Finding(kind, what, f"driver {loaded}, Fabric Manager {have or 'absent'}{running}", mend),)


def unloaded_foreign(found: Found) -> tuple[Finding, ...]:
    """A driver that Berth did not install is on disk and does not run: nothing is installed over it."""
    stack = sorted(n for n, version in found.packages.items() if nvidia_packages.is_driver_package(n, version))
    if found.loaded or not (found.library or any(nvidia_packages.is_kernel_module(name) for name in stack)):
        return ()
    causes = []
    if found.nouveau:
        causes.append("nouveau is loaded and holds the GPU")
    if found.secure_boot and not found.key_enrolled:
        causes.append("Secure Boot is on and the key that signs the module is not known to be enrolled")
    if not found.headers:
        causes.append(f"the headers of kernel {found.kernel} are missing, so DKMS cannot build")
    why = "; ".join(causes) or "see journalctl -k and dkms status"
    names = ", ".join(stack[:4]) or f"libnvidia-ml.so.1 {found.library}"
    mend = "reboot the host and look again; or let Berth replace it: nvidia_driver_enforce_branch: true"
    return (Finding("driver-not-loaded", f"{found.host}: a driver is installed and not loaded ({why})", names, mend),)


def flavour(found: Found, wanted: Wanted) -> tuple[bool, tuple[Finding, ...]]:
    """Whether the open kernel modules are to be taken, and what forbids the choice."""
    gpus = nvidia_gpus.gpus(found.devices)
    old = [gpu for gpu in gpus if nvidia_gpus.before_turing(gpu)]
    new = [gpu for gpu in gpus if nvidia_gpus.needs_open(gpu, found.arch)]
    open_modules = wanted.modules == "open" or (wanted.modules == "auto" and not old)
    findings = []

    def refuse(what: str, devices: list[PciDevice], mend: str) -> None:
        names = ", ".join(nvidia_gpus.name(device) for device in devices)
        findings.append(Finding("kernel-modules", f"{found.host}: {what}", names, mend))

    if old and new:
        refuse("no kernel module drives all of these GPUs", old + new, "put them into different hosts")
    elif open_modules and old:
        refuse("the open kernel modules drive no GPU before Turing", old, "nvidia_driver_modules: auto")
    elif not open_modules and new:
        refuse("only the open kernel modules drive these GPUs", new, "nvidia_driver_modules: auto")
    elif not open_modules and wanted.branch > nvidia_gpus.LAST_PROPRIETARY_BRANCH:
        what, mend = f"branch {wanted.branch} has no proprietary kernel modules", "nvidia_driver_branch: 580"
        findings.append(Finding("kernel-modules", f"{found.host}: {what}", "nvidia_driver_modules: proprietary", mend))
    if old and wanted.branch > nvidia_gpus.LAST_BRANCH_BEFORE_TURING:
        names = ", ".join(nvidia_gpus.name(device) for device in old)
        what = f"{found.host}: branch {wanted.branch} no longer drives GPUs before Turing"
        findings.append(Finding("branch-too-new", what, names, "nvidia_driver_branch: 580, the last that does"))
    return open_modules, tuple(findings)


def wrong_choice(found: Found, wanted: Wanted) -> tuple[Finding, ...]:
    """Variables that contradict each other or the host."""
    findings = []
    if wanted.version not in ("", "latest") and branch_of(wanted.version) != wanted.branch:
        what = f"{found.host}: nvidia_driver_version is not of nvidia_driver_branch"
        state = f"version {wanted.version}, branch {wanted.branch}"
        mend = f"nvidia_driver_branch: {branch_of(wanted.version)}"
        findings.append(Finding("version-not-of-branch", what, state, mend))
    if found.library and not any(
        nvidia_packages.is_driver_package(name, version) for name, version in found.packages.items()
    ):
        what = f"{found.host}: the driver was installed by NVIDIA's .run file; packages beside it would be a second one"
        mend = "nvidia-uninstall on the host (its units stopped), then run again"
        findings.append(Finding("runfile", what, f"libnvidia-ml.so.1 {found.library}, of no package", mend))
    return tuple(findings)


def not_root(found: Found) -> Finding:
    """There is something to do, and nobody to do it as."""
    mend = "set ansible_become: true, install the driver by hand, or nvidia_driver_simulate: true"
    return Finding("not-root", f"{found.host}: installing a driver needs root", "an ordinary user", mend)


def build_findings(found: Found, wanted: Wanted, family: Family, changes_driver: bool) -> tuple[Finding, ...]:
    """What would keep the new kernel module from being built or from being loaded."""
    if not changes_driver:
        return ()
    findings = []
    headers = nvidia_packages.headers_package(family, found, wanted)
    if not found.headers and headers not in found.available:
        what = f"{found.host}: the headers of the running kernel are in no package source, so DKMS cannot build"
        mend = (
            "upgrade the kernel and reboot (sources keep headers of current kernels only), or name the package: "
            "nvidia_driver_kernel_headers"
        )
        findings.append(Finding("kernel-headers-missing", what, f"kernel {found.kernel}, no {headers}", mend))
    if family.manager == "dnf" and "dkms" not in {*found.packages, *found.available}:
        what = f"{found.host}: dkms is in no package source"
        mend = "enable EPEL (and CRB) on the host: NVIDIA's kernel module packages need them"
        findings.append(Finding("dkms-missing", what, "no package dkms", mend))
    if found.secure_boot and not found.key_enrolled and not wanted.secure_boot_signed:
        what = (
            f"{found.host}: Secure Boot is on, so the kernel refuses the module that DKMS builds until the key that "
            "signs it is enrolled"
        )
        mend = (
            "on the host: mokutil --import /var/lib/dkms/mok.pub (Ubuntu: /var/lib/shim-signed/mok/MOK.der), reboot "
            "and confirm at the console; or switch Secure Boot off; or, where modules are signed otherwise, "
            "nvidia_driver_secure_boot_signed: true"
        )
        findings.append(Finding("secure-boot", what, "Secure Boot on, key not enrolled", mend))
    return tuple(findings)


def reboot_needed(found: Found, target: str | None) -> Finding:
    """Everything is installed and only a boot is missing."""
    state = "nouveau is loaded" if found.nouveau else f"kernel module {found.loaded or 'not loaded'}"
    what = f"{found.host}: the driver {target or ''} is installed and runs after a reboot only".replace("  ", " ")
    mend = "reboot the host, or set nvidia_driver_allow_reboot: true (one host at a time, its units stopped before)"
    return Finding("reboot-needed", what, state, mend)
