"""One pass of the rollout against a live Serve: read, decide (berth.ray.rollout), act once, report."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from berth.errors import BerthError, CouldNotTell
from berth.plan.types import POOL, Plan
from berth.ray.client import RayClient, TokenRefused
from berth.ray.rollout import Live, Step, Wanted, next_step
from berth.ray.serve_config import fewest, most, needs, selected, slots_of
from berth.ray.state import parse_state
from berth.ray.types import RayState

MAX_STEPS = 1000
LOG_LINES = 30
GIST_LINES = 8
MAX_LOGS = 2
WATCH_S = 1.5
"""Between two looks at Serve, each of which costs the dashboard some 20 ms."""


@dataclass(frozen=True)
class Outcome:
    """What a pass found or did. ``changed``: Serve was given a new config; ``joining``: nodes of Ray are waited for."""

    kind: Literal["put", "wait", "done"]
    text: str
    changed: bool = False
    down: tuple[str, ...] = ()
    joining: bool = False


def lives(serve: Mapping[str, Any], slot_of: Mapping[str, str] | None = None) -> dict[str, Live]:
    """Serve's REST details -> what the rollout looks at. ``slot_of``: the slot of each Ray node, by its id."""
    found = {}
    for name, app in (serve.get("applications") or {}).items():
        deployments = list((app.get("deployments") or {}).values())
        replicas = [replica for item in deployments for replica in item.get("replicas") or []]
        messages = [str(app.get("message") or ""), *(str(item.get("message") or "") for item in deployments)]
        found[name] = Live(
            name=name,
            status=str(app.get("status")),
            message=gist("\n".join(dict.fromkeys(filter(None, messages)))),
            # A replica over several slots has a deployment on each, and runs when all of its parts do.
            running=min(
                (
                    sum(1 for replica in item.get("replicas") or [] if replica.get("state") == "RUNNING")
                    for item in deployments
                ),
                default=0,
            ),
            stopping=sum(1 for replica in replicas if replica.get("state") == "STOPPING"),
            config=app.get("deployed_app_config"),
            route=app.get("route_prefix"),
            slots=_slots(name, deployments, slot_of or {}),
        )
    return found


def _slots(name: str, deployments: Sequence[Mapping[str, Any]], slot_of: Mapping[str, str]) -> tuple[str, ...]:
    """Where an app of ours may hold memory: of a pool, where Serve may put replicas, and where they still are."""
    if name.rpartition("@")[2] != POOL:
        return slots_of(name, (str(item["name"]) for item in deployments))
    found = {slot for item in deployments for slot in selected(item.get("deployment_config") or {})}
    for item in deployments:
        for replica in item.get("replicas") or []:
            found |= {slot_of[replica["node_id"]]} if replica.get("node_id") in slot_of else set()
    return tuple(sorted(found))


