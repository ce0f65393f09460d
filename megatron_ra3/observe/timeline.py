"""Reads the timelines of all ranks of a run as one: on one clock, with what each wait was for.

Prevents the guess about a slow run. Every rank's file says when it reached a collective; the rank that reached it last
is the one that the others waited for, from their own arrival to its arrival. What is left of a collective then is the
exchange itself. Spans that say whom they await (engines, the corpus, the jail) are waits as a whole. Pure Python.

Between hosts wall clocks differ. Nobody leaves a collective of all ranks before the last one has come, so all leave it
at nearly one moment: the median difference of those moments is how far a host's clock is ahead, within what a message
takes.
"""

from __future__ import annotations

import json
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ra3.observe.journal import FOLDER
from megatron_ra3.observe.spans import MAIN

EVERYONE = "all"


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


def read_timeline(run_folder: Path) -> Timeline:
    """Everything in the run folder, waits attributed; FileNotFoundError when there is nothing."""
    folder = run_folder / FOLDER
    ranks = sorted({int(path.name[5:10]) for path in folder.glob("rank-*.jsonl")})
    if not ranks:
        raise FileNotFoundError(f"{folder}: no timeline; not a run folder, or logging.timeline_megabytes=0")
    timeline = Timeline()
    for rank in ranks:
        files = [path for name in (".1.jsonl", ".jsonl") if (path := folder / f"rank-{rank:05d}{name}").is_file()]
        read_rank(timeline, rank, (line for path in files for line in path.read_bytes().splitlines()))
    align(timeline)
    attribute(timeline.spans)
    return timeline


def read_rank(timeline: Timeline, rank: int, lines: Iterable[bytes]) -> None:
    """Add one rank's lines, oldest first. A span without an end ends where the last word of its process does."""
    own: list[Span] = []
    pending: dict[tuple[int, str, str], Span] = {}
    process: dict[str, Any] = {}
    last_us = 0

    def settle() -> None:
        for span in pending.values():
            span.end_us = max(last_us, span.begin_us)
            own.append(span)
        pending.clear()
        for span in own:
            span.start, span.host = process.get("start", 0), process.get("host", "")
        timeline.spans += own
        own.clear()

    for line in lines:
        record = _parsed(line)
        if record is None:
            timeline.unreadable_lines += bool(line)
            continue
        if "process" in record:
            if record["process"]["began"] != process.get("began"):
                settle()
                process = record["process"]
                timeline.hosts[rank] = process["host"]
            process |= record["process"]
            continue
        at_us = record.pop("at")
        last_us = max(last_us, at_us + record.get("us", 0))
        if "start" in record:
            process["start"] = record["start"]
        elif "dropped" in record:
            timeline.dropped += record["dropped"]
        elif "engine" in record:
            timeline.engines.append(EngineNote(record.pop("engine"), at_us, record, rank))
        else:
            span, is_open = _span(rank, at_us, record)
            key = (at_us, span.what, span.thread)
            if is_open:
                pending[key] = span
            else:
                pending.pop(key, None)
                own.append(span)
    settle()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "at" in record else None


def _span(rank: int, at_us: int, record: dict[str, Any]) -> tuple[Span, bool]:
    is_open = "open" in record
    what, length_us = record.pop("open" if is_open else "span"), record.pop("us", 0)
    thread = record.pop("thread", MAIN)
    return Span(rank, what, at_us, at_us + length_us, thread, record, is_open=is_open), is_open


# One clock


def align(timeline: Timeline) -> None:
    """Put all hosts on the clock of the first rank's."""
    offsets = host_offsets_us(timeline.spans, timeline.hosts)
    for span in timeline.spans:
        ahead_us = offsets.get(span.host, 0)
        span.begin_us -= ahead_us
        span.end_us -= ahead_us
    for note in timeline.engines:
        note.at_us -= offsets.get(timeline.hosts.get(note.rank, ""), 0)
    timeline.clock_us = offsets


def host_offsets_us(spans: Iterable[Span], hosts: Mapping[int, str]) -> dict[str, int]:
    """How far the clock of each host is ahead of the lowest rank's, as the collectives of all ranks tell."""
    if len(set(hosts.values())) < 2:
        return {}
    first = min(hosts)
    apart: dict[str, list[int]] = defaultdict(list)
    for members in meetings(spans):
        if members[0].details["meet"] != EVERYONE or "root" in members[0].details:
            continue
        at = {span.rank: span.end_us for span in members}
        if first in at:
            for rank, end_us in at.items():
                if hosts[rank] != hosts[first]:
                    apart[hosts[rank]].append(end_us - at[first])
    return {host: int(statistics.median(found)) for host, found in apart.items()}


