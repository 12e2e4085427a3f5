"""``berth plan`` and ``berth simulate``: files in, a plan out, with exit codes made for scripts.

0: all placed. 1: something is not (``simulate``: the fleet is too small as it is). 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from berth.codec import dump, replace
from berth.errors import BerthError
from berth.plan.contract import Apps, load_deployments, load_gpus
from berth.plan.contract_answer import Previous, answer, as_previous, gpus_of, load_previous, to_json
from berth.plan.contract_files import read_data
from berth.plan.diff import Rates, describe, diff_plans
from berth.plan.migrate import Migration, migrate
from berth.plan.planner import Options, check_strategy, solve
from berth.plan.types import STRATEGIES, Plan, Solution

OK, UNPLACED, BAD_INPUT = 0, 1, 2
COUNTS = ("moved", "restarted", "replaced", "lost", "added", "removed")
FORMATS = ("table", "json", "html", "svg")


def add_parser(commands: Any) -> None:
    """Add ``plan`` and ``simulate`` to the sub-parsers of ``berth``; each sets ``run``."""
    text = "place deployments on GPUs, from files; exit 0 all placed, 1 something unplaced, 2 bad input"
    plan = commands.add_parser("plan", help=text, description=text)
    plan.set_defaults(run=run)
    plan.add_argument("--gpus", required=True, metavar="FILE", help="hosts and their GPUs, JSON or YAML")
    plan.add_argument("--apps", required=True, metavar="FILE", help="deployments, JSON or YAML")
    plan.add_argument("--strategy", default="pack", metavar="|".join(STRATEGIES), help="(default: pack)")
    plan.add_argument("--previous", metavar="FILE", help="the plan in force: what --format json wrote, or a plan.json")
    plan.add_argument("--format", choices=FORMATS, default="table")
    plan.add_argument("--diff", action="store_true", help="what would move against --previous, its cost and its order")
    plan.add_argument("--max-moves", type=int, metavar="N", help="move at most N replicas that could stay")
    plan.add_argument("--repack", action="store_true", help="serve the strategy first, standing still second")
    plan.add_argument(
        "--reserve-mib", type=int, default=0, metavar="MIB", help="left unpromised on each GPU (default: 0)"
    )
    _add_rates(plan)
    text = "plan a fleet that is described by GPU types and counts: when it fills up, what a loss does"
    simulate = commands.add_parser("simulate", help=text, description=text)
    simulate.set_defaults(run=run)
    simulate.add_argument("file", metavar="FILE", help="the fleet and its load, JSON or YAML")
    simulate.add_argument("--format", choices=FORMATS, default="table")


def _add_rates(parser: argparse.ArgumentParser) -> None:
    rates = Rates()
    parser.add_argument(
        "--load-mib-s",
        type=float,
        default=rates.load_mib_per_s,
        metavar="MIB",
        help=f"MiB per second at which a starting replica fills a GPU (default: {rates.load_mib_per_s:.0f})",
    )
    parser.add_argument(
        "--start-s",
        type=float,
        default=rates.start_s,
        metavar="S",
        help=f"seconds that any start takes besides (default: {rates.start_s:.0f})",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments say; every failure is words and an exit code, never a traceback."""
    work: Callable[[argparse.Namespace], tuple[str, int]] = _simulate if args.command == "simulate" else _plan
    try:
        text, code = work(args)
    except BerthError as error:
        return _refuse(args, error)
    except RecursionError:
        return _refuse(args, BerthError("the input is nested too deep"))
    except MemoryError:
        return _refuse(args, BerthError("not enough memory for this input"))
    except Exception as error:
        # A traceback would end with 1, which means "something is unplaced" to whoever scripts this.
        where = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return _refuse(args, BerthError("a fault of Berth itself", found=fault, mend="report it with the input files"))
    return _print(text, code)


def _print(text: str, code: int) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (| head); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _refuse(args: argparse.Namespace, error: BerthError) -> int:
    if args.format == "json":
        parts = {"what": error.what, "found": error.found, "allowed": error.allowed, "mend": error.mend}
        told = {key: value if isinstance(value, (int, float)) else str(value) for key, value in parts.items() if value}
        return _print(json.dumps({"ok": False, "error": str(error), **told}, indent=2) + "\n", BAD_INPUT)
    print(f"berth {args.command}: {error}", file=sys.stderr)
    return BAD_INPUT


