"""After teardown nothing of the ingress runs, listens or starts at the next boot; the package stays, switched off."""

from __future__ import annotations

import pytest

from tests.lab import on


@pytest.mark.parametrize("host", ["edge01", "head01"])
def test_nothing_is_left(host: str) -> None:
    assert on(host, "systemctl", "list-units", "--all", "--plain", "--no-legend", "berth-*") == ""
    assert on(host, "find", "/etc/systemd", "/run/systemd/system", "-name", "berth-*") == ""
    assert on(host, "sh", "-c", "pgrep -a nginx || true") == ""
    listening = on(host, "ss", "-Htln")
    assert not {int(line.split()[3].rpartition(":")[2]) for line in listening.splitlines()} & {80, 8443}
    places = "/etc/berth-ingress /run/berth-ingress /var/cache/berth-ingress"
    assert on(host, "sh", "-c", f"ls -d {places} 2>/dev/null; true") == ""
