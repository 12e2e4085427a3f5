"""``python -m berth.gpu.sim``: install a simulated driver, inject faults, hold memory, look, remove."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

from berth.codec import dump
from berth.errors import BerthError
from berth.gpu.sim import allocator, build, enter, environment
from berth.gpu.sim.profile import read_yaml, shipped


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 refused (the reason on stderr)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (BerthError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m berth.gpu.sim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    default = os.environ.get("BERTH_GPU_SIM")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--dir", type=Path, required=default is None, default=default and Path(default))
        made.set_defaults(run=run)
        return made

    install = command("install", _install, "build the library and write the profile; print the environment to use")
    install.add_argument("--profile", required=True, help=f"a YAML file, or one of: {', '.join(shipped())}")
    install.add_argument(
        "--seed", default=socket.gethostname(), help="UUIDs follow from it (default: this host's name)"
    )
    hold = command("hold", _hold, "hold memory on a simulated GPU, as a stranger would")
    hold.add_argument("--mib", type=int, required=True, help="MiB, to which the context comes")
    hold.add_argument("--device", type=int, default=0, help="CUDA device, by this process's CUDA_VISIBLE_DEVICES")
    hold.add_argument("--seconds", type=float, default=None, help="default: until killed")
    show = command("show", _show, "what the driver shows")
    show.add_argument("--json", action="store_true")
    command("remove", _remove, "take the simulation away")
    _add_faults(command("inject", None, "change what the running driver shows"))
    return parser


def _add_faults(inject: argparse.ArgumentParser) -> None:
    faults = inject.add_subparsers(required=True, metavar="FAULT")
    which = "index, UUID or PCI address"

    def fault(name: str, text: str) -> argparse.ArgumentParser:
        made = faults.add_parser(name, help=text, description=text)
        made.set_defaults(run=_inject, fault=name)
        return made

    fault("lose", "the GPU falls off the bus").add_argument("device", help=which)
    fault("restore", "undo the faults of one GPU, or every fault").add_argument("device", nargs="?", help=which)
    xid = fault("xid", "the driver reports an XID")
    xid.add_argument("device", help=which)
    xid.add_argument("code", type=int)
    leak = fault("leak", "memory in use that no process holds")
    leak.add_argument("device", help=f"{which}; of a MIG instance its UUID")
    leak.add_argument("mib", type=int)
    renumber = fault("renumber", "the cards change their indices, as after a restart")
    renumber.add_argument(
        "order", nargs="?", help="positions in the profile by their new index: 1,0,3,2 (default: reversed)"
    )
    fault("hide-processes", "the driver lists no pids, as in some containers")
    fault("show-processes", "the driver lists pids again")


def _install(options: argparse.Namespace) -> None:
    path = shipped().get(options.profile, Path(options.profile))
    build.install(options.dir, read_yaml(path), options.seed, str(path))
    for name, value in environment(options.dir).items():
        print(f"export {name}={value}")


def _inject(options: argparse.Namespace) -> None:
    where = options.dir
    match options.fault:
        case "lose":
            build.inject_card(where, options.device, lost=True)
        case "restore" if options.device:
            build.inject_card(where, options.device, lost=False, xid=None, leak_mib=0)
        case "restore":
            build.restore(where)
        case "xid":
            build.inject_card(where, options.device, xid=options.code)
        case "leak":
            build.inject_card(where, options.device, leak_mib=options.mib)
        case "renumber":
            build.inject(where, order=_order(where, options.order))
        case fault:
            build.inject(where, show_processes=fault == "show-processes")


def _order(where: Path, text: str | None) -> tuple[int, ...]:
    if text is None:
        return tuple(reversed(build.read_profile(where).order or ()))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BerthError("renumber: an order is positions with commas between", found=text, allowed="1,0,3,2") from None


def _hold(options: argparse.Namespace) -> None:
    os.environ["BERTH_GPU_SIM"] = str(options.dir.absolute())
    taken = allocator.allocate_mib(options.mib, options.device)
    print(f"pid {os.getpid()} holds {taken.mib:.0f} MiB on {taken.uuid}", flush=True)
    time.sleep(options.seconds if options.seconds is not None else 10**9)


def _show(options: argparse.Namespace) -> None:
    enter(options.dir)
    # Only now, when the simulated library is in place.
    from berth.gpu.nvml import read_host

    host = read_host(socket.gethostname())
    if options.json:
        print(json.dumps(dump(host), indent=2, sort_keys=True))
        return
    print(f"{host.host}: simulated driver {host.driver_version}, {host.vram_scale:g} MiB for each MiB held")
    for gpu in host.gpus:
        state = gpu.lost or f"{gpu.used_mib:>6} of {gpu.total_mib - gpu.reserved_mib} MiB used"
        print(f"{gpu.index:>3}  {gpu.uuid}  {gpu.product:<36} {state}" + (f"  XID {gpu.xid}" if gpu.xid else ""))
        for process in gpu.processes or ():
            who = f"{process.slot or '-'}  {process.command or '?'}"
            print(f"       pid {process.pid:<8} {process.vram_mib:>6} MiB  {who}")
        if gpu.processes is None and not gpu.lost:
            print("       the driver shows no processes")


def _remove(options: argparse.Namespace) -> None:
    print("removed" if build.remove(options.dir) else "nothing there")


if __name__ == "__main__":
    sys.exit(main())
