"""Filters for templates; each is a function of berth/."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

from berth.codec import load
from berth.errors import BerthError
from berth.host import addresses, environment, ingress, look, wheelhouse
from berth.plan import models, store
from berth.plan.apps import load_apps
from berth.plan.types import Plan
from berth.ray import ports, start
from berth.verify.witnesses import witnesses


def slot_nodes(
    slots: Iterable[dict[str, Any]], common: dict[str, Any], run_dir: str, *bases: int
) -> dict[str, dict[str, Any]]:
    """See berth.ray.start.slot_nodes."""
    found: dict[str, dict[str, Any]] = _told(lambda: start.slot_nodes(slots, common, run_dir, *map(int, bases)))
    return found


def fixed_ports(nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """See berth.ray.ports.fixed; ``nodes`` are NodeConfigs, or their ports alone, by name."""
    found: dict[str, int] = _told(lambda: ports.fixed({name: _ports(node) for name, node in nodes.items()}))
    return found


def port_ranges(nodes: Iterable[Mapping[str, Any]], audience: ports.Audience) -> list[str]:
    """See berth.ray.ports.ranges."""
    found: list[str] = _told(lambda: ports.ranges(map(_ports, nodes), audience))
    return found


def node_addresses(hosts: Iterable[str], variables: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """See berth.host.addresses.node_addresses; ``variables`` is hostvars."""
    found: dict[str, list[str]] = _told(lambda: addresses.node_addresses(hosts, variables))
    return found


def ip_family(items: Iterable[str], version: int) -> list[str]:
    """See berth.host.addresses.family."""
    found: list[str] = _told(lambda: addresses.family(items, version))
    return found


def _ports(node: Mapping[str, Any]) -> ports.NodePorts:
    return start.ports_of(node) if "kind" in node else load(ports.NodePorts, dict(node), "ports")


def _told(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BerthError as error:
        raise AnsibleFilterError(str(error)) from None


def wheelhouse_tar(manifest: str, lock: str, text: str, source: str) -> str:
    """The sha256 of a lock's tar in a wheelhouse; see berth.host.wheelhouse.packed_lock."""
    return str(_told(lambda: wheelhouse.packed_lock(str(manifest), str(lock), str(text), str(source)).tar))


def environment_differences(hosts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """See berth.host.environment.differences."""
    return [asdict(item) for item in environment.differences(hosts)]


def environment_differences_text(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The same as lines for people."""
    return [str(item) for item in environment.differences(hosts)]


def runtime_rolled_back(pins: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """See berth.host.environment.rolled_back."""
    found: dict[str, dict[str, str]] = _told(lambda: environment.rolled_back(pins, hosts))
    return found


def host_models(plan: str, apps: str, host: str) -> list[dict[str, str]]:
    """What a host's slots load, from the plan's and the app list's JSON; see berth.plan.models.models_of_host."""

    def found() -> list[dict[str, str]]:
        specs = load_apps(json.loads(str(apps)))
        sources = models.models_of_host(load(Plan, json.loads(str(plan)), "plan"), specs, str(host))
        return [asdict(source) for source in sources]

    return list(_told(found))


def unlike(wanted: Iterable[Mapping[str, Any]], seen: Mapping[str, Any]) -> list[str]:
    """See berth.host.look.unlike."""
    found: list[str] = _told(lambda: look.unlike(wanted, seen))
    return found


def ingress_limits(entries: Iterable[Mapping[str, Any]], *default: int) -> list[dict[str, Any]]:
    """See berth.host.ingress.limit_classes."""

    def found() -> list[dict[str, Any]]:
        classes = ingress.limit_classes(ingress.read_keys(entries), ingress.Limits(*map(int, default)))
        return [asdict(item) for item in classes]

    return list(_told(found))


def ingress_key_table(entries: Iterable[Mapping[str, Any]], directory: str) -> dict[str, str]:
    """See berth.host.ingress.key_table."""
    found: dict[str, str] = _told(lambda: ingress.key_table(ingress.read_keys(entries), Path(directory)))
    return found


def ingress_keys_missing(entries: Iterable[Mapping[str, Any]], directory: str) -> list[str]:
    """See berth.host.ingress.missing."""
    found: list[str] = _told(lambda: ingress.missing(ingress.read_keys(entries), Path(directory)))
    return found


def ingress_keys_lost(names: Iterable[str], text: str) -> list[str]:
    """See berth.host.ingress.lost."""
    return ingress.lost(names, str(text))


def ingress_upstreams(
    variables: Mapping[str, Mapping[str, Any]], me: str, heads: Iterable[str], slots: Iterable[str], http_host: str
) -> list[dict[str, Any]]:
    """See berth.host.ingress.upstreams; ``variables`` is hostvars."""
    found = _told(lambda: ingress.upstreams(str(me), list(heads), list(slots), variables, str(http_host)))
    return [asdict(item) for item in found]


def ingress_long_paths(paths: Iterable[str]) -> list[str]:
    """See berth.host.ingress.long_paths."""
    found: list[str] = _told(lambda: ingress.long_paths(paths))
    return found


def ingress_answers(max_body_mib: int) -> list[dict[str, Any]]:
    """See berth.host.ingress.answers."""
    return [asdict(item) for item in ingress.answers(int(max_body_mib))]


def placement_witnesses(hosts: Iterable[str], variables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """See berth.verify.witnesses.witnesses; ``variables`` is hostvars."""
    found: dict[str, Any] = _told(lambda: witnesses(hosts, variables))
    return found


def berths_by_gpu(path: str, host: str) -> dict[str, list[str]]:
    """See berth.plan.store.berths_by_gpu; no plan, no berths."""
    found: dict[str, list[str]] = _told(lambda: store.berths_by_gpu(store.read_plan(Path(path)), host))
    return found


FILTERS: dict[str, Callable[..., Any]] = {
    "node_digest": start.digest,
    "slot_nodes": slot_nodes,
    "unit_digests": start.unit_digests,
    "fixed_ports": fixed_ports,
    "port_ranges": port_ranges,
    "node_addresses": node_addresses,
    "ip_family": ip_family,
    "wheelhouse_tar": wheelhouse_tar,
    "environment_differences": environment_differences,
    "environment_differences_text": environment_differences_text,
    "runtime_rolled_back": runtime_rolled_back,
    "host_models": host_models,
    "berths_by_gpu": berths_by_gpu,
    "placement_witnesses": placement_witnesses,
    "unlike": unlike,
    "ingress_limits": ingress_limits,
    "ingress_key_table": ingress_key_table,
    "ingress_keys_missing": ingress_keys_missing,
    "ingress_keys_lost": ingress_keys_lost,
    "ingress_upstreams": ingress_upstreams,
    "ingress_long_paths": ingress_long_paths,
    "ingress_answers": ingress_answers,
}


class FilterModule:
    """Registers the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return FILTERS
