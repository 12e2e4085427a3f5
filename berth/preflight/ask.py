"""From the inventory: what each host is asked, and what it is expected to say."""

from __future__ import annotations

from berth.preflight.facts import Ask, Expectation, Peer
from berth.preflight.inventory import Inventory, InventoryHost, node_address
from berth.preflight.ports import HEAD, WORKER_PORTS, single_ports

SSH_PORT = 22
TCP = range(1, 65536)
SHARED_MEMORY, TEMPORARY = "/dev/shm", "/tmp"
REPLY_PORT = WORKER_PORTS[0]
"""Stands for the ports that Ray gives to workers; nobody need listen there: a refusal is an answer."""


def ask(inventory: Inventory, host: InventoryHost) -> Ask:
    """What ``host`` has to look at."""
    expected = expectation(inventory, host)
    return Ask(
        paths=_unique(expected.state_dir, expected.cache_dir, expected.run_dir, SHARED_MEMORY, TEMPORARY),
        exists=_unique(expected.runtime),
        # What comes after preflight need not ask once more whether the agent is there.
        sha1=_unique(host.text("berth_agent_mark")),
        commands=tuple(map(str, host.items("preflight_commands"))),
        interpreters=_unique(expected.agent_python, expected.runtime_python),
        addresses=_addresses(inventory, host),
        peers=_peers(inventory, host),
        ports=tuple(sorted(set(expected.ports.values()))),
    )


def expectation(inventory: Inventory, host: InventoryHost) -> Expectation:
    """What ``host`` should be. An option that is no number counts as nothing asked: it was reported as wrong."""
    head = host.name in inventory.groups.get("ray_head", ())
    slots = host.name in inventory.groups.get("ray_slots", ())
    numbers = {name: value for name in host.values if (value := host.number(name)) is not None}
    shapes = [shape for shape in host.items("placement_slot_shapes") if isinstance(shape, list)]
    named = {
        "placement_slot_shapes": [key for shape in shapes for key in shape],
        "placement_cordoned_gpus": list(host.items("placement_cordoned_gpus")),
    }
    return Expectation(
        host=host.name,
        slot_host=host.text("placement_host_name"),
        head=head,
        slots=slots,
        cluster=host.text("berth_cluster_id"),
        state_dir=host.text("berth_state_dir"),
        run_dir=host.text("berth_run_dir"),
        cache_dir=host.text("ray_slot_cache_dir"),
        systemd=host.text("berth_service_manager") == "systemd",
        simulate=host.text("nvidia_driver_simulate").lower(),
        runtime=f"{host.text('ray_runtime_root')}/current",
        agent_python=host.text("berth_agent_base_python"),
        runtime_python=host.text("ray_runtime_base_python"),
        disk_mib=numbers.get("preflight_disk_mib", 0),
        inodes=numbers.get("preflight_inodes", 0),
        nofile=numbers.get("preflight_nofile", 0),
        clock_offset_s=numbers.get("preflight_clock_offset_s", 0),
        slot_memory_mib=numbers.get("ray_slot_memory_mib", 0),
        slot_object_store_mib=numbers.get("ray_slot_object_store_mib", 0),
        head_memory_mib=numbers.get("ray_head_memory_mib", 0) if head else 0,
        shapes=tuple(len(shape) for shape in shapes if shape),
        named_gpus={
            name: tuple(str(key) for key in keys if str(key).startswith("GPU-")) for name, keys in named.items()
        },
        ports={name: port for name, port in single_ports(numbers, head=head, slots=slots).items() if port in TCP},
    )


def _addresses(inventory: Inventory, host: InventoryHost) -> tuple[str, ...]:
    groups = [group for group in ("ray_head", "ray_slots") if host.name in inventory.groups.get(group, ())]
    return _unique(*(node_address(host, group) for group in groups))


def _peers(inventory: Inventory, host: InventoryHost) -> tuple[Peer, ...]:
    """Every other host at its node address: by SSH's port, a worker's, and the head's GCS, which every node needs."""
    found = []
    for other in inventory.hosts:
        if other.name == host.name:
            continue
        head = other.name in inventory.groups.get("ray_head", ())
        ports = {other.number("ansible_port") or SSH_PORT, REPLY_PORT, (other.number(HEAD[0]) or 0) if head else 0}
        for address in _addresses(inventory, other):
            found.append(Peer(other.name, address, tuple(sorted(port for port in ports if port in TCP))))
    return tuple(found)


def _unique(*items: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for item in items if item))
