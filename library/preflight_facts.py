#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a host is, read before anything is installed on it: Python 3.9 and its standard library are enough.

Only reads and reports; what is right and wrong is judged on the controller (berth/preflight/).
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight_facts
short_description: Read what a fresh host has, before Berth's agent is there
description:
  - Reads system, memory, limits, file systems, clock, addresses, listeners, the NVIDIA driver and which peers answer.
  - Needs Python 3.9 and nothing else on the host. Changes nothing; peers see TCP connections that end at once.
  - An action plugin of this name notes the controller's clock around the call. It does not fail where the host cannot
    be reached or no module can run there; it says why in RV(why_not), with the system's name read by a shell command.
options:
  ask:
    description: What to look at, as M(preflight_inventory) returns it for the host.
    type: dict
    required: true
    suboptions:
      paths:
        description: Paths whose file systems are told; of one that is not there, the nearest directory above it.
        type: list
        elements: str
        default: []
      exists:
        description: Paths of which only the existence is told.
        type: list
        elements: str
        default: []
      sha1:
        description: Small files whose content's digest is told; empty for what is not there.
        type: list
        elements: str
        default: []
      commands:
        description: Commands that are looked for.
        type: list
        elements: str
        default: []
      interpreters:
        description: Python interpreters whose version is told.
        type: list
        elements: str
        default: []
      addresses:
        description: Addresses by which others know this host.
        type: list
        elements: str
        default: []
      peers:
        description: Other hosts, each with C(host), C(address) and C(ports) to connect to.
        type: list
        elements: dict
        default: []
      ports:
        description: Ports whose listeners are told.
        type: list
        elements: int
        default: []
attributes:
  check_mode:
    support: full
    description: Only reads.
  diff_mode:
    support: none
    description: Only reads.
author: The Berth authors
"""

EXAMPLES = r"""
- name: Read what the host is
  preflight_facts:
    ask: {paths: [/var/lib/berth, /dev/shm], ports: [6390], interpreters: [python3.12]}
  register: __preflight_facts
"""

RETURN = r"""
preflight:
  description: What was read (berth.preflight.facts.HostFacts). Memory in MiB, times in seconds since the epoch.
  type: dict
  returned: success
  sample: {hostname: gpu01, kernel: 6.1.0, memory_mib: 257000, nofile_hard: 1048576}
why_not:
  description: Why the host could not be looked at.
  type: str
  returned: when there is no RV(preflight)
  sample: "Failed to connect to the host via ssh: Connection timed out"
os_release:
  description: /etc/os-release, where a shell works and a module does not.
  type: str
  returned: when there is no RV(preflight)
  sample: ID=rocky
before:
  description: The controller's clock before the call, in seconds since the epoch.
  type: float
  returned: when the host could be reached
  sample: 1795271234.5
after:
  description: The controller's clock after it.
  type: float
  returned: when the host could be reached
  sample: 1795271235.1
"""

import ctypes  # noqa: E402 - Ansible's documentation comes first
import errno  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

MIB = 1 << 20
CONNECT_S = 3.0
LOOK_S = 20
TIME_DAEMONS = ("chronyd", "systemd-timesyncd", "systemd-timesyn", "ntpd", "ntpsec", "openntpd")
"""As the kernel shows their names, 15 letters at most."""
CLUSTER_VARIABLE = b"BERTH_CLUSTER="
MARK_FILE = ".berth-unit.json"
"""The marks of berth/host/processes.py, which is not on this host yet. A test holds both against each other."""
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"
IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_MTU = 10, 2, 14
"""Of Linux (ip(7)); Python's socket module does not name them."""
CLOCK_UNSYNCHRONISED = 5
"""TIME_ERROR of adjtimex(2)."""


