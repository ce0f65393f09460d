"""A timeline as one file of trace events, the format of Chrome's tracing that https://ui.perfetto.dev opens.

Ranks are processes, their threads are tracks, and every engine is a process of its own with its standing and counters.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.observe.reading import EngineNote, Span, Timeline
from megatron_ra3.observe.spans import MAIN

ENGINE_PIDS = 1_000_000
"""Added to an engine's number, to tell it from a rank."""
COUNTERS = {
    "open": "open queries",
    "running": "running requests",
    "waiting": "waiting requests",
    "kv_cache_usage": "KV cache usage",
    "tokens_per_second": "generated tokens/s",
}


def trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """All events; microseconds count from the first of them."""
    starts = [span.begin_us for span in timeline.spans] + [note.at_us for note in timeline.engines]
    zero_us = min(starts, default=0)
    tracks: dict[tuple[int, str], int] = {}
    for rank, host in timeline.hosts.items():
        yield _name("process_name", rank, 0, f"rank {rank} on {host}")
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    for span in timeline.spans:
        track = (span.rank, span.thread)
        if track not in tracks:
            tracks[track] = 0 if span.thread == MAIN else 1 + len(tracks)
            yield _name("thread_name", span.rank, tracks[track], span.thread)
        yield _event(span, tracks[track], zero_us)
    by_url: dict[str, list[EngineNote]] = defaultdict(list)
    for note in sorted(timeline.engines, key=lambda note: note.at_us):
        by_url[note.url].append(note)
    for number, (url, notes) in enumerate(by_url.items()):
        yield from _engine(ENGINE_PIDS + number, url, notes, zero_us)


def write_trace(timeline: Timeline, path: Path) -> int:
    """Write the file, compressed where its name ends in .gz; returns the number of events."""
    count = 0
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[')
        for event in trace_events(timeline):
            file.write((",\n" if count else "\n") + json.dumps(event, separators=(",", ":")))
            count += 1
        file.write("\n]}\n")
    return count


def _event(span: Span, track: int, zero_us: int) -> dict[str, Any]:
    details = {key: value for key, value in span.details.items() if key not in ("for", "n")}
    if span.waited_us:
        details |= {"waited for": span.awaited, "waited ms": span.waited_us / 1000}
    if span.is_open:
        details["had not ended"] = True
    kind = "waiting" if span.waited_us else "collective" if "meet" in span.details else "work"
    name = "{phase} {step}".format_map(span.details) if span.what == "step" else span.what
    at = {"ts": span.begin_us - zero_us, "dur": span.us}
    return {"ph": "X", "name": name, "cat": kind, "pid": span.rank, "tid": track, **at, "args": details}


def _engine(pid: int, url: str, notes: Sequence[EngineNote], zero_us: int) -> Iterator[dict[str, Any]]:
    yield _name("process_name", pid, 0, f"engine {url}")
    standings: list[EngineNote] = []
    for note in notes:
        if "standing" in note.values and (not standings or _standing(note) != _standing(standings[-1])):
            standings.append(note)
    ends_us = [note.at_us for note in [*standings[1:], notes[-1]]]
    for note, end_us in zip(standings, ends_us, strict=False):  # no standing, no end
        at = {"ts": note.at_us - zero_us, "dur": end_us - note.at_us}
        name = note.values["standing"]
        yield {"ph": "X", "name": name, "cat": "engine", "pid": pid, "tid": 0, **at, "args": dict(note.values)}
    for note in notes:
        for key, name in COUNTERS.items():
            if key in note.values:
                args = {name: note.values[key]}
                yield {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": note.at_us - zero_us, "args": args}


def _standing(note: EngineNote) -> tuple[Any, Any]:
    return note.values["standing"], note.values.get("version")


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
