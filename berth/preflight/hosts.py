"""What one host said of itself, judged alone. Pure: facts and expectation in, problems out. Memory in MiB."""

from __future__ import annotations

import re
from collections.abc import Iterator

from berth.preflight.ask import SHARED_MEMORY, TEMPORARY
from berth.preflight.facts import Answer, Expectation, FileSystem, HostFacts, OsRelease
from berth.preflight.problem import Problem, Severity

SUPPORTED = {
    "ubuntu": ("22.04", "24.04"),
    "debian": ("12", "13"),
    "rhel": ("9", "10"),
    "rocky": ("9", "10"),
    "almalinux": ("9", "10"),
}
"""Systems whose packages the driver role knows, by ID and the part of VERSION_ID that counts, of os-release(5)."""

RED_HATS = ("rhel", "rocky", "almalinux", "centos", "ol")
OLDEST_KERNEL = (5, 14)
"""RHEL 9's, the oldest among the supported systems."""
OLDEST_MODULE_PYTHON = (3, 9)
OLDEST_AGENT_PYTHON = (3, 11)
ARCHITECTURES = ("x86_64",)
"""What the locks in roles/ray_runtime/files are resolved for."""


def check_host(answer: Answer, wanted: Expectation) -> list[Problem]:
    """Everything that is wrong with one host by itself."""
    facts = answer.facts
    if facts is None:
        return list(_no_facts(answer, wanted))
    return [
        *_system(facts, wanted),
        *_interpreters(facts, wanted),
        *_commands(facts, wanted),
        *_root(facts, wanted),
        *_disks(facts, wanted),
        *_shared_memory(facts, wanted),
        *_memory(facts, wanted),
        *_files(facts, wanted),
        *_clock(answer, facts, wanted),
        *_addresses(facts, wanted),
        *_ports(facts, wanted),
        *_gpus(facts, wanted),
    ]


def _no_facts(answer: Answer, wanted: Expectation) -> Iterator[Problem]:
    if _red_hat_8(answer.os):
        yield _too_old(wanted.host, answer.os)
        return
    why = " ".join(answer.failed.split())
    if re.search(r"sudo|become|password is required|privilege", why, re.IGNORECASE):
        yield Problem(
            "root",
            "error",
            (wanted.host,),
            "Ansible cannot become root there",
            why,
            "sudo without a password, or with ansible_become_password",
            "try `ansible HOST -b -m ansible.builtin.command -a id`; give the user its sudo rule, or pass -K",
        )
        return
    system = f" (the system is {answer.os.name})" if answer.os.name else ""
    yield Problem(
        "unreachable",
        "error",
        (wanted.host,),
        f"the host could not be looked at{system}",
        why or "no answer",
        "SSH, and Python 3.9 or newer",
        "try `ansible HOST -m ansible.builtin.ping`; check ansible_host, ansible_user, the key, and python3 there",
    )


# --- System -----------------------------------------------------------------------------------------------------------


