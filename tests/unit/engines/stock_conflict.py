"""One Ray node of two simulated GPUs that an outer placement group holds, and vLLM on it; by the runtime's interpreter.

``python -m tests.unit.engines.stock_conflict MODEL TEMP_DIR`` prints what came of it as a line of JSON. All in one
actor: vLLM's import alone takes ten seconds of CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

GIVE_UP_S = 5
"""vLLM waits half an hour for its placement group."""
ENGINE_ARGS = {"max_model_len": 256, "max_num_seqs": 2, "enforce_eager": True}


class Engine:
    """A replica's process in the slot."""

    async def run(self, model: str) -> dict[str, Any]:
        from berth.engines.llm import slot_server

        assert slot_server, "vLLM is imported here, before two threads do it at once"
        waited, why = await asyncio.gather(asyncio.to_thread(stock), failing(model))
        return {"stock": waited, "why": why, "ours": await ours(model)}


def stock() -> dict[str, Any]:
    """What vLLM's Ray executor does first: its error, and Ray's state of the group it asked for meanwhile."""
    from ray.util import placement_group_table
    from vllm.config import ParallelConfig
    from vllm.v1.executor import ray_utils

    ray_utils.PG_WAIT_TIMEOUT = GIVE_UP_S
    outer = set(placement_group_table())
    told: list[str] = []

    def begin() -> None:
        config = ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="ray")
        try:
            ray_utils.initialize_ray_cluster(config, require_gpu_on_driver=False)
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=begin)
    thread.start()
    seen: list[str] = []
    while thread.is_alive():
        seen += [item["state"] for name, item in placement_group_table().items() if name not in outer]
        time.sleep(0.5)
    return {"error": told, "states": sorted(set(seen)), "polls": len(seen)}


async def failing(model: str) -> str:
    """A replica whose KV cache is too small for a request: what it says."""
    from berth.engines.replica import Replica

    config = {"model": "small", "engine": "llm", "source": model, "gpus": 1, "vram_mib": 1000}
    replica = Replica.__new__(Replica)
    try:
        await replica.__init__({**config, "engine_args": {**ENGINE_ARGS, "kv_cache_memory_bytes": 1 << 16}})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it started"


async def ours(model: str) -> dict[str, Any]:
    """Berth's engine over both GPUs, which asks Ray for nothing."""
    from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

    from berth.engines.llm import slot_server

    args = {**ENGINE_ARGS, "kv_cache_memory_bytes": 2 << 20}
    server = slot_server({"model": "chat", "engine": "llm", "source": model, "engine_args": args, "gpus": 2})
    await server.start()
    request = CompletionRequest(model="chat", prompt="hi", max_tokens=3, ignore_eos=True)
    tokens = [answer.usage.completion_tokens async for answer in await server.completions(request)]
    return {"tokens": tokens, "pid": os.getpid(), "held": held()}


def held() -> list[list[int]]:
    """The pids on each GPU, by NVML."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [sorted(item.pid for item in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) for handle in handles]


def main(model: str, temp_dir: str) -> None:
    import ray
    from ray.util import placement_group

    ray.init(
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=temp_dir,
    )
    outer = placement_group([{"CPU": 1, "GPU": 2}])
    ray.get(outer.ready(), timeout=60)
    engine = ray.remote(Engine).options(num_cpus=1, runtime_env={"env_vars": {"BERTH_SLOT": "gpu01-0"}}).remote()
    free = ray.available_resources().get("GPU", 0.0)
    print(json.dumps({"free_gpus": free, **ray.get(engine.run.remote(model), timeout=240)}), flush=True)
    ray.kill(engine)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
