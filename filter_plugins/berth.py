"""Filters for templates; each is a function of berth/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ansible.errors import AnsibleFilterError

from berth.errors import BerthError
from berth.host import environment, wheelhouse
from berth.ray import start


def slot_number(name: str) -> int:
    """See berth.ray.start.slot_number."""
    try:
        return start.slot_number(name)
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


def slot_ports(names: Iterable[str], agent_base: int, metrics_base: int) -> dict[str, int]:
    """See berth.ray.start.slot_ports."""
    try:
        return start.slot_ports(names, int(agent_base), int(metrics_base))
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


def wheelhouse_tar(manifest: Mapping[str, Any], lock: str, text: str, source: str) -> str:
    """The sha256 of a lock's tar in a wheelhouse; see berth.host.wheelhouse.packed_lock."""
    try:
        return wheelhouse.packed_lock(manifest, lock, text, source).tar
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


def environment_differences(hosts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """See berth.host.environment.differences."""
    return [asdict(item) for item in environment.differences(hosts)]


def environment_differences_text(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The same as lines for people."""
    return [str(item) for item in environment.differences(hosts)]


def runtime_rolled_back(pins: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """See berth.host.environment.rolled_back."""
    try:
        return environment.rolled_back(pins, hosts)
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


FILTERS: dict[str, Callable[..., Any]] = {
    "slot_number": slot_number,
    "slot_ports": slot_ports,
    "wheelhouse_tar": wheelhouse_tar,
    "environment_differences": environment_differences,
    "environment_differences_text": environment_differences_text,
    "runtime_rolled_back": runtime_rolled_back,
}


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return FILTERS
