"""A directory of wheels for hosts without a package index: ``python -m berth.host.wheelhouse DIR LOCK...``

DIR then holds ``wheels/``, for each lock ``<lock>.tar`` with its wheels (one file travels to a host faster than two
hundred), and ``manifest.json`` with the sha256 of everything. What is there and unchanged is not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from berth.codec import load, write_json
from berth.errors import BerthError
from berth.host.environment import normalized, parse_lock

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Packed:
    """One lock's wheels: hash of the lock (``text_hash``), sha256 of the tar, file name -> sha256 of each wheel."""

    lock: str
    tar: str
    wheels: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """``target`` is the Python, and the platform where it is not the builder's own, that the wheels are for."""

    target: str
    locks: dict[str, Packed] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """Whom the wheels are for: ``python`` as X.Y, ``platforms`` as pip names them; empty is the builder's own."""

    python: str = ""
    platforms: tuple[str, ...] = ()

    def __str__(self) -> str:
        python = self.python or f"{sys.version_info.major}.{sys.version_info.minor}"
        return " ".join([python, *self.platforms])

    def options(self) -> list[str]:
        python = ["--python-version", self.python] if self.python else []
        tags = [tag for platform in self.platforms for tag in platform_tags(platform)]
        return [*python, *(part for tag in tags for part in ("--platform", tag))]


