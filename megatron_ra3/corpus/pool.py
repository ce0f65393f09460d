"""Worker processes for preparing corpora: forked from a process that has imported what they need, and nothing else.

Forking the caller itself would copy its threads' locks; starting fresh interpreters would import everything once each.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of `workers` processes."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["megatron_ra3.corpus.assemble"])
    return ProcessPoolExecutor(workers, mp_context=context)
