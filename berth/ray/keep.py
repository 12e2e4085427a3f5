"""What a slot's launcher becomes once its node runs: it waits for the raylet, in as little memory as Python takes.

``python -I -S keep.py PID SLOT``. ``ray start --block`` would do the same with all of Ray imported, which is a third of
what an idle slot costs (bench_slot_cost). So this file imports nothing of Berth, is run by its path, and expects to be
the parent of the raylet: berth.ray.launch made its process the one that orphans are given to.
"""

from __future__ import annotations

import os
import signal
import sys


def keep(raylet: int, slot: str) -> int:
    """Wait for the process ``raylet``, a child of this one; hand SIGTERM and SIGINT on to it.

    Returns the exit code for the unit: 0 when it was asked to end, else 1, so that it is started again.

    Raises:
        ChildProcessError: ``raylet`` is no child of this process.
    """
    asked = False

    def stop(_signal: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        # Not somebody else's by now: its pid is not free before the wait below has returned it.
        os.kill(raylet, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        pid, status = os.wait()
        if pid == raylet:
            break
    if asked:
        return 0
    code = os.waitstatus_to_exitcode(status)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    print(f"berth: the raylet of slot {slot} {how}; its unit starts it again", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2]))
