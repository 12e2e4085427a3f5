"""From what Serve runs to what the plan wants, one safe step at a time: make, switch, break.

``next_step`` looks only at the present, so a rollout that was killed goes on where it stood. In every step a slot is
promised no more than it has, and a berth that stays is not touched. A berth whose process must be another (its
arguments or actor options change) counts as one that goes and comes: off the gateway's table first, and never all of
a model's berths at once where it has more than one. A pool that must be another is left to Serve's own rolling update
where that leaves replicas that answer: it stays on the table, because Serve takes each replica out before it stops it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from berth.errors import BerthError
from berth.ray.serve_config import (
    BUILD,
    BUILD_GATEWAY,
    GATEWAY,
    ServeOptions,
    at_least,
    fewest,
    gateway_app,
    gateway_table,
    is_pool,
    most,
    needs,
)

Config = Mapping[str, Any]
Change = Literal["same", "new", "adjust", "shrink", "restart"]
ROLLED_AT_ONCE = 0.2
"""The part of a deployment's replicas, at least one, that Serve restarts at once (Ray 2.60: the default of
``rolling_update_percentage``), each stopped before the one in its place starts (``max_surge_percent`` 0)."""


@dataclass(frozen=True)
class Live:
    """One app as Serve has it.

    ``config`` is None once Serve forgot it (an app that is being deleted) and for apps that were not deployed through
    REST, which a PUT leaves alone. ``stopping`` counts replicas that drain and still hold their memory; ``slots`` are
    those that it may hold memory on.
    """

    name: str
    status: str
    message: str = ""
    running: int = 0
    stopping: int = 0
    config: Config | None = None
    route: str | None = None
    slots: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Made by Berth: told by the import path, so that a foreign app of a like name is left alone."""
        if self.config is None:
            return self.status == "DELETING" and ("@" in self.name or self.name == GATEWAY)
        return self.config.get("import_path") in (BUILD, BUILD_GATEWAY)


