"""`ra3 bench timeline`: what noting a span costs the thread that trains, the thread that writes, and the disk."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_ra3.bench.result import publish
from megatron_ra3.observe.journal import Journal
from megatron_ra3.observe.spans import MAX_BUFFERED, Recorder


def add_timeline_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """How many spans, how often."""
    parser.add_argument("--spans", type=int, default=20_000, metavar="N", help="spans of each turn")
    parser.add_argument("--turns", type=int, default=9, metavar="N")
    parser.add_argument("--out", type=Path, help="also write the result as a JSON file")


def run_timeline_bench(arguments: argparse.Namespace) -> int:
    """Measure as asked; the result as one JSON object on the last line."""
    result = measure(arguments.spans, arguments.turns)
    return publish(result, arguments.out)


def measure(spans: int, turns: int) -> dict[str, Any]:
    """Medians over the turns, microseconds of a processor and bytes per span; the loop around the spans is taken off.

    ValueError: more spans at once than a recorder keeps, or none.
    """
    if not 1 <= spans <= MAX_BUFFERED or turns < 1:
        raise ValueError(f"--spans {spans} --turns {turns}: need 1 to {MAX_BUFFERED} spans and at least 1 turn")
    found: dict[str, list[float]] = {"off_us": [], "noted_us": [], "written_us": []}
    with tempfile.TemporaryDirectory(prefix="ra3-timeline-") as folder:
        recorder = Recorder()
        journal = Journal(Path(folder), 0, 1 << 40, recorder)
        for _ in range(turns):
            empty_s = _loop_s(spans)
            recorder.stop()
            found["off_us"].append((_spans_s(recorder, spans) - empty_s) / spans * 1e6)
            recorder.start(rank=0)
            found["noted_us"].append((_spans_s(recorder, spans) - empty_s) / spans * 1e6)
            begun = time.thread_time()
            journal.flush()
            found["written_us"].append((time.thread_time() - begun) / spans * 1e6)
        size_bytes = journal.path.stat().st_size
    medians = {name: round(statistics.median(values), 3) for name, values in found.items()}
    machine = {"cpus": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2)}
    return {**medians, "bytes": round(size_bytes / (spans * turns), 1), "spans": spans, "turns": turns, **machine}


def _loop_s(count: int) -> float:
    begun = time.thread_time()
    for _ in range(count):
        pass
    return time.thread_time() - begun


def _spans_s(recorder: Recorder, count: int) -> float:
    begun = time.thread_time()
    for _ in range(count):
        with recorder.span("scoring", awaits="engines"):
            pass
    return time.thread_time() - begun
