"""The ``berth`` command: playbooks for people, with answers and exit codes made for a terminal and for scripts."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ansible_runner

from berth import __version__
from berth.footprint import command as footprint_command
from berth.plan import command as plan_command
from berth.plan.types import STRATEGIES

OK, DRIFT, COULD_NOT_TELL = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 as wanted, 1 drift (or a run that failed), 2 could not tell (or bad usage)."""
    args = _parser().parse_args(argv)
    code: int = args.run(args)
    return code


def up(args: argparse.Namespace) -> int:
    """The main job: ``ansible-playbook site.yml``."""
    extra = {"strategy": args.strategy} if args.strategy else {}
    return _stream("site.yml", args, extra)


def preflight(args: argparse.Namespace) -> int:
    """What would fail later, all in one list; changes nothing."""
    return _stream("playbooks/preflight.yml", args, {})


def down(args: argparse.Namespace) -> int:
    """Stop exactly what ``berth up`` started."""
    return _stream("playbooks/teardown.yml", args, {})


def verify(args: argparse.Namespace) -> int:
    """Compare plan, Ray and driver; print the map, or with ``--json`` one object."""
    if args.inventory and not Path(args.inventory).exists():
        return _could_not_tell(f"there is no inventory at {args.inventory}", args.json)
    results, runner = _collect("playbooks/verify.yml", args, ("placement_verify", "ansible.builtin.assert", "fail"))
    report = next((item for item in results if "exit_code" in item), None)
    if report is None:
        why = [item["msg"] for item in results if item.get("msg") and item.get("failed", True)]
        text = "; ".join(map(str, why)) or f"the playbook did not come to the verification ({runner.status})"
        return _could_not_tell(text, args.json)
    if args.json:
        keys = ("ok", "exit_code", "failures", "findings", "rows")
        print(json.dumps({key: report[key] for key in keys}, indent=2))
    else:
        print("\n".join(report["map"]))
    return int(report["exit_code"])


def _could_not_tell(why: str, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"ok": False, "exit_code": COULD_NOT_TELL, "error": why, "failures": [], "findings": []}))
    else:
        print(f"could not tell: {why}", file=sys.stderr)
    return COULD_NOT_TELL


def show_map(args: argparse.Namespace) -> int:
    """The plan in force as a picture: in the terminal, or as SVG."""
    from berth.plan.store import read_plan
    from berth.report.map import plan_map, plan_svg

    path = Path(args.plan or _root() / ".berth" / "controller" / "plan.json")
    plan = read_plan(path)
    if plan is None:
        print(f"there is no plan at {path}; mend: berth up", file=sys.stderr)
        return COULD_NOT_TELL
    print(plan_svg(plan) if args.format == "svg" else plan_map(plan))
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="berth", description="GPU placement for Ray Serve, planned, enforced and proved."
    )
    parser.add_argument("--version", action="version", version=f"berth {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("up", up, "plan, start, serve and verify (ansible-playbook site.yml)"),
        ("verify", verify, "compare plan, Ray and driver; exit 0 as wanted, 1 drift, 2 could not tell"),
        ("preflight", preflight, "look at the inventory and every host, list what would fail; change nothing"),
        ("down", down, "stop exactly what up started"),
        ("map", show_map, "draw the plan in force"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if name == "map":
            command.add_argument("--plan", help="a plan file (default: the local inventory's)")
            command.add_argument("--format", choices=["text", "svg"], default="text")
            continue
        command.add_argument("-i", "--inventory", help="inventory (default: the one of ansible.cfg)")
        command.add_argument("-e", "--extra-vars", action="append", default=[], metavar="KEY=VALUE")
        if name == "up":
            command.add_argument("--strategy", choices=STRATEGIES, help="cluster-wide strategy")
        if name == "verify":
            command.add_argument("--json", action="store_true", help="print one object with ok and failures[]")
    footprint_command.add_parser(commands)
    plan_command.add_parser(commands)
    return parser


def _root() -> Path:
    """The checkout: where site.yml is, above the working directory or above this file (an editable install)."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for candidate in (start, *start.parents):
            if (candidate / "site.yml").is_file() and (candidate / "roles" / "placement").is_dir():
                return candidate
    sys.exit("berth: no checkout of Berth here (site.yml); mend: cd into it")


def _command(playbook: str, args: argparse.Namespace, extra: dict[str, str]) -> list[str]:
    options = ["-i", str(Path(args.inventory).resolve())] if args.inventory else []
    for item in [*args.extra_vars, *(f"{key}={value}" for key, value in extra.items())]:
        options += ["-e", item]
    return [playbook, *options]


def _environment() -> dict[str, str]:
    # The environment that berth is installed in has the ansible that belongs to it.
    binaries = str(Path(sys.executable).parent)
    return {"ANSIBLE_CONFIG": str(_root() / "ansible.cfg"), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}


def _stream(playbook: str, args: argparse.Namespace, extra: dict[str, str]) -> int:
    """Run a playbook with its output on this terminal; 0 when it went through, else 1."""
    _, _, code = ansible_runner.run_command(
        executable_cmd=str(Path(sys.executable).parent / "ansible-playbook"),
        cmdline_args=_command(playbook, args, extra),
        host_cwd=str(_root()),
        envvars=_environment(),
        input_fd=sys.stdin,
        output_fd=sys.stdout,
        error_fd=sys.stderr,
    )
    return OK if code == 0 else DRIFT


def _collect(playbook: str, args: argparse.Namespace, actions: tuple[str, ...]) -> tuple[list[dict[str, Any]], Any]:
    """Run a playbook silently; the results of its ``actions``, in order."""
    results: list[dict[str, Any]] = []

    def keep(event: dict[str, Any]) -> bool:
        data = event.get("event_data", {})
        failed = event.get("event") in ("runner_on_failed", "runner_on_unreachable")
        if failed or (event.get("event") == "runner_on_ok" and data.get("task_action") in actions):
            results.append(dict(data.get("res") or {}))
        return False

    with tempfile.TemporaryDirectory(prefix="berth-runner-") as scratch:
        runner = ansible_runner.run(
            private_data_dir=scratch,
            project_dir=str(_root()),
            playbook=playbook,
            cmdline=shlex.join(_command(playbook, args, {})[1:]) or None,
            envvars=_environment(),
            event_handler=keep,
            quiet=True,
        )
    return results, runner


if __name__ == "__main__":
    sys.exit(main())
