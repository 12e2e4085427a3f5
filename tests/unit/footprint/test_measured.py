"""Measured footprints: stored, found again, better than predictions, and heard when they contradict them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import BerthError
from berth.footprint.measured import Measured, findings, key_of, lookup, read, record
from berth.footprint.predict import predict
from berth.footprint.types import EngineArgs
from tests.unit.footprint.test_predict import LLAMA_8B

ENGINE = EngineArgs(max_model_len=4096, max_num_seqs=64)
RAN = Measured(total_mib=19000, kv_mib=2050, weights_mib=15347, activation_mib=400, graphs_mib=500)


def test_what_was_recorded_is_found_again_and_beats_the_prediction(tmp_path: Path) -> None:
    store = tmp_path / "new" / "measured.json"
    assert lookup(store, "llama", ENGINE, "L40S", "0.29.0") is None
    record(store, "llama", ENGINE, "L40S", "0.29.0", RAN)
    found = lookup(store, "llama", ENGINE, "NVIDIA L40S", "0.29.0")
    assert found == RAN
    footprint = predict(LLAMA_8B, ENGINE, gpu="L40S", measured=found)
    assert footprint.measured
    assert footprint.weights_mib == 15347
    assert footprint.total_mib - footprint.kv_mib == pytest.approx(19000 - 2050, abs=2)


def test_only_the_same_replica_is_found(tmp_path: Path) -> None:
    store = tmp_path / "measured.json"
    record(store, "llama", ENGINE, "L40S", "0.29.0", RAN)
    eager = dataclasses.replace(ENGINE, enforce_eager=True)
    assert lookup(store, "llama", eager, "L40S", "0.29.0") is None
    assert lookup(store, "llama", ENGINE, "H100", "0.29.0") is None
    assert lookup(store, "llama", ENGINE, "L40S", "0.30.0") is None
    assert lookup(store, "other", ENGINE, "L40S", "0.29.0") is None


def test_arguments_that_memory_does_not_depend_on_make_no_other_key() -> None:
    named = dataclasses.replace(ENGINE, rest={"served_model_name": "chat"}, kv_cache_memory_bytes=1 << 30)
    other = dataclasses.replace(ENGINE, rest={"some_new_buffer": 3})
    assert key_of("m", named, "L40S", "0.29.0") == key_of("m", ENGINE, "L40S", "0.29.0")
    assert key_of("m", other, "L40S", "0.29.0") != key_of("m", ENGINE, "L40S", "0.29.0")


def test_of_several_runs_the_largest_stays(tmp_path: Path) -> None:
    store = tmp_path / "measured.json"
    larger = dataclasses.replace(RAN, total_mib=19400)
    for measured in (RAN, larger, RAN):
        record(store, "llama", ENGINE, "L40S", "0.29.0", measured)
    assert lookup(store, "llama", ENGINE, "L40S", "0.29.0") == larger
    assert [item.runs for item in read(store).records.values()] == [3]


def test_a_replica_beyond_its_bound_is_reported(tmp_path: Path) -> None:
    predicted = predict(LLAMA_8B, ENGINE, gpu="L40S")
    within = Measured(predicted.total_mib, predicted.kv_mib, weights_mib=predicted.weights_mib)
    assert findings(predicted, within) == ()
    beyond = Measured(predicted.safe_mib + 500, predicted.kv_mib, weights_mib=2 * predicted.weights_mib)
    told = record(tmp_path / "m.json", "llama", ENGINE, "L40S", "0.29.0", beyond, predicted)
    assert len(told) == 2
    assert f"500 MiB beyond its bound of {predicted.safe_mib} MiB" in told[0]
    assert told[1].startswith("weights took")
    wasted = findings(predicted, Measured(predicted.total_mib / 2, predicted.kv_mib))
    assert "more than the" in wasted[0]


def test_a_budget_other_than_the_measured_one_moves_the_total_by_it(tmp_path: Path) -> None:
    small = predict(LLAMA_8B, ENGINE, gpu="L40S", measured=RAN)
    larger = dataclasses.replace(ENGINE, kv_cache_memory_bytes=4 << 30)
    large = predict(LLAMA_8B, larger, gpu="L40S", measured=RAN)
    assert large.total_mib - small.total_mib == pytest.approx(large.kv_mib - small.kv_mib, abs=2)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}', '{"records": {"x": {"model": 1}}}', '{"more": 1}'])
def test_a_torn_store_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    store = tmp_path / "measured.json"
    store.write_text(text, encoding="utf-8")
    with pytest.raises(BerthError, match="measured"):
        lookup(store, "llama", ENGINE, "L40S", "0.29.0")
    with pytest.raises(BerthError):
        record(store, "llama", ENGINE, "L40S", "0.29.0", RAN)
    assert store.read_text(encoding="utf-8") == text


def test_a_measurement_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BerthError, match="larger than all"):
        record(tmp_path / "m.json", "llama", ENGINE, "L40S", "0.29.0", Measured(total_mib=10, kv_mib=20))
    assert not (tmp_path / "m.json").exists()


@settings(deadline=None)
@given(st.floats(1, 1e5), st.floats(0, 1), st.none() | st.floats(0, 1e5), st.none() | st.floats(0, 1e4))
def test_measured_terms_hold_at_least_what_nvml_showed(
    total: float, share: float, loaded: float | None, graphs: float | None
) -> None:
    terms = predict(LLAMA_8B, ENGINE).terms
    rest = tuple(term for term in terms if term.name != "kv_cache")
    measured = Measured(total, total * share, weights_mib=loaded, graphs_mib=graphs)
    found = measured.over(rest)
    assert [term.name for term in found] == [term.name for term in rest]
    assert sum(term.expected_mib for term in found) >= total * (1 - share) - 1e-6 * total
    assert all(term.safe_mib >= term.expected_mib for term in found)
