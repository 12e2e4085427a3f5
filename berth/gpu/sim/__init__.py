"""The simulated driver: a real libnvidia-ml.so.1 that shows the GPUs of a profile (docs: nvml.c, profile.py)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from berth.errors import BerthError
from berth.gpu.sim.build import environment

__all__ = ["directory", "enter", "environment", "kernel_log", "vram_scale"]


def directory() -> Path | None:
    """The simulation in force in this process's environment, None without one."""
    found = os.environ.get("BERTH_GPU_SIM")
    return Path(found) if found else None


def vram_scale() -> float:
    """Simulated MiB for each MiB really held; 1.0 without a simulation.

    Raises:
        BerthError: the simulation named by BERTH_GPU_SIM is not there.
    """
    where = directory()
    if where is None:
        return 1.0
    try:
        lines = (where / "profile.compiled").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BerthError(
            f"BERTH_GPU_SIM={where} is no GPU simulation: {error}", mend="install it, or unset it"
        ) from None
    return float(next(line.split()[1] for line in lines if line.startswith("vram_scale ")))


def kernel_log() -> Path | None:
    """The file that stands for the kernel's log under a simulation."""
    where = directory()
    return where / "kernel.log" if where else None


def enter(where: Path) -> None:
    """Put the simulation in ``where`` in force in this process, whose LD_LIBRARY_PATH was not set when it started.

    Works while no NVML is loaded yet: the loader takes a library that is loaded already for one of the same soname.

    Raises:
        BerthError: no simulation there.
    """
    try:
        ctypes.CDLL(str(where / "lib" / "libnvidia-ml.so.1"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BerthError(f"there is no GPU simulation in {where}: {error}", mend="install it first") from None
    os.environ.update(environment(where))
