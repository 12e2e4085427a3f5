"""The plan file survives bad input and keeps its predecessor; a diff names what moves."""

from __future__ import annotations

import json

import pytest

from berth.codec import dump, replace
from berth.errors import BerthError
from berth.plan.diff import Rates, cost_of, describe, diff_plans, plan_text
from berth.plan.planner import make_plan
from berth.plan.store import previous_path, read_plan, write_plan
from tests.unit.plan.helpers import grid, model, slot


def test_round_trip_and_the_one_before(tmp_path):
    path = tmp_path / "state" / "plan.json"
    assert read_plan(path) is None
    first = make_plan(grid(1, 2), [model("chat", 1, 4_000)], "pack")
    assert write_plan(path, first) is True
    stamp = path.stat().st_mtime_ns
    assert write_plan(path, first) is False
    assert path.stat().st_mtime_ns == stamp
    assert not previous_path(path).exists()
    second = make_plan(grid(1, 2), [model("chat", 2, 4_000)], "pack", first)
    assert write_plan(path, second) is True
    assert read_plan(path) == second
    assert read_plan(previous_path(path)) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "unknown version; found: 2; allowed: 1"),
        ({"strategy": "binpack"}, r"strategy: .*binpack"),
        ({"extra": 1}, "extra: unknown key"),
        ({"slots": []}, "berth chat@gpu00-0 is on no slot"),
    ],
)
def test_a_bad_file_names_itself_and_the_mend(tmp_path, change, message):
    path = tmp_path / "plan.json"
    plan = make_plan(grid(1, 1), [model("chat", 1, 4_000)], "pack")
    path.write_text(json.dumps({**dump(plan), **change}))
    with pytest.raises(BerthError, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert "plan.previous.json" in str(caught.value)


def test_a_broken_file_is_not_kept_as_the_last_good_one(tmp_path):
    path = tmp_path / "plan.json"
    good = make_plan(grid(1, 1), [], "pack")
    write_plan(path, good)
    write_plan(path, make_plan(grid(1, 2), [], "pack"))
    path.write_text("{")
    with pytest.raises(BerthError, match="is not JSON"):
        read_plan(path)
    write_plan(path, make_plan(grid(1, 3), [], "pack"))
    assert read_plan(previous_path(path)) == good


def test_diff_names_every_kind_starts_before_stops():
    slots = [slot("a-0"), slot("b-0")]
    old = make_plan(slots, [model("chat", 2, 4_000), model("rag", 1, 2_000), model("tts", 1, 2_000)], "pack")
    new = make_plan(slots, [model("chat", 3, 4_000), model("rag", 1, 3_000), model("asr", 1, 2_000)], "pack", old)
    assert describe(diff_plans(old, new)) == [
        "start asr@a-0: 1 replica of 2000 MiB",
        "scale chat@a-0: 2 -> 3 replicas of 4000 MiB",
        "resize rag@a-0: 2000 -> 3000 MiB (its replicas restart)",
        "stop tts@a-0: 1 replica of 2000 MiB",
    ]
    assert diff_plans(new, new) == ()
    assert [change.kind for change in diff_plans(None, new)] == ["start"] * 3
    assert plan_text(None) == ""
    assert "a-0 NVIDIA L40S GPU-a-0-0: 17000 of 44000 MiB promised\n  asr@a-0: 1 replica" in plan_text(new)


def test_room_alone_is_told_as_room():
    growing = replace(model("chat", 1, 30_000), max_replicas=2)
    empty = make_plan([slot("a-0"), slot("b-0")], [], "pack")
    full = make_plan([slot("a-0"), slot("b-0")], [growing], "pack")
    assert describe(diff_plans(empty, full)) == [
        "start chat@a-0: 1 replica of 30000 MiB",
        "keep room at chat@b-0: 30000 MiB for each replica to come",
    ]
    assert describe(diff_plans(full, empty))[-1] == "give up the room at chat@b-0: 30000 MiB for each replica to come"


def test_the_cost_counts_each_replica_once():
    two = [replace(slot("a-0"), name="a-0+1", gpu_uuids=("GPU-a-0-0", "GPU-a-1-0")), slot("b-0")]
    old = make_plan(
        [slot("a-0"), slot("a-1"), slot("b-0")], [model("chat", 2, 4_000), model("rag", 1, 2_000)], "spread"
    )
    new = make_plan(two, [model("chat", 2, 5_000), model("wide", 1, 6_000, gpus=2)], "spread")
    cost = cost_of(old, new, Rates(load_mib_per_s=1_000, start_s=10))
    where = {berth.slot for berth in old.berths if berth.deployment == "chat"}
    # Both now stand on b-0 with a new footprint; whoever was there restarts, the others move or are one too many.
    assert (cost.restarted, cost.moved) == (1 if "b-0" in where else 0, 2 - (1 if "b-0" in where else 0))
    assert (cost.added, cost.removed, cost.replaced, cost.lost) == (1, 1, 0, 0)
    assert cost.reload_mib == 2 * 5_000 + 2 * 6_000
    assert cost.cold_start_s == 2 * 15.0 + 16.0
