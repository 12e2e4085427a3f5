"""Why an engine did not start: texts of vLLM, as logged in its issues and by its CPU engine, and what we make of them."""

# ruff: noqa: E501 - lines of logs as they are

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from berth.engines.start_errors import Planned, explain, planned_of
from berth.errors import BerthError

TERMS = {"weights": 15_300.0, "kv_cache": 8192.0, "activation": 1500.0, "cuda_graphs": 700.0, "cuda_context": 600.0}
PLANNED = Planned("chat", "gpu01-0", 26_000, 8192.0, TERMS)


def trace(
    frames: list[str], error: str, prefix: str = "(EngineCore pid=104) ERROR 05-05 07:35:19 [core.py:1136] "
) -> str:
    """A trace as vLLM's engine logs it."""
    lines = ["EngineCore failed to start.", "Traceback (most recent call last):"]
    for name in ["run_engine_core", "__init__", *frames]:
        lines += [
            f'  File "/venv/lib/python3.12/site-packages/vllm/v1/x.py", line 1, in {name}',
            "    code()",
            "    ^^^^",
        ]
    return "\n".join(prefix + line for line in [*lines, error])


def cuda(tried: str, total: str, free: str, used: str) -> str:
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {tried}. GPU 0 has a total capacity of {total} of "
        f"which {free} is free. {used} memory in use. Of the allocated memory 22.88 GiB is allocated by PyTorch, with 24.00 "
        "MiB allocated in private pools (e.g., CUDA Graphs), and 275.38 MiB is reserved by PyTorch but unallocated."
    )


LOAD = ["_init_executor", "load_model", "initialize_model", "create_weights"]
PROFILE = ["_initialize_kv_caches", "determine_available_memory", "profile_run", "_dummy_run", "forward"]
CACHE = ["_initialize_kv_caches", "initialize_from_config", "initialize_kv_cache", "initialize_kv_cache_tensors"]
GRAPHS = ["_initialize_kv_caches", "initialize_from_config", "compile_or_warm_up_model", "capture_model", "_dummy_run"]
SAMPLER = [
    "_initialize_kv_caches",
    "initialize_from_config",
    "compile_or_warm_up_model",
    "_dummy_sampler_run",
    "forward",
]
SIMULATED = "berth.gpu.sim.allocator.SimulatedOutOfMemory: simulated GPU GPU-1 is out of memory"
MINE = "Including non-PyTorch memory, this process has 43.70 GiB"

