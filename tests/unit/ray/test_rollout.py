"""Make, switch, break: whatever is there and whatever is wanted, at every tick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.ray.rollout import Live, Step, Wanted, next_step
from berth.ray.serve_config import GATEWAY, ServeOptions
from tests.unit.ray.builders import app, pool, team_app, wanted
from tests.unit.ray.fake_serve import App, FakeServe, claim, count_of

TICKS = 600
FOREIGN = {"name": "notes", "route_prefix": "/notes", "import_path": "notes:app", "runtime_env": {"env_vars": {}}}
SLOTS = ("gpu01-0", "gpu01-1", "gpu02-0", "gpu02-1")
CAPACITY = dict.fromkeys(SLOTS, 8_000)


def config_of(serve: FakeServe) -> dict[str, Any]:
    return {name: item.config for name, item in serve.apps.items() if "@" in name}


def drive(serve: FakeServe, aim: Wanted, *, retry_failed: bool = False, stop_after: int | None = None) -> list[Step]:
    """Pass after pass until done, checking what each step says about who is down."""
    steps: list[Step] = []
    for tick in range(TICKS):
        if stop_after is not None and tick >= stop_after:
            return steps
        before = serve.table()
        had_gateway = GATEWAY in serve.apps and not serve.apps[GATEWAY].deleting
        step = next_step(serve.lives(), aim, retry_failed and not steps)
        if step.kind == "done":
            assert step.apps == ()
            return steps
        if step.kind == "put":
            steps.append(step)
            serve.put(step.apps)
            known = (before.keys() | serve.table().keys()) & {str(a["args"]["model"]) for a in aim.berths.values()}
            assert set(step.down) == (known - serve.served() if had_gateway else set()), step.why
        serve.tick()
    raise AssertionError(f"not done after {TICKS} ticks: {[step.why for step in steps]} then {step}")


def running(apps: Sequence[Mapping[str, Any]], capacity: Mapping[str, int] = CAPACITY) -> FakeServe:
    """A Serve that runs these berths, their gateway and a foreign app."""
    serve = FakeServe(capacity)
    serve.put([FOREIGN])
    serve.tick()
    drive(serve, wanted(apps, capacity))
    serve.restarts.clear()
    return serve


def assert_is(serve: FakeServe, aim: Wanted) -> None:
    berths = {name: item for name, item in serve.apps.items() if name not in (GATEWAY, "notes")}
    assert {name: item.config for name, item in berths.items()} == dict(aim.berths)
    assert all(item.status == "RUNNING" and item.running == item.count for item in berths.values())
    table: dict[str, list[str]] = {model: [] for model in aim.models}
    for name in sorted(aim.berths):
        table[aim.berths[name]["args"]["model"]].append(name)
    assert serve.table() == serve.applied == table
    assert serve.apps["notes"].config == FOREIGN
    assert serve.apps["notes"].running == 1


# ---- whatever is there, whatever is wanted -------------------------------------------------------------------

Place = tuple[str, str | frozenset[str], int, int, int]
PLACES = st.tuples(
    st.sampled_from("abcd"),
    # A berth on a slot, or a pool over some.
    st.one_of(st.sampled_from(SLOTS), st.frozensets(st.sampled_from(SLOTS), min_size=1)),
    st.integers(1, 2),
    st.sampled_from([1_000, 2_000, 3_000, 4_000, 8_000]),
    st.integers(0, 1),
)


def fit(places: Sequence[Place]) -> list[dict[str, Any]]:
    """As many of these as the slots hold; a model has a pool or berths."""
    left, found = dict(CAPACITY), dict[str, dict[str, Any]]()
    pools = dict[str, bool]()
    for model, place, count, vram, version in places:
        made = (
            app(model, place, count, vram, version)
            if isinstance(place, str)
            else pool_of(model, place, count, vram, version)
        )
        asked = claim(made)
        is_pool = not isinstance(place, str)
        if pools.get(model, is_pool) != is_pool or made["name"] in found:
            continue
        if all(mib <= left[slot] for slot, mib in asked.items()):
            pools[model] = is_pool
            found[made["name"]] = made
            for slot, mib in asked.items():
                left[slot] -= mib
    return list(found.values())


def pool_of(model: str, slots: frozenset[str], each: int, vram: int, version: int) -> dict[str, Any]:
    """A pool with room for one more replica than it has, unless that is its only one; every second one scales."""
    room = each * len(slots)
    most = room if room > 1 and len(slots) % 2 else 0
    count = 1 if most else max(1, room - 1)
    return pool(model, *sorted(slots), count=count, each=each, vram=vram, version=version, most=most)


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What runs, and what shall: parts of what runs, mixed with new places."""
    before = draw(st.lists(PLACES, max_size=8))
    fresh = draw(st.lists(PLACES, max_size=8))
    kept = [place for place in before if draw(st.booleans())]
    after = draw(st.permutations([*kept, *fresh]))
    return fit(before), fit(after)


