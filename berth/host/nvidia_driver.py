"""What to do about the NVIDIA driver of a host: found and wanted in, steps and findings out, no effects.

A driver that runs is adopted when its branch is new enough: nothing of it is touched. A driver that Berth installed is
kept at its version, and followed to another when the variables ask for it. The rules of order: what cannot work is
refused before anything changes; a driver in use is replaced only where the reboot that must follow is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from berth.errors import BerthError
from berth.host import nvidia_gpus, nvidia_packages
from berth.host.nvidia_checks import (
    adopted_findings,
    build_findings,
    errors,
    flavour,
    mismatch,
    not_root,
    reboot_needed,
    unloaded_foreign,
    wrong_choice,
)
from berth.host.nvidia_packages import Family, branch_of, order, upstream
from berth.host.nvidia_types import Action, Decision, File, Finding, Found, Service, Step, Wanted

_ABSENT = "absent"


def managed(found: Found) -> bool:
    """Whether Berth installed this driver: its repository definition is on the host."""
    return nvidia_packages.APT_SOURCE in found.files or nvidia_packages.DNF_SOURCE in found.files


def decide(found: Found, wanted: Wanted) -> Decision:
    """The next decision for a host. Doing what it says and deciding anew gives no further step."""
    action, findings = _action(found, wanted)
    if action != "install":
        extra = _extras_without_repository(found, wanted) if action == "adopt" else ()
        return _rest(Decision(action, findings=findings + extra), found, wanted)
    try:
        family = nvidia_packages.family_of(found)
    except BerthError as error:
        return Decision("install", findings=(*findings, _unsupported(error)))
    open_modules, flavour_findings = flavour(found, wanted)
    findings += flavour_findings + wrong_choice(found, wanted)
    if errors(findings):
        return Decision("install", family.name, findings=findings, open_modules=open_modules)
    return _install(found, wanted, family, open_modules, findings)


def _action(found: Found, wanted: Wanted) -> tuple[Action, tuple[Finding, ...]]:
    """What kind of host this is."""
    broken = mismatch(found, wanted)
    if wanted.install == "false":
        return ("adopt" if found.loaded else "nothing"), broken
    if managed(found):
        return "install", broken
    if found.loaded and not wanted.enforce_branch:
        return "adopt", broken or adopted_findings(found, wanted)
    if not found.loaded and not nvidia_gpus.gpus(found.devices):
        return "nothing", _no_gpu(found) if wanted.install == "true" else ()
    foreign = () if wanted.enforce_branch else unloaded_foreign(found)
    if foreign:
        return "nothing", foreign
    return "install", ()


def _no_gpu(found: Found) -> tuple[Finding, ...]:
    what = f"{found.host} has no NVIDIA GPU on its PCI bus"
    mend = "take the host out of ray_slots, look at lspci -d 10de:, or set nvidia_driver_simulate: true"
    return (Finding("no-gpu", what, f"{len(found.devices)} NVIDIA devices, none of them a GPU", mend),)


def _unsupported(error: BerthError) -> Finding:
    found = f"{error.found} (allowed: {error.allowed})"
    return Finding("distribution", error.what, found, error.mend or "")


def _install(
    found: Found, wanted: Wanted, family: Family, open_modules: bool, findings: tuple[Finding, ...]
) -> Decision:
    names = nvidia_packages.core(family, wanted.branch, open_modules)
    repository = nvidia_packages.repository_file(family, found, wanted)
    asked = found.files.get(repository.path) == repository.content
    target, target_findings = _target(found, wanted, names, asked)
    findings += target_findings
    stream = nvidia_packages.module_stream(family, wanted.branch, open_modules)
    extra = _with_driver(found, wanted, target)
    if asked and target and not target_findings:
        findings += tuple(
            _no_fabric_manager(found, name, target) for name in extra if not _version(found, name, target)
        )
    optional = [name for name in nvidia_packages.optional(family, wanted.branch) if _version(found, name, target)]
    packages = {name: _version(found, name, target) for name in (*names, *optional, *extra)}
    beside = _beside_driver(found, wanted, family)
    stale = _stale(found, target, set(packages))
    replaced = found.loaded is not None and target is not None and found.loaded != target
    steps = [
        *_file_step(found, repository, "NVIDIA's packages come from here"),
        *_stream_step(found, stream),
        *_package_steps(found, packages, beside, target, wanted),
        *(Step(name, found.packages[name], _ABSENT, "another branch or flavour of the driver") for name in stale),
    ]
    changes_driver = any(step.name in {*packages, *stale} for step in steps)
    findings += build_findings(found, wanted, family, changes_driver and asked)
    if replaced and changes_driver and not wanted.allow_reboot:
        findings += (_reboot_not_allowed(found, str(target)),)
    # Beside files of another version nothing new can start, no replica and no drain: there the boot is the cure.
    elif replaced and changes_driver and wanted.berths and not mismatch(found, wanted):
        findings += (_replicas_on_host(found, str(target), wanted.berths),)
    decision = Decision(
        "install",
        family.name,
        steps=tuple(steps),
        findings=findings,
        target=target,
        open_modules=open_modules,
        repository=repository,
        repository_key=nvidia_packages.repository_key(family, found, wanted),
        repository_keyring=nvidia_packages.repository_keyring(family, wanted),
        module_stream=stream if stream != (found.module_stream or "") else "",
        remove=stale,
        packages=tuple(
            _spec(family, name, version)
            for name, version in (packages | beside).items()
            if _differs(found, name, version)
        ),
        disruptive=replaced and changes_driver,
    )
    return _rest(_held(decision, found, family), found, wanted)


def _target(
    found: Found, wanted: Wanted, names: tuple[str, ...], asked: bool
) -> tuple[str | None, tuple[Finding, ...]]:
    """The driver's version to have; None where the repository is not there to be asked yet."""
    installed = upstream(found.packages.get(names[0], ""))
    offered = _offered(found, wanted, names)
    if wanted.version and wanted.version != "latest":
        if installed == wanted.version or wanted.version in offered:
            return wanted.version, ()
        return wanted.version, _not_offered(found, wanted, offered) if asked else ()
    if installed and branch_of(installed) == wanted.branch and (not wanted.version or not offered):
        return installed, ()
    if offered:
        return offered[0], ()
    return None, _not_offered(found, wanted, offered) if asked else ()


