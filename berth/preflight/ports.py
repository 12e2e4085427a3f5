"""Which ports the nodes of a host will listen on, and whether they can be apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from berth.preflight.problem import Problem

PORTS = range(1024, 65536)
"""Below it, only root may listen, and the units run as another user."""

WORKER_PORTS = range(10002, 20000)
"""Ray gives these to workers on every node (--min-worker-port and --max-worker-port of ray start, Ray 2.60) and refuses
to start when one of its own components is told to use one."""

SLOTS_ROOM = 16
"""Slots of a host that must find a port after each base: more than a machine has GPUs, as lost ones keep theirs."""

HEAD = (
    "ray_head_gcs_port",
    "ray_head_dashboard_port",
    "ray_head_client_port",
    "ray_head_dashboard_agent_port",
    "ray_head_metrics_port",
)
EVERYWHERE = ("serve_apps_http_port",)
"""Serve's proxy listens on every node."""
SLOT_BASES = ("ray_slot_dashboard_agent_port_base", "ray_slot_metrics_port_base")


@dataclass(frozen=True)
class Claim:
    """A variable and the ports that follow from it."""

    variable: str
    ports: range

    def __str__(self) -> str:
        last = self.ports[-1]
        return f"{self.variable}={self.ports[0]}" + (f" (to {last})" if last != self.ports[0] else "")


def claims(values: Mapping[str, int], *, head: bool, slots: bool, room: int = SLOTS_ROOM) -> tuple[Claim, ...]:
    """What the nodes of a host listen on; ``values`` are the port variables, ``room`` slots are provided for."""
    single = [*(HEAD if head else ()), *(EVERYWHERE if head or slots else ())]
    found = [Claim(name, range(values[name], values[name] + 1)) for name in single if name in values]
    bases = [name for name in SLOT_BASES if slots and name in values]
    return (*found, *(Claim(name, range(values[name], values[name] + room)) for name in bases))


def single_ports(values: Mapping[str, int], *, head: bool, slots: bool) -> dict[str, int]:
    """Every single port to look at on a host, by the name that an error gives it, as the roles' own check does."""
    found: dict[str, int] = {}
    for claim in claims(values, head=head, slots=slots):
        if len(claim.ports) == 1:
            found[claim.variable] = claim.ports[0]
        else:
            found |= {f"{claim.variable} + {number}": port for number, port in enumerate(claim.ports)}
    return found


def port_problems(host: str, values: Mapping[str, int], *, head: bool, slots: bool) -> Iterator[Problem]:
    """Ports out of range, in the range of Ray's workers, or claimed twice."""
    found = claims(values, head=head, slots=slots)
    for claim in found:
        if claim.ports[0] not in PORTS or claim.ports[-1] not in PORTS:
            yield Problem(
                "port",
                "error",
                (host,),
                f"{claim.variable} is no port that can be used",
                str(claim),
                f"{PORTS[0]}-{PORTS[-1]}" + (f", with room for {SLOTS_ROOM} slots" if len(claim.ports) > 1 else ""),
                f"set {claim.variable} to a free port",
            )
        elif overlap(claim.ports, WORKER_PORTS):
            yield Problem(
                "port",
                "error",
                (host,),
                f"{claim.variable} is in the range that Ray gives to workers",
                str(claim),
                f"outside {WORKER_PORTS[0]}-{WORKER_PORTS[-1]}",
                f"set {claim.variable} outside that range",
            )
    for number, first in enumerate(found):
        for second in found[number + 1 :]:
            if overlap(first.ports, second.ports):
                yield Problem(
                    "port",
                    "error",
                    (host,),
                    f"{first.variable} and {second.variable} claim the same port",
                    f"{first}, {second}",
                    "ports of their own",
                    "set them apart",
                )


def overlap(left: range, right: range) -> bool:
    """Whether two ranges (of step 1, not empty) have a port in common."""
    return left[0] <= right[-1] and right[0] <= left[-1]