def never_down(before: Mapping[str, Any], aim: Wanted) -> set[str]:
    """Models that run now and whose change fits beside all that is there: each of their slots could hold, on top of
    what it holds, everything that is to come to it; and where a berth restarts, there is another."""
    models = set()
    for model in {item["args"]["model"] for item in aim.berths.values()}:
        own = {name: item for name, item in aim.berths.items() if item["args"]["model"] == model}
        present = {name for name, item in before.items() if item["args"]["model"] == model}
        restarts = {
            name
            for name in own
            if name in present and code(before[name]) != code(own[name]) and not survives(before[name], own[name])
        }
        fits = all(fits_beside(place, before, aim) for item in own.values() for place in claim(item))
        if present and fits and (not restarts or len(present | own.keys()) > 1):
            models.add(model)
    return models


def survives(*configs: Mapping[str, Any]) -> bool:
    """A pool that Serve restarts some replicas at a time, which leaves some."""
    return all(item["name"].endswith("@pool") for item in configs) and max_of(configs[-1]) > 1


def max_of(item: Mapping[str, Any]) -> int:
    deployment = item["deployments"][0]
    return int(deployment.get("num_replicas") or deployment["autoscaling_config"]["max_replicas"])


def fits_beside(place: str, before: Mapping[str, Any], aim: Wanted) -> bool:
    used = sum(claim(item).get(place, 0) for item in before.values())
    for name, item in aim.berths.items():
        used += max(0, claim(item).get(place, 0) - (claim(before[name]).get(place, 0) if name in before else 0))
    return used <= aim.capacity_mib[place]


def code(item: Mapping[str, Any]) -> Any:
    deployment = item["deployments"][0]
    return item["args"], deployment["ray_actor_options"], deployment.get("max_replicas_per_node")


class Watched(FakeServe):
    """Remembers, at every tick, who was served and how many replicas ran."""

    def watch(self, models: set[str], untouched: Mapping[str, int]) -> None:
        self.models, self.untouched = models, untouched

    def tick(self) -> None:
        super().tick()
        if hasattr(self, "models"):
            assert self.models <= self.served(), f"down: {self.models - self.served()}"
            for name, count in self.untouched.items():
                assert self.apps[name].running >= count, f"{name} lost a replica"


@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes())
def test_every_rollout_ends_at_the_plan_and_touches_only_what_it_names(
    pair: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    before, after = pair
    serve = running(before)
    serve.__class__ = Watched
    start, aim = config_of(serve), wanted(after, CAPACITY)
    stays = {name: item for name, item in start.items() if name in aim.berths and code(item) == code(aim.berths[name])}
    counts = {
        name: min(count_of(item["deployments"][0]), count_of(aim.berths[name]["deployments"][0]))
        for name, item in stays.items()
    }
    serve.watch(never_down(start, aim), counts)  # type: ignore[attr-defined]
    drive(serve, aim)
    if aim.models:
        assert_is(serve, aim)
    assert not set(serve.restarts) & {*stays, GATEWAY, "notes"}
    assert serve.puts <= 10 + 6 * (len(start) + len(aim.berths))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes(), st.integers(0, 40), st.lists(PLACES, max_size=6))
