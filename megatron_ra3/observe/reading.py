"""The file that a rank keeps of itself, read back: spans, and what was noted of engines. Pure Python.

A file may begin in the middle, as older parts are dropped, and end anywhere, as processes are killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ra3.observe.spans import MAIN

_SPAN = re.compile(rb'\{"span":"[^"]*","at":(\d+),')


@dataclass(slots=True)
class Span:
    """What one thread of a rank did from `begin_us` to `end_us`; `is_open`: it had not ended when last heard of."""

    rank: int
    what: str
    begin_us: int
    end_us: int
    thread: str = MAIN
    details: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    """Which start of the run this belongs to; ranks that ran together share it."""
    host: str = ""
    is_open: bool = False
    awaited: str = ""
    """For whom it waited, by `attribute`."""
    waited_us: int = 0
    """How much of it, from its beginning, was waiting."""

    @property
    def us(self) -> int:
        """Length."""
        return self.end_us - self.begin_us


@dataclass(slots=True)
class EngineNote:
    """What became known of an engine, by one rank."""

    url: str
    at_us: int
    values: Mapping[str, Any]
    rank: int


@dataclass(slots=True)
class Timeline:
    """All that the files of a run say; `clock_us` is what was taken off the clock of each host but the first."""

    spans: list[Span] = field(default_factory=list)
    engines: list[EngineNote] = field(default_factory=list)
    hosts: dict[int, str] = field(default_factory=dict)
    clock_us: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    unreadable_lines: int = 0


class _RankReader:
    """Takes in the records of one rank, oldest first; those of one process come together."""

    def __init__(self, timeline: Timeline, rank: int, window_us: tuple[int, int] | None) -> None:
        self._timeline = timeline
        self._rank = rank
        self._window_us = window_us
        self._own: list[Span] = []
        self._pending: dict[tuple[int, str, str], Span] = {}
        self._process: dict[str, Any] = {}
        self._last_us = 0

    def take(self, record: dict[str, Any]) -> None:
        timeline = self._timeline
        if "process" in record:
            self._begin(record["process"])
            return
        at_us = record.pop("at")
        self._last_us = max(self._last_us, at_us + record.get("us", 0))
        if "start" in record:
            self._process["start"] = record["start"]
        elif "dropped" in record:
            timeline.dropped += record["dropped"]
        elif "engine" in record:
            timeline.engines.append(EngineNote(record.pop("engine"), at_us, record, self._rank))
        elif self._window_us is None or self._window_us[0] <= at_us <= self._window_us[1]:
            self._take_span(at_us, record)

    def settle(self) -> None:
        """The process has written no more."""
        for span in self._pending.values():
            span.end_us = max(self._last_us, span.begin_us)
            self._own.append(span)
        for span in self._own:
            span.start, span.host = self._process.get("start", 0), self._process.get("host", "")
        self._timeline.spans += self._own
        self._own.clear()
        self._pending.clear()

    def _begin(self, process: dict[str, Any]) -> None:
        if process["began"] != self._process.get("began"):
            self.settle()
            self._process = {}
            self._timeline.hosts[self._rank] = process["host"]
        self._process |= process

    def _take_span(self, at_us: int, record: dict[str, Any]) -> None:
        is_open = "open" in record
        what, length_us = record.pop("open" if is_open else "span"), record.pop("us", 0)
        thread = record.pop("thread", MAIN)
        span = Span(self._rank, what, at_us, at_us + length_us, thread, record, is_open=is_open)
        key = (at_us, what, thread)
        if is_open:
            self._pending[key] = span
        else:
            self._pending.pop(key, None)
            self._own.append(span)


def read_rank(timeline: Timeline, rank: int, lines: Iterable[bytes], window_us: tuple[int, int] | None = None) -> None:
    """Add one rank's lines, oldest first, and of spans those that begin within the window.

    A span without an end ends where the last word of its process does.
    """
    reader = _RankReader(timeline, rank, window_us)
    for line in lines:
        if window_us is not None and (span := _SPAN.match(line)) and not window_us[0] <= int(span[1]) <= window_us[1]:
            continue  # of a long run nearly all: not worth parsing
        record = parsed(line)
        if record is None:
            timeline.unreadable_lines += bool(line.strip())
        else:
            reader.take(record)
    reader.settle()


def rank_lines(folder: Path, rank: int) -> Iterator[bytes]:
    """A rank's lines, oldest first."""
    for name in (".1.jsonl", ".jsonl"):
        path = folder / f"rank-{rank:05d}{name}"
        if path.is_file():
            with path.open("rb") as file:
                yield from file


def parsed(line: bytes) -> dict[str, Any] | None:
    """A record; None for what is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "at" in record else None