# For whom


def meetings(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Spans of all ranks that were one collective; those that a rank has not left yet are left out."""
    found: dict[tuple[int, str, int], list[Span]] = defaultdict(list)
    for span in spans:
        if span.start and "meet" in span.details and not span.is_open:
            found[span.start, span.details["meet"], span.details["n"]].append(span)
    yield from (members for members in found.values() if len(members) > 1)


def attribute(spans: Sequence[Span]) -> None:
    """Say of every span for whom it waited, and how long."""
    for span in spans:
        if "for" in span.details:
            span.awaited, span.waited_us = span.details["for"], span.us
    for members in meetings(spans):
        last = max(members, key=lambda span: span.begin_us)
        if "root" in last.details:
            last = next((span for span in members if span.rank == last.details["root"]), last)
        for span in members:
            waited_us = min(last.begin_us - span.begin_us, span.us)
            if waited_us > 0:
                span.awaited, span.waited_us = f"rank {last.rank}", waited_us


# Engines


def busy_intervals(notes: Iterable[EngineNote]) -> dict[str, list[tuple[int, int]]]:
    """When each engine had open queries, as sorted intervals; an engine that is lost has none."""
    changes: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    last_us = 0
    for note in sorted(notes, key=lambda note: note.at_us):
        last_us = max(last_us, note.at_us)
        if note.values.get("standing") in ("lost", "given up", "replaced"):
            changes[note.url].append((note.at_us, False))
        elif "open" in note.values:
            changes[note.url].append((note.at_us, note.values["open"] > 0))
    return {url: _where_true(found, last_us) for url, found in changes.items()}


def out_intervals(notes: Iterable[EngineNote]) -> dict[str, list[tuple[int, int]]]:
    """When each engine did not serve after it had, from its loss to its return or to the end of what is known."""
    changes: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    served: set[str] = set()
    last_us = 0
    for note in sorted(notes, key=lambda note: note.at_us):
        last_us = max(last_us, note.at_us)
        standing = note.values.get("standing")
        if standing == "serving":
            served.add(note.url)
        if standing is not None and note.url in served:
            changes[note.url].append((note.at_us, standing not in ("serving", "replaced")))
    return {url: _where_true(found, last_us) for url, found in changes.items()}


def _where_true(changes: Sequence[tuple[int, bool]], last_us: int) -> list[tuple[int, int]]:
    """Intervals between a change to True and the next one to False."""
    found: list[tuple[int, int]] = []
    since: int | None = None
    for at_us, is_true in changes:
        if is_true and since is None:
            since = at_us
        elif not is_true and since is not None:
            found.append((since, at_us))
            since = None
    return found if since is None else [*found, (since, last_us)]


def alone(busy: Mapping[str, Sequence[tuple[int, int]]]) -> list[tuple[int, int, str]]:
    """Sorted (begin, end, engine) in which that engine was the only busy one of several."""
    if len(busy) < 2:
        return []
    edges = sorted(
        (at_us, change, url)
        for url, intervals in busy.items()
        for begin, end in intervals
        for at_us, change in ((begin, 1), (end, -1))
    )
    found: list[tuple[int, int, str]] = []
    at_work: set[str] = set()
    before_us = 0
    for at_us, change, url in edges:
        if len(at_work) == 1 and at_us > before_us:
            found.append((before_us, at_us, next(iter(at_work))))
        (at_work.add if change > 0 else at_work.discard)(url)
        before_us = at_us
    return found


def overlap_us(intervals: Sequence[tuple[int, int, str]], begin_us: int, end_us: int) -> Iterator[tuple[str, int]]:
    """(name, microseconds) of sorted, disjoint named intervals within a span."""
    index = max(bisect_right(intervals, (begin_us,)) - 1, 0)
    while index < len(intervals) and intervals[index][0] < end_us:
        begin, end, name = intervals[index]
        shared_us = min(end, end_us) - max(begin, begin_us)
        if shared_us > 0:
            yield name, shared_us
        index += 1