def test_a_rollout_killed_at_any_tick_goes_on_to_any_plan(
    pair: tuple[list[dict[str, Any]], list[dict[str, Any]]], tick: int, other: list[Place]
) -> None:
    before, after = pair
    serve = running(before)
    drive(serve, wanted(after, CAPACITY), stop_after=tick)
    drive(serve, wanted(fit(other), CAPACITY, models="abcd"), stop_after=tick // 2)
    aim = wanted(after, CAPACITY, models="abcd")
    drive(serve, aim)
    assert_is(serve, aim)
    assert next_step(serve.lives(), aim) == Step("done", "as planned")


# ---- cases that people meet ----------------------------------------------------------------------------------


def why(steps: Sequence[Step]) -> list[str]:
    return [step.why for step in steps]


def test_the_first_rollout_makes_everything_then_shows_it_to_the_gateway() -> None:
    aim = wanted([app("chat", "gpu01-0"), app("embedding", "gpu01-1")], CAPACITY)
    serve = FakeServe(CAPACITY)
    assert why(drive(serve, aim)) == ["make chat@gpu01-0, embedding@gpu01-1", "switch the gateway's table"]
    assert serve.table() == {"chat": ["chat@gpu01-0"], "embedding": ["embedding@gpu01-1"]}


def test_a_flip_from_pack_to_spread_with_room_takes_nobody_down() -> None:
    pack = [app("chat", "gpu01-0", 2), app("embedding", "gpu01-0", 2, 1_000), app("rerank", "gpu01-0", 1, 1_000)]
    spread = [
        app("chat", "gpu01-0"),
        app("chat", "gpu02-0"),
        app("embedding", "gpu01-1", 1, 1_000),
        app("embedding", "gpu02-1", 1, 1_000),
        app("rerank", "gpu01-1", 1, 1_000),
    ]
    serve = running(pack)
    steps = drive(serve, wanted(spread, CAPACITY))
    assert why(steps) == [
        "make chat@gpu02-0, embedding@gpu01-1, embedding@gpu02-1, rerank@gpu01-1",
        "switch the gateway's table",
        "break chat@gpu01-0, embedding@gpu01-0, rerank@gpu01-0",
    ]
    assert [step.down for step in steps] == [(), (), ()]
    assert serve.restarts == []
    assert serve.apps["chat@gpu01-0"].running == 1


def test_a_swap_on_full_gpus_says_who_is_down() -> None:
    capacity = {"gpu01-0": 8_000, "gpu01-1": 8_000}
    serve = running([app("chat", "gpu01-0", 1, 8_000), app("rerank", "gpu01-1", 1, 8_000)], capacity)
    aim = wanted([app("chat", "gpu01-1", 1, 8_000), app("rerank", "gpu01-0", 1, 8_000)], capacity)
    steps = drive(serve, aim)
    assert why(steps) == [
        "switch the gateway's table",
        "break chat@gpu01-0, rerank@gpu01-1",
        "make chat@gpu01-1, rerank@gpu01-0",
        "switch the gateway's table",
    ]
    assert [step.down for step in steps] == [("chat", "rerank")] * 3 + [()]
    assert_is(serve, aim)


def test_a_model_with_two_berths_in_the_way_gives_them_up_one_by_one() -> None:
    capacity = dict.fromkeys(SLOTS[:2], 8_000)
    serve = running([app("chat", "gpu01-0", 1, 5_000), app("chat", "gpu01-1", 1, 5_000)], capacity)
    aim = wanted(
        [
            app("chat", "gpu01-0", 1, 2_000),
            app("rerank", "gpu01-0", 1, 6_000),
            app("embedding", "gpu01-1", 1, 8_000),
        ],
        capacity,
    )
    assert all("chat" not in step.down for step in drive(serve, aim))
    assert_is(serve, aim)


def test_growing_keeps_what_runs() -> None:
    serve = running([app("chat", "gpu01-0", 1)])
    steps = drive(serve, wanted([app("chat", "gpu01-0", 3)], CAPACITY))
    assert why(steps) == ["make chat@gpu01-0", "switch the gateway's table"]
    assert serve.restarts == []
    assert serve.apps["chat@gpu01-0"].running == 3


def test_shrinking_waits_until_the_replica_has_gone() -> None:
    serve = running([app("chat", "gpu01-0", 3)])
    steps = drive(serve, wanted([app("chat", "gpu01-0", 1)], CAPACITY))
    assert why(steps) == ["switch the gateway's table", "break chat@gpu01-0"]
    assert serve.restarts == []
    assert serve.apps["chat@gpu01-0"].drained == []


def test_a_berth_resized_in_place_is_down_and_says_so() -> None:
    serve = running([app("chat", "gpu01-0", 1, 2_000)])
    aim = wanted([app("chat", "gpu01-0", 1, 4_000)], CAPACITY)
    steps = drive(serve, aim)
    assert why(steps) == ["switch the gateway's table", "restart chat@gpu01-0", "switch the gateway's table"]
    assert [step.down for step in steps] == [("chat",), ("chat",), ()]
    assert_is(serve, aim)


def test_new_arguments_restart_a_models_berths_one_half_after_the_other() -> None:
    serve = running([app("chat", name) for name in SLOTS])
    aim = wanted([app("chat", name, version=1) for name in SLOTS], CAPACITY)
    steps = drive(serve, aim)
    assert [step.why for step in steps if "restart" in step.why] == [
        "restart chat@gpu01-0, chat@gpu01-1",
        "restart chat@gpu02-0, chat@gpu02-1",
    ]
    assert all(step.down == () for step in steps)
    assert_is(serve, aim)


def lowest(serve: FakeServe, aim: Wanted, model: str) -> int:
    """The fewest replicas of ``model`` that the gateway could ask, over all ticks of the rollout."""
    seen: list[int] = []
    tick = serve.tick

    def watched() -> None:
        tick()
        names = serve.table().get(model, [])
        seen.append(sum(serve.apps[name].running for name in names if name in serve.apps))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "tick", watched)
        drive(serve, aim)
    return min(seen)


@pytest.mark.parametrize(("least", "up"), [(None, 2), (0, 0), (1, 1), (2, 2), (3, 3)])
def test_so_many_replicas_stay_up_in_every_step(least: int | None, up: int) -> None:
    serve = running([app("chat", name) for name in SLOTS])
    aim = wanted([app("chat", name, version=1) for name in SLOTS], CAPACITY)
    aim = replace(aim, min_available={} if least is None else {"chat": least})
    assert lowest(serve, aim, "chat") == up
    assert_is(serve, aim)


def test_a_change_that_cannot_keep_so_many_is_refused_and_nothing_goes() -> None:
    serve = running([app("chat", "gpu01-0", 2), app("chat", "gpu01-1", 1)])
    aim = wanted([app("chat", "gpu01-0", 2, version=1), app("chat", "gpu01-1", 1)], CAPACITY)
    with pytest.raises(BerthError, match=r"chat cannot change: .*found: 2 on chat@gpu01-0, 1 on chat@gpu01-1; .*2 up"):
        drive(serve, replace(aim, min_available={"chat": 2}))
    assert serve.restarts == []
    assert serve.served() == {"chat"}


