"""What the tests ask of a host."""

from __future__ import annotations

from typing import Any

ROOT = "/srv/kernel"


def loaded(host: Any) -> str:
    """What stands for /proc/driver/nvidia/version; empty where no driver runs."""
    version = host.file(f"{ROOT}/proc/driver/nvidia/version")
    return str(version.content_string) if version.exists else ""


def library(host: Any) -> str:
    link = host.file("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")
    return str(link.linked_to).rpartition("libnvidia-ml.so.")[2] if link.exists else ""


def held(host: Any) -> set[str]:
    return set(host.check_output("apt-mark showhold").split())


def would_change(host: Any) -> list[str]:
    """The packages that the next distribution upgrade would touch."""
    lines = host.check_output("apt-get --simulate dist-upgrade").splitlines()
    return [line.split()[1] for line in lines if line.startswith(("Inst", "Remv"))]


def name(host: Any) -> str:
    return str(host.check_output("hostname"))