def _system(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    if facts.system != "Linux":
        yield Problem("os", "error", (wanted.host,), "it does not run Linux", facts.system, "Linux", "use a Linux host")
        return
    yield from _os(facts, wanted)
    found = tuple(int(part) for part in re.findall(r"\d+", facts.kernel)[:2])
    if found and found < OLDEST_KERNEL:
        yield Problem(
            "kernel",
            "warning",
            (wanted.host,),
            "the kernel is older than that of any supported system",
            facts.kernel,
            f"{OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer",
            "upgrade the kernel, and the system with it",
        )
    if facts.architecture not in ARCHITECTURES:
        yield Problem(
            "architecture",
            "error",
            (wanted.host,),
            "the runtime's locks are not for this architecture",
            facts.architecture,
            ", ".join(ARCHITECTURES),
            "take the host out of the inventory, or resolve roles/ray_runtime/files for it",
        )


def _os(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    if _red_hat_8(facts.os):
        yield _too_old(wanted.host, facts.os)
    elif not _supported(facts.os):
        # A simulated driver runs wherever gcc does; the real one comes from packages of a known system.
        severity: Severity = "warning" if simulated(facts, wanted) or not wanted.slots else "error"
        yield Problem(
            "os",
            severity,
            (wanted.host,),
            "Berth does not know this system's driver packages",
            facts.os.name or "no /etc/os-release",
            "; ".join(f"{name} {', '.join(versions)}" for name, versions in SUPPORTED.items()),
            "use one of these systems, or install the driver yourself and set preflight_accept: [os]",
        )


def _supported(system: OsRelease) -> bool:
    versions = SUPPORTED.get(system.id, ())
    return any(system.version == version or system.version.startswith(f"{version}.") for version in versions)


def _red_hat_8(system: OsRelease) -> bool:
    return system.id in RED_HATS and system.version.split(".")[0] == "8"


def _too_old(host: str, system: OsRelease) -> Problem:
    return Problem(
        "os",
        "error",
        (host,),
        "RHEL 8 and its relatives have no Python that today's Ansible can use: the system's is 3.6, and its packages "
        "(dnf, SELinux) have bindings for that one alone",
        system.name,
        "version 9 or 10",
        "upgrade the host to RHEL or Rocky 9",
    )


def simulated(facts: HostFacts, wanted: Expectation) -> bool:
    """Whether the host's GPUs will be simulated, as the role nvidia_driver decides it."""
    return wanted.simulate == "true" or (wanted.simulate == "auto" and not facts.nvidia.driver)


def _interpreters(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    variables = {wanted.runtime_python: "ray_runtime_base_python", wanted.agent_python: "berth_agent_base_python"}
    for name, variable in sorted(variables.items()):
        found = facts.interpreters.get(name)
        if found is None:
            continue
        if not found.version:
            yield Problem(
                "python",
                "error",
                (wanted.host,),
                f"{variable} does not run",
                f"{name}: {found.error}",
                "Python 3.11 or newer",
                f"install it, or set {variable} to one that is there",
            )
            continue
        if tuple(map(int, found.minor.split("."))) < OLDEST_AGENT_PYTHON:
            yield Problem(
                "python",
                "error",
                (wanted.host,),
                f"{variable} is too old",
                f"{name} is {found.version}",
                "Python 3.11 or newer",
                f"install a newer one and set {variable}",
            )
        elif not found.venv:
            yield Problem(
                "python",
                "error",
                (wanted.host,),
                f"{name} cannot make virtual environments: its modules venv and ensurepip are not there",
                found.version,
                "",
                f"install the package python{found.minor}-venv",
            )
    own = tuple(int(part) for part in re.findall(r"\d+", facts.python)[:2])
    if own < OLDEST_MODULE_PYTHON:
        yield Problem(
            "python",
            "error",
            (wanted.host,),
            "the Python that Ansible found there is too old for its modules",
            facts.python,
            "3.9 or newer",
            "set ansible_python_interpreter of the host",
        )


def _commands(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    missing = sorted(name for name, there in facts.commands.items() if not there)
    if missing:
        why = " (gcc builds the simulated driver), or set nvidia_driver_simulate: false" if "gcc" in missing else ""
        yield Problem(
            "command",
            "error",
            (wanted.host,),
            f"it lacks {', '.join(missing)}",
            "",
            "",
            f"install it with the system's package manager{why}",
        )


def _root(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    if wanted.systemd and facts.euid != 0:
        yield Problem(
            "root",
            "error",
            (wanted.host,),
            "systemd units need root, and Ansible works there as another user",
            f"uid {facts.euid}",
            "uid 0",
            "set ansible_become: true, or berth_service_manager: supervisord",
        )


# --- Disks ------------------------------------------------------------------------------------------------------------


def _disks(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    state = facts.filesystems.get(wanted.state_dir)
    installed = facts.exists.get(wanted.runtime, False)
    if state is not None and not state.error and not installed and state.free_mib < wanted.disk_mib:
        yield Problem(
            "disk",
            "error",
            (wanted.host,),
            f"{wanted.state_dir} has {state.free_mib} MiB free, the runtime needs {wanted.disk_mib}",
            f"{state.free_mib} MiB on {state.mount}",
            f"{wanted.disk_mib} MiB (preflight_disk_mib)",
            "make room, or set berth_state_dir elsewhere",
        )
    for path, variable in (
        (wanted.state_dir, "berth_state_dir"),
        (wanted.cache_dir, "ray_slot_cache_dir"),
        (wanted.run_dir, "berth_run_dir"),
        (TEMPORARY, ""),
    ):
        found = facts.filesystems.get(path)
        if found is not None:
            yield from _file_system(wanted, path, variable, found)


def _file_system(wanted: Expectation, path: str, variable: str, found: FileSystem) -> Iterator[Problem]:
    elsewhere = f", or set {variable} elsewhere" if variable else ""
    if found.error:
        yield Problem("disk", "error", (wanted.host,), f"{path} cannot be read", found.error, "", f"mend it{elsewhere}")
        return
    if "ro" in found.options:
        yield Problem(
            "disk",
            "error",
            (wanted.host,),
            f"{path} is on a file system that is mounted read-only",
            f"{found.mount} ({found.type})",
            "rw",
            f"remount it{elsewhere}",
        )
    # Environments and compiled kernels are shared libraries, which must be mapped executable.
    if "noexec" in found.options and path in (wanted.state_dir, wanted.cache_dir):
        yield Problem(
            "noexec",
            "error",
            (wanted.host,),
            f"{path} is mounted noexec: no library or compiled kernel below it can be loaded",
            f"{found.mount} ({', '.join(found.options)})",
            "exec",
            f"remount it with exec{elsewhere}",
        )
    if found.inodes and found.inodes_free < wanted.inodes:
        yield Problem(
            "inodes",
            "error",
            (wanted.host,),
            f"{path} has too few inodes left for files of Ray's sessions and environments",
            f"{found.inodes_free} of {found.inodes} on {found.mount}",
            f"{wanted.inodes} (preflight_inodes)",
            f"remove files there (df -i){elsewhere}",
        )


def _shared_memory(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    found = facts.filesystems.get(SHARED_MEMORY)
    if found is None:
        return
    if found.error or found.mount != SHARED_MEMORY:
        yield Problem(
            "shm",
            "error",
            (wanted.host,),
            f"{SHARED_MEMORY} is not a file system of its own: Ray's object stores and NCCL have nowhere to be",
            found.error or f"it is on {found.mount} ({found.type})",
            "a tmpfs",
            f"mount -t tmpfs tmpfs {SHARED_MEMORY}; for good: /etc/fstab",
        )
        return
    if "noexec" in found.options:
        yield Problem(
            "noexec",
            "warning",
            (wanted.host,),
            f"{SHARED_MEMORY} is mounted noexec: Ray does without, code that some engines compile there does not load",
            ", ".join(found.options),
            "exec",
            f"mount -o remount,exec {SHARED_MEMORY}; for good: /etc/fstab",
        )
    needed = slot_count(facts, wanted) * wanted.slot_object_store_mib
    if needed > found.total_mib:
        yield Problem(
            "shm",
            "warning",
            (wanted.host,),
            f"{SHARED_MEMORY} is smaller than the object stores of the host's slots: Ray puts them on disk instead",
            f"{found.total_mib} MiB",
            f"{needed} MiB ({slot_count(facts, wanted)} slots of {wanted.slot_object_store_mib})",
            f"mount -o remount,size={needed}m {SHARED_MEMORY}, or lower ray_slot_object_store_mib",
        )


# --- Memory and limits ------------------------------------------------------------------------------------------------


def slot_count(facts: HostFacts, wanted: Expectation) -> int:
    """Slots that the host's GPUs will make, as far as can be seen before the driver is asked; 0 when simulated."""
    if not wanted.slots or simulated(facts, wanted):
        return 0
    gpus = len(facts.nvidia.gpus) or facts.nvidia.on_pci
    return max(0, gpus - sum(size - 1 for size in wanted.shapes))


def _memory(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    slots = slot_count(facts, wanted)
    needed = slots * (wanted.slot_memory_mib + wanted.slot_object_store_mib) + wanted.head_memory_mib
    if needed > facts.memory_mib:
        yield Problem(
            "memory",
            "error",
            (wanted.host,),
            "its slots offer Ray more memory than the host has",
            f"{facts.memory_mib} MiB",
            f"{needed} MiB: {slots} slots of {wanted.slot_memory_mib} + {wanted.slot_object_store_mib}"
            + (f", head {wanted.head_memory_mib}" if wanted.head_memory_mib else ""),
            "lower ray_slot_memory_mib or ray_slot_object_store_mib of this host",
        )


def _files(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    # systemd gives the units their own limit, up to the kernel's; under supervisord they inherit ours.
    limit = facts.nr_open if wanted.systemd else facts.nofile_hard
    if 0 <= limit < wanted.nofile:
        where = "fs.nr_open" if wanted.systemd else "the hard limit of open files (ulimit -Hn)"
        yield Problem(
            "nofile",
            "error" if wanted.systemd else "warning",
            (wanted.host,),
            f"{where} is too low for Ray's connections",
            str(limit),
            f"{wanted.nofile} (preflight_nofile)",
            "sysctl -w fs.nr_open=1048576"
            if wanted.systemd
            else "raise nofile in /etc/security/limits.conf and log in anew",
        )


# --- Clock ------------------------------------------------------------------------------------------------------------


def clock_offset(before: float, after: float, start: float, end: float) -> tuple[float, float]:
    """Bounds of how far a host's clock is ahead of the controller's, in seconds.

    The host read ``start`` and ``end`` on its clock, the controller ``before`` and ``after`` around them on its own;
    what came between (connection, start of Python) is not known, so the offset is an interval: it lies between
    end - after and start - before.
    """
    return end - after, start - before


def _clock(answer: Answer, facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    low, high = clock_offset(answer.before, answer.after, facts.time_start, facts.time_end)
    off = low if low > wanted.clock_offset_s else -high if high < -wanted.clock_offset_s else 0.0
    if off:
        yield Problem(
            "clock",
            "error",
            (wanted.host,),
            "its clock differs from the controller's",
            f"at least {off:.1f} s {'ahead' if low > 0 else 'behind'}",
            f"{wanted.clock_offset_s:g} s (preflight_clock_offset_s)",
            "start chrony or systemd-timesyncd there; chronyc makestep sets the clock at once",
        )
    if facts.clock_synchronised is not True and not facts.time_daemons:
        yield Problem(
            "time_sync",
            "warning",
            (wanted.host,),
            "nothing keeps its clock: no chrony, timesyncd or ntpd runs, and the kernel calls it unsynchronised",
            "",
            "a time daemon",
            "install chrony, or timedatectl set-ntp true",
        )


# --- Network ----------------------------------------------------------------------------------------------------------


def _addresses(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    for name, found in sorted(facts.addresses.items()):
        if not found.ip:
            yield Problem(
                "address",
                "error",
                (wanted.host,),
                f"its node address {name} cannot be resolved there",
                "",
                "an address of one of its interfaces",
                "set ray_slot_node_ip (ray_head_node_ip on the head) to an IP address",
            )
        elif not found.here:
            yield Problem(
                "address",
                "error",
                (wanted.host,),
                f"its node address {name} is on none of its interfaces",
                found.ip if found.ip != name else "",
                "an address of one of its interfaces (ip addr)",
                "set ray_slot_node_ip (ray_head_node_ip on the head): behind NAT, ansible_host is not what others use",
            )
    silent = {item.host for item in facts.peers} - {item.host for item in facts.peers if item.answered}
    for item in facts.peers:
        if item.host in silent or item.answered:
            continue
        yield Problem(
            "firewall",
            "warning",
            (wanted.host,),
            f"{item.host} answers, but not on port {item.port}: a firewall drops it",
            f"{item.address}:{item.port} {item.state}",
            "an answer: open, or refused where nobody listens yet",
            "let the cluster's hosts reach each other on every port",
        )
    for host in sorted(silent):
        tried = [item for item in facts.peers if item.host == host]
        yield Problem(
            "peer",
            "error",
            (wanted.host,),
            f"it cannot reach {host} at its node address",
            ", ".join(f"{item.address}:{item.port} {item.state}" for item in tried),
            "an answer: open, or refused where nobody listens yet",
            "correct ray_slot_node_ip or ray_head_node_ip, the route, or the firewall between them",
        )


def _ports(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    names = {port: name for name, port in sorted(wanted.ports.items(), reverse=True)}
    for item in facts.listeners:
        if item.port in names and (item.cluster is None or item.cluster != wanted.cluster):
            who = f"pid {item.pid} ({item.command})" if item.pid else "another process"
            variable = names[item.port].split(" ")[0]
            yield Problem(
                "port_taken",
                "error",
                (wanted.host,),
                f"{names[item.port]}={item.port} is taken by {who}",
                "",
                "a free port, or one that this cluster listens on",
                f"end that process, or set {variable} to a free port",
            )


# --- GPUs -------------------------------------------------------------------------------------------------------------


def _gpus(facts: HostFacts, wanted: Expectation) -> Iterator[Problem]:
    if not wanted.slots or simulated(facts, wanted):
        return
    if not facts.nvidia.driver and not facts.nvidia.on_pci:
        yield Problem(
            "gpu",
            "error",
            (wanted.host,),
            "it is in ray_slots and has no NVIDIA GPU on its PCI bus",
            "",
            "a GPU, or a simulated one",
            "take it out of ray_slots, or set nvidia_driver_simulate: true to try Berth without a GPU",
        )
    shown = {gpu.uuid for gpu in facts.nvidia.gpus if gpu.uuid}
    # Without every UUID it cannot be told which one is missing.
    if not shown or len(shown) < len(facts.nvidia.gpus):
        return
    for variable, uuids in sorted(wanted.named_gpus.items()):
        for uuid in sorted(set(uuids) - shown):
            yield Problem(
                "gpu",
                "warning",
                (wanted.host,),
                f"{variable} names GPU {uuid}, which its driver does not show",
                ", ".join(sorted(shown)),
                "",
                f"bring the card back, or correct {variable} of this host",
            )
