"""A driver of somebody else's: nothing of Berth's is on the host but its agent."""

from __future__ import annotations

from typing import Any

from hosts import held, loaded

testinfra_hosts = ["ansible://gpu03"]


def test_nothing_was_touched(host: Any) -> None:
    assert " 570.211.01 " in loaded(host)
    assert host.package("nvidia-driver-cuda").version == "570.211.01-1"
    assert held(host) == set()
    assert host.check_output("find /etc -name '*berth-nvidia*'") == ""
    assert not host.service("nvidia-persistenced").is_enabled
