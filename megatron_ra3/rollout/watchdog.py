"""Ties the life of a server to the process that started it: `python -m megatron_ra3.rollout.watchdog PID COMMAND...`.

vLLM's engine processes outlive their API server when that is killed, and the API server outlives a killed trainer:
on a shared node both would hold the GPU for ever. The watchdog leads the server's process group. When the parent
`PID` is gone or the command has ended, for whatever reason, it kills the whole group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import NoReturn

POLL_S = 0.2
GRACE_S = 5.0


def main(argv: list[str]) -> NoReturn:
    """Run the command until it ends, the parent vanishes, or SIGTERM asks to stop; must lead its process group."""
    parent, command = int(argv[0]), argv[1:]
    deadline = float("inf")

    def stop(*_: object) -> None:
        nonlocal deadline
        deadline = min(deadline, time.monotonic() + GRACE_S)
        child.terminate()

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM's warning to all processes of a step, the server's included
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, stop)
    while child.poll() is None and os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(POLL_S)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("the group includes this process")


if __name__ == "__main__":
    main(sys.argv[1:])
