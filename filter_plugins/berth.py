"""Filters for templates; each is a function of berth/."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ansible.errors import AnsibleFilterError

from berth.codec import load
from berth.errors import BerthError
from berth.host import environment, wheelhouse
from berth.plan import models
from berth.plan.apps import load_apps
from berth.plan.types import Plan
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


def wheelhouse_tar(manifest: str, lock: str, text: str, source: str) -> str:
    """The sha256 of a lock's tar in a wheelhouse; see berth.host.wheelhouse.packed_lock."""
    try:
        return wheelhouse.packed_lock(str(manifest), str(lock), str(text), str(source)).tar
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


def host_models(plan: str, apps: str, host: str) -> list[dict[str, str]]:
    """What a host's slots load, from the plan's and the app list's JSON; see berth.plan.models.models_of_host."""
    try:
        specs = load_apps(json.loads(str(apps)))
        found = models.models_of_host(load(Plan, json.loads(str(plan)), "plan"), specs, str(host))
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None
    return [asdict(source) for source in found]


FILTERS: dict[str, Callable[..., Any]] = {
    "slot_number": slot_number,
    "slot_ports": slot_ports,
    "wheelhouse_tar": wheelhouse_tar,
    "environment_differences": environment_differences,
    "environment_differences_text": environment_differences_text,
    "runtime_rolled_back": runtime_rolled_back,
    "host_models": host_models,
}


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return FILTERS