def test_a_move_on_full_gpus_keeps_so_many_too() -> None:
    full = [app("chat", "gpu01-0", 1, 8_000), app("chat", "gpu01-1", 1, 8_000), app("code", "gpu02-0", 1, 8_000)]
    serve = running(full)
    swapped = [app("code", "gpu01-0", 1, 8_000), app("chat", "gpu01-1", 1, 8_000), app("chat", "gpu02-0", 1, 8_000)]
    aim = wanted(swapped, CAPACITY)
    assert lowest(serve, replace(aim, min_available={"chat": 1}), "chat") == 1
    assert_is(serve, aim)


def test_a_new_berth_is_made_before_the_only_one_restarts() -> None:
    serve = running([app("chat", "gpu01-0")])
    steps = drive(serve, wanted([app("chat", "gpu01-0", version=1), app("chat", "gpu02-0", version=1)], CAPACITY))
    assert why(steps)[0] == "make chat@gpu02-0"
    assert all(step.down == () for step in steps)


def test_an_old_berth_stands_in_while_the_new_one_restarts() -> None:
    serve = running([app("chat", "gpu01-0"), app("chat", "gpu01-1")])
    steps = drive(serve, wanted([app("chat", "gpu01-1", version=1)], CAPACITY))
    assert "restart chat@gpu01-1" in why(steps)
    assert why(steps)[-1] == "break chat@gpu01-0"
    assert all(step.down == () for step in steps)


def test_the_room_of_a_berth_that_is_resized_is_not_promised_before_it_is_free() -> None:
    capacity = {"gpu01-0": 8_000}
    serve = running([app("chat", "gpu01-0", 1, 8_000)], capacity)
    aim = wanted([app("chat", "gpu01-0", 1, 4_000), app("rerank", "gpu01-0", 1, 4_000)], capacity)
    steps = drive(serve, aim)
    assert [text for text in why(steps) if "switch" not in text] == ["restart chat@gpu01-0", "make rerank@gpu01-0"]
    assert_is(serve, aim)


def test_two_berths_of_a_slot_that_trade_room_restart_one_after_the_other() -> None:
    serve = running([app("chat", "gpu01-0", 1, 7_000), app("rerank", "gpu01-0", 1, 1_000)])
    aim = wanted([app("chat", "gpu01-0", 1, 4_000), app("rerank", "gpu01-0", 1, 3_000)], CAPACITY)
    steps = drive(serve, aim)
    assert [text for text in why(steps) if "switch" not in text] == ["restart chat@gpu01-0", "restart rerank@gpu01-0"]
    assert_is(serve, aim)


def test_a_circle_of_moves_on_full_gpus_takes_nobody_down_who_has_two_berths() -> None:
    capacity = dict.fromkeys(SLOTS[:3], 8_000)
    full = [app(model, name, 1, 8_000) for model, name in zip(("chat", "chat", "rerank"), capacity, strict=True)]
    circle = [app(model, name, 1, 8_000) for model, name in zip(("rerank", "rerank", "chat"), capacity, strict=True)]
    serve, aim = running(full, capacity), wanted(circle, capacity)
    assert [step.down for step in drive(serve, aim) if step.down] == []
    assert_is(serve, aim)


def test_nobody_is_taken_down_for_room_that_is_about_to_be_free() -> None:
    serve = running([app("chat", "gpu01-0", 1, 8_000), app("old", "gpu01-1", 1, 8_000)])
    drive(serve, wanted([app("chat", "gpu01-0", 1, 8_000)], CAPACITY), stop_after=2)
    assert serve.apps["old@gpu01-1"].deleting
    aim = wanted([app("chat", "gpu01-1", 1, 8_000), app("rerank", "gpu01-0", 1, 8_000)], CAPACITY)
    assert all("chat" not in step.down for step in drive(serve, aim))
    assert_is(serve, aim)


def test_what_disturbs_nobody_comes_first() -> None:
    serve = running([app("chat", "gpu01-0", 1, 3_000), app("old", "gpu01-0", 1, 3_000)])
    aim = wanted([app("chat", "gpu01-0", 1, 5_000), app("rerank", "gpu01-0", 1, 2_000)], CAPACITY)
    assert why(drive(serve, aim))[0] == "make rerank@gpu01-0"


def test_a_setting_that_needs_no_restart_changes_in_place() -> None:
    serve = running([app("chat", "gpu01-0")])
    changed = app("chat", "gpu01-0")
    changed["deployments"][0]["max_ongoing_requests"] = 7
    assert why(drive(serve, wanted([changed], CAPACITY))) == ["make chat@gpu01-0"]
    assert serve.restarts == []


