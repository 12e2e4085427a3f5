"""What a unit executes: resolve the slot's GPUs, then ``ray start``.

``python -m berth.ray.launch FILE NAME``: FILE holds the nodes of this host by name, as the roles write it. The head's
launcher becomes ``ray start --block``, which watches all that a head consists of. A slot's becomes berth.ray.keep.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import psutil

from berth.codec import load
from berth.errors import BerthError
from berth.gpu.nvml import read_host
from berth.host.processes import Mark, terminate, write_mark
from berth.ray import keep
from berth.ray.start import NodeConfig, command, digest, environment

PR_SET_CHILD_SUBREAPER = 36
"""linux/prctl.h"""


def resolve(node: NodeConfig) -> tuple[str, ...]:
    """The CUDA device of each of the slot's GPUs now: an index, or the UUID itself for a MIG instance.

    Raises:
        BerthError: a GPU of the slot is gone or lost; starting anyway would put replicas on a stranger's GPU.
    """
    if not node.gpu_uuids:
        return ()
    seen = {gpu.uuid: gpu for gpu in read_host(node.name).gpus}
    devices = []
    for uuid in node.gpu_uuids:
        gpu = seen.get(uuid)
        if gpu is None or gpu.lost:
            raise BerthError(
                f"slot {node.name}: its GPU {uuid} is {gpu.lost if gpu else 'not there'}; the slot does not start",
                found=", ".join(sorted(seen)) or "no GPU",
                mend="look at the host's driver, then: ansible-playbook site.yml",
            )
        devices.append(uuid if gpu.mig_parent else str(gpu.index))
    return tuple(devices)


def main(path: str, name: str) -> None:
    nodes = json.loads(Path(path).read_text(encoding="utf-8"))
    if name not in nodes:
        sys.exit(f"{path} has no node {name}; it has {', '.join(sorted(nodes))}; mend: ansible-playbook site.yml")
    node = load(NodeConfig, nodes[name], f"{path}: {name}")
    try:
        env = environment(node, resolve(node))
    except BerthError as error:
        sys.exit(str(error))
    env["BERTH_CONFIG_SHA1"] = digest(nodes[name])
    temp = Path(node.temp_dir)
    temp.mkdir(parents=True, exist_ok=True)
    # Left by a node that was killed: Ray would take it for a cluster that still runs here ("already running at").
    (temp / "ray_current_cluster").unlink(missing_ok=True)
    slot = node.name if node.kind == "slot" else None
    write_mark(temp, Mark(node.cluster, env["BERTH_UNIT"], slot))
    os.chdir(temp)
    args = command(node)
    print("berth:", " ".join(args), flush=True)
    if slot is None:
        os.execve(args[0], args, env)
    _run_slot(slot, node.cluster, args, env)


def _run_slot(slot: str, cluster: str, args: list[str], env: dict[str, str]) -> NoReturn:
    # Where no control group ends them, those of a launcher that was killed still hold the slot's ports and GPUs.
    terminate(cluster, units=frozenset({env["BERTH_UNIT"]}))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit(f"slot {slot}: prctl: {os.strerror(ctypes.get_errno())}")
    if code := subprocess.run(args, env=env, check=False).returncode:
        sys.exit(code)
    raylets = [child.pid for child in psutil.Process().children() if child.name() == "raylet"]
    if len(raylets) != 1:
        sys.exit(f"slot {slot}: ray start ended well and left {len(raylets)} raylets; Ray's logs: {os.getcwd()}")
    # Isolated and without site-packages: nothing is imported that it does not need.
    os.execve(sys.executable, [sys.executable, "-I", "-S", str(keep.__file__), str(raylets[0]), slot], env)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