# --- plan -------------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> tuple[str, int]:
    from berth.report import fleet

    check_strategy(args.strategy)
    if args.max_moves is not None and args.max_moves < 0:
        raise BerthError("--max-moves is negative", found=args.max_moves, allowed=">= 0")
    rates = _rates(args)
    slots = load_gpus(read_data(Path(args.gpus), "--gpus"), args.reserve_mib)
    raw = load_previous(read_data(Path(args.previous), "--previous"), args.previous) if args.previous else None
    apps_path = Path(args.apps)
    apps = load_deployments(
        read_data(apps_path, "--apps"), slots, apps_path.parent, gpus_of(raw) if raw is not None else ()
    )
    previous = as_previous(raw, slots, apps.deployments) if raw is not None else None
    options = Options(max_moves=args.max_moves, repack=args.repack, regroup=True)
    before = previous.plan if previous else None
    solution = told(solve(slots, apps.deployments, args.strategy, before, options=options), apps)
    migration = migrate(before, solution.plan, apps.deployments, rates) if args.diff else None
    code = UNPLACED if solution.plan.unplaced else OK
    if args.format == "json":
        return to_json(_object(solution, previous, apps, migration)), code
    if args.format == "svg":
        return fleet.fleet_svg(solution), code
    lines = migration_lines(before, solution.plan, migration) if migration else []
    if args.format == "html":
        return fleet.fleet_html(solution, notes=apps.notes, changes=lines), code
    text = fleet.fleet_table(solution, color=sys.stdout.isatty(), notes=apps.notes)
    return text + ("\n" + "\n".join(lines) + "\n" if lines else ""), code


def _rates(args: argparse.Namespace) -> Rates:
    if not 0 < args.load_mib_s < float("inf"):
        raise BerthError("--load-mib-s is no rate", found=args.load_mib_s, allowed="> 0 MiB per second")
    if not 0 <= args.start_s < float("inf"):
        raise BerthError("--start-s is no time", found=args.start_s, allowed=">= 0 seconds")
    return Rates(args.load_mib_s, args.start_s)


def told(solution: Solution, apps: Apps) -> Solution:
    """``solution`` whose refusals also say what the footprint would take to fit."""
    unplaced = tuple(
        replace(item, reason=f"{item.reason}; its footprint: {apps.shortfalls[item.deployment]}")
        if item.deployment in apps.shortfalls
        else item
        for item in solution.plan.unplaced
    )
    return replace(solution, plan=replace(solution.plan, unplaced=unplaced))


def _object(solution: Solution, previous: Previous | None, apps: Apps, migration: Migration | None) -> dict[str, Any]:
    data = answer(solution, previous.numbers if previous else None)
    if apps.notes:
        data["notes"] = list(apps.notes)
    if migration is not None:
        data["diff"] = {
            "cost": dump(migration.cost),
            "elapsed_s": migration.elapsed_s,
            "ok": migration.ok,
            "refused": list(migration.refused),
        }
        data["steps"] = [dump_step(step) for step in migration.steps]
    return data


def dump_step(step: Any) -> dict[str, Any]:
    """A step of a migration as plain data."""
    return {**{key: getattr(step, key) for key in step.__dataclass_fields__}, "gpus": list(step.gpus)}


def migration_lines(old: Plan | None, new: Plan, migration: Migration) -> list[str]:
    """What changes, what it costs and in which order, for people."""
    changes = diff_plans(old, new)
    if not changes:
        return ["diff: nothing changes"]
    cost = migration.cost
    lines = ["diff against the previous plan:" if old else "diff: there was no plan, everything starts:"]
    lines += [f"  {line}" for line in describe(changes)]
    counts = [f"{getattr(cost, name)} {name}" for name in COUNTS]
    lines += [
        f"cost: {', '.join(counts)}; {cost.reload_mib} MiB of VRAM loaded anew; {cost.cold_start_s:.0f} s of cold "
        f"start in sum, {migration.elapsed_s:.0f} s in the order below",
        "order (seconds from the start):",
    ]
    lines += [
        f"  {number:>3}. {step.begin_s:>7.0f} {step.kind:<5} {step.deployment}@{step.slot}: {step.why}"
        for number, step in enumerate(migration.steps, 1)
    ]
    lines += [f"refused: {reason}" for reason in migration.refused]
    return lines


# --- simulate ---------------------------------------------------------------------------------------------------------


def _simulate(args: argparse.Namespace) -> tuple[str, int]:
    from berth.plan.simulate import load_fleet, simulate
    from berth.report import fleet_simulation

    path = Path(args.file)
    found = simulate(load_fleet(read_data(path, "fleet"), path.parent))
    code = UNPLACED if found.solution.plan.unplaced else OK
    if args.format == "json":
        return to_json(fleet_simulation.simulation_object(found)), code
    if args.format == "svg":
        return fleet_simulation.simulation_svg(found), code
    if args.format == "html":
        return fleet_simulation.simulation_html(found), code
    return fleet_simulation.simulation_table(found, color=sys.stdout.isatty()), code
