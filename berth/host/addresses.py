"""The addresses by which the cluster's hosts know each other: what certificates name and the firewall lets in."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from berth.errors import BerthError

OWN = ("ray_head_node_ip", "ray_slot_node_ip")
"""The variables that give a host's address to Ray, as head and as GPU host; without them Ansible's own is taken."""
REPLACED_BY_RAY = ("localhost", "127.0.0.1", "::1")
"""``ray start`` takes the host's first other address where it is given one of these (Ray 2.60)."""


def node_addresses(hosts: Iterable[str], variables: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Host to the addresses that its nodes have: IP addresses, each once, in canonical form.

    Raises:
        BerthError: a host's address is a name, or one that Ray replaces by another.
    """
    found = {host: _of(host, variables[host]) for host in hosts}
    wrong = {host: bad for host, own in found.items() if (bad := [item for item in own if not _usable(item)])}
    if wrong:
        raise BerthError(
            "certificates and firewall rules need the IP address that each host's nodes really have",
            found="; ".join(f"{host}: {', '.join(bad)}" for host, bad in sorted(wrong.items())),
            allowed="an IP address of the host that the other hosts reach, not a name, not the loopback address",
            mend=f"set {' and '.join(OWN)} (or ansible_host) of these hosts",
        )
    return {host: list(dict.fromkeys(str(ipaddress.ip_address(item)) for item in own)) for host, own in found.items()}


def family(addresses: Iterable[str], version: int) -> list[str]:
    """Of addresses and networks (``10.0.0.0/8``), those of IP ``version`` (4 or 6), in canonical form, each once.

    Raises:
        BerthError: one is neither.
    """
    found = [_network(item) for item in addresses]
    # nftables refuses intervals that overlap.
    if version == 4:
        four = ipaddress.collapse_addresses(net for net in found if isinstance(net, ipaddress.IPv4Network))
        return [str(net).removesuffix("/32") for net in four]
    six = ipaddress.collapse_addresses(net for net in found if isinstance(net, ipaddress.IPv6Network))
    return [str(net).removesuffix("/128") for net in six]


def _network(item: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(item, strict=False)
    except ValueError:
        raise BerthError("not an IP address or network", found=item, allowed="192.0.2.7, 192.0.2.0/24") from None


def _of(host: str, variables: Mapping[str, Any]) -> list[str]:
    own = [str(variables[name]) for name in OWN if variables.get(name)]
    return own or [str(variables.get("ansible_host") or host)]


def _usable(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return address not in REPLACED_BY_RAY
