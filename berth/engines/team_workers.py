"""The workers of one node of an engine over several slots: ``python -m berth.engines.team_workers CONFIG``.

What ``vllm serve --headless`` does for nodes without an API, with the very arguments that the leading replica has.
A worker that waits for another node does not notice that its own parent is gone, and Ray kills the children of a worker
that ends, but not theirs (core_worker.cc, KillChildProcs). Hence two processes: one that Ray may kill, and one that the
kernel then tells to end the whole group.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

from berth.engines.child import PR_SET_PDEATHSIG


def main(config: dict[str, Any]) -> int:
    """Run the workers until one of them ends; the exit code. ``config`` as in berth.engines.app.build, and ``node``."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    guard = os.getpid()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != guard:
        os.killpg(0, signal.SIGKILL)
    _work(config)
    return 0


def _work(config: dict[str, Any]) -> None:
    from vllm.usage.usage_lib import UsageContext

    from berth.engines.llm import engine_arguments, llm_config_of

    args = engine_arguments(llm_config_of(config))
    vllm_config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=True)
    if vllm_config.parallel_config.node_rank_within_dp:
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        MultiprocExecutor(vllm_config, monitor_workers=False).start_worker_monitor(inline=True)
    else:
        _engine(vllm_config)


def _engine(vllm_config: Any) -> None:
    """A whole engine, one of those that the leading replica shares its requests out to (data parallel)."""
    from vllm.utils.network_utils import get_tcp_uri
    from vllm.v1.engine.utils import CoreEngineProcManager
    from vllm.v1.executor import Executor

    sizes = vllm_config.parallel_config
    CoreEngineProcManager(
        local_engine_count=sizes.data_parallel_size_local,
        start_index=sizes.data_parallel_rank,
        local_start_index=0,
        vllm_config=vllm_config,
        local_client=False,
        handshake_address=get_tcp_uri(sizes.data_parallel_master_ip, sizes.data_parallel_rpc_port),
        executor_class=Executor.get_class(vllm_config),
        log_stats=False,
    ).monitor_engine_liveness()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