def test_queues_get_an_end_without_a_restart() -> None:
    serve = running([app("chat", "gpu01-0")])
    del serve.apps["chat@gpu01-0"].config["deployments"][0]["max_queued_requests"]
    aim = wanted([app("chat", "gpu01-0")], CAPACITY)
    assert why(drive(serve, aim))[0] == "make chat@gpu01-0"
    assert serve.restarts == []


def test_done_at_once_when_serve_runs_the_plan() -> None:
    serve = running([app("chat", "gpu01-0", 2), app("rerank", "gpu01-1")])
    aim = wanted([app("chat", "gpu01-0", 2), app("rerank", "gpu01-1")], CAPACITY)
    assert next_step(serve.lives(), aim) == Step("done", "as planned")


def test_serves_own_defaults_in_its_echo_are_no_change() -> None:
    serve = running([app("chat", "gpu01-0")])
    echo = serve.apps["chat@gpu01-0"].config
    assert echo is not None
    echo["runtime_env"] = {"env_vars": {}, "working_dir": None}
    echo["external_scaler_enabled"] = False
    echo["deployments"][0]["ray_actor_options"]["runtime_env"] = {}
    assert next_step(serve.lives(), wanted([app("chat", "gpu01-0")], CAPACITY)).kind == "done"


def test_a_team_that_changes_goes_before_it_comes_and_waits_for_all_of_its_slots() -> None:
    serve = running([team_app("big", "gpu01-0", "gpu01-1", vram=6_000), app("b", "gpu02-0", vram=6_000)])
    aim = wanted([team_app("big", "gpu01-0", "gpu02-0", vram=6_000), app("b", "gpu01-1", vram=6_000)], CAPACITY)
    steps = drive(serve, aim)
    assert_is(serve, aim)
    assert any("big" in step.down for step in steps), "it was down, and nobody said so"
    assert not serve.restarts


def test_a_team_that_stays_is_not_touched() -> None:
    serve = running([team_app("big", "gpu01-0", "gpu01-1"), app("b", "gpu02-0")])
    aim = wanted([team_app("big", "gpu01-0", "gpu01-1"), app("b", "gpu01-1")], CAPACITY)
    drive(serve, aim)
    assert_is(serve, aim)
    assert not serve.restarts


def test_a_team_does_not_come_where_one_of_its_slots_is_full() -> None:
    serve = running([app("b", "gpu01-1", vram=6_000)])
    aim = wanted([team_app("big", "gpu01-0", "gpu01-1", vram=6_000), app("b", "gpu02-0", vram=6_000)], CAPACITY)
    drive(serve, aim)
    assert_is(serve, aim)


def test_berths_become_a_pool_and_berths_again_with_nobody_down_where_there_is_room() -> None:
    berths = [app("chat", name) for name in SLOTS]
    serve = running(berths)
    aim = wanted([pool("chat", *SLOTS, count=4)], CAPACITY)
    steps = drive(serve, aim)
    assert why(steps) == [
        "make chat@pool",
        "switch the gateway's table",
        f"break {', '.join(f'chat@{name}' for name in SLOTS)}",
    ]
    assert_is(serve, aim)
    back = drive(serve, wanted(berths, CAPACITY))
    assert why(back)[-2:] == ["switch the gateway's table", "break chat@pool"]
    assert {step.down for step in (*steps, *back)} == {()}
    assert serve.restarts == []


def test_a_pool_in_place_of_berths_on_full_gpus_says_who_is_down() -> None:
    serve = running([app("chat", name, vram=5_000) for name in SLOTS])
    aim = wanted([pool("chat", *SLOTS, count=4, vram=5_000)], CAPACITY)
    steps = drive(serve, aim)
    assert_is(serve, aim)
    assert [step.down for step in steps if step.why == "make chat@pool"] == [("chat",)]
    assert lowest(running([app("chat", name, vram=5_000) for name in SLOTS]), aim, "chat") == 0


def test_a_pool_on_full_gpus_that_may_not_go_is_refused_in_words() -> None:
    serve = running([app("chat", name, vram=5_000) for name in SLOTS])
    aim = replace(wanted([pool("chat", *SLOTS, count=4, vram=5_000)], CAPACITY), min_available={"chat": 1})
    with pytest.raises(BerthError, match="chat cannot change: whichever of its berths goes"):
        drive(serve, aim)
    assert serve.served() == {"chat"}


@pytest.mark.parametrize(
    "after",
    [
        pool("chat", "gpu01-0", "gpu01-1", "gpu02-1", count=3, vram=8_000),
        pool("chat", *SLOTS[:3], count=3, vram=8_000, version=1),
        pool("chat", *SLOTS, count=4, vram=8_000),
        pool("chat", *SLOTS[:2], count=2, vram=8_000),
    ],
    ids=["another slot", "other arguments", "one more", "one less"],
)
def test_a_pool_on_full_gpus_is_restarted_by_serve_some_at_a_time(after: dict[str, Any]) -> None:
    serve = running([pool("chat", *SLOTS[:3], count=3, vram=8_000)])
    aim = wanted([after], CAPACITY)
    steps = drive(serve, aim)
    assert [text for text in why(steps) if "switch" not in text] == ["roll chat@pool"]
    assert {step.down for step in steps} == {()}
    assert serve.restarts == ["chat@pool"]
    assert_is(serve, aim)
    start = running([pool("chat", *SLOTS[:3], count=3, vram=8_000)])
    assert lowest(start, aim, "chat") >= 1


