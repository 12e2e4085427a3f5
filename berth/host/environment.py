"""Virtual environments side by side: what is in one, whether two are the same, and which are no longer needed.

What is in one is asked of the files that pip leaves (``*.dist-info/RECORD``, PEP 376 and 627), which name every
installed file with its hash and size. So a scan reads some hundred small files and asks for the size of the rest, and
an environment of 3 GB is told apart from another without reading it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from berth.errors import BerthError

COMPLETE = ".complete"
"""The file that an environment gets last: its package list as it was when everything was there."""
LOCK = "lock.txt"
WHEEL = ".berth-wheel"
OWN = "berth"
"""Berth's own wheel changes with every commit and is looked after apart (``WHEEL``)."""
_NAME = re.compile(r"^[0-9a-f]{12}$")
_IGNORED = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
"""Of a package's metadata: how it came, not what it is."""


@dataclass(frozen=True)
class Package:
    """``content`` is a hash over the package's files as its wheel brought them; the same on every host and path."""

    version: str
    content: str

    def __str__(self) -> str:
        return f"{self.version} ({self.content})"


@dataclass(frozen=True)
class Environment:
    """An environment as it is now.

    ``packages`` by normalized name. ``damaged``: package -> a file that is gone or has another size. ``recorded``: the
    packages when it was completed; None for an environment that never was, or that an earlier Berth made. ``wheel``:
    which wheel of Berth's own was put into it, "" where none was.
    """

    path: str
    python: str
    complete: bool
    packages: dict[str, Package] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    recorded: dict[str, Package] | None = None
    wheel: str = ""

    @property
    def hash(self) -> str:
        """One value for all of it: equal exactly where interpreter version and every package are equal."""
        text = "\n".join([self.python, *(f"{name} {package}" for name, package in sorted(self.packages.items()))])
        return hashlib.sha256(text.encode()).hexdigest()


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_environment(path: Path) -> Environment:
    """Scan the environment at ``path``; one that is not there has no Python and no packages."""
    found: dict[str, Package] = {}
    damaged: dict[str, str] = {}
    for site in sorted(path.glob("lib/python*/site-packages")):
        for info in sorted(site.glob("*.dist-info")):
            name, version = _name_and_version(info)
            rows = _record(info)
            found[name] = Package(version, _content(info.name, rows))
            broken = _broken(site, rows) if rows else f"{info.name}/RECORD"
            if broken:
                damaged[name] = broken
    return Environment(
        path=str(path),
        python=_python(path),
        complete=(path / COMPLETE).is_file(),
        packages=found,
        damaged=damaged,
        recorded=_recorded(path / COMPLETE),
        wheel=_wheel(path),
    )


def _name_and_version(info: Path) -> tuple[str, str]:
    name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
    return normalized(name), version


def _record(info: Path) -> list[tuple[str, str, str]]:
    try:
        text = (info / "RECORD").read_text(encoding="utf-8")
    except OSError:
        return []
    rows = (row for row in csv.reader(io.StringIO(text)) if len(row) == 3)
    # Bytecode that a wheel brings is compiled over when it is installed.
    return [(name, digest, size) for name, digest, size in rows if "__pycache__/" not in name]


