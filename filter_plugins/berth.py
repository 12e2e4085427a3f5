"""Filters for templates; each is a function of berth/."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ansible.errors import AnsibleFilterError

from berth.errors import BerthError
from berth.ray import start


def slot_ports(names: Iterable[str], agent_base: int, metrics_base: int) -> dict[str, int]:
    """See berth.ray.start.slot_ports."""
    try:
        return start.slot_ports(names, int(agent_base), int(metrics_base))
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


def slot_nodes(
    slots: Iterable[dict[str, Any]], common: dict[str, Any], run_dir: str, agent_base: int, metrics_base: int
) -> dict[str, dict[str, Any]]:
    """See berth.ray.start.slot_nodes."""
    try:
        return start.slot_nodes(slots, common, run_dir, int(agent_base), int(metrics_base))
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "node_digest": start.digest,
            "slot_nodes": slot_nodes,
            "slot_ports": slot_ports,
            "unit_digests": start.unit_digests,
        }