def test_what_a_pool_leaves_is_nobodys_until_its_last_replica_there_has_gone() -> None:
    serve = running([pool("chat", *SLOTS[:3], count=3, vram=8_000)])
    aim = wanted([pool("chat", *SLOTS[1:], count=3, vram=8_000), app("rerank", "gpu01-0", vram=8_000)], CAPACITY)
    steps = drive(serve, aim)
    assert [text for text in why(steps) if "switch" not in text] == ["roll chat@pool", "make rerank@gpu01-0"]
    assert all("chat" not in step.down for step in steps)
    assert_is(serve, aim)


def test_a_pool_that_serve_has_scaled_down_to_one_gets_a_second_before_that_one_restarts() -> None:
    serve = running([pool("chat", *SLOTS[:3], count=1, most=3)])
    aim = wanted([pool("chat", *SLOTS[1:], count=1, most=3)], CAPACITY)
    steps = drive(serve, aim)
    assert [text for text in why(steps) if "switch" not in text] == ["roll chat@pool", "make chat@pool"]
    rolled = next(app for app in steps[0].apps if app["name"] == "chat@pool")
    assert rolled["deployments"][0]["autoscaling_config"]["min_replicas"] == 2
    assert {step.down for step in steps} == {()}
    assert_is(serve, aim)


def test_a_pool_of_one_is_down_while_it_changes_and_says_so() -> None:
    serve = running([pool("chat", *SLOTS[:2], count=1)])
    steps = drive(serve, wanted([pool("chat", *SLOTS[:2], count=1, version=1)], CAPACITY))
    assert [text for text in why(steps) if "switch" not in text] == ["restart chat@pool"]
    assert ("chat",) in {step.down for step in steps}


def test_a_pool_that_is_stuck_in_its_restart_is_cured_by_its_new_arguments() -> None:
    serve = running([pool("chat", *SLOTS, count=2, most=4)])
    live = serve.lives()
    live["chat@pool"] = replace(live["chat@pool"], status="DEPLOYING", running=3)
    assert next_step(live, wanted([pool("chat", *SLOTS, count=2, most=4)], CAPACITY)).kind == "wait"
    step = next_step(live, wanted([pool("chat", *SLOTS, count=2, most=4, version=1)], CAPACITY))
    assert (step.kind, step.why, step.down) == ("put", "make chat@pool", ())


def test_a_pool_keeps_so_many_up_or_is_refused() -> None:
    before, after = pool("chat", *SLOTS, count=4), pool("chat", *SLOTS, count=4, version=1)
    aim = replace(wanted([after], CAPACITY), min_available={"chat": 3})
    assert lowest(running([before]), aim, "chat") == 3
    with pytest.raises(BerthError, match="chat cannot change"):
        drive(running([before]), replace(aim, min_available={"chat": 4}))


def test_a_pool_that_sleeps_changes_while_nobody_notices() -> None:
    serve = running([app("rerank", "gpu01-0")])
    drive(serve, wanted([pool("chat", *SLOTS, count=0, most=4), app("rerank", "gpu01-0")], CAPACITY))
    steps = drive(serve, wanted([pool("chat", *SLOTS[1:], count=0, most=3), app("rerank", "gpu01-0")], CAPACITY))
    assert [text for text in why(steps) if "switch" not in text] == ["roll chat@pool"]
    assert {step.down for step in steps} == {()}


def test_pools_that_stand_in_each_others_way_go_one_after_the_other() -> None:
    serve = running([pool("a", "gpu01-0", "gpu01-1", vram=8_000), pool("b", "gpu02-0", "gpu02-1", vram=8_000)])
    aim = wanted([pool("a", "gpu02-0", "gpu02-1", vram=8_000), pool("b", "gpu01-0", "gpu01-1", vram=8_000)], CAPACITY)
    steps = drive(serve, aim)
    assert why(steps)[:2] == ["switch the gateway's table", "break a@pool"]
    assert all("b" not in step.down for step in steps), "b's room was free once a had gone"
    assert_is(serve, aim)


def test_more_replicas_of_a_pool_restart_none() -> None:
    serve = running([pool("chat", *SLOTS, count=2)])
    drive(serve, wanted([pool("chat", *SLOTS, count=4)], CAPACITY))
    drive(serve, wanted([pool("chat", *SLOTS, count=3)], CAPACITY))
    assert serve.restarts == []
    assert serve.apps["chat@pool"].running == 3