def _offered(found: Found, wanted: Wanted, names: tuple[str, ...]) -> tuple[str, ...]:
    """Versions of the branch that the repository has for every package, newest first."""
    sets = [{upstream(version) for version in found.available.get(name, ())} for name in names]
    common = set.intersection(*sets) if sets else set()
    return tuple(sorted((v for v in common if branch_of(v) == wanted.branch), key=order, reverse=True))


def _not_offered(found: Found, wanted: Wanted, offered: tuple[str, ...]) -> tuple[Finding, ...]:
    driver = {
        v for name, versions in found.available.items() for v in versions if nvidia_packages.is_kernel_module(name)
    }
    seen = sorted({upstream(version) for version in driver}, key=order, reverse=True)
    what = f"{found.host}: the repository has no driver {wanted.version or f'of branch {wanted.branch}'} that is whole"
    mend = "set nvidia_driver_branch or nvidia_driver_version to one that is there, or mend the mirror"
    return (Finding("not-in-repository", what, ", ".join(offered or seen) or "no driver at all", mend),)


def _no_fabric_manager(found: Found, name: str, target: str) -> Finding:
    offered = sorted({upstream(v) for v in found.available.get(name, ())}, key=order, reverse=True)
    return Finding(
        "fabric-manager-missing",
        f"{found.host} has NVSwitches, and the repository has no Fabric Manager of the driver's version {target}",
        f"{name}: {', '.join(offered) or 'none'}",
        "set nvidia_driver_version to a version that has one, or nvidia_driver_fabric_manager: false",
    )


def _with_driver(found: Found, wanted: Wanted, target: str | None) -> tuple[str, ...]:
    """Packages beside the core that must have the driver's very version."""
    needed = wanted.fabric_manager == "true" or (
        wanted.fabric_manager == "auto" and nvidia_gpus.needs_fabric_manager(found.devices)
    )
    if not needed:
        return ()
    names = nvidia_packages.fabric_manager_names(wanted.branch)
    return (next((name for name in names if _version(found, name, target)), names[0]),)


def _beside_driver(found: Found, wanted: Wanted, family: Family) -> dict[str, str | None]:
    """Packages with versions of their own; any installed one will do."""
    headers = nvidia_packages.headers_package(family, found, wanted)
    names = [] if found.headers or (found.available and headers not in found.available) else [headers]
    names += [nvidia_packages.dcgm_package(wanted.branch)] if wanted.dcgm else []
    names += ["nvidia-container-toolkit"] if wanted.container_toolkit else []
    if wanted.fabric_manager != "false" and nvidia_gpus.has_hgx_blackwell(found.devices):
        names.append("nvlsm")
    if family.manager == "dnf":
        names.append("python3-dnf-plugin-versionlock")
    return dict.fromkeys(names)


