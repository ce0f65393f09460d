"""Real gloo processes for tests: run one function on every rank and bring the results home.

A test of tensor, pipeline or data parallelism must cross process borders, otherwise a missing collective goes unseen.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

PRELOADED = ["megatron.core.optimizer", "megatron.core.pipeline_parallel", "tests.tiny_model", "transformers"]
"""Imported once, in the process that ranks are forked from: imports would take most of a test's time."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes of their own with torchrun's environment; return each rank's result.

    `fn` must be a module-level function; results must be picklable. `fn` initialises torch.distributed itself.
    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError when a rank is not done in time.
    No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The parent owns the rendezvous, as torchrun does: a port found free here could be taken before rank 0 listens.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = pickle.dumps((fn, args))
    environment = dict(os.environ)  # a fork server keeps that of its own start
    readers: list[Connection] = []
    processes = []
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(rank, world_size, store.port, payload, environment, writer))
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    try:
        return _collect(readers, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process in processes:
            _kill_group(process.pid)
            process.join()


def _collect(readers: list[Connection], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(readers))) - set(results))
            raise TimeoutError(f"ranks {missing} did not finish within {timeout_s} s")
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a traceback") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _kill_group(pid: int | None) -> None:
    """Kill a rank and its children; each rank leads its own process group."""
    assert pid is not None
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # killed before it became a leader, or gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _child(
    rank: int, world_size: int, port: int, payload: bytes, environment: dict[str, str], writer: Connection
) -> None:
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(payload)
        message = pickle.dumps((True, fn(*args)))
    except BaseException:  # noqa: BLE001 - the parent raises it
        message = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(message)
