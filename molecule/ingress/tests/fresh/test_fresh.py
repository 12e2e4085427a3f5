"""After check mode on fresh hosts: nothing is there, here or on them."""

from __future__ import annotations

import pytest

from tests.lab import ROOT, on


@pytest.mark.parametrize("host", ["edge01", "head01"])
def test_check_mode_changed_nothing(host: str) -> None:
    found = on(host, "sh", "-c", "ls -d /usr/sbin/nginx /etc/berth-ingress /var/cache/berth-ingress 2>/dev/null; true")
    assert found == ""
    assert on(host, "sh", "-c", "getent passwd berth-ingress || true") == ""
    assert not (ROOT / ".berth/lab-ingress/controller/secrets").exists()
