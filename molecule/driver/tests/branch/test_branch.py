"""Another branch was asked for, and to be enforced."""

from __future__ import annotations

from typing import Any

from hosts import library, loaded, name, would_change

testinfra_hosts = ["ansible://gpu01", "ansible://gpu02", "ansible://gpu03", "ansible://gpu04"]


def test_every_host_is_on_the_branch(host: Any) -> None:
    assert " 590.48.01 " in loaded(host)
    assert library(host) == "590.48.01"
    assert would_change(host) == []


def test_the_old_names_are_gone(host: Any) -> None:
    installed = host.check_output("dpkg-query -W -f='${db:Status-Status} ${Package}\\n'").splitlines()
    assert not [line for line in installed if line.startswith("installed") and "-580" in line]
    if name(host) == "gpu04":
        assert host.package("nvidia-dkms-open").is_installed