def platform_tags(platform: str) -> list[str]:
    """The tags of wheels that run on a platform: ``manylinux_2_31_x86_64`` takes every wheel for glibc 2.31 or older.

    pip takes a platform literally (PEP 600 names the order of the tags). Other platforms are handed on as they are.
    """
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if not match:
        return [platform]
    newest, machine = int(match.group(1)), match.group(2)
    # The names from before PEP 600, and the glibc they stand for.
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    tags = []
    for minor in range(newest, 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        tags += [f"{legacy[minor]}_{machine}"] if minor in legacy else []
    return tags


def build(directory: Path, locks: Sequence[Path], target: Target, torch_index: str = TORCH_INDEX) -> list[str]:
    """Have every wheel of ``locks`` in ``directory``; one line per lock that was fetched.

    Raises:
        BerthError: pip cannot find a wheel; what was complete before is still so.
    """
    manifest = read_manifest(directory)
    if manifest is None or manifest.target != str(target):
        manifest = Manifest(str(target))
    lines = []
    for lock in locks:
        digest = text_hash(lock.read_text(encoding="utf-8"))
        packed = manifest.locks.get(lock.name)
        if packed and packed.lock == digest and _is_there(directory, lock.name, packed):
            continue
        wheels = directory / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        _download(wheels, lock, target, torch_index)
        files = _wheels_of(wheels, lock)
        tar = _pack(directory / tar_name(lock.name), files)
        packed = Packed(digest, tar, {file.name: _sha256(file) for file in files})
        manifest = Manifest(manifest.target, {**manifest.locks, lock.name: packed})
        # After each lock: an interrupted build keeps what it has.
        write_json(directory / "manifest.json", asdict(manifest))
        size = sum(file.stat().st_size for file in files)
        lines.append(f"{lock.name}: {len(files)} wheels, {size / 2**20:.0f} MiB, for Python {target}")
    return lines


def text_hash(text: str) -> str:
    """The sha256 of a lock's lines; its last newline does not count, since not every reader hands it on."""
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()


def tar_name(lock: str) -> str:
    """``runtime-light.txt`` -> ``runtime-light.tar``."""
    return f"{lock.removesuffix('.txt')}.tar"


def read_manifest(directory: Path) -> Manifest | None:
    """What ``directory`` holds; None where nothing was built yet.

    Raises:
        BerthError: the manifest is not one.
    """
    path = directory / "manifest.json"
    try:
        return parse_manifest(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return None


def parse_manifest(text: str, what: str) -> Manifest:
    """A manifest from its JSON.

    Raises:
        BerthError: it is not one; ``what`` is how it is called there.
    """
    mend = f"remove {what} and build the wheelhouse again"
    try:
        return load(Manifest, json.loads(text), what, mend)
    except ValueError as error:
        raise BerthError(f"{what} is not a manifest", found=error, mend=mend) from None


def check(directory: Path) -> list[str]:
    """What of the manifest is not there as it was written; reads every file."""
    manifest = read_manifest(directory)
    if manifest is None:
        return [f"{directory} has no manifest.json"]
    wanted = {f"wheels/{name}": digest for item in manifest.locks.values() for name, digest in item.wheels.items()}
    wanted |= {tar_name(lock): item.tar for lock, item in manifest.locks.items()}
    return [
        f"{name} is {'not as it was built' if (directory / name).is_file() else 'missing'}"
        for name, digest in sorted(wanted.items())
        if not (directory / name).is_file() or _sha256(directory / name) != digest
    ]


def _is_there(directory: Path, lock: str, packed: Packed) -> bool:
    return (directory / tar_name(lock)).is_file() and all(
        (directory / "wheels" / name).is_file() for name in packed.wheels
    )


def _download(wheels: Path, lock: Path, target: Target, torch_index: str) -> None:
    """PyTorch's CPU build first, since PyPI does not have it: pip's own sources, else PyTorch's index."""
    text = lock.read_text(encoding="utf-8")
    torch = re.search(r"(?m)^torch==\S*\+cpu\s*$", text)
    if torch and _pip(wheels, [torch.group().strip()], target).returncode:
        _must(_pip(wheels, [torch.group().strip(), "--index-url", torch_index], target), lock)
    _must(_pip(wheels, ["-r", str(lock)], target), lock)


def _pip(wheels: Path, what: Sequence[str], target: Target) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(wheels), "--find-links", str(wheels), *target.options(), *what]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _must(done: subprocess.CompletedProcess[str], lock: Path) -> None:
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise BerthError(
            f"the wheels of {lock.name} cannot be had",
            found=" ".join(why)[-600:],
            mend="run it where pip reaches an index; a wheel for another Python or platform: --python, --platform",
        )


def _wheels_of(wheels: Path, lock: Path) -> list[Path]:
    """The wheels of a lock among all that lie there, by name and version."""
    pins = parse_lock(lock.read_text(encoding="utf-8"))
    found: dict[str, Path] = {}
    for file in sorted(wheels.glob("*.whl")):
        name, version = file.name.split("-")[:2]
        if pins.get(normalized(name), "").replace("-", "_") == version:
            found[normalized(name)] = file
    missing = sorted(set(pins) - set(found))
    if missing:
        raise BerthError(f"pip left no wheel of {', '.join(missing)} in {wheels}", mend=f"remove {wheels}")
    return sorted(found.values())


def _pack(path: Path, files: Sequence[Path]) -> str:
    """Write the tar beside its place and rename it; the same wheels give the same bytes."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size, entry.mode = file.stat().st_size, 0o644
            with file.open("rb") as content:
                tar.addfile(entry, content)
    part.replace(path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def packed_lock(manifest: str, lock: str, text: str, source: str) -> Packed:
    """The entry of a lock, of that name and those lines, in a manifest (its JSON): for a role that hands it out.

    Raises:
        BerthError: there is no wheelhouse, or it was built from another lock of that name, or not for it.
    """
    mend = f"make wheelhouse WHEELHOUSE={source} LOCKS={lock}, in this checkout"
    if not manifest:
        raise BerthError(f"there is no wheelhouse at {source} on the controller", mend=mend)
    found = parse_manifest(manifest, f"{source}/manifest.json").locks
    packed = found.get(lock)
    if packed is None:
        held = ", ".join(sorted(found)) or "nothing"
        raise BerthError(f"the wheelhouse {source} lacks {lock}", found=held, mend=mend)
    if packed.lock != text_hash(text):
        raise BerthError(f"the wheelhouse {source} was built from another {lock}", found=packed.lock[:12], mend=mend)
    return packed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 everything is there, 1 ``--check`` found a difference, 2 it could not be built."""
    parser = argparse.ArgumentParser(prog="python -m berth.host.wheelhouse", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("locks", type=Path, nargs="*", help="lock files")
    parser.add_argument("--python", default="", metavar="X.Y", help="Python of the hosts (default: this one)")
    parser.add_argument(
        "--platform", action="append", default=[], help="platform tag of the hosts, as pip download takes"
    )
    parser.add_argument(
        "--torch-index", default=TORCH_INDEX, help=f"where PyTorch's CPU build is (default: {TORCH_INDEX})"
    )
    parser.add_argument("--check", action="store_true", help="read everything and compare it with the manifest")
    args = parser.parse_args(argv)
    try:
        for line in build(args.directory, args.locks, Target(args.python, tuple(args.platform)), args.torch_index):
            print(line)
        wrong = check(args.directory) if args.check else []
    except BerthError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    for line in wrong:
        print(f"wheelhouse: {line}", file=sys.stderr)
    if not wrong:
        print(f"{args.directory}: as its locks say")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
