"""Reads the timelines of all ranks of a run as one: on one clock, with what each wait was for.

Prevents the guess about a slow run. Every rank's file says when it reached a collective; the rank that reached it last
is the one that the others waited for, from their own arrival to its arrival. What is left of a collective then is the
exchange itself. Spans that say whom they await (engines, the corpus, the jail) are waits as a whole. Pure Python.

Between hosts wall clocks differ. Nobody leaves a collective of all ranks before the last one has come, so all leave it
at nearly one moment: the median difference of those moments is how far a host's clock is ahead, within what a message
takes.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.observe.journal import FOLDER
from megatron_ra3.observe.reading import EngineNote, Span, Timeline, parsed, rank_lines, read_rank

EVERYONE = "all"
CLOCKS_US = 60_000_000
"""How far the clocks of hosts may be apart."""


def read_timeline(run_folder: Path, steps: tuple[int, int] | None = None) -> Timeline:
    """What the run folder has of all ranks, waits attributed; of a long run rather some `steps`, first and last, alone.

    FileNotFoundError when there is nothing, ValueError when none of the steps is there.
    """
    folder = run_folder / FOLDER
    ranks = sorted({int(path.name[5:10]) for path in folder.glob("rank-*.jsonl")})
    if not ranks:
        raise FileNotFoundError(f"{folder}: no timeline; not a run folder, or logging.timeline_megabytes=0")
    window_us = None if steps is None else _around(rank_lines(folder, ranks[0]), *steps)
    timeline = Timeline()
    for rank in ranks:
        read_rank(timeline, rank, rank_lines(folder, rank), window_us)
    align(timeline)
    attribute(timeline.spans)
    if steps is not None:
        cut(timeline, *steps)
    return timeline


def cut(timeline: Timeline, first: int, last: int) -> None:
    """Leave only what lies in the steps `first` to `last`; ValueError where there is none."""
    steps = [span for span in timeline.spans if span.what == "step" and first <= span.details["step"] <= last]
    if not steps:
        raise ValueError(f"steps {first} to {last}: the timeline has none of them")
    begin_us, end_us = min(span.begin_us for span in steps), max(span.end_us for span in steps)
    timeline.spans = [span for span in timeline.spans if span.begin_us >= begin_us and span.end_us <= end_us]
    before: dict[tuple[str, int], dict[str, Any]] = {}
    for note in sorted(timeline.engines, key=lambda note: note.at_us):
        if note.at_us < begin_us:
            before.setdefault((note.url, note.rank), {}).update(note.values)
    timeline.engines = [
        *(EngineNote(url, begin_us, values, rank) for (url, rank), values in before.items()),
        *(note for note in timeline.engines if begin_us <= note.at_us <= end_us),
    ]


def _around(lines: Iterable[bytes], first: int, last: int) -> tuple[int, int]:
    """From when to when a rank was in these steps, widened by as much as clocks of hosts may differ."""
    found = [
        record
        for record in (parsed(line) for line in lines if b'"step":' in line)
        if record is not None and first <= record["step"] <= last
    ]
    if not found:
        raise ValueError(f"steps {first} to {last}: the timeline has none of them")
    begin_us = min(record["at"] for record in found)
    return begin_us - CLOCKS_US, max(record["at"] + record.get("us", 0) for record in found) + CLOCKS_US


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
