"""Starts the ranks of `ra3 midtrain` as a launcher would, from one process that has imported everything already.

A fresh interpreter spends seconds on imports, a run of this size takes two: forking a prepared one makes a hundred
trials affordable. When one rank fails the others are ended, as torchrun and srun do.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = ["megatron_ra3.cli", "megatron_ra3.em", "megatron_ra3.convert", "megatron.core.optimizer", "transformers"]
GRACE_S = 10.0
"""What ranks get to end by themselves after one of them has ended well, and after SIGTERM where it has not."""
_CAPABILITIES_V3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2


@dataclass(frozen=True)
class Handicap:
    """What a run's processes suffer from their start.

    max_file_bytes: no file grows beyond, as on a full disk; 0: no limit. obeys_modes: root, too, is refused by the
    permissions of files. clock_seed: the wall clock jumps by hours at random; 0: it does not.
    """

    max_file_bytes: int = 0
    obeys_modes: bool = False
    clock_seed: int = 0


class Ranks:
    """One start of the command on `world_size` ranks, whose output is appended to `log`."""

    def __init__(self, arguments: Sequence[str], world_size: int, log: Path, handicap: Handicap) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = _store() if world_size > 1 else None
        port = self._store.port if self._store is not None else 0
        self.processes: list[ForkServerProcess] = []
        for rank in range(world_size):
            environment = dict(os.environ) | (_environment(rank, world_size, port) if world_size > 1 else {})
            process = context.Process(target=_rank, args=(list(arguments), environment, str(log), handicap))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """No rank has ended yet."""
        return all(process.exitcode is None for process in self.processes)

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to the ranks that are still there."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            if self.processes[rank].exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self, timeout_s: float) -> int:
        """Wait for all ranks and return the exit code of the first that ended; TimeoutError: none did in time."""
        deadline = time.monotonic() + timeout_s
        try:
            while self.running:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no rank has ended within {timeout_s:g} s")
                time.sleep(0.005)
            code = next(process.exitcode for process in self.processes if process.exitcode is not None)
            if code not in (0, 75):
                self.send(signal.SIGTERM, range(len(self.processes)))
            for process in self.processes:
                process.join(GRACE_S)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return code


def _store() -> Any:
    """The rendezvous, in this process as in torchrun's: a port found free could be taken before rank 0 listens."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(arguments: list[str], environment: dict[str, str], log: str, handicap: Handicap) -> None:
    """What a rank's process does: the command, with its output in `log`."""
    import torch

    from megatron_ra3.cli import main

    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    if handicap.max_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (handicap.max_file_bytes, resource.RLIM_INFINITY))
    if handicap.obeys_modes:
        _obey_modes()
    if handicap.clock_seed:
        _let_clock_jump(random.Random(handicap.clock_seed))
    sys.exit(main(arguments))


def _obey_modes() -> None:
    """Give up root's capabilities to ignore the permissions of files; nothing to do for other users."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Sets(ctypes.Structure):
        _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]

    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = Header(_CAPABILITIES_V3, 0), (Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    kept = ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    sets[0].effective &= kept
    sets[0].permitted &= kept
    if libc.capset(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capset")


def _let_clock_jump(draw: random.Random) -> None:
    """Let time.time be off by up to twelve hours either way, by another amount after every fiftieth look on average."""
    true_time, offset_s = time.time, draw.uniform(-43200.0, 43200.0)

    def jumping_time() -> float:
        nonlocal offset_s
        if draw.random() < 0.02:
            offset_s = draw.uniform(-43200.0, 43200.0)
        return true_time() + offset_s

    time.time = jumping_time
