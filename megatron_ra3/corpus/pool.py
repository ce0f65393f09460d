"""Worker processes for preparing corpora, which live no longer than the process that wants their work.

They are forked from a process that has imported what they need, and nothing else: forking the caller itself would copy
its threads' locks, and fresh interpreters would import everything once each.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

_T = TypeVar("_T")
_WORTH_PROCESSES_BYTES = 8 << 20
_PRELOADED = ["megatron_ra3.corpus.assemble", "datasketch", "pygments", "webdataset"]


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes; an error in the block drops what waits to be done.

    Raises:
        ChildProcessError: a worker died, most likely for lack of memory.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"one of {workers} worker processes died (out of memory?); give fewer --workers and start again: what "
                "was examined is kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def map_in_processes(function: Callable[..., _T], jobs: Sequence[tuple[Any, ...]], workers: int) -> list[_T]:
    """`function(*job)` for every job, in their order; in this process where one is enough."""
    if workers == 1 or len(jobs) <= 1:
        return [function(*job) for job in jobs]
    with worker_pool(min(workers, len(jobs))) as pool:
        return list(pool.map(function, *zip(*jobs, strict=True)))


def num_workers(asked: int, num_bytes: int) -> int:
    """As many processes as were asked for; 0: one per core, but a single one for what is done before these start."""
    return asked or (1 if num_bytes < _WORTH_PROCESSES_BYTES else len(os.sched_getaffinity(0)))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would write on into a folder that the next start works in."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
