"""The two modules as Ansible runs them: check mode, second run, and every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from berth.codec import dump
from berth.plan.store import previous_path, read_plan
from berth.ray.types import RayState
from tests.unit.plan.helpers import L40S, T4, gpu, host
from tests.unit.verify.scene import CLUSTER, Lab

ROOT = Path(__file__).parents[3]
CHAT = {"name": "chat", "engine": "light", "replicas": 2, "vram_mib": 9_828}


def hosts() -> list[dict[str, Any]]:
    big = host("gpu01", gpu("GPU-a", 0), gpu("GPU-b", 1))
    small = host("gpu02", gpu("GPU-c", 0, total=15_360, reserved=300, product=T4))
    return [
        {"host_gpus": dump(big), "rack": "r1", "zone": "z1"},
        {"host_gpus": dump(small), "rack": "r2", "zone": "z1", "slot_shapes": []},
    ]


def play(tmp_path: Path, tasks: list[tuple[str, dict[str, Any]]], *flags: str) -> list[dict[str, Any]]:
    """Runs each module call as one task of one play (starting Ansible is what takes the time)."""
    steps = [{"name": str(n), name: args, "ignore_errors": True} for n, (name, args) in enumerate(tasks)]
    # JSON is YAML, and a value of the test is data, never a template.
    book = [{"hosts": "localhost", "gather_facts": False, "connection": "local", "tasks": steps}]
    path = tmp_path / "play.yml"
    path.write_text(json.dumps(book))
    environment = {
        **os.environ,
        "ANSIBLE_LIBRARY": str(ROOT / "library"),
        "ANSIBLE_STDOUT_CALLBACK": "json",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
        "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
        "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", str(path), *flags]
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.stdout.lstrip().startswith("{"), done.stdout + done.stderr
    return [task["hosts"]["localhost"] for task in json.loads(done.stdout)["plays"][0]["tasks"]]


def plan_task(path: Path, /, **changes: Any) -> tuple[str, dict[str, Any]]:
    base = {"hosts": hosts(), "apps": [CHAT], "strategy": "pack", "cluster": CLUSTER, "path": str(path)}
    return "placement_plan", {**base, **changes}


def test_check_mode_tells_the_truth_and_writes_nothing(tmp_path):
    path = tmp_path / "plan.json"
    checked = play(tmp_path, [plan_task(path)], "--check", "--diff")[0]
    assert checked["changed"] is True
    assert not path.exists()
    assert checked["diff"]["before"] == ""
    assert "gpu01-0 NVIDIA L40S GPU-a: 19656 of 44956 MiB promised\n  chat@gpu01-0" in checked["diff"]["after"]
    assert checked["changes_text"] == ["start chat@gpu01-0: 2 replicas of 9828 MiB"]


def test_run_run_again_flip_and_shrink(tmp_path):
    path = tmp_path / "plan.json"
    first, second, flipped, shrunk = play(
        tmp_path,
        [
            plan_task(path),
            plan_task(path),
            plan_task(path, strategy="spread"),
            plan_task(path, strategy="spread", hosts=hosts()[:1]),
        ],
        "--diff",
    )
    assert (first["changed"], second["changed"], flipped["changed"], shrunk["changed"]) == (True, False, True, True)
    assert second["plan"] == first["plan"]
    assert second["changes"] == []
    assert second["diff"]["before"] == second["diff"]["after"]
    assert [slot["name"] for slot in first["slots_by_host"]["gpu01"]] == ["gpu01-0", "gpu01-1"]
    assert first["slots_by_host"]["gpu02"][0]["rack"] == "r2"
    assert flipped["changes_text"] == [
        "start chat@gpu02-0: 1 replica of 9828 MiB",
        "scale chat@gpu01-0: 2 -> 1 replica of 9828 MiB",
    ]
    assert shrunk["plan"]["retired"] == {"GPU-c": "gpu02-0"}
    assert dump(read_plan(path)) == shrunk["plan"]
    assert dump(read_plan(previous_path(path))) == flipped["plan"]


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown strategy": (
        {"strategy": "binpack"},
        ["strategy is unknown", "'binpack'", "pack, spread, strict_pack, strict_spread"],
    ),
    "too large": (
        {"apps": [{**CHAT, "name": "moe", "vram_mib": 58_235}]},
        ["moe is larger than any GPU here", "58235 MiB", L40S, "44956 MiB"],
    ),
    "more than there is": (
        {"apps": [{**CHAT, "replicas": 40}]},
        ["nothing was written", "31 of 40 replicas", "free by slot", "more is asked than there is"],
    ),
    "two of a name": ({"apps": [CHAT, CHAT]}, ["two apps have the same name", "chat"]),
    "unknown key": ({"apps": [{**CHAT, "vram": 5}]}, ["0.vram: unknown key"]),
    "unknown key of a host": ({"hosts": [{**hosts()[0], "shelf": 3}]}, ["hosts: 0.shelf: unknown key"]),
    "host twice": ({"hosts": hosts()[:1] * 2}, ["the same host is listed twice", "gpu01"]),
    "wrong shape": ({"hosts": [{**hosts()[0], "slot_shapes": [[0, 7]]}]}, ["names a GPU that is not there", "7"]),
    "strict_spread short": (
        {"strategy": "strict_spread", "apps": [{**CHAT, "replicas": 4}]},
        ["strict_spread needs 4 GPUs with one replica each, 3 have room"],
    ),
    "strict_pack short": (
        {"strategy": "strict_pack", "apps": [{**CHAT, "replicas": 9}]},
        ["strict_pack needs room for all 9 on one host", "gpu01 has room for 8", "gpu02 has room for 1"],
    ),
}


def test_every_bad_input_fails_in_words_and_writes_nothing(tmp_path):
    path = tmp_path / "plan.json"
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": 9}')
    cases = [*BAD.values(), ({"path": str(broken)}, ["unknown version", "found: 9", "broken.previous.json"])]
    answers = play(tmp_path, [plan_task(path, **changes) for changes, _ in cases])
    for answer, (changes, words) in zip(answers, cases, strict=True):
        assert answer.get("failed") is True, changes
        assert "Traceback" not in json.dumps(answer)
        for word in words:
            assert word in answer["msg"], answer["msg"]
    assert not path.exists()
    assert broken.read_text() == '{"version": 9}'


def test_allow_unplaced_writes_and_still_says_it(tmp_path):
    path = tmp_path / "plan.json"
    apps = [CHAT, {**CHAT, "name": "moe", "vram_mib": 58_235}]
    answer = play(tmp_path, [plan_task(path, apps=apps, allow_unplaced=True)])[0]
    assert answer["changed"] is True
    assert [item["deployment"] for item in answer["unplaced"]] == ["moe"]
    assert len(read_plan(path).unplaced) == 1


def test_standing_replicas_move_only_when_that_is_asked_for(tmp_path):
    path = tmp_path / "plan.json"
    spread = {"apps": [CHAT], "strategy": "spread"}
    large = {**spread, "apps": [CHAT, {**CHAT, "name": "large", "replicas": 1, "vram_mib": 40_000}]}
    on = [{"host_gpus": hosts()[0]["host_gpus"]}]
    tasks = [plan_task(path, hosts=on, **spread)]
    tasks += [plan_task(path, hosts=on, **large, max_moves=moves) for moves in (0, 1, 1)]
    _, refused, moved, again = play(tmp_path, tasks)
    assert "placement_max_moves" in refused["msg"]
    assert [item["kind"] for item in moved["changes"]] == ["start", "scale", "stop"]
    assert (moved["changed"], again["changed"]) == (True, False)


def test_a_pool_is_planned_turned_into_berths_and_refused_where_it_would_be_on_two_products(tmp_path):
    path = tmp_path / "plan.json"
    pool = {**CHAT, "placement": "pool"}
    mixed, first, again, back = play(
        tmp_path,
        [
            plan_task(path, apps=[pool], strategy="spread"),
            plan_task(path, apps=[{**pool, "products": [L40S]}], strategy="spread"),
            plan_task(path, apps=[{**pool, "products": [L40S]}], strategy="spread"),
            plan_task(path, apps=[{**CHAT, "products": [L40S]}], strategy="spread"),
        ],
    )
    assert "app chat: a pool is of one GPU product" in mixed["msg"]
    assert f"found: {L40S} with 9828 MiB; {T4} with 9828 MiB" in mixed["msg"]
    assert [(berth["slot"], berth["pool"]) for berth in first["plan"]["berths"]] == [("gpu01-0", 2), ("gpu01-1", 2)]
    assert (first["changed"], again["changed"], again["changes"]) == (True, False, [])
    assert [change["kind"] for change in back["changes"]] == ["regroup", "regroup"]


def verify_task(lab: Lab, **changes: Any) -> tuple[str, dict[str, Any]]:
    state = RayState(tuple(lab.nodes.values()), tuple(lab.apps.values()))
    seen = {name: item if isinstance(item, str) else dump(item) for name, item in lab.hosts.items()}
    base = {"plan": dump(lab.plan), "ray_state": dump(state), "hosts": seen, "cluster": CLUSTER}
    return "placement_verify", {key: value for key, value in {**base, **changes}.items() if value is not None}


def test_verify_as_a_module(tmp_path):
    good, drifting, silent = Lab(), Lab(), Lab()
    del drifting.apps["embed@a-0"]
    silent.hosts["b"] = "no route to host"
    missing = str(tmp_path / "none.json")
    fine, drift, failed, unknown, absent, garbled = play(
        tmp_path,
        [
            verify_task(good, fail_on_drift=True),
            verify_task(drifting),
            verify_task(drifting, fail_on_drift=True),
            verify_task(silent, fail_on_drift=True),
            verify_task(good, plan=None, path=missing),
            verify_task(good, hosts={"a": {"host": "a"}}),
        ],
    )
    assert (fine["ok"], fine["exit_code"], fine["changed"], fine["failures"]) == (True, 0, False, [])
    assert any("as wanted" in line for line in fine["map"])
    assert (drift["exit_code"], drift["changed"], drift.get("failed", False)) == (1, False, False)
    assert "app_missing" in [item["kind"] for item in drift["failures"]]
    assert failed["failed"] is True
    assert failed["exit_code"] == 1
    assert "app_missing: embed@a-0 [GPU-a-0-0]: found no such Serve app; wanted 1 RUNNING on a-0" in failed["msg"]
    assert unknown["exit_code"] == 2
    assert not unknown.get("failed", False)
    assert f"there is no plan at {missing}" in absent["msg"]
    assert "hosts.a: driver_version" in garbled["msg"]


@pytest.mark.parametrize("module", ["placement_plan", "placement_verify"])
def test_without_berth_the_module_says_what_is_missing(tmp_path, module):
    """In an interpreter that has Ansible and no berth."""
    code = (
        "import sys, types\n"
        "sys.modules['berth'] = None\n"
        f"sys.path.insert(0, {str(ROOT / 'library')!r})\n"
        "import json, ansible.module_utils.basic as basic\n"
        f"import {module} as shim\n"
        "print(type(shim.IMPORT_ERROR).__name__, basic.missing_required_lib('berth')[:40])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("str Failed to import the required Python lib"), done.stderr


@pytest.mark.parametrize("module", ["placement_plan", "placement_verify"])
def test_documentation_matches_the_code(module):
    """Every option of the code is documented and the other way round."""
    import ast

    import yaml

    tree = ast.parse((ROOT / "library" / f"{module}.py").read_text())
    texts = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.targets[0], ast.Name)
    }
    spec = next(
        ast.literal_eval(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "argument_spec"
    )
    options = yaml.safe_load(texts["DOCUMENTATION"])["options"]
    assert set(options) == set(spec)
    for name, option in options.items():
        told = {key: option.get(key) for key in ("type", "default", "required", "elements")}
        assert told == {key: spec[name].get(key) for key in told}, name
    assert yaml.safe_load(texts["RETURN"])
    assert yaml.safe_load(texts["EXAMPLES"])