def _version(found: Found, name: str, target: str | None) -> str | None:
    """The package's full version that is the driver's ``target``: installed, or offered."""
    if target is None:
        return None
    candidates = (found.packages.get(name, ""), *found.available.get(name, ()))
    return next((version for version in candidates if upstream(version) == target), None)


def _stale(found: Found, target: str | None, wanted_names: set[str]) -> tuple[str, ...]:
    """Installed packages that would be a second driver: of another branch, or the other flavour's kernel module."""
    if target is None:
        return ()
    names = []
    for name, version in found.packages.items():
        other_branch = nvidia_packages.is_driver_package(name, version) and branch_of(version) != branch_of(target)
        if name not in wanted_names and (other_branch or _is_dkms(name)):
            names.append(name)
    return tuple(sorted(names))


def _is_dkms(name: str) -> bool:
    return nvidia_packages.is_kernel_module(name) and "dkms" in name


def _differs(found: Found, name: str, version: str | None) -> bool:
    return name not in found.packages or (version is not None and found.packages[name] != version)


def _spec(family: Family, name: str, version: str | None) -> str:
    if version is None:
        return name
    return f"{name}={version}" if family.manager == "apt" else f"{name}-{version}"


def _package_steps(
    found: Found, packages: dict[str, str | None], beside: dict[str, str | None], target: str | None, wanted: Wanted
) -> Iterable[Step]:
    newest = f"the newest of branch {wanted.branch}" if target is None else target
    for name, version in packages.items():
        if _differs(found, name, version):
            why = f"the driver of branch {wanted.branch}" if not wanted.version else "nvidia_driver_version"
            yield Step(name, found.packages.get(name, _ABSENT), version or newest, why)
    for name in beside:
        if name not in found.packages:
            yield Step(name, _ABSENT, "installed", _why_beside(name))


def _why_beside(name: str) -> str:
    if "headers" in name or "kernel-devel" in name:
        return "the kernel module is built for the running kernel"
    if name == "python3-dnf-plugin-versionlock":
        return "it keeps the driver's version"
    return "asked for by a variable, or by the hardware"


def _file_step(found: Found, file: File, why: str) -> tuple[Step, ...]:
    current = found.files.get(file.path)
    if current == file.content:
        return ()
    return (Step(file.path, _ABSENT if current is None else "other content", "as wanted", why),)


def _stream_step(found: Found, stream: str) -> tuple[Step, ...]:
    if not stream or stream == found.module_stream:
        return ()
    return (Step("module nvidia-driver", found.module_stream or "not enabled", stream, "the branch's own stream"),)


def _held(decision: Decision, found: Found, family: Family) -> Decision:
    """Adds what keeps the version: known in full once the packages are there."""
    target = decision.target
    stack = sorted(n for n, v in found.packages.items() if target and _moves_with_driver(n, v, target))
    stack = [name for name in stack if name not in decision.remove]
    files = [nvidia_packages.nouveau_file()]
    hold: tuple[str, ...] = ()
    lock: tuple[str, ...] = ()
    steps: list[Step] = []
    if family.manager == "apt":
        files += [nvidia_packages.unattended_file()] + ([nvidia_packages.pin_file(target)] if target else [])
        hold = tuple(name for name in stack if name not in found.held)
        steps += [Step(f"hold {name}", "not held", "held", "no upgrade but one that is asked for") for name in hold]
    else:
        lock = tuple(nvidia_packages.lock_line(name, found.packages[name]) for name in stack)
        have = found.files.get(nvidia_packages.DNF_LOCK, "").splitlines()
        missing = [line for line in lock if line not in have]
        steps += [Step(f"lock {line}", "not locked", "locked", "no upgrade but one asked for") for line in missing]
    for file in files:
        steps += _file_step(found, file, "keeps nouveau off" if file.path == nvidia_packages.NOUVEAU else "keeps it so")
    return _with(decision, steps=(*decision.steps, *steps), hold=hold, lock=lock, files=tuple(files))


def _moves_with_driver(name: str, version: str, target: str) -> bool:
    return nvidia_packages.is_driver_package(name, version) and upstream(version) == target


