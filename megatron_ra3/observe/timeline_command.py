"""`ra3 timeline RUN_FOLDER`: where the time of a run went, who was waited for, and one trace file of all of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ra3.observe.engine_times import busy_intervals, out_intervals
from megatron_ra3.observe.reading import Timeline
from megatron_ra3.observe.shares import Share, awaited, by_phase, percentile, shares
from megatron_ra3.observe.spans import MAIN
from megatron_ra3.observe.timeline import read_timeline
from megatron_ra3.observe.trace import write_trace

TRACE = "timeline.json"
LEAST_SHARE = 0.005
"""Work that takes less of a phase is summed up."""
LEAST_US = 1000
"""Rows of less are not shown."""


def add_timeline_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folder, and what to show of it."""
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, help=f"trace file, .gz compresses (default: {TRACE} in the run folder)")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("FIRST", "LAST"), help="only what happened in these")
    parser.add_argument("--ranks", type=int, default=16, metavar="N", help="ranks to show, the most awaited first")
    parser.set_defaults(run=run_timeline)


def run_timeline(arguments: argparse.Namespace) -> int:
    """Write the trace and print the tables."""
    timeline = read_timeline(arguments.run_folder, arguments.steps and tuple(arguments.steps))
    print("\n".join(tables(timeline, most_ranks=arguments.ranks)))
    out = arguments.out or arguments.run_folder / TRACE
    count = write_trace(timeline, out)
    print(f"\n{out}: {count} events, for https://ui.perfetto.dev or chrome://tracing")
    return 0


def tables(timeline: Timeline, *, most_ranks: int) -> Iterator[str]:
    """Lines: per phase and rank, what the work was, who was waited for, and the engines."""
    found = shares(timeline)
    waits = awaited(found)
    ranks = sorted({share.rank for share in found})
    shown = sorted(ranks, key=lambda rank: (-waits[f"rank {rank}"], rank))[:most_ranks]
    yield f"{'phase':<14}{'rank':>6}{'seconds':>10}{'busy':>8}{'waiting':>9}{'exchange':>10}   waited most for"
    for share in found:
        if share.rank in shown and share.us >= LEAST_US:
            yield _row(share)
    if len(shown) < len(ranks):
        yield f"({len(ranks) - len(shown)} other ranks, which were waited for less: --ranks {len(ranks)})"
    yield ""
    yield from _work(by_phase(found), len(ranks))
    yield ""
    yield from _awaited(found)
    if timeline.engines:
        yield ""
        yield from _engines(timeline)
    beside = sorted({(span.thread, span.what) for span in timeline.spans if span.thread != MAIN})
    if beside:
        yield ""
        yield "beside the main thread: " + ", ".join(f"{what} ({thread})" for thread, what in beside)
    yield from _caveats(timeline)


def _row(share: Share) -> str:
    whole = share.us or 1
    most = [f"{whom} {us / 1e6:.1f} s ({us / whole:.0%})" for whom, us in share.waiting_us.most_common(2)]
    parts = (share.busy_us, share.waited_us, share.exchange_us)
    busy, waiting, exchange = (f"{part / whole:.1%}" for part in parts)
    seconds = share.us / 1e6
    return f"{share.phase:<14}{share.rank:>6}{seconds:>10.1f}{busy:>8}{waiting:>9}{exchange:>10}   {', '.join(most)}"


def _work(phases: dict[str, Share], ranks: int) -> Iterator[str]:
    yield f"{'phase':<14}{'s per rank':>10}{'share':>8}{'times':>8}{'median':>9}{'95 %':>9}{'longest':>9}"
    for phase, share in phases.items():
        if share.us < LEAST_US:
            continue
        rows = [(sum(parts), name, parts) for name, parts in share.parts_us.items()]
        rows.append((share.exchange_us, "exchange", []))
        large = sorted((row for row in rows if row[0] > LEAST_SHARE * share.us), reverse=True)
        small_us = share.us - sum(us for us, _, _ in large)
        if small_us > LEAST_SHARE * share.us:
            large.append((small_us, "less than 0.5 % each", []))
        for number, (us, name, parts) in enumerate(large):
            label = "" if number else phase
            each = [percentile(parts, 0.5), percentile(parts, 0.95), max(parts)] if parts else []
            figures = f"{len(parts):>8}" + "".join(f"{length / 1e6:>9.3f}" for length in each) if parts else " " * 35
            yield f"{label:<14}{us / 1e6 / ranks:>10.2f}{us / share.us:>8.1%}{figures}  {name}"


def _awaited(found: Sequence[Share]) -> Iterator[str]:
    whole = sum(share.us for share in found) or 1
    waits = awaited(found)
    if not waits:
        yield "nobody was waited for"
        return
    yield "waited for, seconds over all ranks and share of all their time"
    for whom, us in waits.most_common(8):
        yield f"  {whom:<40}{us / 1e6:>10.1f}{us / whole:>8.1%}"


def _engines(timeline: Timeline) -> Iterator[str]:
    busy, out = busy_intervals(timeline.engines), out_intervals(timeline.engines)
    at = [note.at_us for note in timeline.engines]
    total_s = (max(at) - min(at)) / 1e6 or 1.0
    yield f"{'engine':<40}{'rank':>6}{'busy s':>10}{'busy':>8}{'out s':>8}{'lost':>6}"
    for url, rank in dict(sorted((note.url, note.rank) for note in timeline.engines)).items():
        busy_s, out_s = (sum(end - begin for begin, end in found.get(url, [])) / 1e6 for found in (busy, out))
        lost = len(out.get(url, []))
        yield f"{url:<40}{rank:>6}{busy_s:>10.1f}{busy_s / total_s:>8.1%}{out_s:>8.1f}{lost:>6}"


def _caveats(timeline: Timeline) -> Iterator[str]:
    for host, offset_us in timeline.clock_us.items():
        yield f"the clock of {host} was {offset_us / 1000:+.2f} ms off, corrected"
    if timeline.dropped or timeline.unreadable_lines:
        yield f"missing: {timeline.dropped} records dropped by a full disk, {timeline.unreadable_lines} torn lines"
