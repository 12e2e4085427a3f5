"""Serve's controller in small: what a PUT starts, stops and restarts, and how long it takes. Time is in ticks.

Semantics of Ray 2.60 (serve/_private/application_state.py, version.py): a PUT sets every app it names to DEPLOYING
until the controller's next turn; absent apps are DELETING, without config, until their replicas have drained; a
change of args, environment or actor options restarts an app's replicas; a change of count keeps those that stay.
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

    @property
    def deleting(self) -> bool:
        return self.status == "DELETING"

    @property
    def count(self) -> int:
        return int(self.config["deployments"][0]["num_replicas"]) if self.config else 0

    @property
    def size(self) -> int:
        actor = self.config["deployments"][0].get("ray_actor_options", {}) if self.config else {}
        return int(actor.get("resources", {}).get("VRAM_MB", 0))

    def promised(self) -> int:
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
                self.apps[name] = App(config, starting=[START] * self._count(config), slots=_slots(config))
        for name, app in self.apps.items():
            if name not in wanted and app.config is not None:
                app.status, app.drained = "DELETING", [*app.drained, *app.replaced, *self._out(app, self._holding(app))]
                app.config, app.running, app.starting, app.replaced = None, 0, [], []
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
            promised = sum(app.promised() for app in self.apps.values() if slot in app.slots)
            assert promised <= capacity, f"{slot}: {promised} MiB promised of {capacity}"

    def _runs(self, name: str) -> bool:
        return name in self.apps and self.apps[name].running > 0

    def _count(self, config: Mapping[str, Any]) -> int:
        return int(config["deployments"][0].get("num_replicas", 1)) if config.get("deployments") else 1

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
            assert _slots(before) == _slots(config), f"{name} leaves a slot, and nobody will know what it holds there"
            self.restarts.append(name)
            app.replaced += self._out(app, self._holding(app))
            app.running, app.starting = 0, [START] * count
        elif count >= held:
            app.starting += [START] * (count - held)
        else:
            app.drained += self._out(app, self._holding(app) - count)
            app.starting = app.starting[: max(0, count - app.running)]
            app.running = min(app.running, count)
        app.config = config
        if app.status != "DEPLOY_FAILED":
            app.status = "DEPLOYING"

    def _advance(self, name: str, app: App) -> None:
        if name in self.failing and app.starting:
            app.status, app.message = "DEPLOY_FAILED", self.failing[name]
            return
        waiting = [left - 1 for left in app.starting] if not app.replaced else app.starting
        app.running += sum(1 for left in waiting if left <= 0)
        app.starting = [left for left in waiting if left > 0]
        app.status = "DEPLOYING" if app.starting else "RUNNING"
        if name == GATEWAY and app.status == "RUNNING":
            self.applied = self.table()

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


def _slots(config: Mapping[str, Any]) -> tuple[str, ...]:
    actors = [item.get("ray_actor_options") or {} for item in config.get("deployments") or []]
    return tuple(actor.get("label_selector", {}).get("berth.slot", "") for actor in actors)


def _code(config: Mapping[str, Any]) -> list[Any]:
    return [
        config.get("import_path"),
        config.get("args"),
        config.get("runtime_env"),
        [item.get("ray_actor_options") for item in config.get("deployments") or []],
    ]
