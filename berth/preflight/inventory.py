"""Mistakes that the inventory alone shows: no host is asked."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from berth.errors import BerthError
from berth.host import ingress
from berth.plan.apps import load_apps
from berth.plan.types import STRATEGIES
from berth.preflight.ports import port_problems
from berth.preflight.problem import Problem

REMOVED: Mapping[str, str] = {}
"""Variables that are no more, each with what replaces it ("" for nothing)."""

CLUSTER_WIDE = (
    "berth_cluster",
    "berth_state_dir",
    "berth_controller_dir",
    "berth_service_manager",
    "placement_strategy",
    "placement_reserve_mib",
    "placement_max_moves",
    "placement_repack",
    "placement_allow_unplaced",
    "ray_head_gcs_port",
    "ray_head_token_source",
    "serve_apps_list",
    "serve_apps_http_port",
)
"""One value for the whole cluster: tasks that run once take it from whichever host comes first, and the cluster's id
is made of the first two."""

LOOKS_LIKE = 0.8
"""How alike two names must be (difflib's ratio) for one to be taken for a slip of the other."""

EVERY_OPTION = "docs/VARIABLES.md has every variable"


@dataclass(frozen=True)
class InventoryHost:
    """One host: its options as they will be (defaults filled in, templates resolved), and the names the inventory sets.

    ``wrong`` are the words of Ansible's validator, ``unresolved`` the variables that could not be templated, with why.
    """

    name: str
    values: Mapping[str, Any]
    given: frozenset[str] = frozenset()
    wrong: tuple[str, ...] = ()
    unresolved: tuple[tuple[str, str], ...] = ()

    def number(self, name: str) -> int | None:
        """An option as a number; None where it is not one (Ansible's validator has said so)."""
        value = self.values.get(name)
        try:
            return None if value is None or isinstance(value, bool) else int(value)
        except (TypeError, ValueError):
            return None

    def text(self, name: str) -> str:
        value = self.values.get(name)
        return "" if value is None else str(value)

    def items(self, name: str) -> Sequence[Any]:
        value = self.values.get(name)
        return value if isinstance(value, list | tuple) else ()


@dataclass(frozen=True)
class SecretFile:
    """A secret on the controller. ``mode`` is None where there is no file; ``writable`` is about its directory."""

    path: str
    mode: int | None
    readable: bool = True
    empty: bool = False
    writable: bool = True


@dataclass(frozen=True)
class Inventory:
    """The whole cluster before any host is asked; ``options`` and ``derived`` are names of the roles' variables."""

    hosts: tuple[InventoryHost, ...]
    groups: Mapping[str, tuple[str, ...]]
    roles: tuple[str, ...]
    options: frozenset[str]
    derived: frozenset[str]
    made: frozenset[str] = frozenset()
    secrets: tuple[SecretFile, ...] = ()

    def members(self, group: str) -> tuple[InventoryHost, ...]:
        return tuple(host for host in self.hosts if host.name in self.groups.get(group, ()))


def read_secret(path: str) -> SecretFile:
    """Look at a secret on the controller; its content is not kept."""
    file = Path(path)
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except PermissionError:
        return SecretFile(path, 0, readable=False)
    except OSError:
        above = next((item for item in file.parents if item.exists()), Path("/"))
        return SecretFile(path, None, writable=os.access(above, os.W_OK | os.X_OK))
    try:
        empty = not file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return SecretFile(path, mode, readable=False)
    return SecretFile(path, mode, empty=empty)


def check_inventory(inventory: Inventory, removed: Mapping[str, str] = REMOVED) -> list[Problem]:
    """Every mistake that needs no host to be seen. Raises nothing: what cannot be read is a problem, too."""
    return [
        *_groups(inventory),
        *_options(inventory),
        *_names(inventory, removed),
        *_strategies(inventory),
        *_cluster_wide(inventory),
        *_host_names(inventory),
        *_addresses(inventory),
        *_ports(inventory),
        *_gpus(inventory),
        *_apps(inventory),
        *_ingresses(inventory),
        *_secrets(inventory),
    ]


def _groups(inventory: Inventory) -> Iterator[Problem]:
    heads, slots = inventory.groups.get("ray_head", ()), inventory.groups.get("ray_slots", ())
    if len(heads) != 1:
        yield Problem(
            "groups",
            "error",
            ("inventory",),
            "the group ray_head must have one host",
            ", ".join(heads) or "none",
            "one host",
            "list the head's host under ray_head",
        )
    if not slots:
        yield Problem(
            "groups",
            "error",
            ("inventory",),
            "the group ray_slots has no host: nothing could be placed",
            "none",
            "one host or more",
            "add GPU hosts to ray_slots",
        )
    known = {host.name for host in inventory.hosts}
    for name in sorted({*heads, *slots} - known):
        yield Problem(
            "groups",
            "error",
            (name,),
            "it is in ray_head or ray_slots, not in berth: the playbooks would not touch it",
            "",
            "both groups as children of berth",
            "make ray_head and ray_slots children of the group berth",
        )
    for name in sorted(known - {*heads, *slots}):
        yield Problem(
            "groups",
            "warning",
            (name,),
            "it is in berth, in neither ray_head nor ray_slots: it gets Berth's environments and no work",
            "",
            "ray_head, ray_slots, or both",
            "add it to one of them, or take it out of berth",
        )


def _options(inventory: Inventory) -> Iterator[Problem]:
    apps = any(True for _ in _apps(inventory))
    for host in inventory.hosts:
        for name, why in host.unresolved:
            mend = f"set what it refers to, or {name}"
            yield Problem("option", "error", (host.name,), f"{name} cannot be resolved", why, "", mend)
        for text in host.wrong:
            # Told better below, with the entry or the command that mends it.
            if "placement_strategy" in text or (apps and "serve_apps_list" in text):
                continue
            yield Problem(
                "option",
                "error",
                (host.name,),
                "an option has a wrong value, an unknown key or lacks one",
                text,
                "",
                f"correct it in the inventory or on the command line ({EVERY_OPTION})",
            )


def _names(inventory: Inventory, removed: Mapping[str, str]) -> Iterator[Problem]:
    for host in inventory.hosts:
        for name in sorted(host.given - inventory.options):
            found = _name(name, inventory, removed)
            if found:
                kind, what, mend = found
                severe = kind != "unlike"
                yield Problem(
                    "variable", "error" if severe else "warning", (host.name,), what, "", "", mend or EVERY_OPTION
                )


def _name(name: str, inventory: Inventory, removed: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(how bad, what, mend) of a variable that no role takes; None for one that is nobody's business here."""
    if name in removed:
        instead = removed[name]
        mend = f"use {instead} instead" if instead else "take it out of the inventory"
        return "removed", f"the variable {name} is no more", mend
    if name in inventory.derived:
        return "derived", f"{name} is derived, so what the inventory says has no effect", f"remove it; {EVERY_OPTION}"
    if name in inventory.made or not any(name.startswith(f"{role}_") for role in inventory.roles):
        return None
    close = difflib.get_close_matches(name, sorted(inventory.options), 1, LOOKS_LIKE)
    if close:
        return "close", f"no role takes the variable {name}", f"did you mean {close[0]}?"
    return "unlike", f"no role takes the variable {name}", f"remove or rename it; {EVERY_OPTION}"


def _strategies(inventory: Inventory) -> Iterator[Problem]:
    for host in inventory.hosts:
        strategy = host.text("placement_strategy")
        if strategy not in STRATEGIES and "placement_strategy" in host.values:
            yield Problem(
                "strategy",
                "error",
                (host.name,),
                "unknown strategy",
                strategy,
                ", ".join(STRATEGIES),
                "ansible-playbook site.yml -e strategy=pack",
            )


def _cluster_wide(inventory: Inventory) -> Iterator[Problem]:
    for name in CLUSTER_WIDE:
        seen: dict[str, list[str]] = {}
        for host in inventory.hosts:
            if name in host.values:
                seen.setdefault(json.dumps(host.values[name], sort_keys=True, default=str), []).append(host.name)
        if len(seen) > 1:
            # A list of apps is too long to show; which hosts differ is what helps.
            brief = [
                f"{', '.join(hosts)}: {value if len(value) < 60 else 'another one'}" for value, hosts in seen.items()
            ]
            yield Problem(
                "cluster_wide",
                "error",
                tuple(sorted(host for hosts in seen.values() for host in hosts)),
                f"{name} differs between hosts, and the cluster has one",
                "; ".join(brief),
                "one value",
                f"set {name} once, in group_vars of berth or all",
            )


def _host_names(inventory: Inventory) -> Iterator[Problem]:
    named: dict[str, list[str]] = {}
    for host in inventory.members("ray_slots"):
        named.setdefault(host.text("placement_host_name"), []).append(host.name)
    for name, hosts in sorted(named.items()):
        if len(hosts) > 1:
            yield Problem(
                "host_name",
                "error",
                tuple(sorted(hosts)),
                "placement_host_name is the same on several hosts: their slots would have the same names",
                name,
                "a name of its own for each host",
                "set placement_host_name per host, or leave it out: it is the inventory's name then",
            )


def node_address(host: InventoryHost, group: str) -> str:
    """By which address the host's Ray nodes of ``group`` (``ray_head`` or ``ray_slots``) are known to the others."""
    return host.text("ray_head_node_ip" if group == "ray_head" else "ray_slot_node_ip")


def _addresses(inventory: Inventory) -> Iterator[Problem]:
    owners: dict[str, set[str]] = {}
    for group in ("ray_head", "ray_slots"):
        variable = "ray_head_node_ip" if group == "ray_head" else "ray_slot_node_ip"
        for host in inventory.members(group):
            address = node_address(host, group)
            owners.setdefault(address, set()).add(host.name)
            if len(inventory.hosts) > 1 and _loopback(address):
                yield Problem(
                    "address",
                    "error",
                    (host.name,),
                    f"{variable} is a loopback address: no other host can reach it",
                    address,
                    "an address of the network between the hosts",
                    f"set {variable} (or ansible_host) of this host",
                )
    for address, hosts in sorted(owners.items()):
        if len(hosts) > 1 and address and not _loopback(address):
            yield Problem(
                "address",
                "error",
                tuple(sorted(hosts)),
                "several hosts have the same node address",
                address,
                "an address of its own for each host",
                "set ansible_host, or ray_slot_node_ip and ray_head_node_ip, per host",
            )


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.split(".")[0] == "localhost"


def _ports(inventory: Inventory) -> Iterator[Problem]:
    for host in inventory.hosts:
        yield from port_problems(
            host.name,
            {name: value for name in host.values if (value := host.number(name)) is not None},
            head=host.name in inventory.groups.get("ray_head", ()),
            slots=host.name in inventory.groups.get("ray_slots", ()),
        )


# --- GPUs -------------------------------------------------------------------------------------------------------------


def _gpus(inventory: Inventory) -> Iterator[Problem]:
    claims: dict[str, dict[str, set[str]]] = {}
    for host in inventory.members("ray_slots"):
        shaped = [key for shape in host.items("placement_slot_shapes") if isinstance(shape, list) for key in shape]
        cordoned = list(host.items("placement_cordoned_gpus"))
        for variable, keys in (("placement_slot_shapes", shaped), ("placement_cordoned_gpus", cordoned)):
            yield from _named_twice(host.name, variable, keys)
            yield from _no_gpu(host.name, variable, keys)
            for key in keys:
                if _is_uuid(key):
                    claims.setdefault(str(key), {}).setdefault(host.name, set()).add(variable)
    for uuid, hosts in sorted(claims.items()):
        if len(hosts) > 1:
            found = "; ".join(f"{host} in {', '.join(sorted(names))}" for host, names in sorted(hosts.items()))
            yield Problem(
                "gpu",
                "error",
                tuple(sorted(hosts)),
                f"several hosts name GPU {uuid}",
                found,
                "a GPU is in one host",
                "remove it from every host but its own (nvidia-smi -L)",
            )
    yield from _pins(inventory)


def _named_twice(host: str, variable: str, keys: Sequence[object]) -> Iterator[Problem]:
    for key, times in sorted(Counter(map(str, keys)).items()):
        if times > 1:
            yield Problem(
                "gpu",
                "error",
                (host,),
                f"{variable} names GPU {key} {times} times",
                str(list(keys)),
                "each GPU once",
                f"correct {variable} of this host",
            )


def _no_gpu(host: str, variable: str, keys: Sequence[object]) -> Iterator[Problem]:
    for key in keys:
        if not _is_uuid(key) and not str(key).isdigit():
            yield Problem(
                "gpu",
                "error",
                (host,),
                f"{variable} has what is neither a UUID nor an index",
                repr(key),
                "GPU-…, MIG-…, or a number",
                f"correct {variable} of this host (nvidia-smi -L)",
            )


def _is_uuid(key: object) -> bool:
    return str(key).startswith(("GPU-", "MIG-"))


def _pins(inventory: Inventory) -> Iterator[Problem]:
    for app in _raw_apps(inventory):
        pins = app.get("pins") or ()
        for uuid, times in sorted(Counter(map(str, pins if isinstance(pins, list) else ())).items()):
            if times > 1:
                yield Problem(
                    "gpu",
                    "error",
                    ("inventory",),
                    f"app {app.get('name')}: pins names GPU {uuid} {times} times",
                    "",
                    "each GPU once",
                    "correct the entry in serve_apps_list",
                )


# --- The app list -----------------------------------------------------------------------------------------------------


def _raw_apps(inventory: Inventory) -> tuple[dict[str, Any], ...]:
    """The list of the first host, which is the one that counts; that all have the same is checked apart."""
    found = inventory.hosts[0].items("serve_apps_list") if inventory.hosts else ()
    return tuple(item for item in found if isinstance(item, dict))


def _apps(inventory: Inventory) -> Iterator[Problem]:
    """Each entry by itself, so that one mistake does not hide the next."""
    apps = _raw_apps(inventory)
    for app in apps:
        try:
            load_apps([app])
        except BerthError as error:
            label = app.get("name") or "an app without a name"
            yield _app_problem(label, error)
    for name, times in sorted(Counter(str(app.get("name")) for app in apps).items()):
        if times > 1:
            twice = BerthError(
                "app list: two apps have the same name",
                found=name,
                allowed="unique names",
                mend="correct the entry in serve_apps_list",
            )
            yield _app_problem(name, twice)


def _app_problem(name: str, error: BerthError) -> Problem:
    return Problem(
        "app",
        "error",
        ("inventory",),
        error.what.replace("app list: 0.", f"app list: {name}: "),
        "" if error.found is None else str(error.found),
        "" if error.allowed is None else str(error.allowed),
        error.mend or "",
    )


# --- Ingress ----------------------------------------------------------------------------------------------------------


def _ingresses(inventory: Inventory) -> Iterator[Problem]:
    """Those on hosts of the cluster; one beside it is judged by its role alone, its variables are not read here."""
    slots = inventory.groups.get("ray_slots", ())
    heads = inventory.groups.get("ray_head", ())
    for host in inventory.members("ray_ingress"):
        entries = [entry for entry in host.items("ingress_keys") if isinstance(entry, Mapping)]
        limits = [host.number(f"ingress_{name}") for name in ("requests_per_minute", "burst", "connections")]
        addresses: dict[str, dict[str, str]] = {name: {} for name in (*heads, *slots)}
        try:
            ingress.limit_classes(ingress.read_keys(entries), ingress.Limits(*(number or 0 for number in limits)))
            ingress.long_paths(map(str, host.items("ingress_long_paths")))
            ingress.upstreams(host.name, heads, slots, addresses, host.text("serve_apps_http_host"))
        except BerthError as error:
            found, allowed = ("" if value is None else str(value) for value in (error.found, error.allowed))
            yield Problem("ingress", "error", (host.name,), error.what, found, allowed, error.mend or "")


# --- Secrets ----------------------------------------------------------------------------------------------------------


def _secrets(inventory: Inventory) -> Iterator[Problem]:
    for secret in inventory.secrets:
        variable = "ray_head_token_source"
        if secret.mode is None:
            if not secret.writable:
                yield Problem(
                    "secret",
                    "error",
                    ("controller",),
                    f"{variable} is not there, and its directory cannot be written to make it",
                    secret.path,
                    "a readable file, or a directory to make it in",
                    f"put Ray's token there, or set {variable}",
                )
        elif not secret.readable:
            yield Problem(
                "secret",
                "error",
                ("controller",),
                f"{variable} cannot be read",
                secret.path,
                "a file that whoever runs the playbook may read",
                f"chown it, or set {variable}",
            )
        else:
            yield from _secret_file(variable, secret, secret.mode)


def _secret_file(variable: str, secret: SecretFile, mode: int) -> Iterator[Problem]:
    if secret.empty:
        yield Problem(
            "secret",
            "error",
            ("controller",),
            f"{variable} is empty: every Ray process would refuse every other",
            secret.path,
            "a token of 64 hexadecimal digits",
            "remove the file; the next run makes a new one for all hosts",
        )
    if mode & 0o077:
        yield Problem(
            "secret",
            "error",
            ("controller",),
            f"{variable} may be read by others: it lets them run code on every host",
            f"{secret.path} has mode {mode:04o}",
            "0600",
            f"chmod 600 {secret.path}",
        )


def accepted(inventory: Inventory) -> Collection[str]:
    """Kinds of problems that the inventory asks only to be warned about (``preflight_accept``)."""
    return {str(kind) for host in inventory.hosts for kind in host.items("preflight_accept")}
