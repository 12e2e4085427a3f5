"""The role ray_runtime on this machine, through ansible-playbook: tiny locks, a wheelhouse, no index."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from berth.host.wheelhouse import Target, build
from tests.wheels import write_wheel

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.e2e
PLAY = """
- name: Runtime
  hosts: berth
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - name: Directories
      ansible.builtin.import_role: {name: berth}
    - name: Agent
      ansible.builtin.import_role: {name: berth_agent, tasks_from: find}
    - name: Choose the previous one
      ansible.builtin.import_role: {name: ray_runtime, tasks_from: rollback}
      when: back | default(false)
    - name: Runtime
      ansible.builtin.import_role: {name: ray_runtime}
    - name: Unlock
      ansible.builtin.import_role: {name: berth, tasks_from: unlock}
"""


def version(lock: Path) -> str:
    return hashlib.sha1(lock.read_text().rstrip("\n").encode()).hexdigest()[:12]


SEVERAL_PLAYS = """
- name: One that asks for the agent
  hosts: berth
  gather_facts: false
  tasks:
    - name: Agent
      ansible.builtin.import_role: {name: berth_agent, tasks_from: find}
    - name: Unlock
      ansible.builtin.import_role: {name: berth, tasks_from: unlock}

- name: One as in site.yml
  hosts: berth
  gather_facts: false
  tasks:
    - name: Directories
      ansible.builtin.import_role: {name: berth}
    - name: Agent
      ansible.builtin.import_role: {name: berth_agent}
    - name: Unlock
      ansible.builtin.import_role: {name: berth, tasks_from: unlock}