def look(ask):
    """Everything that berth.preflight.facts.HostFacts has."""
    started = time.time()
    found = {
        "system": platform.system(),
        "hostname": socket.gethostname(),
        "machine_id": _text("/etc/machine-id"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "os": os_release(_text("/etc/os-release")),
        "python": platform.python_version(),
        "euid": os.geteuid(),
        "memory_mib": _memory_mib(),
        "nofile_hard": _limit(),
        "nr_open": int(_text("/proc/sys/fs/nr_open") or 0),
        "interpreters": {name: _interpreter(name) for name in ask["interpreters"]},
        "commands": {name: shutil.which(name) is not None for name in ask["commands"]},
        "exists": {path: os.path.exists(path) for path in ask["exists"]},
        "sha1": {path: _sha1(path) for path in ask["sha1"]},
        "filesystems": {path: _filesystem(path) for path in ask["paths"]},
        "clock_synchronised": _clock_synchronised(),
        "time_daemons": _time_daemons(),
        "addresses": {address: _own_address(address) for address in ask["addresses"]},
        "peers": _peers(ask["peers"]),
        "listeners": _listeners(ask["ports"]),
        "nvidia": _nvidia(),
    }
    found["time_start"], found["time_end"] = started, time.time()
    return found


def os_release(text):
    """``ID``, ``VERSION_ID``, ``PRETTY_NAME`` of an os-release(5) file, with empty strings for what is not there."""
    pairs = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    names = {"id": "ID", "version": "VERSION_ID", "name": "PRETTY_NAME"}
    return {key: pairs.get(name, "").strip().strip("\"'") for key, name in names.items()}


def _text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _sha1(path):
    try:
        with open(path, "rb") as file:
            return hashlib.sha1(file.read()).hexdigest()
    except OSError:
        return ""


def _memory_mib():
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def _limit():
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return -1 if hard == resource.RLIM_INFINITY else hard


def _interpreter(name):
    """Version of an interpreter, and whether it can make virtual environments; Debian ships ensurepip apart."""
    code = (
        "import json, sys, importlib.util as u;"
        "print(json.dumps({'version': '.'.join(map(str, sys.version_info[:3])),"
        " 'venv': all(u.find_spec(m) for m in ('venv', 'ensurepip'))}))"
    )
    try:
        done = subprocess.run([name, "-c", code], capture_output=True, text=True, timeout=LOOK_S, check=False)
        if done.returncode == 0:
            return json.loads(done.stdout)
        return {"version": "", "venv": False, "error": (done.stderr.strip().splitlines() or ["it failed"])[-1][:200]}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = "not there" if isinstance(error, FileNotFoundError) else str(error)[:200]
        return {"version": "", "venv": False, "error": reason}


# --- File systems -----------------------------------------------------------------------------------------------------


def _filesystem(path):
    at = os.path.realpath(path)
    while not os.path.exists(at) and at != "/":
        at = os.path.dirname(at)
    try:
        stat = os.statvfs(at)
    except OSError as error:
        return {"error": str(error)}
    mount = _mount(at)
    return {
        "at": at,
        "mount": mount[0],
        "type": mount[1],
        "options": mount[2],
        "total_mib": stat.f_blocks * stat.f_frsize // MIB,
        "free_mib": stat.f_bavail * stat.f_frsize // MIB,
        # Some file systems (btrfs) have no fixed number of inodes and say 0.
        "inodes": stat.f_files,
        "inodes_free": stat.f_favail,
    }


def _mount(path):
    """(mount point, type, options) of the file system that ``path`` is on, from proc(5) mountinfo."""
    best = ("", "", [])
    for line in _text("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        point = fields[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # The last of several on one point is the one that is seen.
        if inside and len(point) >= len(best[0]):
            best = (point, right.split()[0], fields[5].split(","))
    return best


# --- Clock ------------------------------------------------------------------------------------------------------------


def _clock_synchronised():
    """What the kernel thinks of its clock (adjtimex(2), read only); None where it does not say."""
    try:
        # Larger than struct timex is anywhere; modes = 0 only reads.
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != CLOCK_UNSYNCHRONISED


def _time_daemons():
    running = {_text(path) for path in glob.glob("/proc/[0-9]*/comm")}
    return sorted(running & set(TIME_DAEMONS))


# --- Network ----------------------------------------------------------------------------------------------------------


def _resolve(address):
    """IPv4 first, as Ray does."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    return sorted(found, key=lambda item: item[0] != socket.AF_INET)[0]


def _own_address(address):
    """Whether ``address`` is one of this host's, and the MTU of the interface that carries it."""
    resolved = _resolve(address)
    if resolved is None:
        return {"ip": "", "here": False, "interface": "", "mtu": None}
    family, _, _, _, where = resolved
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((where[0], 0))
            here = True
        except OSError:
            here = False
    interface = _interface(where[0]) if here else ""
    mtu = _text(f"/sys/class/net/{interface}/mtu") if interface else ""
    return {"ip": where[0], "here": here, "interface": interface, "mtu": int(mtu) if mtu else None}


def _interface(ip):
    import fcntl
    import struct

    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # SIOCGIFADDR (netdevice(7)): the interface's first address.
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))
            except OSError:
                continue
        if socket.inet_ntoa(answer[20:24]) == ip:
            return name
    return _interface_of_further_address(ip)


