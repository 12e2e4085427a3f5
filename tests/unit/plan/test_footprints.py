"""Where a footprint comes from: given, kept, measured, predicted; and that no better guess restarts a replica."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from berth.codec import replace
from berth.errors import BerthError
from berth.plan.apps import AppSpec, Sleep, load_apps
from berth.plan.footprints import Card, cards, footprints, note_measured
from berth.plan.slots import HostInput, build_slots
from berth.plan.types import Plan, PlannedFootprint
from berth.ray.serve_config import ServeOptions, berth_apps
from berth.verify.compare import Row, RowReplica
from tests.unit.plan.helpers import L40S, gpu, host

H100 = "NVIDIA H100 80GB HBM3"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
CARDS = (Card(L40S, 45_486), Card(H100, 81_080))
CONTEXT_BYTES = 8192 * 131_072


@pytest.fixture
def app(tmp_path: Path) -> AppSpec:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return spec(config=str(tmp_path))


def spec(**more: Any) -> AppSpec:
    entry = {"name": "chat", "engine": "llm", "replicas": 1, "model": "hub/chat", "concurrency": 4}
    (found,) = load_apps([{**entry, "engine_args": {"max_model_len": 8192}, **more}])
    return found


def plan_with(found: dict[str, dict[str, PlannedFootprint]], **more: Any) -> Plan:
    return Plan("pack", **{"slots": (), "berths": (), "footprints": found, **more})


def test_predicted_for_every_product_that_can_hold_it(app: AppSpec) -> None:
    found = footprints([app], CARDS, None, None)["chat"]
    assert set(found) == {L40S, H100}
    # vLLM keeps one block of 16 tokens to itself.
    assert {item.kv_cache_memory_bytes for item in found.values()} == {4 * CONTEXT_BYTES + 16 * 131_072}
    for item in found.values():
        assert item.source == "predicted"
        assert 15_300 + 4096 < item.vram_mib < 28_000
    assert app.deployment({L40S: found[L40S].vram_mib}).vram_mib == {L40S: found[L40S].vram_mib}


def test_a_product_that_is_too_small_is_left_out_and_none_is_an_error(app: AppSpec) -> None:
    larger = replace(app, concurrency=30.0)
    assert set(footprints([larger], CARDS, None, None)["chat"]) == {H100}
    with pytest.raises(BerthError, match=r"no GPU product here can hold it.*set max_model_len to \d+ or less"):
        footprints([replace(app, concurrency=100.0)], CARDS, None, None)


def test_what_is_given_is_not_predicted() -> None:
    assert footprints([spec(vram_mib=9000, concurrency=None)], CARDS, None, None) == {}
    with pytest.raises(BerthError, match="nothing is predicted from concurrency"):
        spec(vram_mib=9000)
    with pytest.raises(BerthError, match="light app has no model"):
        spec(engine="light", concurrency=None)


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["missing", "torn", "no object"])
def test_a_config_that_cannot_be_read_names_the_way_out(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BerthError, match=r"set config of app chat .* or give its vram_mib"):
        footprints([spec(config=str(tmp_path))], CARDS, None, None)


def test_what_stands_keeps_its_figure_until_its_model_changes(app: AppSpec) -> None:
    (first,) = (footprints([app], CARDS[:1], None, None)["chat"][L40S],)
    kept = replace(first, vram_mib=first.vram_mib + 1000)
    before = plan_with({"chat": {L40S: kept}})
    assert footprints([app], CARDS[:1], before, None)["chat"][L40S] == kept
    assert footprints([replace(app, concurrency=5.0)], CARDS[:1], before, None)["chat"][L40S] != kept


def rows(mib: int | None, state: str = "RUNNING") -> list[Row]:
    replica = RowReplica("chat@gpu01-0", state, 7, mib)
    return [Row("gpu01-0", "gpu01", 0, "GPU-a", L40S, 45_486, 20_000, 20_000, mib, (replica,))]


@pytest.mark.parametrize("scale", [1.0, 96.0])
def test_what_ran_is_used_for_what_is_placed_anew(app: AppSpec, tmp_path: Path, scale: float) -> None:
    store = tmp_path / "footprints.json"
    (slot,), _, _ = build_slots([HostInput(host("gpu01", gpu("GPU-a", 0)))])
    card = Card(L40S, slot.total_mib, scale)
    predicted = footprints([app], [card], None, store)
    plan = plan_with(predicted, slots=(slot,))
    kv_mib = (predicted["chat"][L40S].kv_cache_memory_bytes or 0) / 2**20 * scale
    held = int(kv_mib) + 15_000
    scales = {"gpu01": scale}
    assert note_measured([app], plan, scales, rows(None), store) == ([], [])
    assert note_measured([app], plan, scales, rows(held, "STARTING"), store) == ([], [])
    dozes = replace(app, sleep=Sleep(60))
    assert note_measured([dozes], plan, scales, rows(held), store) == ([], []), "it may have been asleep"
    written, _ = note_measured([app], plan, scales, rows(held), store)
    assert written == [f"chat on {card.name}: {held} MiB"]
    assert note_measured([app], plan, scales, rows(held), store)[0] == [], "a second look writes nothing"
    again = footprints([app], [card], None, store)["chat"][L40S]
    assert again.source == "measured"
    assert held < again.vram_mib < held + 400
    assert footprints([app], [card], plan, store) == predicted, "a replica that stands was restarted for a better guess"
    other = Card(L40S, slot.total_mib, 2.0)
    assert footprints([app], [other], None, store)["chat"][L40S].source == "predicted"


def test_a_prediction_beyond_its_bound_is_told(app: AppSpec, tmp_path: Path) -> None:
    (slot,), _, _ = build_slots([HostInput(host("gpu01", gpu("GPU-a", 0)))])
    plan = plan_with(footprints([app], CARDS[:1], None, None), slots=(slot,))
    _, findings = note_measured([app], plan, {}, rows(40_000), tmp_path / "footprints.json")
    assert any("beyond its bound" in line for line in findings)


def test_the_budget_is_set_in_the_engine(app: AppSpec) -> None:
    from berth.plan.planner import make_plan

    slots, _, _ = build_slots([HostInput(host("gpu01", gpu("GPU-a", 0)))])
    found = footprints([app], cards([], slots), None, None)
    sizes = {product: item.vram_mib for product, item in found["chat"].items()}
    plan = replace(make_plan(slots, [app.deployment(sizes)], "pack"), footprints=found)
    (served,) = berth_apps(plan, [app], ServeOptions("127.0.0.1", 8000)).values()
    assert served["args"]["engine_args"]["kv_cache_memory_bytes"] == found["chat"][L40S].kv_cache_memory_bytes
    assert served["args"]["vram_mib"] == sizes[L40S]