def gist(message: str) -> str:
    """Serve's message without colours and without the frames of the trace: how it begins and how it ends.

    A failed constructor comes with the same trace two or three times over, a hundred lines that end in the one that
    tells.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.rstrip() for line in plain.splitlines() if line.strip()]
    if len(lines) <= GIST_LINES:
        return "\n".join(lines)
    last = max(
        (i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|OutOfMemory)\b", line)), default=-1
    )
    return "\n".join([*lines[:2], "...", *lines[last:][:GIST_LINES]])


def reconcile(client: RayClient, plan: Plan, wanted: Wanted, retry_failed: bool) -> Outcome:
    """Do the next step, or say what is waited for.

    Raises:
        BerthError: a wanted app failed (with the tail of its replica's log), or cannot be placed at all.
    """
    try:
        serve = client.serve()
        state = parse_state(client.nodes(), serve)
    except TokenRefused:
        raise
    except CouldNotTell:
        # A head that is coming up refuses connections first, then answers 5xx for a while.
        return Outcome("wait", f"Ray's head to answer at {client.address}", joining=True)
    if missing := missing_slots(plan, state, holding=True):
        return Outcome("wait", f"slots {', '.join(missing)} to join the Ray cluster", joining=True)
    check_feasible(plan, wanted, state)
    live = lives(serve, {node.node_id: node.slot for node in state.nodes if node.slot})
    try:
        step = next_step(live, wanted, retry_failed)
    except BerthError as error:
        raise BerthError(f"{error}{failure_logs(client, serve)}") from None
    if step.kind == "put":
        client.put_serve(_config(step, wanted))
    if step.kind == "done" and (missing := missing_slots(plan, state)):
        # They hold nothing yet, so the rollout did not wait for them; the verification that follows counts them.
        return Outcome("wait", f"slots {', '.join(missing)} to join the Ray cluster", joining=True)
    text = f"{step.why}{_progress(step, live)}"
    return Outcome(step.kind, text, changed=step.kind == "put", down=step.down)


def watch(
    client: RayClient,
    plan: Plan,
    wanted: Wanted,
    retry_failed: bool,
    known: str,
    watch_s: float,
    every_s: float = WATCH_S,
) -> Outcome:
    """``reconcile`` again and again while all there is to do is to wait as ``known`` says, for ``watch_s`` at most: a
    pass of its own costs the controller and the head over a CPU second each.

    Raises:
        BerthError: as ``reconcile``.
    """
    until = time.monotonic() + watch_s
    outcome = reconcile(client, plan, wanted, retry_failed)
    while (outcome.kind, outcome.text) == ("wait", known) and time.monotonic() < until:
        time.sleep(every_s)
        outcome = reconcile(client, plan, wanted, retry_failed=False)
    return outcome


def rehearse(serve: Mapping[str, Any], wanted: Wanted) -> list[Step]:
    """Every step a rollout would take from here, as if each app came up at once (check mode)."""
    live = lives(serve)
    steps: list[Step] = []
    for _ in range(MAX_STEPS):
        step = next_step(live, wanted, retry_failed=True)
        if step.kind == "done":
            return steps
        if step.kind == "put":
            steps.append(step)
            names = [str(app.get("name", "default")) for app in step.apps]
            live = {name: Live(name, "RUNNING", config=app) for name, app in zip(names, step.apps, strict=True)}
        live = _settled(live)
    raise BerthError("the rollout does not come to an end; please report the plan and Serve's state")


def missing_slots(plan: Plan, state: RayState, *, holding: bool = False) -> list[str]:
    """Slots of the plan that have no live Ray node; with ``holding`` only those that a berth stands on."""
    alive = {node.slot for node in state.nodes if node.alive}
    wanted = {berth.slot for berth in plan.berths} if holding else {slot.name for slot in plan.slots}
    return sorted(wanted - alive)


def check_feasible(plan: Plan, wanted: Wanted, state: RayState) -> None:
    """Refuse what Ray would let pend for ever without an error (ray #65166).

    Raises:
        BerthError: a slot's node has less VRAM_MB, GPU or CPU than the berths planned on it ask for.
    """
    nodes = {node.slot: node for node in state.nodes if node.alive and node.slot}
    asked: dict[str, dict[str, float]] = {}
    for app in wanted.berths.values():
        for slot, wants in needs(app).items():
            total = asked.setdefault(slot, {})
            for key, need in wants.items():
                total[key] = total.get(key, 0) + need
    for slot, total in sorted(asked.items()):
        for key, need in sorted(total.items()):
            has = nodes[slot].resources.get(key, 0.0)
            if need > has + 1e-6:
                raise BerthError(
                    f"slot {slot} cannot hold what the plan puts there: its Ray node has {has:g} {key}, "
                    f"{need:g} are asked for",
                    mend="set num_cpus of the apps lower or ray_slot_num_cpus higher"
                    if key == "CPU"
                    else "ansible-playbook site.yml --tags plan,ray,serve",
                )


def failure_logs(client: RayClient, serve: Mapping[str, Any]) -> str:
    """The tails of the logs of our replicas that do not run, a few of each app, for the error message."""
    ours = {name for name, app in lives(serve).items() if app.ours}
    parts = []
    for name, app in sorted((serve.get("applications") or {}).items()):
        if name not in ours or app.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY", "DEPLOYING"):
            continue
        for item in (app.get("deployments") or {}).values():
            replicas = [*(item.get("replicas") or []), *(item.get("recent_dead_replicas") or [])]
            told = [
                replica
                for replica in replicas
                if replica.get("state") != "RUNNING" and replica.get("node_id") and replica.get("log_file_path")
            ]
            for replica in told[:MAX_LOGS]:
                tail = client.log_tail(replica["node_id"], replica["log_file_path"], LOG_LINES).strip()
                if tail:
                    parts.append(f"\n--- {name} {replica.get('replica_id')}: {replica['log_file_path']}\n{tail}")
    return "".join(parts)


def stuck(client: RayClient) -> str:
    """Why a rollout that ran out of time is not through: every app that does not run, with message and log tail."""
    serve = client.serve()
    lines = [
        f"\n{name}: {app.status} {app.message.strip()}".rstrip()
        for name, app in sorted(lives(serve).items())
        if app.ours and app.status != "RUNNING"
    ]
    return "".join(lines) + failure_logs(client, serve)


def _config(step: Step, wanted: Wanted) -> dict[str, Any]:
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": wanted.options.host, "port": wanted.options.port},
        "applications": [dict(app) for app in step.apps],
    }


def _progress(step: Step, live: Mapping[str, Live]) -> str:
    if step.kind != "wait":
        return ""
    states = []
    for name in step.waiting:
        app = live[name]
        count = fewest(app.config) if app.config else 0
        states.append(f"{name} {app.status.lower()} {app.running}/{count}")
    return f" [{'; '.join(states)}]"


def _settled(live: Mapping[str, Live]) -> dict[str, Live]:
    return {
        name: replace(app, status="RUNNING", running=most(app.config) if app.ours else 1, stopping=0)
        for name, app in live.items()
        if app.status != "DELETING" and app.config is not None
    }
