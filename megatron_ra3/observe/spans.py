"""What this process does, when, and for whom it waits: noted in memory for about a microsecond a span.

Without it a run that is slow says so and not why: whether engines, one rank, the corpus or the disk is what the rest
waits for. Nothing here does I/O, nothing here raises; `journal` takes what was noted to disk. Pure Python.

The clock: microseconds since the epoch, read once at the start of recording and then counted on the monotonic clock, so
no correction of the wall clock tears a span. What is left between hosts `timeline` finds from the collectives.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

MAX_BUFFERED = 50_000
"""Records in memory at most; further ones are dropped, and counted, until a disk that hangs takes some."""
LONG_US = 5_000_000
"""A span that goes on for so long is written down before its end, so that others can see what this process is in."""
AGAIN_US = 60_000_000
"""How often it is repeated whose file this is, and how the engines are, for readers of the end of the file."""
IDLE_US, LEVEL_US = 100_000, 2_000_000
"""How far apart records of an engine's open queries lie: those that say idle or busy, and those that say how busy."""
MAIN = "MainThread"
NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class _Span:
    """A context manager; cheaper than one made of a generator."""

    __slots__ = ("_recorder", "begun_ns", "details", "ended_ns", "is_told", "thread", "what")

    def __init__(self, recorder: Recorder, what: str, details: dict[str, Any]) -> None:
        self._recorder = recorder
        self.what = what
        self.details = details
        self.is_told = False

    def __enter__(self) -> None:
        self.thread = threading.current_thread().name
        self._recorder.open_spans[id(self)] = self
        self.begun_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        self.ended_ns = time.monotonic_ns()
        self._recorder.open_spans.pop(id(self), None)
        self._recorder.append(self)


class Meter:
    """Thins out the changes of a count: when it is 0 stays true to `IDLE_US`, how large it is to `LEVEL_US`."""

    def __init__(self) -> None:
        self._told = (-LEVEL_US, 0)
        self._held: tuple[int, int] | None = None

    def change(self, at_us: int, count: int) -> list[tuple[int, int]]:
        """The records, as (microseconds, count), that this change makes due."""
        due = self.settle(at_us)
        wait_us = IDLE_US if (count == 0) != (self._told[1] == 0) else LEVEL_US
        if at_us - self._told[0] >= wait_us:
            self._told, self._held = (at_us, count), None
            return [*due, self._told]
        self._held = (at_us, count) if count != self._told[1] else None
        return due

    def settle(self, now_us: int) -> list[tuple[int, int]]:
        """A change that was held back and has lasted."""
        if self._held is None or now_us - self._held[0] < IDLE_US:
            return []
        self._told, self._held = self._held, None
        return [self._told]


