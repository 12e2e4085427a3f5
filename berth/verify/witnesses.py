"""What the hosts of a cluster said, put together for the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

VARIABLE = "nvidia_driver_seen"
"""Where role nvidia_driver registers what a host's driver said."""


def witnesses(hosts: Iterable[str], variables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What each host's driver said, by the host's name in the plan; ``variables`` by the host's name in the inventory.

    A host that fell out of the play, since it could not be reached, noted nothing: that is a finding, not an error.
    """
    found: dict[str, Any] = {}
    for host in hosts:
        said = variables[host].get(VARIABLE, {})
        name = str(variables[host].get("placement_host_name", host))
        found[name] = said.get("host_gpus", said.get("msg", "the host did not answer"))
    return found
