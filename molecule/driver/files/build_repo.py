#!/usr/bin/env python3
"""Builds apt repositories of small packages that have the names, versions and dependencies of NVIDIA's.

Nothing of NVIDIA's is in them: libraries are empty files, services sleep, and the kernel module is a directory that the
lab's modprobe looks at. Needs nothing but Python: a .deb is an ar archive of two tar archives.

    build_repo.py TARGET --family debian --kernel 6.1.0-40-amd64 --release 570.211.01 --release 580.159.04
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

EPOCH = 1_700_000_000
LIB = "usr/lib/x86_64-linux-gnu"
KERNEL = "/srv/kernel"
"""Where a host of the lab has what stands for /proc and /sys (nvidia_driver_kernel_root)."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    depends: str = ""
    provides: str = ""
    conflicts: str = ""
    replaces: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def control(self) -> str:
        lines = [f"Package: {self.name}", f"Version: {self.version}", "Architecture: amd64"]
        lines += ["Maintainer: The Berth authors <berth@localhost>", "Section: non-free/kernel", "Priority: optional"]
        fields = ("depends", "provides", "conflicts", "replaces")
        lines += [f"{key.capitalize()}: {value}" for key in fields if (value := getattr(self, key))]
        return "\n".join([*lines, f"Description: stands for NVIDIA's {self.name} in the lab"]) + "\n"


def service(name: str, version: str, exact: bool) -> dict[str, str]:
    """A service that, like the real ones, needs the driver: any, or the one of its very version."""
    needs = f"/bin/grep -q ' {version} ' {KERNEL}/proc/driver/nvidia/version" if exact else ""
    needs = needs or f"/bin/test -e {KERNEL}/proc/driver/nvidia/version"
    unit = (
        f"[Unit]\nDescription={name} of the lab\nAfter=lab-kernel.service\n[Service]\nExecStartPre={needs}\n"
        "ExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
    )
    return {f"lib/systemd/system/{name}.service": unit}


def library(name: str, version: str) -> tuple[dict[str, str], dict[str, str]]:
    return {f"{LIB}/{name}.so.{version}": ""}, {f"{LIB}/{name}.so.1": f"{name}.so.{version}"}


def debian(release: str) -> Iterator[Package]:
    """Debian's names: the same in every branch; everything of a release depends on the very same version."""
    version = f"{release}-1"
    same = f"(= {version})"
    ml, cuda = library("libnvidia-ml", release), library("libcuda", release)
    yield Package("libnvidia-ml1", version, files=ml[0], links=ml[1])
    yield Package("libcuda1", version, f"libnvidia-ml1 {same}", files=cuda[0], links=cuda[1])
    yield Package("nvidia-smi", version, f"libnvidia-ml1 {same}", files={"usr/bin/nvidia-smi": "#!/bin/sh\n"})
    persistenced = service("nvidia-persistenced", release, exact=False)
    yield Package("nvidia-persistenced", version, f"libnvidia-ml1 {same}", files=persistenced)
    yield Package("firmware-nvidia-gsp", version)
    yield Package("nvidia-kernel-support", version, f"firmware-nvidia-gsp {same}")
    for name, other in (
        ("nvidia-kernel-open-dkms", "nvidia-kernel-dkms"),
        ("nvidia-kernel-dkms", "nvidia-kernel-open-dkms"),
    ):
        source = {f"usr/src/nvidia-{release}/flavour": "Open " if "open" in name else ""}
        yield Package(name, version, f"dkms, nvidia-kernel-support {same}", conflicts=other, files=source)
    needs = f"libcuda1 {same}, libnvidia-ml1 {same}, nvidia-smi {same}, nvidia-persistenced {same}"
    yield Package("nvidia-driver-cuda", version, needs)


