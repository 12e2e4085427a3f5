"""vLLM's CPU engine standing on a simulated GPU, so that an app's config is the same with and without a GPU.

Registered as a vLLM platform plugin; says nothing unless a simulation is in force in this process's environment.
"""

from __future__ import annotations

import os


def register() -> str | None:
    """The platform class to use, or None to leave vLLM's own choice alone (vLLM's plugin protocol)."""
    return "berth.engines.sim_gpu.SimGpuPlatform" if os.environ.get("BERTH_GPU_SIM") else None
