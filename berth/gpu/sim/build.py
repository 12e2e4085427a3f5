"""A simulation on disk: install it, change what its driver shows, take it away.

``DIR/lib/libnvidia-ml.so.1`` the library, ``DIR/profile.wanted.yml`` what was asked for, ``DIR/profile.yml`` what the
driver shows now (the wanted profile made whole, plus the faults injected since), ``DIR/profile.compiled`` the same
for the library, ``DIR/state`` the memory that processes hold, ``DIR/kernel.log`` the XIDs as a kernel logs them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from berth.codec import replace, write_text
from berth.errors import BerthError
from berth.gpu.sim.profile import Profile, SimGpu, compile_text, expand, kernel_log, named, parse, read_yaml, to_yaml

SOURCE = Path(__file__).parent / "nvml.c"
LIBRARY = "lib/libnvidia-ml.so.1"
WANTED = "profile.wanted.yml"
_MARK = "lib/source.sha256"
_STATE_MAGIC = b"berthst1"
_STATE_HEADER = 96
_FILES = (LIBRARY, _MARK, WANTED, "profile.yml", "profile.compiled", "state", "kernel.log", ".lock")
_FLAGS = ("-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1")
_LIBRARIES = ("-ldl", "-lm")


@dataclass(frozen=True)
class Change:
    """What an install would do: ``reasons`` is empty when nothing; the texts are for a diff."""

    reasons: tuple[str, ...]
    before: str
    after: str


def environment(directory: Path) -> dict[str, str]:
    """The environment by which a process sees the simulated driver."""
    directory = directory.absolute()
    return {
        "LD_LIBRARY_PATH": str(directory / "lib"),
        "BERTH_GPU_SIM": str(directory),
        "BERTH_GPU_KERNEL_LOG": str(directory / "kernel.log"),
    }


def wanted_text(profile_data: object, seed: str, what: str = "GPU profile") -> str:
    """The text of ``profile.wanted.yml``: the profile as asked for, with its seed.

    Raises:
        BerthError: the profile is malformed or contradicts itself.
    """
    expand(parse(profile_data, what), seed, what)
    return yaml.safe_dump({"seed": seed, "profile": profile_data}, sort_keys=False, width=100)


def differences(directory: Path, profile_data: object, seed: str, what: str = "GPU profile") -> Change:
    """What ``install`` would change, without changing it.

    Faults injected into a running simulation are no difference: only another wanted profile or seed, another version
    of the library's source, or a file that is gone.

    Raises:
        BerthError: the profile is malformed.
    """
    after = wanted_text(profile_data, seed, what)
    wanted = directory / WANTED
    before = wanted.read_text(encoding="utf-8") if wanted.is_file() else ""
    reasons = []
    if before != after:
        reasons.append("profile or seed")
    if not _library_is_current(directory):
        reasons.append("library")
    if not all((directory / name).is_file() for name in _FILES[2:-1]):
        reasons.append("missing files")
    return Change(tuple(reasons), before, after)


def is_as_wanted(directory: Path, profile: str, seed: str) -> bool:
    """Whether ``install`` would leave everything as it is; ``profile`` is a name or a path. A bad profile is not."""
    try:
        data, what = named(profile)
        return not differences(directory, data, seed, what).reasons
    except BerthError:
        return False


def install(directory: Path, profile_data: object, seed: str, what: str = "GPU profile") -> Change:
    """Make ``directory`` a simulation of ``profile_data``; what is already so is left alone, injected faults too.

    Another profile or seed replaces the faults as well. Memory that processes hold stays held.

    Raises:
        BerthError: a malformed profile, no compiler, or a directory that cannot be written.
    """
    change = differences(directory, profile_data, seed, what)
    try:
        (directory / "lib").mkdir(parents=True, exist_ok=True)
        for folder in (directory, directory / "lib"):
            folder.chmod(0o755)
        with _locked(directory):
            build_library(directory)
            _make_state(directory / "state")
            if "profile or seed" in change.reasons or "missing files" in change.reasons:
                _write_profile(directory, expand(parse(profile_data, what), seed, what))
                write_text(directory / WANTED, change.after)
    except OSError as error:
        raise BerthError(
            f"simulation in {directory} cannot be written: {error}", mend="choose another directory"
        ) from None
    return change


def is_simulation(directory: Path) -> bool:
    """Whether ``install`` made this directory."""
    return (directory / WANTED).is_file() or (directory / "profile.compiled").is_file()


def remove(directory: Path) -> bool:
    """Take the simulation away; False when there was none. Files that are not its own stay.

    Raises:
        BerthError: the directory exists, is not empty and is no simulation, or cannot be changed.
    """
    if not directory.exists():
        return False
    if not is_simulation(directory):
        if any(directory.iterdir()):
            raise BerthError(f"{directory} is no GPU simulation; nothing was removed", mend="name the right directory")
        return False
    try:
        for name in _FILES:
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise BerthError(f"simulation in {directory} cannot be removed: {error}") from None
    for folder in (directory / "lib", directory):
        with suppress(OSError):
            folder.rmdir()
    return True


def build_library(directory: Path) -> bool:
    """Compile the library unless the one there is of this source; True when it was compiled.

    Raises:
        BerthError: no C compiler, or it failed.
    """
    if _library_is_current(directory):
        return False
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BerthError(
            "the simulated GPU driver is built on the spot and there is no C compiler on PATH",
            mend="install one: apt-get install gcc libc6-dev, or dnf install gcc glibc-devel",
        )
    target = directory / LIBRARY
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *_FLAGS, "-o", str(made), str(SOURCE), *_LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BerthError(
                f"{compiler} failed on the simulated GPU driver: {done.stderr.strip()[-500:]}",
                mend="install the C library's headers (libc6-dev or glibc-devel)",
            )
        made.chmod(0o755)
        made.replace(target)
    write_text(directory / _MARK, _source_hash() + "\n")
    return True


def read_profile(directory: Path) -> Profile:
    """What the driver shows now, whole.

    Raises:
        BerthError: no simulation there, or its profile.yml was damaged by hand.
    """
    if not is_simulation(directory):
        raise BerthError(f"there is no GPU simulation in {directory}", mend="python -m berth.gpu.sim install --dir …")
    path = directory / "profile.yml"
    return expand(parse(read_yaml(path), str(path)), "", str(path))


def restore(directory: Path) -> None:
    """Undo every injected fault: the driver shows the wanted profile again.

    Raises:
        BerthError: no simulation there.
    """
    wanted = read_yaml(directory / WANTED)
    what = str(directory / WANTED)
    if not isinstance(wanted, dict) or "profile" not in wanted:
        raise BerthError(f"{what}: no wanted profile in it", mend="install the simulation again")
    with _locked(directory):
        _write_profile(directory, expand(parse(wanted["profile"], what), str(wanted.get("seed", "")), what))


def inject_card(directory: Path, device: str, **changes: Any) -> SimGpu:
    """Change one card: ``lost``, ``xid``, ``leak_mib``.

    ``device`` is an index, a UUID (or its start), or a PCI address; a leak may also name a MIG instance by its UUID.
    Returns the card as it is now.

    Raises:
        BerthError: no such card, or a change that the profile does not allow.
    """
    with _locked(directory):
        profile = read_profile(directory)
        position, mig = _find(profile, device)
        gpu = profile.gpus[position]
        if mig is not None and set(changes) == {"leak_mib"}:
            instances = list(gpu.mig or ())
            instances[mig] = replace(instances[mig], **changes)
            changes = {"mig": tuple(instances)}
        gpu = replace(gpu, **changes)
        _rewrite(directory, replace(profile, gpus=(*profile.gpus[:position], gpu, *profile.gpus[position + 1 :])))
    return gpu


def inject(directory: Path, **changes: Any) -> None:
    """Change the driver as a whole: ``order``, ``show_processes``.

    Raises:
        BerthError: no simulation there, or a change that the profile does not allow.
    """
    with _locked(directory):
        _rewrite(directory, replace(read_profile(directory), **changes))


def _rewrite(directory: Path, profile: Profile) -> None:
    what = str(directory / "profile.yml")
    _write_profile(directory, expand(parse(yaml.safe_load(to_yaml(profile)), what), "", what))


def _write_profile(directory: Path, whole: Profile) -> None:
    write_text(directory / "profile.yml", to_yaml(whole))
    write_text(directory / "kernel.log", kernel_log(whole))
    # Last, for it is what the library watches.
    write_text(directory / "profile.compiled", compile_text(whole))


def _find(profile: Profile, device: str) -> tuple[int, int | None]:
    order = profile.order or ()
    if device.isdigit() and int(device) < len(order):
        return order[int(device)], None
    found: list[tuple[int, int | None]] = []
    for position, gpu in enumerate(profile.gpus):
        if len(device) > 4 and ((gpu.uuid or "").startswith(device) or (gpu.pci_bus_id or "").endswith(device.upper())):
            found.append((position, None))
        found += [
            (position, n)
            for n, mig in enumerate(gpu.mig or ())
            if len(device) > 4 and (mig.uuid or "").startswith(device)
        ]
    if len(found) != 1:
        allowed = ", ".join(f"{shown} ({profile.gpus[position].uuid})" for shown, position in enumerate(order))
        raise BerthError("no such simulated GPU, or more than one", found=device, allowed=allowed)
    return found[0]


def _source_hash() -> str:
    return hashlib.sha256(SOURCE.read_bytes() + " ".join((*_FLAGS, *_LIBRARIES)).encode()).hexdigest()


def _library_is_current(directory: Path) -> bool:
    mark = directory / _MARK
    return (
        (directory / LIBRARY).is_file()
        and mark.is_file()
        and mark.read_text(encoding="utf-8").strip() == _source_hash()
    )


def _make_state(path: Path) -> None:
    """The file that every user's processes write, as every user may use a GPU."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_STATE_MAGIC)) == _STATE_MAGIC:
                return
    next_handle = (1).to_bytes(8, "little")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".state.")
    with os.fdopen(handle, "wb") as file:
        file.write((_STATE_MAGIC + next_handle).ljust(_STATE_HEADER, b"\0"))
    os.chmod(name, 0o666)
    os.replace(name, path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        file = (directory / ".lock").open("a")
    except OSError as error:
        raise BerthError(f"simulation in {directory} cannot be changed: {error}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
