"""The platform behind berth.engines.sim_platform. Imported by vLLM only under a simulation.

Apart from the worker, whose imports need a platform that is already resolved.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.platforms.cpu import CpuPlatform


class SimGpuPlatform(CpuPlatform):  # type: ignore[misc]
    """The CPU platform under the name of a GPU: Ray's key and the driver's variable for visible devices."""

    ray_device_key = "GPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"

    def is_sleep_mode_available(self) -> bool:
        return True

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "berth.engines.sim_worker.SimGpuWorker"
        if vllm_config.parallel_config.world_size > 1:
            # The CPU engine binds each worker's threads to a NUMA node of its own and refuses more workers than there
            # are nodes; a host has GPUs enough on one.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        super().check_and_update_config(vllm_config)