def test_nothing_wanted_leaves_only_what_is_foreign() -> None:
    serve = running([app("chat", "gpu01-0"), app("rerank", "gpu01-1")])
    steps = drive(serve, wanted([], CAPACITY))
    assert why(steps) == ["remove the gateway", "break chat@gpu01-0, rerank@gpu01-1"]
    assert all(step.down == () for step in steps)
    assert list(serve.apps) == ["notes"]
    assert serve.apps["notes"].running == 1


def test_zero_replicas_everywhere_keeps_the_gateway_with_an_empty_table() -> None:
    serve = running([app("chat", "gpu01-0"), app("rerank", "gpu01-1")])
    aim = wanted([], CAPACITY, models=["chat", "rerank"])
    assert all(step.down == () for step in drive(serve, aim))
    assert serve.table() == {"chat": [], "rerank": []}
    assert sorted(serve.apps) == [GATEWAY, "notes"]


def test_the_gateway_is_not_made_anew_while_the_old_one_drains() -> None:
    serve = running([app("chat", "gpu01-0")])
    drive(serve, wanted([], CAPACITY), stop_after=1)
    assert serve.apps[GATEWAY].deleting
    aim = wanted([app("chat", "gpu01-0"), app("rerank", "gpu01-1")], CAPACITY)
    drive(serve, aim)
    assert_is(serve, aim)


def test_a_lost_gateway_is_made_with_what_runs() -> None:
    serve = running([app("chat", "gpu01-0")])
    del serve.apps[GATEWAY]
    assert why(drive(serve, wanted([app("chat", "gpu01-0")], CAPACITY))) == [f"make {GATEWAY}"]
    assert serve.table() == {"chat": ["chat@gpu01-0"]}


# ---- failures ------------------------------------------------------------------------------------------------


def test_a_failed_deployment_ends_the_rollout_with_its_message() -> None:
    serve = running([app("chat", "gpu01-0")])
    serve.failing["rerank@gpu01-1"] = "  ValueError: no such model\n"
    with pytest.raises(BerthError, match=r"rerank@gpu01-1 failed to deploy: ValueError: no such model$"):
        drive(serve, wanted([app("chat", "gpu01-0"), app("rerank", "gpu01-1")], CAPACITY))
    assert serve.served() == {"chat"}


def test_what_failed_in_an_earlier_run_is_cleared_and_made_anew() -> None:
    serve = running([app("chat", "gpu01-0")])
    serve.failing["rerank@gpu01-1"] = "out of memory"
    aim = wanted([app("chat", "gpu01-0"), app("rerank", "gpu01-1")], CAPACITY)
    with pytest.raises(BerthError):
        drive(serve, aim)
    serve.failing.clear()
    steps = drive(serve, aim, retry_failed=True)
    assert [text for text in why(steps) if "switch" not in text] == [
        "clear what failed before: rerank@gpu01-1",
        "make rerank@gpu01-1",
    ]
    assert_is(serve, aim)


def test_a_failed_berth_that_the_table_names_leaves_it_when_it_is_cleared() -> None:
    serve = running([app("chat", "gpu01-0"), app("chat", "gpu01-1"), app("rerank", "gpu02-0")])
    for name in ("chat@gpu01-0", "rerank@gpu02-0"):
        serve.apps[name].status, serve.apps[name].message, serve.apps[name].running = "DEPLOY_FAILED", "dead", 0
    aim = wanted([app("chat", "gpu01-0"), app("chat", "gpu01-1"), app("rerank", "gpu02-0")], CAPACITY)
    step = next_step(serve.lives(), aim, retry_failed=True)
    serve.put(step.apps)
    assert serve.table() == {"chat": ["chat@gpu01-1"], "rerank": []}
    assert step.down == ("rerank",)
    drive(serve, aim)
    assert_is(serve, aim)


def test_a_failed_gateway_is_made_anew() -> None:
    serve = running([app("chat", "gpu01-0")])
    serve.apps[GATEWAY].status, serve.apps[GATEWAY].message = "DEPLOY_FAILED", "port in use"
    aim = wanted([app("chat", "gpu01-0")], CAPACITY)
    with pytest.raises(BerthError, match="berth-gateway failed to deploy: port in use"):
        next_step(serve.lives(), aim)
    drive(serve, aim, retry_failed=True)
    assert_is(serve, aim)


def test_a_berth_that_never_comes_up_is_cured_by_its_new_arguments() -> None:
    serve = running([app("chat", "gpu01-0")])
    serve.apps["chat@gpu01-0"].running, serve.apps["chat@gpu01-0"].status = 0, "UNHEALTHY"
    aim = wanted([app("chat", "gpu01-0", version=1)], CAPACITY)
    step = next_step(serve.lives(), aim)
    assert (step.kind, step.why, step.down) == ("put", "make chat@gpu01-0", ("chat",))


def test_a_berth_that_serve_finds_unhealthy_is_cured_by_its_new_arguments() -> None:
    serve = running([app("chat", "gpu01-0")])
    serve.apps["chat@gpu01-0"].status = "UNHEALTHY"
    assert next_step(serve.lives(), wanted([app("chat", "gpu01-0", version=1)], CAPACITY)).kind == "put"
    assert next_step(serve.lives(), wanted([app("chat", "gpu01-0")], CAPACITY)).kind == "wait"