def _content(info: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """A hash of the rows that do not depend on where and how it was installed: no scripts (their first line is the
    environment's path)."""
    kept = sorted(
        f"{name} {digest}"
        for name, digest, _ in rows
        if digest and not name.startswith("../") and name not in {f"{info}/{ignored}" for ignored in _IGNORED}
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def _broken(site: Path, rows: Iterable[tuple[str, str, str]]) -> str:
    """The first file that is not there with its size; "" when all are."""
    root = str(site)
    for name, digest, size in rows:
        if not digest or not size:
            continue
        try:
            if os.stat(os.path.join(root, name)).st_size != int(size):
                return name
        except OSError:
            return name
    return ""


def _python(path: Path) -> str:
    """``X.Y`` of the interpreter it was made from: packages do not care for the patch level."""
    try:
        text = (path / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"(?m)^version(?:_info)?\s*=\s*(\d+\.\d+)", text)
    return match.group(1) if match else ""


def _wheel(environment: Path) -> str:
    try:
        return (environment / WHEEL).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _recorded(path: Path) -> dict[str, Package] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: Package(**package) for name, package in data["packages"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def record(environment: Environment) -> str:
    """What ``.complete`` says: the packages that came from the lock."""
    packages = {name: asdict(item) for name, item in sorted(environment.packages.items()) if name != OWN}
    return json.dumps({"python": environment.python, "packages": packages}, indent=1, sort_keys=True) + "\n"


def parse_lock(text: str) -> dict[str, str]:
    """Normalized name -> exact version of a lock's lines.

    Raises:
        BerthError: a line that is not ``name==version``.
    """
    found = {}
    for line in text.splitlines():
        stripped = line.split("#", 1)[0].strip()
        if not stripped:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._+!-]+)", stripped)
        if not match:
            raise BerthError("a lock has a line that pins nothing", found=stripped, allowed="name==version")
        found[normalized(match.group(1))] = match.group(2)
    return found


def lock_of(environment: Path) -> dict[str, str]:
    """What the lock pinned that an environment was made from; nothing where that was not written down."""
    try:
        return parse_lock((environment / LOCK).read_text(encoding="utf-8"))
    except (OSError, BerthError):
        return {}


@dataclass(frozen=True)
class Repair:
    """What has to be done so that an environment is what its lock says: names only for ``remove``, pins otherwise."""

    install: list[str]
    remove: list[str]
    reasons: list[str]


def repair(found: Environment, lock: Mapping[str, str]) -> Repair:
    """The difference between an environment and its lock, package by package.

    pip and setuptools come with the environment itself, and Berth's own wheel is looked after apart: the three are let
    be unless the lock names them.
    """
    install, remove, reasons = {}, [], []
    for name, version in sorted(lock.items()):
        package = found.packages.get(name)
        recorded = (found.recorded or {}).get(name)
        if package is None:
            reasons.append(f"{name} {version} is not installed")
        elif not _same_version(package.version, version):
            reasons.append(f"{name} is {package.version}, the lock says {version}")
        elif name in found.damaged:
            reasons.append(f"{name} {version} is damaged ({found.damaged[name]})")
        elif recorded is not None and recorded != package:
            reasons.append(f"{name} {version} is another build than the one that was installed")
        else:
            continue
        install[name] = version
    for name, package in sorted(found.packages.items()):
        if name not in lock and name not in (OWN, "pip", "setuptools", "wheel"):
            reasons.append(f"{name} {package.version} is not in the lock")
            remove.append(name)
    return Repair([f"{name}=={version}" for name, version in install.items()], remove, reasons)


def _same_version(installed: str, locked: str) -> bool:
    """A directory's name has its version with other separators where a version has them (``1.0+cpu-1``)."""
    return re.sub(r"[-_+]", "-", installed) == re.sub(r"[-_+]", "-", locked)


@dataclass(frozen=True)
class Difference:
    """One package (or ``Python``) that a host has otherwise than the other hosts; "" is none at all."""

    host: str
    what: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what} {self.found or 'missing'}, the other hosts have {self.wanted or 'none'}"


