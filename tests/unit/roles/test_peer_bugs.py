"""What the systems that Berth replaces do to hosts, and no file of ours may: docs/peers_bugs.md has them all."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("roles", "playbooks", "library", "action_plugins", "filter_plugins", "berth", "inventories")
ACTING = [
    *(ROOT / name for name in ("site.yml", "Makefile", "setup.sh")),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if path.is_file() and path.suffix != ".pyc"),
]
TASKS = [ROOT / "site.yml", *sorted((ROOT / "playbooks").glob("*.yml")), *sorted((ROOT / "roles").rglob("tasks/*.yml"))]
BY_NAME = r"ray stop|serve[ .]shutdown|pkill|killall|kill -9|kill -KILL|fuser -k|system prune|volume prune"
BLOCKING = {
    "time.sleep",
    "ray.get",
    "ray.wait",
    "subprocess.run",
    "subprocess.check_output",
    "requests.get",
    "requests.post",
}


def tasks(data: Any) -> Iterator[dict[str, Any]]:
    """Every task of a play or task file, those in blocks included."""
    for item in data if isinstance(data, list) else []:
        if isinstance(item, dict):
            yield item
            for key in ("tasks", "pre_tasks", "post_tasks", "handlers", "block", "rescue", "always"):
                yield from tasks(item.get(key))


def every_task() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, task) for path in TASKS for task in tasks(yaml.safe_load(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize(
    "wrong", ["ray stop --force", "from ray import serve; serve.shutdown()", "docker system prune -f"]
)
def test_the_pattern_of_what_ends_others_work_sees_it(wrong: str) -> None:
    assert re.search(BY_NAME, wrong)


def test_nothing_is_ended_by_name_and_nobody_elses_apps_are_shut_down() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in ACTING
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if re.search(BY_NAME, line)
    ]
    assert len(ACTING) > 100
    assert found == []


def test_apps_are_deployed_from_the_head_alone() -> None:
    callers = []
    for path, task in every_task():
        role = next(
            (task[key] for key in ("ansible.builtin.import_role", "ansible.builtin.include_role") if key in task), {}
        )
        if role.get("name") == "serve_apps" and role.get("tasks_from", "main") == "main":
            callers.append((path.name, task.get("when")))
    assert {name for name, _ in callers} == {"site.yml", "scale_out.yml", "rotate_secrets.yml", "roll.yml"}
    assert {when for _, when in callers} == {"inventory_hostname in groups['ray_head']"}
    modules = [path.relative_to(ROOT).as_posix() for path, task in every_task() if "serve_application" in task]
    assert modules == ["roles/serve_apps/tasks/main.yml"]


def test_no_task_waits_a_fixed_time() -> None:
    for path, task in every_task():
        waits = {"pause", "ansible.builtin.pause"} & set(task)
        assert not waits, f"{path.relative_to(ROOT)}: {task.get('name')}"
        wait_for = task.get("ansible.builtin.wait_for", task.get("wait_for"))
        assert wait_for is None or {"port", "path"} & set(wait_for), f"{path.relative_to(ROOT)}: {task.get('name')}"
        command = task.get("ansible.builtin.command", task.get("ansible.builtin.shell", ""))
        assert not re.search(r"\bsleep\b", str(command)), f"{path.relative_to(ROOT)}: {task.get('name')}"


def test_there_is_no_default_password() -> None:
    files = [*ROOT.glob("roles/*/defaults/*.yml"), *ROOT.glob("roles/*/vars/*.yml"), *ROOT.glob("inventories/**/*.yml")]
    given = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name, value in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items()
        if re.search(r"password|passwd|secret|token|api_key", name)
        and value
        and "/" not in str(value)
        # A template is no word: what it may be made of are variables, looked at here as well.
        and not str(value).startswith("{{")
    }
    assert given == set()
    (made,) = [task for _, task in every_task() if task.get("name") == "Make Ray's token where there is none"]
    assert "length=64" in made["ansible.builtin.copy"]["content"]
    assert (made["no_log"], made["ansible.builtin.copy"]["mode"]) == (True, "0600")


def test_asynchronous_code_never_blocks_its_loop() -> None:
    found = []
    for path in sorted((ROOT / "berth" / "engines").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)):
            calls = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
            wrong = [call for call in calls if call in BLOCKING or call.endswith(".result")]
            found += [f"{path.name}:{function.name}: {call}" for call in wrong]
    assert found == []
