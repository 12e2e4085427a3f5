"""``berth plan`` and ``berth simulate`` as scripts see them: arguments in, text and an exit code out."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from berth.plan import command

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
GPUS, APPS, FLEET = (str(EXAMPLES / f"{name}.yml") for name in ("gpus", "apps", "fleet"))


def berth(*args: str) -> int:
    parser = argparse.ArgumentParser(prog="berth")
    command.add_parser(parser.add_subparsers(dest="command", required=True))
    parsed = parser.parse_args(args)
    code: int = parsed.run(parsed)
    return code


def write(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def small(tmp_path: Path, replicas: int = 1, gpus: int = 2, mib: int = 30_000) -> tuple[str, str]:
    cards = [{"uuid": f"GPU-{n}", "index": n, "product": "NVIDIA L40S", "memory_mib": 45_488} for n in range(gpus)]
    apps = {"deployments": [{"name": "chat", "replicas": replicas, "footprint_mib": mib}]}
    return (
        write(tmp_path / "gpus.json", {"hosts": [{"name": "a", "gpus": cards}]}),
        write(tmp_path / "apps.json", apps),
    )


@pytest.mark.parametrize("strategy", ["pack", "spread", "strict_pack", "strict_spread", "balanced"])
def test_every_strategy_answers_by_the_schema(capsys, tmp_path: Path, strategy: str):
    gpus, apps = small(tmp_path, replicas=2)
    assert berth("plan", "--gpus", gpus, "--apps", apps, "--strategy", strategy, "--format", "json") == 0
    data = json.loads(capsys.readouterr().out)
    jsonschema.validate(data, json.loads((ROOT / "docs" / "schemas" / "plan.schema.json").read_text()))
    assert (data["ok"], data["strategy"], len(data["assignments"])) == (True, strategy, 2)


def test_something_unplaced_is_exit_1_with_the_shortage(capsys, tmp_path: Path):
    gpus, apps = small(tmp_path, replicas=3)
    assert berth("plan", "--gpus", gpus, "--apps", apps, "--format", "json") == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"]
    (missing,) = data["unplaced"]
    assert missing["replica"] == 2
    # 45488 - 30000 are left on each GPU, 30000 are wanted.
    assert missing["shortage_mib"] == 14_512
    assert berth("plan", "--gpus", gpus, "--apps", apps) == 1
    assert "NOT PLACED chat: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--gpus", "/nowhere.yml"], "--gpus /nowhere.yml cannot be read; found: No such file or directory"),
        (["--apps", str(ROOT)], "cannot be read; found: Is a directory"),
        (["--strategy", "binpack"], "strategy is unknown; found: 'binpack'; allowed: pack, spread"),
        (["--previous", APPS], "unknown version"),
        (["--max-moves", "-1"], "--max-moves is negative; found: -1"),
        (["--reserve-mib", "-1"], "--reserve-mib is negative"),
        (["--load-mib-s", "0"], "--load-mib-s is no rate"),
        (["--start-s", "nan"], "--start-s is no time"),
        (["--apps", GPUS], "apps: "),
    ],
)
def test_bad_input_is_exit_2_in_words_or_as_an_object(capsys, change: list[str], message: str):
    args = ["plan", "--gpus", GPUS, "--apps", APPS, *change]
    assert berth(*args) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert berth(*args, "--format", "json") == 2
    told = capsys.readouterr()
    data = json.loads(told.out)
    assert data["ok"] is False
    assert message in data["error"]
    assert told.err == ""


def test_planning_again_from_its_own_answer_moves_nothing(capsys, tmp_path: Path):
    args = ["plan", "--gpus", GPUS, "--apps", APPS, "--strategy", "pack", "--format", "json"]
    assert berth(*args) == 0
    first = capsys.readouterr().out
    (tmp_path / "plan.json").write_text(first)
    assert berth(*args, "--previous", str(tmp_path / "plan.json"), "--diff") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["assignments"] == json.loads(first)["assignments"]
    assert again["summary"]["moves"] == 0
    assert again["steps"] == []
    assert again["diff"]["cost"]["reload_mib"] == 0


def test_a_lost_gpu_moves_its_replica_alone_and_the_diff_says_what_it_takes(capsys, tmp_path: Path):
    gpus, apps = small(tmp_path, replicas=2, gpus=3)
    assert berth("plan", "--gpus", gpus, "--apps", apps, "--format", "json") == 0
    first = json.loads(capsys.readouterr().out)
    previous = write(tmp_path / "plan.json", first)
    lost = first["assignments"][0]["gpus"][0]
    data = json.loads(Path(gpus).read_text())
    data["hosts"][0]["gpus"] = [item for item in data["hosts"][0]["gpus"] if item["uuid"] != lost]
    less = write(tmp_path / "less.json", data)
    args = ["plan", "--gpus", less, "--apps", apps, "--previous", previous, "--diff"]
    assert berth(*args, "--format", "json", "--load-mib-s", "1000", "--start-s", "10") == 0
    after = json.loads(capsys.readouterr().out)
    assert after["assignments"][1]["gpus"] == first["assignments"][1]["gpus"]
    assert [(step["kind"], step["gpus"]) for step in after["steps"]] == [("make", after["assignments"][0]["gpus"])]
    assert (after["diff"]["cost"]["moved"], after["diff"]["cost"]["replaced"]) == (0, 1)
    assert (after["summary"]["moves"], after["summary"]["replaced"]) == (0, 1)
    assert after["diff"]["elapsed_s"] == 40.0
    assert berth(*args) == 0
    text = capsys.readouterr().out
    assert "cost: 0 moved, 0 restarted, 1 replaced, 0 lost" in text
    assert "1 replica is replaced, its GPU is gone" in " ".join(text.split())
    assert "standing replica" not in text
    assert "30000 MiB of VRAM loaded anew" in text


def test_the_reserve_is_not_promised(tmp_path: Path):
    gpus, apps = small(tmp_path, gpus=1, mib=45_000)
    assert berth("plan", "--gpus", gpus, "--apps", apps) == 0
    assert berth("plan", "--gpus", gpus, "--apps", apps, "--reserve-mib", "512") == 1


def test_nothing_at_all_is_a_plan_too(capsys, tmp_path: Path):
    gpus, apps = write(tmp_path / "g", {"hosts": []}), write(tmp_path / "a", {"deployments": []})
    for form in command.FORMATS:
        assert berth("plan", "--gpus", gpus, "--apps", apps, "--format", form) == 0
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("args", [["plan", "--gpus", GPUS, "--apps", APPS, "--diff"], ["simulate", FLEET]])
def test_every_format_is_what_it_says_and_the_same_twice(capsys, args: list[str]):
    for form in command.FORMATS:
        assert berth(*args, "--format", form) == 0
        text = capsys.readouterr().out
        assert berth(*args, "--format", form) == 0
        assert capsys.readouterr().out == text
        if form == "json":
            assert json.loads(text)["ok"] is True
        elif form == "svg":
            assert ET.fromstring(text).tag.endswith("svg")
        elif form == "html":
            assert text.startswith("<!DOCTYPE html>")
        else:
            assert "chat" in text


def test_a_fault_of_our_own_is_no_traceback_and_not_exit_1(capsys, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(command, "solve", broken)
    assert berth("plan", "--gpus", GPUS, "--apps", APPS) == 2
    assert "a fault of Berth itself; found: ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback():
    code = (
        "import argparse, sys; from berth.plan import command; p = argparse.ArgumentParser();"
        "command.add_parser(p.add_subparsers(dest='command')); a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))"
    )
    args = [sys.executable, "-c", code, "plan", "--gpus", GPUS, "--apps", APPS, "--format", "html"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0