def _interface_of_further_address(ip):
    """Second addresses and IPv6 are told only by netlink: ask the ip command, where there is one."""
    if shutil.which("ip") is None:
        return ""
    done = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, timeout=LOOK_S, check=False)
    for line in done.stdout.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3].split("/")[0] == ip:
            return fields[1].split("@")[0]
    return ""


def _peers(peers):
    probes = [(peer, port) for peer in peers for port in peer["ports"]]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return list(pool.map(lambda item: _probe(item[0]["host"], item[0]["address"], int(item[1])), probes))


def _probe(host, address, port):
    """One TCP connection. Refused is an answer, too: the peer is there, and nothing on the way drops the packet."""
    found = {"host": host, "address": address, "port": port, "state": "unresolved", "mtu": None}
    resolved = _resolve(address)
    if resolved is None:
        return found
    family, _, _, _, where = resolved
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        code = probe.connect_ex((where[0], port))
    if code == 0:
        state = "open"
    elif code == errno.ECONNREFUSED:
        state = "refused"
    elif code in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM):
        state = "unreachable"
    else:
        state = "timeout"
    return {**found, "state": state, "mtu": _path_mtu(family, where[0])}


def _path_mtu(family, ip):
    """What the kernel knows of the path's MTU: the route's, lowered by what routers told it."""
    if family != socket.AF_INET:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
            probe.connect((ip, 9))
            return probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
        except OSError:
            return None


def _listeners(ports):
    """Who listens on ``ports``: pid, command and Berth's mark; None where the kernel does not tell us."""
    inodes = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _text(table).splitlines()[1:]:
            fields = line.split()
            port = int(fields[1].rpartition(":")[2], 16)
            if fields[3] == "0A" and port in ports:
                inodes[fields[9]] = port
    found = [_listener(port, None) for port in sorted(set(inodes.values()))] if inodes else []
    if not inodes:
        return found
    owners = {(inodes[inode], pid) for inode, pid in _owners(set(inodes))}
    told = {port for port, _ in owners}
    return [item for item in found if item["port"] not in told] + [_listener(port, pid) for port, pid in sorted(owners)]


def _owners(inodes):
    for link in glob.iglob("/proc/[0-9]*/fd/[0-9]*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            yield target[8:-1], int(link.split("/")[2])


def _listener(port, pid):
    if pid is None:
        return {"port": port, "pid": None, "command": None, "cluster": None}
    command = _text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()[:120]
    return {"port": port, "pid": pid, "command": command, "cluster": _cluster_of(pid)}


def _cluster_of(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            raw = file.read()
        for item in raw.split(b"\0"):
            if item.startswith(CLUSTER_VARIABLE):
                return item[len(CLUSTER_VARIABLE) :].decode(errors="replace")
        if b"=" in raw.split(b"\0", 1)[0]:
            return None
        with open(f"/proc/{pid}/cwd/{MARK_FILE}", encoding="utf-8") as file:
            return json.load(file)["cluster"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- GPUs -------------------------------------------------------------------------------------------------------------


def _nvidia():
    """The loaded driver as the kernel shows it, and GPUs on the PCI bus; without NVML, which may not be there yet."""
    gpus = []
    for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
        pairs = dict(line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
        uuid = pairs.get("GPU UUID", "").strip()
        gpus.append({"uuid": "" if "?" in uuid else uuid, "product": pairs.get("Model", "").strip()})
    version = next(
        (word for word in _text("/proc/driver/nvidia/version").split() if word[:1].isdigit() and "." in word), ""
    )
    pci = sum(
        1
        for path in glob.glob("/sys/bus/pci/devices/*")
        if _text(path + "/vendor") == NVIDIA_VENDOR and _text(path + "/class").startswith(DISPLAY_CLASS)
    )
    return {"driver": version, "gpus": gpus, "on_pci": pci}


def main():
    module = AnsibleModule(
        argument_spec={
            "ask": {
                "type": "dict",
                "required": True,
                "options": {
                    "paths": {"type": "list", "elements": "str", "default": []},
                    "exists": {"type": "list", "elements": "str", "default": []},
                    "sha1": {"type": "list", "elements": "str", "default": []},
                    "commands": {"type": "list", "elements": "str", "default": []},
                    "interpreters": {"type": "list", "elements": "str", "default": []},
                    "addresses": {"type": "list", "elements": "str", "default": []},
                    "peers": {"type": "list", "elements": "dict", "default": []},
                    "ports": {"type": "list", "elements": "int", "default": []},
                },
            }
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, preflight=look(module.params["ask"]))


if __name__ == "__main__":
    main()