"""


@dataclass
class Host:
    """A state directory on this machine, with an agent's environment that is this test's own Python."""

    where: Path

    @property
    def root(self) -> Path:
        return self.where / "state/runtime"

    def lock(self, number: int) -> Path:
        return self.where / f"v{number}.txt"

    def link(self, name: str) -> str:
        link = self.root / name
        return link.resolve().name if link.is_symlink() else ""

    def python(self, code: str, environment: str = "current") -> str:
        command = [str(self.root / environment / "bin/python"), "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def play(
        self, lock: Path, *args: str, wheelhouse: str = "wheelhouse", back: bool = False, book: str = PLAY
    ) -> Play:
        variables = {
            "berth_cluster": "rt",
            "berth_state_dir": str(self.where / "state"),
            "berth_run_dir": str(self.where / "run"),
            "berth_agent_root": str(self.where / "agent"),
            "berth_agent_wheelhouse_source": str(self.where / wheelhouse),
            "ray_runtime_lock": str(lock),
            "back": back,
        }
        env = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        # Nothing but the wheelhouse may be found.
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/"}
        (self.where / "play.yml").write_text(book)
        command = [str(BIN / "ansible-playbook"), str(self.where / "play.yml"), "-i", str(ROOT / "inventories/local")]
        command += ["-e", json.dumps(variables), *args]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        return Play(done.returncode, done.stdout + done.stderr)


@dataclass
class Play:
    rc: int
    output: str

    def ok(self) -> Play:
        assert self.rc == 0, self.output[-5000:]
        return self

    @property
    def changed(self) -> int:
        found = re.search(r"localhost +: ok=\d+ +changed=(\d+)", self.output)
        assert found, self.output[-3000:]
        return int(found.group(1))

    def task(self, name: str) -> str:
        """What a task printed; empty when it did not run."""
        parts = re.split(r"(?m)^TASK \[", self.output)
        return next((part for part in parts if part.split("]")[0].endswith(name)), "")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    where = tmp_path_factory.mktemp("runtime")
    made = Host(where)
    wheels = where / "index"
    locks = []
    for number in (1, 2, 3):
        write_wheel(wheels, "ray", f"{number}.0")
        write_wheel(wheels, "tiny", "0.5")
        made.lock(number).write_text(f"# Version {number}.\nray=={number}.0\ntiny==0.5\n")
        locks.append(made.lock(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        patch.setenv("PIP_NO_INDEX", "1")
        build(where / "wheelhouse", locks, Target())
    agent = where / "agent" / version(ROOT / "roles/berth_agent/files/agent.txt") / "bin"
    agent.mkdir(parents=True)
    (agent.parent / ".complete").write_text("agent.txt\n")
    (agent / "python").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    (agent / "python").chmod(0o755)
    # Berth's own wheel, which the agent's role would have brought.
    (where / "state").mkdir()
    wheel = next((ROOT / ".berth/dist").glob("berth-*.whl"))
    (where / "state" / wheel.name).write_bytes(wheel.read_bytes())
    return made


def test_check_mode_on_a_fresh_host_says_what_would_be_and_does_nothing(host: Host) -> None:
    play = host.play(host.lock(1), "--check", "--diff").ok()
    assert "changed: [localhost]" in play.task("Install with pip, v1.txt")
    assert "changed: [localhost]" in play.task("Point to the environment in use")
    assert not host.root.exists()


def test_a_fresh_host_is_installed_without_an_index(host: Host) -> None:
    host.play(host.lock(1)).ok()
    assert host.link("current") == version(host.lock(1))
    assert host.link("previous") == ""
    assert host.python("import ray, tiny, berth; print(ray.VERSION, tiny.VERSION)") == "1.0 0.5"


def test_a_second_run_changes_nothing(host: Host) -> None:
    before = sorted(str(path) for path in host.where.rglob("*"))
    assert host.play(host.lock(1)).ok().changed == 0
    assert host.play(host.lock(1), "--check", "--diff").ok().changed == 0
    assert sorted(str(path) for path in host.where.rglob("*")) == before


def test_what_was_changed_by_hand_is_found_and_repaired(host: Host) -> None:
    site = next((host.root / "current/lib").glob("python*/site-packages"))
    (site / "tiny.py").write_text("broken")
    write_wheel(host.where / "stray", "stray", "9")
    pip = [str(host.root / "current/bin/pip"), "install", "-q", "--no-index", "--find-links", str(host.where / "stray")]
    subprocess.run([*pip, "stray"], check=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
    told = host.play(host.lock(1), "--check").ok().task("Say how the environment differs from its lock")
    assert "tiny 0.5 is damaged (tiny.py); stray 9 is not in the lock" in " ".join(told.split())
    assert (site / "tiny.py").read_text() == "broken"
    assert host.play(host.lock(1)).ok().changed == 2
    assert host.python("import tiny; print(tiny.VERSION)") == "0.5"
    assert not (site / "stray.py").exists()


def test_another_lock_lies_beside_and_the_link_moves(host: Host) -> None:
    check = host.play(host.lock(2), "--check", "--diff").ok()
    assert version(host.lock(2)) in check.task("Point to the environment in use")
    assert host.link("current") == version(host.lock(1))
    host.play(host.lock(2)).ok()
    assert (host.link("current"), host.link("previous")) == (version(host.lock(2)), version(host.lock(1)))
    assert host.python("import ray; print(ray.VERSION)") == "2.0"
    assert host.python("import ray; print(ray.VERSION)", "previous") == "1.0"


def test_a_rollback_goes_back_and_holds_until_it_is_undone(host: Host) -> None:
    one, two = version(host.lock(1)), version(host.lock(2))
    check = host.play(host.lock(2), "--check", "--diff", back=True).ok()
    assert f"{two} -> {one}" in check.output
    assert "changed: [localhost]" in check.task("Point to the environment in use")
    assert host.link("current") == two
    # No index and no wheelhouse: it is still there.
    host.play(host.lock(2), back=True).ok()
    assert (host.link("current"), host.link("previous")) == (one, two)
    again = host.play(host.lock(2)).ok()
    assert again.changed == 0
    assert f"{one} stands in for {two}" in " ".join(again.output.split())
    host.play(host.lock(2), back=True).ok()
    assert (host.link("current"), host.link("previous")) == (two, one)


def test_a_failed_installation_leaves_what_ran_as_it_was(host: Host) -> None:
    lock = host.where / "v9.txt"
    lock.write_text("ray==9.0\n")
    play = host.play(lock, "-e", "berth_agent_wheelhouse_source=''", "-e", f"ray_runtime_wheelhouse={host.where}/index")
    assert play.rc != 0
    text = " ".join(play.output.split())
    assert "the packages of v9.txt could not be installed; what ran before is untouched" in text
    assert "No matching distribution found for ray==9.0" in text
    assert not (host.root / version(lock)).exists()
    assert (host.link("current"), host.link("previous")) == (version(host.lock(2)), version(host.lock(1)))


def test_a_wheelhouse_of_another_lock_is_refused(host: Host) -> None:
    lock = host.where / "other" / "v2.txt"
    lock.parent.mkdir()
    lock.write_text("ray==2.0\n")
    play = host.play(lock)
    assert play.rc != 0
    assert "was built from another v2.txt" in " ".join(play.output.split())


def test_an_interrupted_installation_is_begun_anew_and_the_oldest_environment_goes(host: Host) -> None:
    """Three versions, two kept; the first stays while a process runs from it."""
    one, two, three = (version(host.lock(number)) for number in (1, 2, 3))
    half = host.root / three / "lib"
    half.mkdir(parents=True)
    (half / "half").touch()
    sleeper = subprocess.Popen([str(host.root / one / "bin/python"), "-c", "import time; time.sleep(600)"])
    try:
        time.sleep(0.3)
        host.play(host.lock(3)).ok()
        assert not (half / "half").exists()
        assert (host.link("current"), host.link("previous")) == (three, two)
        assert (host.root / one).is_dir(), "somebody runs from it"
    finally:
        sleeper.kill()
        sleeper.wait()
    play = host.play(host.lock(3)).ok()
    assert play.changed == 1
    assert not (host.root / one).exists()


def test_an_agent_that_an_earlier_play_has_found_is_still_there(host: Host) -> None:
    """Playbooks that import each other are one run; its second play must not forget what the first one registered."""
    mark = next((host.where / "agent").glob("*/.complete"))
    before = mark.read_text()
    mark.write_text((ROOT / ".berth/dist/.sources").read_text()[:40])
    try:
        host.play(host.lock(1), book=SEVERAL_PLAYS).ok()
    finally:
        mark.write_text(before)
