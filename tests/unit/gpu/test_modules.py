"""The modules gpu_sim and gpu_info, run by ansible-playbook as a role runs them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
ANSIBLE = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
SIM = {"directory": "{{ dir }}", "profile": "l40s-x4", "seed": "gpu01"}
STEPS: list[dict[str, Any]] = [
    {"name": "check_fresh", "gpu_sim": SIM, "check_mode": True, "diff": True},
    {"name": "fresh_is", "ansible.builtin.stat": {"path": "{{ dir }}"}},
    {"name": "install", "gpu_sim": SIM},
    {"name": "again", "gpu_sim": SIM},
    {"name": "check_again", "gpu_sim": SIM, "check_mode": True},
    {"name": "info", "gpu_info": {"host": "gpu01"}, "environment": "{{ results.install.environment }}"},
    {
        "name": "info_check",
        "gpu_info": {"host": "gpu01"},
        "environment": "{{ results.install.environment }}",
        "check_mode": True,
    },
    {"name": "info_without", "gpu_info": {"host": "gpu01"}, "ignore_errors": True},
    {"name": "reseed", "gpu_sim": {**SIM, "seed": "gpu02"}, "diff": True},
    {
        "name": "malformed",
        "gpu_sim": {"directory": "{{ dir }}", "profile_data": {"driver_version": "580.1", "gpus": [{"product": 3}]}},
        "ignore_errors": True,
    },
    {"name": "no_profile", "gpu_sim": {"directory": "{{ dir }}"}, "ignore_errors": True},
    {
        "name": "without_berth",
        "gpu_sim": SIM,
        "ignore_errors": True,
        "environment": {"PYTHONPATH": "{{ no_berth }}"},
    },
    {"name": "check_absent", "gpu_sim": {"directory": "{{ dir }}", "state": "absent"}, "check_mode": True},
    {"name": "still_is", "ansible.builtin.stat": {"path": "{{ dir }}/profile.yml"}},
    {"name": "absent", "gpu_sim": {"directory": "{{ dir }}", "state": "absent"}},
    {"name": "absent_again", "gpu_sim": {"directory": "{{ dir }}", "state": "absent"}},
    {"name": "gone_is", "ansible.builtin.stat": {"path": "{{ dir }}"}},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if ANSIBLE is None:
        pytest.fail("ansible-playbook is not installed beside this interpreter")
    tmp = tmp_path_factory.mktemp("modules")
    (tmp / "no_berth" / "berth").mkdir(parents=True)
    (tmp / "no_berth" / "berth" / "__init__.py").write_text("raise ImportError('not installed')\n")
    tasks: list[dict[str, Any]] = []
    for step in STEPS:
        keep = {"results": "{{ results | default({}) | combine({'" + step["name"] + "': __step}) }}"}
        tasks += [{**step, "register": "__step"}, {"name": "keep", "ansible.builtin.set_fact": keep}]
    tasks.append(
        {"name": "write", "ansible.builtin.copy": {"content": "{{ results | to_json }}", "dest": f"{tmp}/results"}}
    )
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars": {
            "dir": str(tmp / "sim"),
            "no_berth": str(tmp / "no_berth"),
            "ansible_python_interpreter": sys.executable,
        },
        "tasks": tasks,
    }
    (tmp / "play.yml").write_text(yaml.safe_dump([play]))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "BERTH_", "LD_LIBRARY"))}
    env |= {"ANSIBLE_LIBRARY": str(ROOT / "library"), "ANSIBLE_HOME": str(tmp / "ansible"), "PYTHONPATH": str(ROOT)}
    command = [ANSIBLE, "-i", "localhost,", "-c", "local", "play.yml"]
    done = subprocess.run(command, cwd=tmp, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp / "results").read_text()) | {"dir": str(tmp / "sim")}


def test_check_mode_tells_and_changes_nothing(results: Any) -> None:
    assert results["check_fresh"]["changed"]
    assert results["check_fresh"]["reasons"] == ["profile or seed", "library", "missing files"]
    assert "NVIDIA L40S" in results["check_fresh"]["diff"]["after"]
    assert results["check_fresh"]["diff"]["before"] == ""
    assert not results["fresh_is"]["stat"]["exists"]
    assert (results["check_absent"]["changed"], results["still_is"]["stat"]["exists"]) == (True, True)


def test_second_run_is_unchanged(results: Any) -> None:
    changed = [results[step]["changed"] for step in ("install", "again", "check_again", "absent", "absent_again")]
    assert changed == [True, False, False, True, False]
    assert results["install"]["reasons"] == results["check_fresh"]["reasons"]
    assert results["again"]["reasons"] == []
    assert not results["gone_is"]["stat"]["exists"]


def test_environment_is_what_gpu_info_needs(results: Any) -> None:
    where = results["dir"]
    assert results["install"]["environment"] == {
        "LD_LIBRARY_PATH": f"{where}/lib",
        "BERTH_GPU_SIM": where,
        "BERTH_GPU_KERNEL_LOG": f"{where}/kernel.log",
    }
    found = results["info"]["host_gpus"]
    assert (found["host"], found["simulated"], found["vram_scale"]) == ("gpu01", True, 96.0)
    assert [gpu["product"] for gpu in found["gpus"]] == ["NVIDIA L40S"] * 4
    assert not results["info"]["changed"]
    assert results["info_check"]["host_gpus"] == found


def test_another_seed_is_a_difference_that_the_diff_shows(results: Any) -> None:
    assert results["reseed"]["reasons"] == ["profile or seed"]
    assert "seed: gpu01" in results["reseed"]["diff"]["before"]
    assert "seed: gpu02" in results["reseed"]["diff"]["after"]


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("malformed", ["profile_data", "gpus.0.product", "found 3"]),
        ("no_profile", ["profile, profile_data"]),
        ("without_berth", ["berth", "run role berth_agent"]),
        ("info_without", ["libnvidia-ml.so.1 cannot be loaded", "nvidia_driver_simulate"]),
    ],
)
def test_failures_tell_what_to_do(step: str, told: list[str], results: Any) -> None:
    if step == "info_without" and Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a real NVIDIA driver")
    assert results[step]["failed"]
    for part in told:
        assert part in results[step]["msg"]


@pytest.mark.parametrize("name", ["gpu_sim", "gpu_info"])
def test_documentation_says_what_the_module_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "library" / f"{name}.py"
    texts = {
        node.targets[0].id: yaml.safe_load(node.value.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    taken: dict[str, Any] = {}

    def capture(**arguments: Any) -> None:
        taken.update(arguments)
        raise SystemExit

    monkeypatch.setattr(module, "AnsibleModule", capture)
    with pytest.raises(SystemExit):
        module.main()
    documented = texts["DOCUMENTATION"]["options"]
    said = {key: {k: v for k, v in option.items() if k != "description"} for key, option in documented.items()}
    assert said == taken["argument_spec"]
    assert texts["DOCUMENTATION"]["module"] == name
    assert all(name in task for task in texts["EXAMPLES"])
    assert texts["RETURN"]