@dataclass(frozen=True)
class Step:
    """``put``: set Serve's apps to ``apps``. ``wait``: for ``waiting``. ``done``: nothing left to do.

    ``down`` names the models that the gateway knows and that answer 503 until a later step is through.
    """

    kind: Literal["put", "wait", "done"]
    why: str
    apps: tuple[Config, ...] = ()
    waiting: tuple[str, ...] = ()
    down: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """The aim: berths by app name, the models served (with or without berths), each slot's VRAM in MiB, and the
    models whose prompts' beginnings count in the gateway (``AppSpec.prefix_affinity``), and the replicas of a model
    that no step may go below (``AppSpec.min_available``)."""

    berths: Mapping[str, Config]
    models: Sequence[str]
    capacity_mib: Mapping[str, int]
    options: ServeOptions
    prefix_affinity: Mapping[str, float] = field(default_factory=dict)
    min_available: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _Now:
    live: Mapping[str, Live]
    wanted: Wanted
    foreign: list[Live] = field(default_factory=list)
    ours: dict[str, Config] = field(default_factory=dict)
    gateway: Config | None = None
    leaving: list[str] = field(default_factory=list)
    """Apps that drain: their memory is not free yet, and how much it is Serve no longer says."""

    def __post_init__(self) -> None:
        for name, app in sorted(self.live.items()):
            if app.ours and (app.status == "DELETING" or app.stopping):
                self.leaving.append(name)
            if app.status == "DELETING":
                continue
            if app.config is None or not app.ours:
                self.foreign.append(app)
            elif name == GATEWAY:
                self.gateway = app.config
            else:
                self.ours[name] = app.config

    def full(self, name: str) -> bool:
        """Every replica that its config asks for runs. Serve's status is no help: each PUT sets all to DEPLOYING."""
        return name in self.ours and self.live[name].running >= fewest(self.ours[name])

    def ready(self, name: str) -> bool:
        return self.full(name) and self.live[name].status == "RUNNING"

    def change(self, name: str) -> Change:
        """What becomes of a wanted berth."""
        return _change(self.ours.get(name), self.wanted.berths[name])

    def rolled(self, name: str) -> Config | None:
        """A pool's new config, where Serve itself can restart its replicas under load; None for anything else.

        Serve stops no more of them than leave all but ``ROLLED_AT_ONCE`` of those that it wants, and starts what is
        missing first. So it is told for as long to want enough that, however few there are, some are left.
        """
        present, target = self.ours.get(name), self.wanted.berths.get(name)
        if present is None or target is None or not is_pool(target) or _change(present, target) != "restart":
            return None
        running, least = self.live[name].running, max(1, self.wanted.min_available.get(_model(target), 1))
        if not running:
            return None if fewest(present) else target
        want = next(count for count in itertools.count(1) if count - max(1, int(ROLLED_AT_ONCE * count)) >= least)
        return at_least(target, want) if running >= least and want <= most(target) else None

    def rolls(self, name: str) -> bool:
        """Whether this is a pool that Serve itself restarts, some replicas at a time, while enough others answer."""
        return self.rolled(name) is not None

    def at_work(self, name: str) -> bool:
        """A pool that Serve restarts already: it may never be through with what the plan no longer wants."""
        return self.live[name].status == "DEPLOYING" and self.rolls(name)

    def held_up(self, name: str) -> bool:
        """A pool that Serve was told to want more of while it restarts them, and does."""
        app = self.ours.get(name)
        if app is None or not is_pool(app) or self.live[name].status != "DEPLOYING" or self.change(name) == "restart":
            return False
        return fewest(app) > fewest(self.wanted.berths[name])

    def pending(self) -> list[str]:
        """Wanted berths that are not there yet, or not yet as they should be; shrinking comes last."""
        return [name for name in self.wanted.berths if self.change(name) not in ("same", "shrink")]

    def put(self, why: str, ours: Mapping[str, Config], gateway: Config | None) -> Step:
        foreign = [app.config for app in self.foreign if app.config is not None]
        apps = [*foreign, *(ours[name] for name in sorted(ours)), *([gateway] if gateway else [])]
        return Step("put", why, apps=tuple(apps), down=self._down(ours, gateway))

    def _down(self, ours: Mapping[str, Config], gateway: Config | None) -> tuple[str, ...]:
        """Planned models that the gateway knows and that no berth of its table answers once Serve has this config."""
        before, after = _models(self.gateway), _models(gateway)
        planned = {_model(app) for app in self.wanted.berths.values()}
        up = {model for model, names in after.items() if any(self._answers(name, ours) for name in names)}
        return tuple(sorted((planned & (before.keys() | after.keys())) - up)) if self.gateway else ()

    def _answers(self, name: str, ours: Mapping[str, Config]) -> bool:
        stays = name in self.ours and name in ours
        stays = stays and (_change(self.ours[name], ours[name]) != "restart" or self.rolls(name))
        # One that sleeps answers, once it is awake.
        return stays and (self.live[name].running > 0 or not fewest(self.ours[name]))


def next_step(live: Mapping[str, Live], wanted: Wanted, retry_failed: bool = False) -> Step:
    """The next thing to do, or what to wait for.

    ``retry_failed``: take away apps that failed in an earlier run, so that they are made anew; without it a failed
    app ends the rollout.

    Raises:
        BerthError: an app that is wanted failed to deploy, a foreign app has a name or the route we need, or the
            plan promises more than a slot has.
    """
    now = _Now(live, wanted)
    _refuse_foreign_clash(now)
    if failed := _failed(now):
        if not retry_failed:
            raise BerthError("; ".join(f"{name} failed to deploy: {live[name].message.strip()}" for name in failed))
        return _clear(now, failed)
    make = {
        name: now.rolled(name) or app
        for name, app in _fitting(now).items()
        if (not now.full(name) or now.change(name) != "restart" or now.at_work(name)) and not now.held_up(name)
    }
    gateway = now.gateway
    if gateway is None and wanted.models and GATEWAY not in now.leaving:
        gateway = gateway_app(_table(now), wanted.options)
    if make or gateway is not now.gateway:
        return now.put(f"make {', '.join(sorted(make) or [GATEWAY])}", {**now.ours, **make}, gateway)
    # A berth that still has to change is waited for only while Serve is at work on it: the change may be its cure.
    pending = now.pending()
    waiting = tuple(
        name
        for name in sorted(now.ours)
        if name in wanted.berths and not now.ready(name) and (name not in pending or live[name].status == "DEPLOYING")
    )
    if waiting:
        return Step("wait", f"{', '.join(waiting)} to run", waiting=waiting)
    return _switch_or_break(now)


