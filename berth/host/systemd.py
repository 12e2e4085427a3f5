"""systemd as the service manager: Berth's units on this host made what they must be, and nothing else touched.

A unit that runs tells by its process's environment with which node configuration and which unit text it was started;
a unit whose files say otherwise now is restarted, the others are left alone.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from berth.errors import BerthError

PREFIX = "berth-ray-"
WANTS_DIR = Path("/etc/systemd/system/multi-user.target.wants")
STEADY_S = 3.0
"""A unit counts as started when the same process has run this long: a node that cannot start exits before."""
START_S = 20.0
PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "NeedDaemonReload")
UP = ("active", "activating", "reloading")


@dataclass(frozen=True)
class Wanted:
    """A unit that must run: digests of its node's configuration and of its unit's text."""

    name: str
    config_sha1: str
    unit_sha1: str


@dataclass(frozen=True)
class Found:
    """A unit as systemd has it. The digests are those its process was started with, "" when none runs.

    ``sub`` is systemd's SubState: ``auto-restart`` is a unit whose process ended and that waits to be started again.
    """

    name: str
    active: str
    enabled: bool
    sub: str = ""
    pid: int = 0
    config_sha1: str = ""
    unit_sha1: str = ""


@dataclass(frozen=True)
class Step:
    """``verb`` is started, restarted, enabled or removed; ``why`` says what was found."""

    unit: str
    verb: str
    why: str

    def __str__(self) -> str:
        return f"{self.unit}: {self.verb} ({self.why})"


def differences(wanted: Sequence[Wanted], found: Sequence[Found]) -> list[Step]:
    """What must be done, in order: removals first (they free GPUs and ports), then the rest by name."""
    known = {unit.name: unit for unit in found}
    names = {unit.name for unit in wanted}
    steps = [
        Step(unit.name, "removed", "it is not wanted any more")
        for unit in sorted(found, key=lambda item: item.name)
        if unit.name not in names and (unit.active in UP or unit.active == "failed" or unit.enabled)
    ]
    for unit in sorted(wanted, key=lambda item: item.name):
        now = known.get(unit.name)
        if now is None or now.active not in UP:
            steps.append(Step(unit.name, "started", f"it is {now.active if now else 'not there'}"))
        elif now.pid and now.config_sha1 != unit.config_sha1:
            steps.append(Step(unit.name, "restarted", "its node's configuration changed"))
        elif now.pid and now.unit_sha1 != unit.unit_sha1:
            steps.append(Step(unit.name, "restarted", "its unit changed"))
        elif now.sub == "auto-restart":
            # What it waits to be started with may just have been mended.
            steps.append(Step(unit.name, "restarted", "its process ended and it waits to try again"))
        elif not now.enabled:
            steps.append(Step(unit.name, "enabled", "it would not come back after a boot"))
    return steps


def parse(shown: str, environ: Mapping[int, Mapping[str, str]]) -> list[Found]:
    """Units from the text of ``systemctl show`` (blocks of key=value) and the environments of their main processes."""
    units = []
    for block in shown.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if not values.get("Id"):
            continue
        pid = int(values.get("MainPID") or 0)
        env = environ.get(pid, {})
        units.append(
            Found(
                values["Id"].removesuffix(".service"),
                values.get("ActiveState", "inactive"),
                values.get("UnitFileState") == "enabled",
                values.get("SubState", ""),
                pid,
                env.get("BERTH_CONFIG_SHA1", ""),
                env.get("BERTH_UNIT_SHA1", ""),
            )
        )
    return units


def read(names: Sequence[str]) -> list[Found]:
    """The units ``names`` and every other unit of Berth's that systemd has or would start.

    Raises:
        BerthError: systemd does not answer.
    """
    listed = _systemctl("list-units", "--all", "--plain", "--no-legend", f"{PREFIX}*.service")
    known = {line.split()[0].removesuffix(".service") for line in listed.splitlines() if line.strip()}
    known |= {path.name.removesuffix(".service") for path in WANTS_DIR.glob(f"{PREFIX}*.service")}
    every = sorted(known | set(names))
    if not every:
        return []
    shown = _systemctl("show", f"--property={','.join(PROPERTIES)}", *(f"{name}.service" for name in every))
    pids = [int(line.partition("=")[2] or 0) for line in shown.splitlines() if line.startswith("MainPID=")]
    return parse(shown, {pid: _environ(pid) for pid in pids if pid})


def apply(steps: Sequence[Step]) -> None:
    """Do the steps; units are restarted side by side, since each has waited for nobody but itself.

    Raises:
        BerthError: a unit does not stay up; the end of its journal is in the message.
    """
    if not steps:
        return
    by_verb = {verb: [f"{step.unit}.service" for step in steps if step.verb == verb] for verb in VERBS}
    if by_verb["removed"]:
        _systemctl("disable", "--now", *by_verb["removed"])
        _systemctl("reset-failed", *by_verb["removed"], may_fail=True)
    _systemctl("daemon-reload")
    if enable := [*by_verb["started"], *by_verb["enabled"], *by_verb["restarted"]]:
        _systemctl("enable", "--quiet", *enable)
    if start := [*by_verb["started"], *by_verb["restarted"]]:
        _systemctl("reset-failed", *start, may_fail=True)
        _systemctl("restart", *start)
        _steady([unit.removesuffix(".service") for unit in start])


VERBS = ("removed", "restarted", "started", "enabled")


def _steady(names: Sequence[str]) -> None:
    deadline = time.monotonic() + START_S
    since: dict[str, tuple[int, float]] = {}
    while True:
        now = time.monotonic()
        units = {unit.name: unit for unit in read(names)}
        for name in names:
            unit = units[name]
            pid = unit.pid if unit.active == "active" else 0
            if since.get(name, (0, 0.0))[0] != pid:
                since[name] = (pid, now)
        waiting = [name for name in names if not since[name][0] or now - since[name][1] < STEADY_S]
        if not waiting:
            return
        if now > deadline:
            raise BerthError(
                "; ".join(f"unit {name} does not stay up: {journal(name)}" for name in waiting),
                mend="put right what its journal says (journalctl -u UNIT), then: ansible-playbook site.yml",
            )
        time.sleep(0.5)


def journal(name: str, lines: int = 15) -> str:
    """The end of a unit's journal."""
    done = subprocess.run(
        ["journalctl", "--no-pager", "--output=cat", f"--lines={lines}", f"--unit={name}.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "its journal is empty"


def _systemctl(*args: str, may_fail: bool = False) -> str:
    done = subprocess.run(["systemctl", *args], capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise BerthError(
            f"systemctl {' '.join(args)} failed",
            found=(done.stderr or done.stdout).strip(),
            mend="look at: systemctl status, journalctl --boot",
        )
    return done.stdout


def _environ(pid: int) -> dict[str, str]:
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in raw.split("\0") if "=" in item)
