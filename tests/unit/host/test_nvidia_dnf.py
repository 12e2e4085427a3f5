"""NVIDIA's names on the RPM side, resolved by dnf itself in an empty root: streams, epochs, exact versions."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from berth.host import nvidia_facts, nvidia_packages
from berth.host.nvidia_driver import decide
from berth.host.nvidia_types import Found, Wanted

from .nvidia_hosts import fresh

TOOLS = ("dnf", "rpmbuild", "createrepo_c", "modifyrepo_c")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: dnf, rpm, createrepo-c)")

RELEASES = ("580.159.04", "580.178.04", "590.48.01")
STACK = {
    "kmod-nvidia-open-dkms": "dkms, nvidia-kmod-common = 3:{version}",
    "nvidia-kmod-common": "",
    "nvidia-driver-cuda": "nvidia-driver-cuda-libs = 3:{version}, nvidia-persistenced = 3:{version}",
    "nvidia-driver-cuda-libs": "libnvidia-ml = 3:{version}",
    "libnvidia-ml": "",
    "nvidia-persistenced": "libnvidia-ml = 3:{version}",
}
SPEC = """Name: {name}
Epoch: {epoch}
Version: {version}
Release: {release}
Summary: stands for NVIDIA's
License: NVIDIA
BuildArch: noarch
{requires}
%description
%files
"""
STREAM = """---
document: modulemd
version: 2
data:
  name: nvidia-driver
  stream: "{stream}"
  version: {number}
  context: abcdef0{number}
  arch: x86_64
  summary: NVIDIA driver
  description: NVIDIA driver
  license: {{module: [MIT]}}
  dependencies: [{{}}]
  artifacts:
    rpms: [{rpms}]
"""


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages of three releases; a stream each for the branches, as NVIDIA's repository for RHEL 9 has them."""
    top = tmp_path_factory.mktemp("rpm")
    packages = [("dkms", 0, "3.2.2", "1.el9", ""), ("kernel-devel", 0, "5.14.0", "611.el9", "")]
    packages += [
        (name, 3, version, "1.el9", needs.format(version=version))
        for version in RELEASES
        for name, needs in STACK.items()
    ]
    for name, epoch, version, release, needs in packages:
        requires = f"Requires: {needs}" if needs else ""
        spec = SPEC.format(name=name, epoch=epoch, version=version, release=release, requires=requires)
        (top / f"{name}-{version}.spec").write_text(spec)
    run("rpmbuild", "--quiet", "-bb", "--define", f"_topdir {top}", *sorted(top.glob("*.spec")))
    target = top / "RPMS"
    run("createrepo_c", "--quiet", target)
    documents = []
    for number, stream in enumerate(("580-open", "590-open"), start=1):
        versions = [version for version in RELEASES if version.startswith(stream[:3])]
        rpms = ", ".join(f'"{name}-3:{version}-1.el9.noarch"' for version in versions for name in STACK)
        documents.append(STREAM.format(stream=stream, number=number, rpms=rpms))
    (top / "modules.yaml").write_text("".join(documents))
    run("modifyrepo_c", "--mdtype=modules", top / "modules.yaml", target / "repodata")
    return target


class Root:
    """An empty root that dnf installs into; only the database is written."""

    def __init__(self, path: Path, found: Found, wanted: Wanted, modules: bool) -> None:
        self.path, self.found, self.wanted, self.modules = path, found, wanted, modules
        (path / "etc/dnf").mkdir(parents=True)
        (path / "etc/yum.repos.d").mkdir()
        source = decide(found, wanted).repository
        assert source
        (path / source.path.lstrip("/")).write_text(source.content)
        self.files = {source.path: source.content}

    def dnf(self, *arguments: str) -> str:
        options = ("--setopt=tsflags=justdb", "--setopt=module_platform_id=platform:el9", "--releasever=9")
        where = (f"--installroot={self.path}", f"--setopt=reposdir={self.path}/etc/yum.repos.d")
        hotfixes = () if self.modules else ("--setopt=berth-nvidia.module_hotfixes=1",)
        return run("dnf", "--quiet", "--assumeyes", *where, *options, *hotfixes, *arguments)

    def read(self) -> Found:
        form = r"%{NAME}\t%{EPOCH}\t%{VERSION}-%{RELEASE}\t%{ARCH}\n"
        packages = nvidia_facts.parse_rpm(run("rpm", "--root", self.path, "-qa", "--qf", form))
        names = nvidia_packages.asked_for(self.found, self.wanted)
        query = "%{name}|%{epoch}|%{version}-%{release}|%{arch}|%{repoid}"
        told = self.dnf("repoquery", "--available", "--showduplicates", "--qf", f"{query}\n", *names)
        module = self.path / "etc/dnf/modules.d/nvidia-driver.module"
        stream = nvidia_facts.enabled_stream(module.read_text() if module.is_file() else None)
        offered = nvidia_facts.parse_repoquery(told, names)
        return replace(self.found, packages=packages, available=offered, module_stream=stream, files=self.files)


@pytest.mark.parametrize("version", ["", "580.159.04"])
@pytest.mark.parametrize(("system", "modules"), [(("rocky", "9.6"), True), (("rocky", "10.1"), False)])
def test_dnf_installs_what_was_decided(
    tmp_path: Path, repository: Path, system: tuple[str, str], modules: bool, version: str
) -> None:
    wanted = Wanted(repository_url=repository.as_uri(), repository_unsigned=True, version=version)
    found = fresh(system, headers=True, packages={"python3-dnf-plugin-versionlock": "4.3.0-1.el9"})
    root = Root(tmp_path, found, wanted, modules)
    first = decide(root.read(), wanted)
    if modules:
        assert first.module_stream == "580-open"
        root.dnf("module", "enable", f"nvidia-driver:{first.module_stream}")
    exact = decide(root.read(), wanted)
    release = version or "580.178.04"
    assert exact.target == release
    wished = [spec for spec in exact.packages if spec != "python3-dnf-plugin-versionlock"]
    assert f"kmod-nvidia-open-dkms-3:{release}-1.el9" in wished
    root.dnf("install", *wished)
    installed = root.read().packages
    stack = {name: value for name, value in installed.items() if nvidia_packages.is_driver_package(name, value)}
    assert set(stack) == set(STACK)
    assert set(stack.values()) == {f"3:{release}-1.el9"}
    after = decide(replace(root.read(), packages={**installed, **found.packages}), wanted)
    assert not after.packages
    assert f"kmod-nvidia-open-dkms-3:{release}-1.el9.*" in after.lock