def _switch_or_break(now: _Now) -> Step:
    if now.gateway is not None and not now.wanted.models:
        return now.put("remove the gateway", now.ours, None)
    changes = _changes(now)
    if now.gateway is not None:
        going = {
            name
            for name, target in changes.items()
            if not target or (_change(now.ours[name], target) == "restart" and not now.rolls(name))
        }
        gateway = gateway_app(_table(now, going), now.wanted.options)
        if _change(now.gateway, gateway) != "same":
            return now.put("switch the gateway's table", now.ours, gateway)
        if now.live[GATEWAY].status != "RUNNING":
            return Step("wait", f"{GATEWAY} to run", waiting=(GATEWAY,))
    if changes:
        ours = {name: app for name, app in {**now.ours, **changes}.items() if app is not None}
        return now.put(_words(now, changes), ours, now.gateway)
    if now.leaving:
        return Step("wait", f"{', '.join(now.leaving)} to drain and stop", waiting=tuple(now.leaving))
    if pending := now.pending():
        _refuse_to_go_below(now)
        raise BerthError(
            f"no room for {', '.join(sorted(pending))} and nothing left to remove: "
            "the plan promises more than its slots have",
            mend="ansible-playbook site.yml --tags plan",
        )
    return Step("done", "as planned")


def _fitting(now: _Now) -> dict[str, Config]:
    """Pending berths that fit beside everything that is there now, new ones first.

    A slot counts as full while anything drains there, and for others while Serve is at work on a pool there: how much
    its replicas of before still hold is in no config any more. Room that a restart will free counts once it is free.
    """
    capacity = now.wanted.capacity_mib
    used: dict[str, int] = dict.fromkeys(capacity, 0)
    for app in now.ours.values():
        for slot, mib in _vram(app).items():
            used[slot] = used.get(slot, 0) + mib
    for name in now.leaving:
        for slot in now.live[name].slots or (name.rpartition("@")[2],):
            used[slot] = used.get(slot, 0) + capacity.get(slot, 0)
    for name, app in now.ours.items():
        for slot in set(now.live[name].slots) - _vram(app).keys() if is_pool(app) else ():
            used[slot] = used.get(slot, 0) + capacity.get(slot, 0)
    fitting = {}
    berths, rolling = now.wanted.berths, _rolling(now)
    order = {name: (now.change(name) == "restart", -sum(_vram(berths[name]).values()), name) for name in now.pending()}
    for name in sorted(order, key=lambda name: order[name]):
        app, present = berths[name], now.ours.get(name)
        held = _vram(present) if present else {}
        extra = {slot: mib - held.get(slot, 0) for slot, mib in _vram(app).items()}
        if name in now.leaving or any(extra.keys() & slots for other, slots in rolling.items() if other != name):
            continue
        if all(used.get(slot, 0) + mib <= capacity.get(slot, 0) for slot, mib in extra.items()):
            fitting[name] = app
            for slot, mib in extra.items():
                used[slot] = used.get(slot, 0) + max(0, mib)
    return fitting


def _rolling(now: _Now) -> dict[str, set[str]]:
    """The pools that Serve is at work on, with their slots."""
    return {
        name: set(_vram(app))
        for name, app in now.ours.items()
        if is_pool(app) and now.live[name].status == "DEPLOYING" and now.live[name].running
    }


