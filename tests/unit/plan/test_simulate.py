"""What-if: when a fleet is full and what a loss does, against what one can count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.plan.planner import solve
from berth.plan.simulate import QUICK, grown, load_fleet, simulate
from berth.report.fleet_simulation import loss_verdict

EXAMPLE = Path(__file__).parents[3] / "examples" / "fleet.yml"


def group(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "count": 2, "gpus": 2, "product": "NVIDIA L40S", "memory_mib": 44_000, **changes}


def app(**changes: Any) -> dict[str, Any]:
    return {"name": "chat", "replicas": 2, "footprint_mib": 22_000, **changes}


def fleet(*apps: dict[str, Any], hosts: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    return {"hosts": hosts or [group()], "deployments": list(apps) or [app()], **changes}


def test_groups_become_hosts_in_racks():
    found = load_fleet(fleet(hosts=[group(count=4, racks=["x", "y"], zone=1), group(name="b-", count=1, nvlink=True)]))
    assert [(item.host, item.rack, item.zone) for item in found.slots[::2]] == [
        ("a01", "x", "1"),
        ("a02", "x", "1"),
        ("a03", "y", "1"),
        ("a04", "y", "1"),
        ("b-01", "r1", ""),
    ]
    assert found.slots[-1].nvlink_group
    assert load_fleet(fleet(hosts=[group(memory_mib=None, product="L40S")])).slots[0].total_mib == 45_486


def test_a_fleet_fills_up_where_the_sum_says():
    # 4 GPUs hold 8 of these; 2 are there: four times the load, and not a ninth replica.
    found = simulate(load_fleet(fleet()))
    assert found.full_at == 4.0
    assert found.limit is not None
    assert 4.0 < found.limit <= 4.05
    assert [(point.factor, point.replicas, point.unplaced) for point in found.points if point.factor <= 4] == [
        (1.0, 2, 0),
        (2.0, 4, 0),
        (4.0, 8, 0),
    ]


def test_demand_tells_the_replicas_and_grows_by_parts_of_one():
    entry = app()
    del entry["replicas"]
    made = load_fleet(fleet({**entry, "demand": {"tokens_per_s": 900, "per_replica": 400}}))
    assert made.deployments[0].replicas == 3
    # 2.25 replicas' worth of work: a third more still fits into three.
    assert grown(made, 4 / 3)[0].replicas == 3
    assert grown(made, 1.34)[0].replicas == 4


def test_what_does_not_grow_stays():
    made = load_fleet(fleet(app(), app(name="batch", grows=False)))
    assert [(item.name, item.replicas) for item in grown(made, 3)] == [("batch", 2), ("chat", 6)]
    assert simulate(load_fleet(fleet(app(grows=False)))).limit is None


def test_a_fleet_that_is_too_small_today():
    found = simulate(load_fleet(fleet(app(replicas=16))))
    assert found.full_at == pytest.approx(0.5, abs=0.02)
    assert found.solution.plan.unplaced


def test_a_lost_host_is_made_good_or_named():
    # Four replicas of which two fill a GPU, over four GPUs of two hosts: either host can take all.
    spread = simulate(load_fleet(fleet(app(replicas=4, strategy="spread"))))
    assert [(loss.domain, loss.replicas, loss.again, loss.lost) for loss in spread.losses if loss.domain == "host"] == [
        ("host", 2, 2, ())
    ]
    assert spread.losses[0].alike == 1
    full = simulate(load_fleet(fleet(app(replicas=8))))
    (host,) = [loss for loss in full.losses if loss.domain == "host"]
    assert (host.replicas, host.again, host.alike) == (4, 0, 1)
    assert [(item.deployment, item.replicas) for item in host.lost] == [("chat", 4)]
    assert "way out" in host.lost[0].why


def test_losing_the_only_rack_loses_all():
    (rack,) = [loss for loss in simulate(load_fleet(fleet())).losses if loss.domain == "rack"]
    assert (rack.name, rack.gpus, rack.replicas, rack.again) == ("r1", 4, 2, 0)


def test_a_pin_on_the_lost_host_is_a_loss_not_an_error():
    found = simulate(load_fleet(fleet(app(replicas=1, pin="a01/0"))))
    (host,) = [loss for loss in found.losses if loss.domain == "host"]
    assert (host.name, host.again) == ("a01", 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "fleet: not an object"),
        ({"hosts": []}, "fleet: deployments"),
        (fleet(hosts=[group(count=0)]), "hosts a: count"),
        (fleet(hosts=[group(product="NPU 9", memory_mib=None)]), "hosts a: .*found: NPU 9; mend: give its memory_mib"),
        (fleet(hosts=[group(racks=[])]), "hosts a: racks is empty"),
        (fleet(hosts=[group(), group()]), "two hosts have the same name"),
        (fleet(app(demand={"tokens_per_s": 1, "per_replica": 1})), "chat: replicas and demand are both given"),
        (
            fleet({"name": "chat", "footprint_mib": 1, "demand": {"tokens_per_s": 1}}),
            "deployment chat: demand: per_replica",
        ),
        (fleet(growth={"up_to": 1}), "growth.up_to"),
        (fleet(app(replicas="2")), "deployment chat: replicas"),
        (fleet(app(grows="no")), "deployment chat: grows"),
        (fleet(losses=["room"]), "losses"),
    ],
)
def test_a_fleet_that_is_wrong_is_told_where(data: object, message: str):
    with pytest.raises(BerthError, match=message):
        load_fleet(data)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(4, 44)), min_size=1, max_size=3),
)
def test_at_the_limit_it_does_not_fit_and_below_it_does(hosts: int, gpus: int, models: list[tuple[int, int]]):
    apps = [app(name=f"m{n}", replicas=count, footprint_mib=1000 * size) for n, (count, size) in enumerate(models)]
    made = load_fleet(fleet(*apps, hosts=[group(count=hosts, gpus=gpus)], losses=[]))
    found = simulate(made)
    for factor, fits in ((found.full_at, True), (found.limit, False)):
        if factor is not None and factor != 1.0:
            plan = solve(made.slots, grown(made, factor), made.strategy, options=QUICK).plan
            assert (not plan.unplaced) is fits
    assert found.full_at is None or found.limit is None or found.full_at < found.limit


def test_the_example_is_what_the_manual_says_it_is():
    found = simulate(load_fleet(yaml.safe_load(EXAMPLE.read_text()), EXAMPLE.parent))
    assert not found.solution.plan.unplaced
    assert {loss.domain for loss in found.losses} == {"host", "rack"}
    assert not any(loss.lost for loss in found.losses)
    (host,) = [loss for loss in found.losses if loss.name == "h100-01"]
    assert (host.replicas, host.again, host.moved) == (1, 1, 2)
    assert loss_verdict(host).endswith("its one replica finds a new place; 2 that stood elsewhere move to make room")