CASES = {
    # vllm #28143, with the sizes of a card of 44 GiB.
    "weights": (
        trace(LOAD, cuda("896.00 MiB", "44.42 GiB", "739.81 MiB", MINE)),
        [
            "term weights",
            "44749 MiB held by this process, 896 MiB more asked for",
            "15300 MiB planned of 26000",
            "vram_mib",
        ],
    ),
    "activation": (
        trace(PROFILE, cuda("1.50 GiB", "44.42 GiB", "739.81 MiB", MINE)),
        ["term activation", "1536 MiB more asked for, 740 free of 45486", "max_num_batched_tokens"],
    ),
    "kv_cache": (
        trace(CACHE, cuda("2.00 GiB", "44.42 GiB", "739.81 MiB", MINE)),
        ["term kv_cache", "8192 MiB planned of 26000", "max_model_len"],
    ),
    "graphs": (
        trace(GRAPHS, cuda("50.00 MiB", "44.42 GiB", "21.75 MiB", MINE)),
        ["term cuda_graphs", "700 MiB planned", "max_cudagraph_capture_size"],
    ),
    # vllm #27508: the process is named by a pid that it does not know, in a container.
    "sampler": (
        trace(SAMPLER, cuda("786.00 MiB", "79.11 GiB", "140.75 MiB", "Process 3270336 has 78.96 GiB"))
        + "\n"
        + trace(
            SAMPLER[:-1],
            "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try "
            "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.",
        ),
        ["term activation", "786 MiB more asked for", "max_num_seqs"],
    ),
    "others hold it": (
        trace(LOAD, cuda("896.00 MiB", "44.42 GiB", "739.81 MiB", "this process has 12.50 GiB")),
        ["no term of its footprint is wrong", "12800 MiB held by this process", "26000 MiB", "berth verify"],
    ),
    # vllm #34076.
    "one request": (
        trace(
            ["_initialize_kv_caches", "get_kv_cache_configs", "_check_enough_kv_cache_memory"],
            "ValueError: To serve at least one request with the model's max seq len (262144), (24.0 GiB KV cache is needed, "
            "which is larger than the available KV cache memory (3.18 GiB). Based on the available memory, the estimated "
            "maximum model length is 34736. Try increasing `gpu_memory_utilization`",
        ),
        ["term kv_cache", "262144", "24576 MiB needed, 3256 MiB there", "max_model_len: 34736 or less", "concurrency"],
    ),
    # vllm-omni #1842.
    "not free": (
        trace(
            ["init_device", "request_memory"],
            "ValueError: Free memory on device cuda:0 (11.99/139.8 GiB) on startup is less than desired GPU memory "
            "utilization (0.18, 25.16 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        ),
        ["no term of its footprint is wrong", "12278 MiB free of 143155", "25764 MiB, its footprint", "berth verify"],
    ),
    "larger weights": (
        "(EngineCore pid=1) INFO 05-07 02:13:52 [gpu_model_runner.py:5472] Model loading took 24.9 GiB memory and 0.9 seconds\n"
        + trace(["_check_enough_kv_cache_memory"], "ValueError: No available memory for the cache blocks. Try"),
        ["term weights", "25498 MiB", "15300 MiB planned of 26000"],
    ),
    "larger activations": (
        "(EngineCore pid=1) INFO 05-07 02:13:52 [gpu_model_runner.py:5472] Model loading took 14.9 GiB memory and 0.9 seconds\n"
        "(EngineCore pid=1) INFO 05-07 02:13:59 [gpu_worker.py:626] Available KV cache memory: -0.52 GiB\n"
        + trace(["_check_enough_kv_cache_memory"], "ValueError: No available memory for the cache blocks. Try"),
        ["term activation", "11275 MiB beside 15258 of weights", "1500 MiB planned"],
    ),
    "nothing known": (
        trace(["_check_enough_kv_cache_memory"], "ValueError: No available memory for the cache blocks. Try"),
        ["weights and activations leave nothing for the KV cache", "26000 MiB for all of them"],
    ),
    "the host's memory": (
        trace(
            ["determine_available_memory"],
            "ValueError: Available memory on node 0 (1.21/23.4 GiB) on kv cache allocation is less than requested memory "
            "for kv (4.0 GiB). Decrease --kv-cache-memory-bytes",
        ),
        ["the host's own memory", "1239 MiB free", "4096 MiB planned"],
    ),
    "simulated weights": (
        trace(["_init_executor", "load_model"], f"{SIMULATED}: asked 19000 MiB, free 12000 MiB, total 46068 MiB"),
        ["term weights", "19000 MiB asked for, 12000 free of 46068", "15300 MiB planned of 26000"],
    ),
    "simulated KV cache": (
        trace(["initialize_from_config"], f"{SIMULATED}: asked 9000 MiB, free 8500 MiB, total 46068 MiB"),
        ["term kv_cache", "9000 MiB asked for, 8500 free", "8192 MiB planned"],
    ),
    "simulated, others hold it": (
        trace(["initialize_from_config"], f"{SIMULATED}: asked 8192 MiB, free 1000 MiB, total 46068 MiB"),
        ["no term of its footprint is wrong", "8192 MiB asked for, 1000 free", "berth verify"],
    ),
    "no trace": ("RuntimeError: CUDA driver error: out of memory", ["term unknown", "26000 MiB, its footprint"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_term_the_figures_and_the_variable(case: str) -> None:
    text, words = CASES[case]
    found = explain(text, PLANNED)
    assert found is not None
    told = str(found)
    assert told.startswith("app chat, slot gpu01-0: the engine does not start: ")
    assert [word for word in words if word not in told] == [], told
    assert str(pickle.loads(pickle.dumps(found))) == told, "Serve could not carry it"


@pytest.mark.parametrize(
    "text",
    [
        "",
        trace(["load_model"], "ValueError: There is no module or parameter named 'lm_head' in LlamaModel"),
        "pydantic_core.ValidationError: User-specified max_model_len (4096) is greater than the derived max_model_len",
    ],
)
def test_what_was_not_memory_is_left_as_it_came(text: str) -> None:
    assert explain(text, PLANNED) is None


def test_what_a_process_and_its_children_print_is_found_where_it_goes_to_files(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; from berth.engines.start_errors import Printed\n"
        "print('before', flush=True); printed = Printed()\n"
        "subprocess.run([sys.executable, '-c', 'import sys; print(1); print(2, file=sys.stderr)'])\n"
        "found = printed.text(); open(sys.argv[1], 'w').write(found)"
    )
    with (tmp_path / "out").open("a") as out, (tmp_path / "err").open("a") as err:
        command = [sys.executable, "-c", code, str(tmp_path / "found")]
        subprocess.run(command, stdout=out, stderr=err, check=True, cwd=Path(__file__).parents[3])
    assert (tmp_path / "found").read_text() == "1\n\n2\n"


def test_where_output_goes_to_no_file_nothing_is_found() -> None:
    read, write = os.pipe()
    code = (
        "from berth.engines.start_errors import Printed\n"
        "printed = Printed(); print('x', flush=True); assert not printed.text()"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, check=False, cwd=root)
    os.close(read)
    os.close(write)
    assert done.returncode == 0


def test_a_plan_whose_terms_cannot_be_told_still_has_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTH_SLOT", "gpu01-0")
    config = {"model": "chat", "source": "/nowhere", "engine_args": {"kv_cache_memory_bytes": 1 << 30}, "gpus": 1}
    found = planned_of({**config, "vram_mib": 4000})
    assert (found.app, found.slot, found.vram_mib, found.kv_mib, found.terms) == ("chat", "gpu01-0", 4000, 1024.0, {})
    told = explain(CASES["weights"][0], found)
    assert isinstance(told, BerthError)
    assert "4000 MiB, its footprint" in str(told)
