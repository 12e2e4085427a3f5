"""``berth footprint``: exit codes, one JSON object that keeps to its schema, and never a traceback."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from berth.footprint.command import add_parser, schema
from berth.footprint.measured import Measured, record
from berth.footprint.types import EngineArgs
from tests.unit.footprint.cases import FILES, LOGS, case, config_of
from tests.unit.footprint.test_predict import LLAMA_8B

SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "schemas" / "footprint.schema.json"
CONTRACT = {"weights_mib", "kv_bytes_per_token", "kv_mib", "activation_mib", "graphs_mib", "overhead_mib", "total_mib",
            "safe_mib", "terms"}  # fmt: skip


def _run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["footprint", *map(str, arguments)])
    code: int = args.run(args)
    return code


def _write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def _check(data: Any, rule: dict[str, Any], root: dict[str, Any], where: str = "$") -> None:
    """The parts of JSON Schema that ours uses."""
    if "$ref" in rule:
        return _check(data, root["$defs"][rule["$ref"].rsplit("/", 1)[1]], root, where)
    if "anyOf" in rule:
        problems = []
        for option in rule["anyOf"]:
            try:
                return _check(data, option, root, where)
            except AssertionError as error:
                problems.append(str(error))
        raise AssertionError("; ".join(problems))
    if "const" in rule:
        assert data == rule["const"], where
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
             "null": type(None)}  # fmt: skip
    if "type" in rule:
        assert isinstance(data, kinds[rule["type"]]), f"{where}: {data!r} is no {rule['type']}"
        assert rule["type"] == "boolean" or not isinstance(data, bool), where
    if rule.get("type") == "object":
        assert set(rule.get("required", ())) <= set(data), f"{where}: lacks {set(rule['required']) - set(data)}"
        for key, value in data.items():
            assert key in rule["properties"] or rule.get("additionalProperties", True), f"{where}: {key}"
            if key in rule["properties"]:
                _check(value, rule["properties"][key], root, f"{where}.{key}")
    for number, item in enumerate(data if rule.get("type") == "array" else ()):
        _check(item, rule["items"], root, f"{where}[{number}]")
    return None


def _answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(out)
    _check(found, json.loads(SCHEMA.read_text(encoding="utf-8")), json.loads(SCHEMA.read_text(encoding="utf-8")))
    return found


def test_the_published_schema_is_the_one_in_force() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema()


def test_the_schema_refuses_what_is_not_an_answer() -> None:
    published = schema()
    for wrong in ({}, {"ok": True, "error": "x"}, {"ok": False}, [], {"weights_mib": 1}):
        with pytest.raises(AssertionError):
            _check(wrong, published, published)


def test_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write(tmp_path / "config.json", LLAMA_8B)
    engine = _write(tmp_path / "engine.yml", "max-model-len: 8192\nconcurrency: 4\n")
    assert _run("--config", config, "--engine", engine, "--gpu", "L40S", "--format", "json") == 0
    found = _answer(capsys)
    assert set(found) >= CONTRACT
    assert found["ok"]
    assert found["kv_bytes_per_token"] == 131072
    assert found["kv_tokens"] == pytest.approx(4 * 8192, abs=64)


def test_it_does_not_fit_and_still_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write(tmp_path / "config.json", LLAMA_8B)
    assert _run("--config", config, "--gpu", "L4", "--format", "json") == 1
    found = _answer(capsys)
    assert not found["ok"]
    assert "set max_model_len to" in found["error"]
    assert found["safe_mib"] > 22563


def test_the_table_shows_terms_and_the_budget_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write(tmp_path / "config.json", LLAMA_8B)
    assert _run("--config", config, "--gpu", "H100") == 0
    out = capsys.readouterr().out
    assert "cuda_graphs" in out
    assert "set kv_cache_memory_bytes: " in out
    assert "fits H100" in out


@pytest.mark.parametrize(
    ("config", "engine", "extra", "named"),
    [
        ("{", None, (), "config"),
        ("[]", None, (), "not a JSON object"),
        ("{}", None, (), "config.json lacks"),
        (LLAMA_8B, ": [", (), "engine arguments"),
        (LLAMA_8B, "- 1", (), "not a mapping"),
        (LLAMA_8B, "tensor_parallel_size: many", (), "tensor_parallel_size"),
        (LLAMA_8B, None, ("--gpu", "L9"), "L9"),
        (LLAMA_8B, None, ("--checkpoint", "/nowhere"), "no safetensors"),
        (LLAMA_8B, None, ("--measured", "/nowhere"), "--gpu"),
        (LLAMA_8B | {"num_hidden_layers": "many"}, None, (), "num_hidden_layers"),
    ],
)
def test_bad_input_is_one_object_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: object,
    engine: str | None,
    extra: tuple[str, ...],
    named: str,
) -> None:
    options: list[object] = ["--config", _write(tmp_path / "config.json", config), "--format", "json", *extra]
    if engine is not None:
        options += ["--engine", _write(tmp_path / "engine.yml", engine)]
    assert _run(*options) == 2
    found = _answer(capsys)
    assert set(found) == {"ok", "error"}
    assert named in found["error"]


def test_a_missing_config_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--config", tmp_path / "none.json") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_directory_is_its_config_and_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    _write(snapshot / "config.json", LLAMA_8B)
    assert _run("--config", tmp_path / "models--a--b", "--format", "json") == 0
    by_formula = _answer(capsys)["weights_mib"]
    index = {"metadata": {"total_size": 2 * 16060522496}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}
    _write(snapshot / "model.safetensors.index.json", index)
    assert _run("--config", tmp_path / "models--a--b", "--format", "json") == 0
    assert _answer(capsys)["weights_mib"] > 1.5 * by_formula


def test_older_modelopt_exports_say_their_quantisation_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "config.json", LLAMA_8B)
    assert _run("--config", tmp_path, "--format", "json") == 0
    plain = _answer(capsys)["weights_mib"]
    _write(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}})
    assert _run("--config", tmp_path, "--format", "json") == 0
    assert _answer(capsys)["weights_mib"] < 0.65 * plain


def test_a_measured_footprint_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write(tmp_path / "config.json", LLAMA_8B)
    store = tmp_path / "measured.json"
    record(store, "chat", EngineArgs(), "H100", "0.29.0", Measured(40000, 16386))
    assert _run("--config", config, "--gpu", "H100", "--measured", store, "--model", "chat", "--format", "json") == 0
    found = _answer(capsys)
    assert found["measured"]
    assert found["total_mib"] == pytest.approx(40000, abs=2)


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_architecture_answers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _write(tmp_path / "config.json", case(name)["config"])
    assert _run("--config", config, "--gpu", "H100", "--format", "json") in (0, 1)
    assert set(_answer(capsys)) >= CONTRACT


def test_logged_models_answer_or_name_the_missing_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = json.loads(LOGS.read_text(encoding="utf-8"))["models"]
    codes = {}
    for name in sorted(models):
        fields = models[name]["fields"]
        codes[name] = _run(
            "--config", _write(tmp_path / "c.json", config_of(fields)), "--gpu", "H200", "--format", "json"
        )
        found = _answer(capsys)
        assert codes[name] != 2 or "lacks" in found["error"]
    assert sum(code == 2 for code in codes.values()) <= 2


JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-10, 1 << 40)
    | st.text(max_size=5)
    | st.just([])
    | st.just({})
    | st.just([1, "x"])
)
KEYS = st.sampled_from(sorted({*LLAMA_8B, "quantization_config", "num_experts", "sliding_window", "layer_types",
                               "vision_config", "rope_scaling", "text_config", "head_dim"}))  # fmt: skip


@given(st.sampled_from(["llama", "qwen3_moe", "gemma3_mm", "deepseek_v3", "jamba"]), KEYS, JUNK)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_config_makes_it_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str, value: object
) -> None:
    config = _write(tmp_path / "config.json", case(name)["config"] | {key: value})
    assert _run("--config", config, "--gpu", "L40S", "--format", "json") in (0, 1, 2)
    _answer(capsys)
