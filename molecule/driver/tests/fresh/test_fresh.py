"""After check mode on fresh hosts: nothing is there."""

from __future__ import annotations

from typing import Any

from hosts import ROOT, loaded, name

testinfra_hosts = ["ansible://gpu01", "ansible://gpu02", "ansible://gpu04"]


def test_check_mode_changed_nothing(host: Any) -> None:
    for path in ("/etc/apt/sources.list.d/berth-nvidia.list", "/etc/modprobe.d/berth-nvidia.conf"):
        assert not host.file(path).exists
    assert not host.check_output("dpkg-query -W -f='${Package} ' '*nvidia*' 2>/dev/null || true")
    assert not loaded(host)
    assert host.file(f"{ROOT}/sys/module/nouveau").exists == (name(host) == "gpu02")
