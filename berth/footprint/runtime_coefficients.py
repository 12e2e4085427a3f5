"""What cannot be derived from vLLM's source, fitted to start-up logs (tests/data/vllm_memory_cases.json).

``python -m bench.bench_footprint_cases --refit`` fits these again and prints them; the same bench judges them with
every case's model left out of the fit (docs/footprint.md has the errors). Medians, so that a log with another process
on the GPU does not pull them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficients:
    """Fitted constants, in MiB unless the name tells otherwise.

    ``graph_dense`` and ``graph_other`` are MiB per captured batch size and layer, for dense attention models and for
    those with experts or recurrent states; ``graph_ranks`` is what several ranks add. ``non_torch`` is what CUDA
    libraries take beside PyTorch and the context; ``unified`` adds to it where memory is the host's too.
    ``margin_rest`` and ``margin_graphs`` are what the bound adds to activation with non-torch, and to graphs.
    """

    graph_dense: float = 0.362
    graph_other: float = 0.442
    graph_ranks: float = 158.0
    non_torch: float = 312.0
    unified: float = 2623.0
    margin_rest: float = 200.0
    margin_graphs: float = 207.0


COEFFICIENTS = Coefficients()