def _changes(now: _Now) -> dict[str, Config | None]:
    """What may go next: berths to remove (None), to shrink or to restart (their new config).

    First what costs no model its last berth. Then, when nothing drains that could make room instead, what stands in
    the way of berths that wait for room, and restarts of single berths; at last pools that stand in each other's way.
    """
    berths, pending, restarts = now.wanted.berths, now.pending(), _fitting(now)
    unfinished = {_model(berths[name]) for name in pending}
    blocked = {slot for name in pending if name not in restarts for slot in _vram(berths[name])}
    ends = [name for name in now.ours if name not in berths or now.change(name) == "shrink"]
    finished = [name for name in ends if _model(now.ours[name]) not in unfinished]
    in_the_way = [name for name in ends if blocked & _vram(now.ours[name]).keys()]
    choices = [[*finished, *_some(now, restarts)]]
    if not now.leaving:
        moves = [name for name in pending if name not in restarts and _leaves(now, name, blocked)]
        free, first = (
            [name for name in names if _model(now.ours[name]) not in now.wanted.min_available]
            for names in ((*in_the_way, *restarts), moves)
        )
        choices += [_some(now, in_the_way), free, first[:1]]
    found = next(filter(None, choices), [])
    return {name: _in_place(now, name) if name in restarts or name in ends else None for name in found}


def _leaves(now: _Now, name: str, slots: Iterable[str]) -> bool:
    """Whether it holds more now on one of ``slots`` than it will."""
    if name not in now.ours:
        return False
    held, target = _vram(now.ours[name]), _vram(now.wanted.berths[name])
    return any(held.get(slot, 0) > target.get(slot, 0) for slot in slots)


def _in_place(now: _Now, name: str) -> Config | None:
    """Its new config; None when it has to go first: what a part of it holds on a slot that it leaves is Serve's to tell
    only while the app is being deleted, but for pools."""
    target = now.wanted.berths.get(name)
    if target is None or _vram(target).keys() == _vram(now.ours[name]).keys():
        return target and (now.rolled(name) or target)
    return now.rolled(name)


def _some(now: _Now, names: Iterable[str]) -> list[str]:
    """Of each model at most half of the berths that are ready, so that one is left, or as many as leave its
    ``min_available`` replicas; all that are not ready, and pools that Serve can restart under load."""
    chosen, taken = [], Counter[str]()
    for name in sorted(names):
        model = _model(now.ours[name])
        if not now.ready(name) or now.rolls(name):
            chosen.append(name)
            continue
        ready = [other for other, app in now.ours.items() if _model(app) == model and now.ready(other)]
        least = now.wanted.min_available.get(model)
        spare = len(ready) // 2 if least is None else sum(now.live[other].running for other in ready) - least
        cost = 1 if least is None else now.live[name].running
        if taken[model] + cost <= spare:
            chosen.append(name)
            taken[model] += cost
    return chosen


def _refuse_to_go_below(now: _Now) -> None:
    """
    Raises:
        BerthError: what is left to change are berths of a model that has to keep more replicas up than the rest has.
    """
    stuck = {name for name in now.ours if name not in now.wanted.berths or now.change(name) != "same"}
    models = {_model(now.ours[name]) for name in stuck} & now.wanted.min_available.keys()
    for model in sorted(models):
        ready = {name: now.live[name].running for name in sorted(now.ours) if _model(now.ours[name]) == model}
        raise BerthError(
            f"{model} cannot change: whichever of its berths goes, fewer than min_available replicas stay up",
            found=", ".join(f"{count} on {name}" for name, count in ready.items()),
            allowed=f"{now.wanted.min_available[model]} up at any time",
            mend=f"lower min_available of {model} in serve_apps_list, or give it a replica on another slot (spread)",
        )


def _table(now: _Now, going: set[str] | None = None) -> dict[str, Any]:
    """The berths the gateway may use: those that run and stay; a model that would be left with none keeps its old
    ones while they are not about to go."""
    going = going or set()
    usable = [name for name in now.ours if now.ready(name) and name not in going]
    staying = [now.wanted.berths[name] for name in usable if name in now.wanted.berths]
    served = {_model(app) for app in staying}
    fallback = [now.ours[name] for name in usable if _model(now.ours[name]) not in served]
    return gateway_table(now.wanted.models, [*staying, *fallback], now.wanted.prefix_affinity)