def differences(hosts: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """How the environments of a cluster's hosts differ, by host and package.

    ``hosts``: host -> ``version`` (of its lock), ``python`` and ``packages`` (name -> version and content), as
    python_environment_info returns them. Hosts of one lock must be equal in everything; hosts of two locks (a head
    without an engine beside GPU hosts) in Python's minor version and in Ray, which refuse to talk otherwise. What most
    hosts have is taken for right; a tie goes to the host that comes first by name.
    """
    found = _unlike("Python", {host: str(data["python"]) for host, data in hosts.items()})
    found += _unlike("ray", {host: _text(data["packages"].get("ray"), False) for host, data in hosts.items()})
    for version in sorted({str(data["version"]) for data in hosts.values()}):
        same = {host: data["packages"] for host, data in hosts.items() if str(data["version"]) == version}
        for name in sorted({name for packages in same.values() for name in packages} - {"ray", OWN}):
            versions = {_text(packages.get(name), False) for packages in same.values()}
            # The build is named only where the version does not tell them apart.
            build = len(versions) == 1
            found += _unlike(name, {host: _text(packages.get(name), build) for host, packages in same.items()})
    return sorted(found, key=lambda item: (item.host, item.what))


def _text(package: Mapping[str, str] | None, build: bool) -> str:
    if not package:
        return ""
    return f"{package['version']} (build {package['content']})" if build else str(package["version"])


def _unlike(what: str, values: Mapping[str, str]) -> list[Difference]:
    if len(set(values.values())) < 2:
        return []
    counts = Counter(values.values())
    right = min(values.items(), key=lambda item: (-counts[item[1]], item[0]))[1]
    return [Difference(host, what, value, right) for host, value in sorted(values.items()) if value != right]


@dataclass(frozen=True)
class Standing:
    """An environment's directory: its name, when it was completed (seconds since the epoch; 0: never)."""

    name: str
    completed_s: float


def superfluous(
    standing: Iterable[Standing], spared: Iterable[str], keep: int, in_use: Iterable[str]
) -> tuple[str, ...]:
    """Names of the environments to remove, so that ``keep`` stay: those spared, then the newest.

    One that a process runs from stays as well, whatever ``keep`` is.

    Raises:
        BerthError: keep is less than 2, which would leave nothing to go back to.
    """
    if keep < 2:
        raise BerthError("too few environments are kept to go back to one", found=keep, allowed=">= 2")
    first = {name for name in spared if name}
    others = sorted(
        (item for item in standing if item.name not in first), key=lambda item: (-item.completed_s, item.name)
    )
    busy = set(in_use)
    return tuple(sorted(item.name for item in others[max(0, keep - len(first)) :] if item.name not in busy))


def environments(root: Path) -> list[Standing]:
    """The environments below ``root``: directories named after a lock's hash. Links and anything else is not ours."""
    if not root.is_dir():
        return []
    return [
        Standing(path.name, _mtime(path / COMPLETE))
        for path in sorted(root.iterdir())
        if _NAME.match(path.name) and path.is_dir() and not path.is_symlink()
    ]


def linked(link: Path) -> str:
    """The name of the complete environment that a link points to; "" where there is none."""
    target = Path(os.readlink(link)) if link.is_symlink() else None
    return target.name if target and (link.parent / target / COMPLETE).is_file() else ""


def remove(path: Path) -> None:
    """Remove an environment; the mark of its completeness first, so that a half removed one is not taken for one."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def describe(path: Path, lock: str) -> dict[str, Any]:
    """What modules python_environment_info and host_look tell of the environment at ``path``: RETURN of the former.

    Raises:
        BerthError: ``lock`` has a line that is not ``name==version``.
    """
    found = read_environment(path)
    todo = repair(found, parse_lock(lock))
    return {
        "complete": found.complete,
        "python": found.python,
        "hash": found.hash,
        "packages": {name: asdict(package) for name, package in found.packages.items()},
        "recorded": found.recorded is not None,
        "record": record(found),
        **(asdict(todo) if found.complete else {"install": [], "remove": [], "reasons": []}),
        "wheel": found.wheel,
        "current": linked(path.parent / "current"),
        "current_lock": lock_of(path.parent / "current"),
        "previous": linked(path.parent / "previous"),
        "environments": [item.name for item in environments(path.parent)],
    }


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def used(root: Path, proc: Path = Path("/proc")) -> frozenset[str]:
    """Names of the environments below ``root`` that a process runs from: a path of its command line, or a file that it
    has mapped (its program, a library). Of processes whose maps are not ours to read, the command line alone."""
    prefix = str(root.resolve()).rstrip("/") + "/"
    found: set[str] = set()
    for process in proc.glob("[0-9]*"):
        for file in ("cmdline", "maps"):
            try:
                text = (process / file).read_bytes().decode(errors="replace")
            except OSError:
                continue
            found.update(part.split("/", 1)[0] for part in text.split(prefix)[1:])
    return frozenset(name for name in found if _NAME.match(name))


def rolled_back(pins: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The pins after every host went back to its previous environment.

    A pin says which environment stands in for a lock's own: lock version -> ``version`` and ``lock`` (the text of the
    lock that it was made from, for hosts that come later). It holds as long as that lock is the one asked for; with
    another lock it is passed over, so an upgrade needs no unpinning. ``hosts``: host -> ``lock_version``, ``current``,
    ``previous`` and ``lock`` (text of the previous one's).

    Raises:
        BerthError: a host has nothing to go back to, or hosts of one lock would go to different environments.
    """
    none = sorted(host for host, data in hosts.items() if not data["previous"])
    if none:
        raise BerthError(
            f"no complete previous environment on {', '.join(none)}",
            mend="ansible-playbook site.yml -e ray_runtime_lock=FILE with the lock that ran before",
        )
    targets: dict[str, dict[str, list[str]]] = {}
    for host, data in sorted(hosts.items()):
        targets.setdefault(str(data["lock_version"]), {}).setdefault(str(data["previous"]), []).append(host)
    for choices in targets.values():
        if len(choices) > 1:
            raise BerthError(
                "the hosts would not go back to the same environment",
                found="; ".join(f"{', '.join(names)}: {version}" for version, names in sorted(choices.items())),
                mend="ansible-playbook site.yml -e ray_runtime_lock=FILE with the lock that ran before",
            )
    after = {name: dict(pin) for name, pin in pins.items()}
    for data in hosts.values():
        lock_version, previous = str(data["lock_version"]), str(data["previous"])
        if previous == lock_version:
            after.pop(lock_version, None)
        else:
            after[lock_version] = {"version": previous, "lock": str(data["lock"])}
    return after
