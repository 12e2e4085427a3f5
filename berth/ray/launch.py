"""What a unit executes: resolve the slot's GPUs, then become ``ray start``.

``python -m berth.ray.launch FILE NAME``: FILE holds the nodes of this host by name, as the roles write it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from berth.codec import load
from berth.errors import BerthError
from berth.gpu.nvml import read_host
from berth.host.processes import Mark, write_mark
from berth.ray.start import NodeConfig, command, digest, environment


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
    os.execve(args[0], args, env)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