def _failed(now: _Now) -> list[str]:
    names = [name for name in now.ours if name in now.wanted.berths] + ([GATEWAY] if now.gateway else [])
    return sorted(name for name in names if now.live[name].status == "DEPLOY_FAILED")


def _clear(now: _Now, failed: Sequence[str]) -> Step:
    keep = {name: app for name, app in now.ours.items() if name not in failed}
    gateway = None
    if now.gateway is not None and GATEWAY not in failed:
        left = {model: [name for name in names if name in keep] for model, names in _models(now.gateway).items()}
        berths = [keep[name] for names in left.values() for name in names]
        asked_for = left.keys() - {_model(now.ours[name]) for name in failed if "prefill_of" in now.ours[name]["args"]}
        gateway = gateway_app(gateway_table(asked_for, berths, now.wanted.prefix_affinity), now.wanted.options)
    return now.put(f"clear what failed before: {', '.join(failed)}", keep, gateway)


def _refuse_foreign_clash(now: _Now) -> None:
    for app in now.foreign:
        if app.name in now.wanted.berths or (app.name == GATEWAY and now.wanted.models):
            raise BerthError(
                f"a Serve app named {app.name} is there and is not Berth's",
                mend="rename the model or remove that app",
            )
        # Serve leaves out of a config what its author left out; its default route is /.
        route = app.route if app.config is None else app.config.get("route_prefix", "/")
        if now.wanted.models and route == now.wanted.options.route_prefix:
            raise BerthError(
                f"the Serve app {app.name} has the gateway's route {route}",
                mend="give that app another route_prefix, or set serve_apps_route_prefix",
            )


def _words(now: _Now, changes: Mapping[str, Config | None]) -> str:
    restarts = [name for name, target in changes.items() if target and _change(now.ours[name], target) == "restart"]
    rolls = [name for name in restarts if now.rolls(name)]
    breaks = [name for name in changes if name not in restarts]
    parts = [("break", breaks), ("restart", [name for name in restarts if name not in rolls]), ("roll", rolls)]
    return "; ".join(f"{verb} {', '.join(sorted(names))}" for verb, names in parts if names)


def _change(present: Config | None, target: Config) -> Change:
    """From Serve's config of an app to ours: ``adjust`` and ``shrink`` touch no replica that stays."""
    if present is None:
        return "new"
    found, wanted = _essence(present), _essence(target)
    if found == wanted:
        return "same"
    if any(found[key] != wanted[key] for key in ("name", "import_path", "args", "env", "actor", "per_node")):
        return "restart"
    return "shrink" if most(present) > most(target) else "adjust"


def _essence(app: Config) -> dict[str, Any]:
    """The parts of an app's config that Berth decides; Serve adds defaults of its own around them."""
    deployment = app["deployments"][0]
    return {
        "import_path": app.get("import_path"),
        "route_prefix": app.get("route_prefix"),
        "args": app.get("args") or {},
        "env": (app.get("runtime_env") or {}).get("env_vars") or {},
        "actor": [
            {key: actor.get(key) for key in ("num_cpus", "num_gpus", "resources", "label_selector")}
            for item in app["deployments"]
            for actor in [item.get("ray_actor_options") or {}]
        ],
        "per_node": deployment.get("max_replicas_per_node"),
        **{
            key: deployment.get(key)
            for key in (
                *("name", "num_replicas", "autoscaling_config", "max_ongoing_requests", "max_queued_requests"),
                *("graceful_shutdown_timeout_s", "user_config"),
            )
        },
    }


def _models(gateway: Config | None) -> dict[str, list[str]]:
    """The gateway's table: the berths of each model, by name."""
    config = (gateway["deployments"][0].get("user_config") or {}) if gateway else {}
    return {model: [berth["app"] for berth in entry["berths"]] for model, entry in config.get("models", {}).items()}


def _model(app: Config) -> str:
    return str(app["args"]["model"])


def _vram(app: Config) -> dict[str, int]:
    """MiB that it may take on each slot."""
    return {slot: int(asked["VRAM_MB"]) for slot, asked in needs(app).items()}
