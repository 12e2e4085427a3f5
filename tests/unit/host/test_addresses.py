"""The addresses that certificates name and the firewall lets in."""

from __future__ import annotations

import pytest

from berth.errors import BerthError
from berth.host.addresses import family, node_addresses

HOSTS = {
    "head01": {"ansible_host": "192.0.2.10"},
    "gpu01": {"ansible_host": "gpu01.example", "ray_slot_node_ip": "10.0.0.21"},
    "both": {"ray_head_node_ip": "10.0.0.9", "ray_slot_node_ip": "fd00:0::9"},
    "192.0.2.7": {},
}


def test_the_address_that_ray_is_given_comes_first() -> None:
    assert node_addresses(sorted(HOSTS), HOSTS) == {
        "192.0.2.7": ["192.0.2.7"],
        "both": ["10.0.0.9", "fd00::9"],
        "gpu01": ["10.0.0.21"],
        "head01": ["192.0.2.10"],
    }


@pytest.mark.parametrize("address", ["gpu01.example", "127.0.0.1", "::1", "localhost"])
def test_an_address_that_ray_does_not_use_as_it_stands_is_refused(address: str) -> None:
    with pytest.raises(BerthError, match=rf"found: gpu01: {address}; .*mend: set ray_head_node_ip"):
        node_addresses(["gpu01"], {"gpu01": {"ansible_host": address}})


def test_networks_are_kept_apart_by_family_and_do_not_overlap() -> None:
    given = ["10.0.0.7", "10.0.0.0/24", "10.0.0.9/24", "192.0.2.1", "fd00::1", "fd00::/64", "192.0.2.1"]
    assert family(given, 4) == ["10.0.0.0/24", "192.0.2.1"]
    assert family(given, 6) == ["fd00::/64"]
    with pytest.raises(BerthError, match="found: gpu01"):
        family(["gpu01"], 4)