def test_a_berth_with_a_replica_missing_is_waited_for_whatever_serve_calls_it() -> None:
    serve = running([app("chat", "gpu01-0", 2)])
    serve.apps["chat@gpu01-0"].running = 1
    step = next_step(serve.lives(), wanted([app("chat", "gpu01-0", 2)], CAPACITY))
    assert (step.kind, step.waiting) == ("wait", ("chat@gpu01-0",))


def test_a_step_says_that_a_model_is_down_for_reasons_of_its_own() -> None:
    serve = running([app("chat", "gpu01-0")])
    serve.apps["chat@gpu01-0"].running = 0
    step = next_step(serve.lives(), wanted([app("chat", "gpu01-0"), app("rerank", "gpu01-1")], CAPACITY))
    assert (step.why, step.down) == ("make rerank@gpu01-1", ("chat",))


def test_a_plan_that_promises_too_much_is_refused_before_anything_is_removed() -> None:
    serve = running([app("chat", "gpu01-0", 1, 4_000)])
    aim = wanted([app("chat", "gpu01-0", 1, 4_000), app("rerank", "gpu01-0", 1, 8_000)], CAPACITY)
    with pytest.raises(BerthError, match="no room for rerank@gpu01-0"):
        drive(serve, aim)
    assert serve.served() == {"chat"}


# ---- what is not ours ----------------------------------------------------------------------------------------


def foreign(name: str, **config: Any) -> dict[str, Live]:
    return {name: Live(name, "RUNNING", running=1, config={"import_path": "notes:app", "name": name, **config})}


def test_a_foreign_app_with_a_berths_name_is_refused() -> None:
    with pytest.raises(BerthError, match=r"named chat@gpu01-0 is there and is not Berth's; mend: rename the model"):
        next_step(foreign("chat@gpu01-0", route_prefix="/x"), wanted([app("chat", "gpu01-0")], CAPACITY))


@pytest.mark.parametrize("config", [{"route_prefix": "/"}, {}], ids=["said", "by Serve's default"])
def test_a_foreign_app_on_the_gateways_route_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BerthError, match=r"notes has the gateway's route /; mend: .*serve_apps_route_prefix"):
        next_step(foreign("notes", **config), wanted([app("chat", "gpu01-0")], CAPACITY))


def test_another_route_makes_room_for_a_foreign_app() -> None:
    options = ServeOptions(host="127.0.0.1", port=8000, route_prefix="/berth")
    aim = wanted([app("chat", "gpu01-0")], CAPACITY, options=options)
    assert next_step(foreign("notes", route_prefix="/"), aim).kind == "put"


def test_a_foreign_app_without_a_name_in_its_config_is_kept_as_it_is() -> None:
    config = {"import_path": "notes:app", "route_prefix": "/notes"}
    live = {"default": Live("default", "RUNNING", running=1, config=config)}
    step = next_step(live, wanted([app("chat", "gpu01-0")], CAPACITY))
    assert step.apps[0] == config


def test_an_app_that_was_not_deployed_through_rest_is_left_alone() -> None:
    aim = wanted([app("chat", "gpu01-0")], CAPACITY)
    serve = running([app("chat", "gpu01-0")])
    lives = serve.lives() | {"lab@home": Live("lab@home", "RUNNING", running=1, route="/lab")}
    assert next_step(lives, aim).kind == "done"
    lives["lab@home"] = Live("lab@home", "RUNNING", running=1, route="/")
    with pytest.raises(BerthError, match="lab@home has the gateway's route /"):
        next_step(lives, aim)
    with pytest.raises(BerthError, match="named chat@gpu01-0 is there"):
        next_step({"chat@gpu01-0": Live("chat@gpu01-0", "RUNNING", running=1, route="/x")}, aim)


def test_a_foreign_app_that_is_being_deleted_is_not_brought_back() -> None:
    lives = {"notes": Live("notes", "DELETING", config=None)}
    step = next_step(lives, wanted([app("chat", "gpu01-0")], CAPACITY))
    assert [config["name"] for config in step.apps] == ["chat@gpu01-0", GATEWAY]


def test_the_fake_refuses_what_it_must() -> None:
    """The checks above stand on the fake's: each of its assertions can fail."""
    serve = running([app("chat", "gpu01-0")])
    gateway = serve.apps[GATEWAY].config
    assert gateway is not None
    with pytest.raises(AssertionError, match="removed while the gateway's table names it"):
        serve.put([FOREIGN, gateway])
    serve = running([app("chat", "gpu01-0", 1, 8_000)])
    with pytest.raises(AssertionError, match="MiB promised"):
        serve.put([FOREIGN, app("chat", "gpu01-0", 2, 8_000), serve.apps[GATEWAY].config or {}])
    serve = FakeServe(CAPACITY, {"a": App(None, "DELETING")})
    with pytest.raises(AssertionError, match="still drains"):
        serve.put([{"name": "a", "import_path": "x"}])
