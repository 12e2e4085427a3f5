"""vLLM's worker on a simulated GPU."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from berth.gpu.sim import allocator


class SimGpuWorker(CPUWorker):  # type: ignore[misc]
    """Takes on the simulated GPU what vLLM really holds: the weights it loaded and the KV cache it was given.

    Never the planned figure, so that the driver's view stays an independent witness.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        tensors = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.get_model().parameters()}
        self._bytes = [sum(tensors.values())]
        self._held = [allocator.allocate(self._bytes[0], self.local_rank)]

    def compile_or_warm_up_model(self) -> Any:
        # Where nothing is compiled the CPU engine skips the run that gives a pipeline's later stages their buffers.
        if self.parallel_config.pipeline_parallel_size > 1 and self.model_runner.intermediate_tensors is None:
            self.model_runner.profile_run()
        return super().compile_or_warm_up_model()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        # The driver refuses before the memory is touched, as on a real card.
        self._bytes.append(sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors))
        self._held.append(allocator.allocate(self._bytes[-1], self.local_rank))
        super().initialize_from_config(kv_cache_config)

    def sleep(self, level: int = 1) -> None:
        """What vLLM's GPU worker gives back at level 1; the tensors themselves lie in the host's memory anyway."""
        while self._held:
            allocator.free(self._held.pop())

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._held = [allocator.allocate(held, self.local_rank) for held in self._bytes]
