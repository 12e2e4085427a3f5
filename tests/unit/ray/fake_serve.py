"""Serve's controller in small: what a PUT starts, stops and restarts, and how long it takes. Time is in ticks.

Semantics of Ray 2.60 (serve/_private/application_state.py, version.py): a PUT sets every app it names to DEPLOYING
until the controller's next turn; absent apps are DELETING, without config, until their replicas have drained; a
change of args, environment or actor options restarts an app's replicas; a change of count keeps those that stay.
Berths are restarted all at once here, which is the worst that Serve may do to few replicas; pools by its rolling
update: a fifth of them at a time, at least one, each stopped before the one in its place starts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from berth.ray.rollout import Live
from berth.ray.serve_config import GATEWAY

DRAIN = 3
START = 2


@dataclass
class App:
    config: dict[str, Any] | None
    status: str = "DEPLOYING"
    message: str = ""
    running: int = 0
    starting: list[int] = field(default_factory=list)
    drained: list[list[int]] = field(default_factory=list)
    """[ticks left, MiB] of each replica that is on its way out; they hold their memory until then."""
    replaced: list[list[int]] = field(default_factory=list)
    """The same for replicas whose successors wait for them (a restart stops the old one first)."""
    slots: tuple[str, ...] = ()
    old: int = 0
    """Running replicas of a pool that still have an earlier config."""
    claims: list[dict[str, int]] = field(default_factory=list)
    """MiB that a pool may hold on each slot, by its config and by those before it that replicas still have."""

    @property
    def deleting(self) -> bool:
        return self.status == "DELETING"

    @property
    def count(self) -> int:
        return count_of(self.config["deployments"][0]) if self.config else 0

    @property
    def size(self) -> int:
        actor = self.config["deployments"][0].get("ray_actor_options", {}) if self.config else {}
        return int(actor.get("resources", {}).get("VRAM_MB", 0))

    def promised(self, slot: str) -> int:
        if self.claims:
            return max(claim.get(slot, 0) for claim in self.claims)
        if slot not in self.slots:
            return 0
        old = sum(size for _, size in self.replaced)
        return max(self.count * self.size, old) + sum(size for _, size in self.drained)


@dataclass
class FakeServe:
    capacity: Mapping[str, int]
    apps: dict[str, App] = field(default_factory=dict)
    failing: dict[str, str] = field(default_factory=dict)
    restarts: list[str] = field(default_factory=list)
    puts: int = 0
    applied: dict[str, list[str]] = field(default_factory=dict)
    """The table that the gateway's replicas have taken."""

    def put(self, configs: Iterable[Mapping[str, Any]]) -> None:
        self.puts += 1
        wanted = {str(config.get("name", "default")): copy.deepcopy(dict(config)) for config in configs}
        self._check_removals(wanted)
        for name, config in wanted.items():
            if name in self.apps and not self.apps[name].deleting:
                self._redeploy(name, self.apps[name], config)
            else:
                assert name not in self.apps, f"{name} is made anew while it still drains"
                self.apps[name] = App(config, starting=[START] * self._count(config))
                self._claim(self.apps[name])
        for name, app in self.apps.items():
            if name not in wanted and app.config is not None:
                app.status, app.drained = "DELETING", [*app.drained, *app.replaced, *self._out(app, self._holding(app))]
                app.config, app.running, app.starting, app.replaced, app.old = None, 0, [], [], 0
        self._check_table()
        self.check_vram()

    def tick(self) -> None:
        for name, app in list(self.apps.items()):
            app.drained = [[left - 1, size] for left, size in app.drained if left > 1]
            app.replaced = [[left - 1, size] for left, size in app.replaced if left > 1]
            if app.deleting:
                if not app.drained:
                    del self.apps[name]
            elif app.config is not None:
                self._advance(name, app)
        self.check_vram()

    def lives(self) -> dict[str, Live]:
        return {
            name: Live(
                name=name,
                status=app.status,
                message=app.message,
                running=app.running,
                stopping=0 if app.deleting else len(app.drained) + len(app.replaced),
                config=app.config,
                route=(app.config or {}).get("route_prefix"),
                slots=app.slots,
            )
            for name, app in self.apps.items()
        }

    def table(self) -> dict[str, list[str]]:
        """The table in the gateway's config."""
        gateway = self.apps.get(GATEWAY)
        if gateway is None or gateway.config is None:
            return {}
        models = gateway.config["deployments"][0]["user_config"]["models"]
        return {model: [berth["app"] for berth in entry["berths"]] for model, entry in models.items()}

    def served(self) -> set[str]:
        """Models for which a request finds a running replica."""
        return {model for model, names in self.table().items() if any(self._runs(name) for name in names)}

    def check_vram(self) -> None:
        for slot, capacity in self.capacity.items():
            promised = sum(app.promised(slot) for app in self.apps.values())
            assert promised <= capacity, f"{slot}: {promised} MiB promised of {capacity}"

    def _runs(self, name: str) -> bool:
        """Somebody answers there: a replica, or Serve, which starts one when it is asked."""
        return name in self.apps and (self.apps[name].running > 0 or self._sleeps(self.apps[name]))

    def _sleeps(self, app: App) -> bool:
        return app.config is not None and "autoscaling_config" in app.config["deployments"][0] and app.count == 0

    def _count(self, config: Mapping[str, Any]) -> int:
        return count_of(config["deployments"][0]) if config.get("deployments") else 1

    def _holding(self, app: App) -> int:
        """Replicas that have memory: those that wait for their predecessors' have none yet."""
        return app.running + (0 if app.replaced else len(app.starting))

    def _out(self, app: App, count: int) -> list[list[int]]:
        return [[DRAIN, app.size] for _ in range(count)]

    def _redeploy(self, name: str, app: App, config: dict[str, Any]) -> None:
        before, held = app.config, app.running + len(app.starting)
        assert before is not None
        count = self._count(config)
        if _code(before) != _code(config) or (app.status == "DEPLOY_FAILED" and before != config):
            self.restarts.append(name)
            if app.claims:
                app.drained += self._out(app, max(0, app.running - count))
                app.running = app.old = min(app.running, count)
                app.starting = [START] * (count - app.running)
            else:
                assert _slots(before) == _slots(config), f"{name} leaves a slot, and nobody will know what it holds"
                app.replaced += self._out(app, self._holding(app))
                app.running, app.starting = 0, [START] * count
        elif count >= held:
            app.starting += [START] * (count - held)
        else:
            app.drained += self._out(app, self._holding(app) - count)
            app.starting = app.starting[: max(0, count - app.running)]
            app.running = min(app.running, count)
            app.old = min(app.old, app.running)
        app.config = config
        self._claim(app)
        self._roll(app)
        if app.status != "DEPLOY_FAILED":
            app.status = "DEPLOYING"

    def _advance(self, name: str, app: App) -> None:
        if name in self.failing and app.starting:
            app.status, app.message = "DEPLOY_FAILED", self.failing[name]
            return
        self._roll(app)
        waiting = [left - 1 for left in app.starting] if not app.replaced else app.starting
        app.running += sum(1 for left in waiting if left <= 0)
        app.starting = [left for left in waiting if left > 0]
        app.status = "DEPLOYING" if app.starting or app.old else "RUNNING"
        if not app.old and not app.drained and not app.replaced:
            app.claims = app.claims[-1:]
            app.slots = tuple(app.claims[0]) if app.claims else app.slots
        if name == GATEWAY and app.status == "RUNNING":
            self.applied = self.table()

    def _roll(self, app: App) -> None:
        if app.old and not app.starting and not app.replaced:
            out = min(app.old, max(1, app.count // 5))
            app.old, app.running = app.old - out, app.running - out
            app.replaced, app.starting = self._out(app, out), [START] * out

    def _claim(self, app: App) -> None:
        assert app.config is not None
        slots = _slots(app.config)
        if app.claims or str(app.config["name"]).endswith("@pool"):
            app.claims.append(claim(app.config))
            slots = tuple(sorted({slot for each in app.claims for slot in each}))
        app.slots = slots

    def _check_removals(self, wanted: Mapping[str, Any]) -> None:
        if GATEWAY not in self.apps or GATEWAY not in wanted:
            return
        for name in {name for table in (self.applied, self.table()) for names in table.values() for name in names}:
            if name in self.apps and self.apps[name].status != "DEPLOY_FAILED":
                assert name in wanted, f"{name} is removed while the gateway's table names it"

    def _check_table(self) -> None:
        for names in self.table().values():
            for name in names:
                assert self._runs(name), f"the table names {name}, which does not run"


def count_of(deployment: Mapping[str, Any]) -> int:
    """Replicas that Serve wants; nobody asks, so that where it scales they are the fewest."""
    scaling = deployment.get("autoscaling_config")
    return int(scaling["min_replicas"] if scaling else deployment.get("num_replicas", 1))


def claim(config: Mapping[str, Any]) -> dict[str, int]:
    """MiB on each slot that an app of one deployment may take."""
    deployment = config["deployments"][0]
    count = deployment.get("max_replicas_per_node") or count_of(deployment)
    return {slot: int(deployment["ray_actor_options"]["resources"]["VRAM_MB"] * count) for slot in _slots(config)}


def _slots(config: Mapping[str, Any]) -> tuple[str, ...]:
    actors = [item.get("ray_actor_options") or {} for item in config.get("deployments") or []]
    places = [str(actor.get("label_selector", {}).get("berth.slot", "")) for actor in actors]
    return tuple(slot for place in places for slot in place.removeprefix("in(").removesuffix(")").split(","))


def _code(config: Mapping[str, Any]) -> list[Any]:
    return [
        config.get("import_path"),
        config.get("args"),
        config.get("runtime_env"),
        [
            (item.get("ray_actor_options"), item.get("max_replicas_per_node"))
            for item in config.get("deployments") or []
        ],
    ]
