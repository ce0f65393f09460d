"""Worker processes for preparing corpora, which live no longer than the process that wants their work.

They are forked from a process that has imported what they need, and nothing else: forking the caller itself would copy
its threads' locks, and fresh interpreters would import everything once each.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

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


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would write on into a folder that the next start works in."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
