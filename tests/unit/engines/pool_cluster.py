"""A Ray of a head and a node for each slot named, with Serve, that obeys as gateway_cluster.py does."""

from __future__ import annotations

import sys

from tests.unit.engines.gateway_cluster import obey


def main(port: int, vram_mib: int, slots: list[str]) -> None:
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for number, name in enumerate(slots):
        cluster.add_node(
            num_cpus=2,
            num_gpus=1,
            object_store_memory=100 << 20,
            resources={"VRAM_MB": vram_mib},
            labels={"berth.role": "slot", "berth.slot": name, "berth.gpu": f"GPU-{number}"},
            env_vars={"CUDA_VISIBLE_DEVICES": str(number)},
        )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    obey(port)
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