def _rest(decision: Decision, found: Found, wanted: Wanted) -> Decision:
    """Adds what follows from what runs: loading, the reboot, the services."""
    target = decision.target or (found.library if decision.action == "adopt" else None)
    steps: list[Step] = []
    load = reboot = False
    if decision.action == "install" and found.loaded is None:
        load, reboot = not found.nouveau, found.nouveau
        current, why = ("nouveau", "nouveau lets a GPU go at a boot only") if found.nouveau else ("none", "it drives")
        steps.append(Step("kernel module", current, target or f"of branch {wanted.branch}", why))
    elif found.loaded and target and found.loaded != target and decision.action != "nothing":
        reboot = decision.action == "install" or wanted.allow_reboot
        if reboot:
            steps.append(Step("kernel module", found.loaded, target, "a driver in use is replaced by a reboot"))
    services = _services(decision, found, wanted)
    findings = _after_all(decision, found, wanted, reboot, bool(steps))
    running = found.loaded is not None and not reboot
    for name in services:
        now = found.services.get(name, Service(False, False))
        if not now.enabled or (running and not now.active):
            desired = "enabled, running" if running else "enabled"
            steps.append(Step(f"service {name}", _state(now), desired, _why_service(name)))
    return _with(
        decision, steps=(*decision.steps, *steps), findings=findings, load=load, reboot=reboot, services=services
    )


def _after_all(decision: Decision, found: Found, wanted: Wanted, reboot: bool, load: bool) -> tuple[Finding, ...]:
    """The findings, with those that only the whole decision tells."""
    findings = decision.findings
    pending = bool(decision.steps) or load
    if decision.action == "install" and pending and not found.root:
        findings += (not_root(found),)
    only_the_boot = not (decision.packages or decision.remove or decision.target is None)
    if reboot and only_the_boot and not wanted.allow_reboot and not errors(findings):
        findings += (reboot_needed(found, decision.target),)
    return findings


def _services(decision: Decision, found: Found, wanted: Wanted) -> tuple[str, ...]:
    """Services to have; of an adopted driver none is touched but those asked for by name."""
    names = []
    if decision.action == "install":
        names += ["nvidia-persistenced"] if wanted.persistence else []
        names += ["nvidia-fabricmanager"] if _with_driver(found, wanted, decision.target) else []
    if decision.action != "nothing":
        names += ["nvidia-dcgm"] if wanted.dcgm and (decision.action == "install" or _has_dcgm(found)) else []
        names += ["berth-nvidia-mps"] if wanted.mps else []
    return tuple(names) if found.systemd else ()


def _has_dcgm(found: Found) -> bool:
    return any(name.startswith("datacenter-gpu-manager") for name in found.packages)


def _extras_without_repository(found: Found, wanted: Wanted) -> tuple[Finding, ...]:
    """An adopted driver's host keeps its own package sources: what is asked for and not there is told, not fetched."""
    missing = [] if not wanted.dcgm or _has_dcgm(found) else [("nvidia_driver_dcgm", "DCGM")]
    if wanted.container_toolkit and "nvidia-container-toolkit" not in found.packages:
        missing.append(("nvidia_driver_container_toolkit", "the NVIDIA container toolkit"))
    return tuple(
        Finding(
            "adopted-without",
            f"{found.host}: the driver was adopted, so Berth adds no package source for {label}",
            "not installed",
            f"install it by hand, set {variable}: false, or let Berth take the driver over "
            "(nvidia_driver_enforce_branch: true)",
        )
        for variable, label in missing
    )


def _why_service(name: str) -> str:
    return {
        "nvidia-persistenced": "without it the driver unloads a GPU's state between processes",
        "nvidia-fabricmanager": "it sets the NVSwitches up; without it CUDA gives error 802",
        "nvidia-dcgm": "nvidia_driver_dcgm",
        "berth-nvidia-mps": "nvidia_driver_mps",
    }[name]


def _state(service: Service) -> str:
    words = ("enabled" if service.enabled else "not enabled", "running" if service.active else "not running")
    return ", ".join(words)


def _reboot_not_allowed(found: Found, target: str) -> Finding:
    return Finding(
        "reboot-not-allowed",
        f"{found.host}: driver {target} cannot replace the one in use without a reboot, and nothing was changed",
        f"kernel module {found.loaded} loaded, nvidia_driver_allow_reboot: false",
        "set nvidia_driver_allow_reboot: true: one host at a time stops its units, is upgraded and boots",
    )


def _replicas_on_host(found: Found, target: str, berths: tuple[str, ...]) -> Finding:
    return Finding(
        "replicas-on-host",
        f"{found.host}: driver {target} cannot replace the one in use while replicas are served from it, and nothing "
        "was changed",
        f"{', '.join(berths)} in the plan",
        f"move them away first: ansible-playbook playbooks/drain.yml -e target={found.host}; then ansible-playbook "
        f"site.yml --tags driver --limit {found.host}; then playbooks/undrain.yml -e target={found.host}",
    )


def _with(decision: Decision, **changes: Any) -> Decision:
    return dataclasses.replace(decision, **changes)
