"""Newer releases are in the repository, the role ran again, and nothing moved."""

from __future__ import annotations

from typing import Any

from hosts import library, loaded, name, would_change

testinfra_hosts = ["ansible://gpu01", "ansible://gpu02", "ansible://gpu04"]


def test_newer_releases_are_on_offer(host: Any) -> None:
    package = "libnvidia-compute-580" if name(host) == "gpu04" else "nvidia-driver-cuda"
    assert "580.178.04" in host.check_output(f"apt-cache madison {package}")


def test_the_hold_holds(host: Any) -> None:
    assert would_change(host) == []
    assert " 580.159.04 " in loaded(host)


def test_the_pin_alone_holds_as_well(host: Any) -> None:
    """Somebody may let go of the holds, or name a package: the pin still keeps the release."""
    package = "libnvidia-compute-580" if name(host) == "gpu04" else "libnvidia-ml1"
    policy = host.check_output(f"apt-cache policy {package}")
    assert "Candidate: 580.159.04" in policy
    assert library(host) == "580.159.04"