class Recorder:
    """Spans, meetings and engines of this process; off until `start`. All methods may be called by any thread."""

    def __init__(self) -> None:
        self.is_on = False
        self.open_spans: dict[int, _Span] = {}
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._records: deque[_Span | dict[str, Any]] = deque()
        self._met: Counter[str] = Counter()
        self._engines: dict[str, dict[str, Any]] = {}
        self._meters: dict[str, Meter] = {}
        self._header: dict[str, Any] = {}
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._repeated_us = 0
        self._dropped = self._untold = 0

    # What is noted

    def span(self, what: str, *, awaits: str = "", **details: Any) -> AbstractContextManager[None]:
        """Note what is done inside; `awaits` says for whom, where all of it is waiting."""
        if not self.is_on:
            return NOTHING
        return _Span(self, what, {"for": awaits, **details} if awaits else details)

    def meeting(self, what: str, group: str, root: int | None = None) -> AbstractContextManager[None]:
        """Note a collective of the ranks that name the same `group`; only `root` is awaited where it is given.

        All of them pass the meetings of a group in one order, so its number tells readers which spans belong together.
        """
        if not self.is_on:
            return NOTHING
        number = self._met[group]
        self._met[group] += 1
        details = {"meet": group, "n": number}
        return _Span(self, what, details if root is None else {**details, "root": root})

    def engine(self, url: str, **values: Any) -> None:
        """Note what is known of an engine from now on: its `standing`, or figures it gives."""
        if not self.is_on:
            return
        with self._lock:
            self._engines.setdefault(url, {}).update(values)
        self.append({"engine": url, "at": self.now_us(), **values})

    def open_queries(self, url: str, count: int) -> None:
        """Note how many queries are open at an engine; thinned out, see `Meter`."""
        if not self.is_on:
            return
        with self._lock:
            due = self._meters.setdefault(url, Meter()).change(self.now_us(), count)
        self._note_open(url, due)

    def forget_engine(self, url: str) -> None:
        """Note that no process will listen there any more."""
        self.engine(url, standing="replaced")
        with self._lock:
            self._engines.pop(url, None)
            self._meters.pop(url, None)

    def join(self, start: int) -> None:
        """Tell this start of all ranks, by a number that they share, from earlier and later ones."""
        self._header["start"] = start
        if self.is_on:
            self.append({"start": start, "at": self.now_us()})

    def append(self, record: _Span | dict[str, Any]) -> None:
        """Keep a finished record until it is collected."""
        if len(self._records) < MAX_BUFFERED:
            self._records.append(record)
        else:
            self.count_dropped(1)

    # What is taken

    def start(self, **header: Any) -> None:
        """Begin; `header` says which process this is."""
        self._clear()
        self._repeated_us = self.now_us()
        self._header = {**header, "began": self._repeated_us}
        self.is_on = True

    def stop(self) -> None:
        """Note nothing any more, and forget what was not collected."""
        self.is_on = False
        self._clear()

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        return (self._epoch_ns + time.monotonic_ns()) // 1000

    def header(self) -> list[dict[str, Any]]:
        """What the beginning of every file must say: whose it is, and how the engines are."""
        return [{"process": dict(self._header), "at": self.now_us()}, *self._engine_states()]

    def collect(self) -> Iterator[dict[str, Any]]:
        """Records since the last call, as plain JSON values."""
        now_us = self.now_us()
        with self._lock:
            settled = {url: meter.settle(now_us) for url, meter in self._meters.items()}
        for url, due in settled.items():
            self._note_open(url, due)
        if now_us - self._repeated_us >= AGAIN_US:
            self._repeated_us = now_us
            yield from self.header()
        if self._untold:
            yield {"dropped": self._untold, "at": now_us}
            self._untold = 0
        while self._records:
            record = self._records.popleft()
            yield record if isinstance(record, dict) else self._ended(record)
        for span in list(self.open_spans.values()):
            if not span.is_told and now_us - self._us(span) >= LONG_US:
                span.is_told = True
                yield {"open": span.what, "at": self._us(span), **self._context(span)}

    def count_dropped(self, number: int) -> None:
        """Count records that are lost."""
        with self._lock:
            self._dropped += number
            self._untold += number

    def take_dropped(self) -> int:
        """Records that were lost since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def _ended(self, span: _Span) -> dict[str, Any]:
        begun_us = self._us(span)
        ended_us = (self._epoch_ns + span.ended_ns) // 1000  # rounded as beginnings are: what nests stays nested
        return {"span": span.what, "at": begun_us, "us": ended_us - begun_us, **self._context(span)}

    def _us(self, span: _Span) -> int:
        return (self._epoch_ns + span.begun_ns) // 1000

    def _context(self, span: _Span) -> dict[str, Any]:
        return span.details if span.thread == MAIN else {"thread": span.thread, **span.details}

    def _note_open(self, url: str, due: list[tuple[int, int]]) -> None:
        for at_us, count in due:
            with self._lock:
                self._engines.setdefault(url, {})["open"] = count
            self.append({"engine": url, "at": at_us, "open": count})

    def _engine_states(self) -> list[dict[str, Any]]:
        with self._lock:
            return [{"engine": url, "at": self.now_us(), **values} for url, values in self._engines.items()]


TIMELINE = Recorder()
"""The recorder of this process."""
