"""Reads chunks ahead of their use, so that a slow storage works while the trainer computes, and names what it awaits.

Only bytes are read ahead. The cursor does not know of them, so a run that dies with reads under way resumes exactly.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from megatron_ra3.corpus.reader import Chunk
from megatron_ra3.observe.spans import TIMELINE

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    read: Future[Chunk]
    until: int  # position of the stream up to which it is needed for certain


class Prefetcher:
    """The chunks in use and those to come, read by threads in the order they were asked for.

    Args:
        read: reads a chunk; what it raises, `get` raises for as long as the chunk is kept.
        place: names where a chunk lies.
        threads: reads at a time.
        capacity: chunks kept although nobody asked for them at the time; those last asked for stay.
        stall_s: a wait longer than this is logged, then at every doubling.
    """

    def __init__(
        self,
        read: Callable[[int], Chunk],
        place: Callable[[int], str],
        *,
        threads: int,
        capacity: int,
        stall_s: float,
    ) -> None:
        self._read = read
        self._place = place
        self._capacity = capacity
        self._stall_s = stall_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-chunk")
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._stalls = 0
        self.waited_s = 0.0
        """Seconds that `get` has waited."""

    def request(self, chunks: Iterable[int], *, until: int) -> None:
        """Has chunks read that are not here yet, for samples before the position `until`; returns at once."""
        for chunk in dict.fromkeys(chunks):
            kept = self._kept.pop(chunk, None) or _Kept(self._pool.submit(self._read, chunk), until)
            kept.until = max(kept.until, until)
            self._kept[chunk] = kept

    def release(self, position: int) -> None:
        """Forgets chunks that no sample from `position` on was asked from, beyond the capacity."""
        while len(self._kept) > self._capacity and next(iter(self._kept.values())).until <= position:
            self._kept.popitem(last=False)[1].read.cancel()

    def get(self, chunk: int) -> Chunk:
        """A chunk that was requested; waits until it is read, and raises what the reader raised."""
        read = self._kept[chunk].read
        if not read.done():
            with TIMELINE.span("samples", awaits="corpus"):
                self._wait(chunk, read)
        return read.result()

    def close(self) -> None:
        """Reads nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, chunk: int, future: Future[Chunk]) -> None:
        started_s, patience_s = time.monotonic(), self._stall_s
        while not wait([future], patience_s).done:
            self._stalls += patience_s == self._stall_s
            log.warning(
                "the stream waits for %s since %.0f s (stall %d of this process): slow storage; look there, or raise "
                "corpus.prefetch_samples or corpus.read_threads",
                self._place(chunk), time.monotonic() - started_s, self._stalls,
            )  # fmt: skip
            patience_s *= 2
        self.waited_s += time.monotonic() - started_s