def ubuntu(release: str) -> Iterator[Package]:
    """Ubuntu's names: with the branch in them until 590 took it out."""
    branch = int(release.split(".")[0])
    old = branch < 590
    version, suffix = f"{release}-0ubuntu1" if old else f"{release}-1ubuntu1", f"-{branch}" if old else ""
    same = f"(= {version})"

    def package(stem: str, needs: str = "", tail: str = "", **more: dict[str, str]) -> Package:
        role = f"{stem}{tail}-lab-role"
        return Package(f"{stem}{suffix}{tail}", version, needs, role, role, role, **more)

    ml = library("libnvidia-ml", release)
    yield package("libnvidia-compute", files=ml[0], links=ml[1])
    yield package("libnvidia-cfg1")
    utils = {"usr/bin/nvidia-smi": "#!/bin/sh\n"}
    yield package("nvidia-utils", f"libnvidia-compute{suffix} {same}", files=utils)
    persistenced = service("nvidia-persistenced", release, exact=False)
    if old:
        yield package("nvidia-compute-utils", f"libnvidia-compute{suffix} {same}", files=persistenced)
    else:
        taken = "nvidia-compute-utils-lab-role"
        yield Package("nvidia-persistenced", version, "", taken, taken, taken, files=persistenced)
    yield package("nvidia-kernel-common")
    for tail, flavour in (("-open", "Open "), ("", "")):
        yield package("nvidia-kernel-source", tail=tail)
        needs = f"dkms, nvidia-kernel-common{suffix} {same}, nvidia-kernel-source{suffix}{tail} {same}"
        source = {f"usr/src/nvidia-{release}/flavour": flavour}
        role = "nvidia-dkms-lab-role"
        yield Package(f"nvidia-dkms{suffix}{tail}", version, needs, role, role, role, files=source)


def both(release: str, tail: str) -> Iterator[Package]:
    """What has one name in both families."""
    fabric = service("nvidia-fabricmanager", release, exact=True)
    yield Package("nvidia-fabricmanager", f"{release}-{tail}", files=fabric)
    branch = release.split(".")[0]
    yield Package(f"nvidia-driver-pinning-{branch}", f"{branch}-2", files={f"usr/share/doc/pinning-{branch}": ""})


def beside(kernel: str) -> Iterator[Package]:
    """Packages with versions of their own, and what a mirror of the distribution would have."""
    yield Package("dkms", "3.0.10-8")
    yield Package("nvlsm", "2025.10.12-1")
    yield Package("nvidia-container-toolkit", "1.18.1-1", "libnvidia-container1")
    yield Package("libnvidia-container1", "1.18.1-1")
    yield Package("datacenter-gpu-manager-4-core", "1:4.4.2-1", files=service("nvidia-dcgm", "", exact=False))
    for cuda in (12, 13):
        yield Package(f"datacenter-gpu-manager-4-cuda{cuda}", "1:4.4.2-1", "datacenter-gpu-manager-4-core")
    if kernel:
        yield Package(f"linux-headers-{kernel}", "6.1.1-1", files={f"lib/modules/{kernel}/build/Makefile": ""})


def packages(family: str, kernel: str, releases: list[str]) -> Iterator[Package]:
    yield from beside(kernel)
    for release in releases:
        yield from (debian if family == "debian" else ubuntu)(release)
        yield from both(release, "1" if family == "debian" else "1ubuntu1")


def tar(files: Mapping[str, str], links: Mapping[str, str]) -> bytes:
    """A gzipped tar archive of the files, with the directories above them."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=EPOCH) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        parents = {parent for name in (*files, *links) for parent in Path(name).parents if str(parent) != "."}
        for parent in sorted(parents, key=str):
            _add(archive, f"./{parent}/", tarfile.DIRTYPE, mode=0o755)
        for name, content in sorted(files.items()):
            mode = 0o755 if "/bin/" in f"/{name}" or name in ("postinst", "prerm") else 0o644
            _add(archive, f"./{name}", tarfile.REGTYPE, content.encode(), mode)
        for name, target in sorted(links.items()):
            _add(archive, f"./{name}", tarfile.SYMTYPE, link=target)
    return out.getvalue()


def _add(
    archive: tarfile.TarFile, name: str, kind: bytes, data: bytes = b"", mode: int = 0o777, link: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime, info.linkname = kind, len(data), mode, EPOCH, link
    archive.addfile(info, io.BytesIO(data))


def deb(package: Package) -> bytes:
    members = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", tar({"control": package.control}, {})),
        ("data.tar.gz", tar(package.files, package.links)),
    )
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{EPOCH:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def build(target: Path, family: str, kernel: str, releases: list[str]) -> None:
    """Writes the .deb files and the index Packages of a flat repository."""
    target.mkdir(parents=True, exist_ok=True)
    index = []
    for package in packages(family, kernel, releases):
        data = deb(package)
        name = f"{package.name}_{package.version.rpartition(':')[2]}_amd64.deb"
        (target / name).write_bytes(data)
        sums = f"Size: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        index.append(f"{package.control}Filename: ./{name}\n{sums}")
    (target / "Packages").write_text("\n".join(index), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--family", choices=["debian", "ubuntu"], required=True)
    parser.add_argument("--kernel", default="", help="make a package with this kernel's headers")
    parser.add_argument("--release", action="append", required=True, help="a version of the driver; again for more")
    options = parser.parse_args()
    build(options.target, options.family, options.kernel, options.release)


if __name__ == "__main__":
    main()
