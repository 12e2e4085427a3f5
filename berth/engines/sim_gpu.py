"""The platform behind berth.engines.sim_platform. Imported by vLLM only under a simulation.

Apart from the worker, whose imports need a platform that is already resolved.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


class SimGpuPlatform(CpuPlatform):  # type: ignore[misc]
    """The CPU platform under the name of a GPU: Ray's key and the driver's variable for visible devices."""

    ray_device_key = "GPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "berth.engines.sim_worker.SimGpuWorker"
        super().check_and_update_config(vllm_config)
