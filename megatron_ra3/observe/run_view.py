"""A run as its files show it now: how far, how fast, what its engines do, who waits for whom, what went wrong last.

Reads only, and only what was added since the last look or stands at the end of a file: it may run on any machine that
sees the run folder, beside a run of weeks, and costs that run nothing.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ra3.observe.journal import FOLDER
from megatron_ra3.observe.reading import Span, Timeline, read_rank
from megatron_ra3.observe.run_card import read_run_card

TAIL_BYTES = 65_536
KEPT_RECORDS = 500
"""Of each phase."""
KEPT_WARNINGS = 8
WARNED_OF = (
    "engines_lost",
    "deadlines_missed",
    "engine_scrapes_failed",
    "infrastructure_errors",
    "kernel_fallbacks",
    "timeline_dropped",
)
"""Metrics of a step that say something went wrong when they are there and not 0."""


@dataclass(slots=True)
class RunView:
    """What there is to show; times are in seconds, `now_s` in seconds since the epoch."""

    folder: Path
    now_s: float
    card: Mapping[str, Any]
    by_phase: Mapping[str, Sequence[Mapping[str, Any]]]
    last: Mapping[str, Any]
    """The newest record of the metrics; empty before the first step."""
    remaining_s: float | None
    steps_left: int | None
    sign_s: float | None
    """When anything of the run was written last."""
    is_finished: bool
    engines: Mapping[str, Mapping[str, Any]]
    waits: Sequence[str]
    warnings: Sequence[str] = field(default_factory=list)


class Follower:
    """Looks at a run folder again and again."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such run folder")
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self._by_phase: dict[str, deque[dict[str, Any]]] = defaultdict(lambda: deque(maxlen=KEPT_RECORDS))
        self._done: Counter[tuple[str, int]] = Counter()
        self._last: dict[str, Any] = {}
        self._warnings: deque[str] = deque(maxlen=KEPT_WARNINGS)

    def look(self, now_s: float) -> RunView:
        """The run as it is now."""
        self._read_metrics()
        card = read_run_card(self._folder) or {}
        tails = _tails(self._folder / FOLDER)
        steps_left, remaining_s = left(card.get("phases", ()), self._done, self._last, self._pace())
        stacks = sorted((self._folder / "stalls").glob("*.txt"))
        stalled = [f"nothing moved: {path.relative_to(self._folder)}" for path in stacks[-2:]]
        return RunView(
            folder=self._folder,
            now_s=now_s,
            card=card,
            by_phase=self._by_phase,
            last=self._last,
            remaining_s=remaining_s,
            steps_left=steps_left,
            sign_s=_newest(self._folder),
            is_finished=(self._folder / "summary.json").is_file(),
            engines=engine_states(tails),
            waits=waits_now(tails.spans, now_s),
            warnings=[*self._warnings, *stalled],
        )

    def _read_metrics(self) -> None:
        path = self._folder / "metrics.jsonl"
        if not path.is_file():
            return
        try:
            records = self._new_records(path)
            goes_on = not self._last or all(record["step"] == self._last["step"] + 1 for record in records[:1])
        except ValueError:
            goes_on = False
        if not goes_on:  # cut back to a checkpoint, and perhaps longer again
            self._begin()
            records = self._new_records(path)
        for record in records:
            self._take(record)

    def _new_records(self, path: Path) -> list[dict[str, Any]]:
        """What was appended since the last look; ValueError: something else is there now."""
        with path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                raise ValueError(f"{path}: shorter than it was")
            file.seek(self._offset)
            whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _take(self, record: dict[str, Any]) -> None:
        self._warnings.extend(warnings_of(record, self._last))
        self._by_phase[record["phase"]].append(record)
        self._done[record["phase"], record["round"]] += 1
        self._last = record

    def _pace(self) -> dict[str, float]:
        return {
            phase: statistics.median([record["seconds"] for record in list(records)[-20:]])
            for phase, records in self._by_phase.items()
        }


def left(
    phases: Sequence[Mapping[str, Any]],
    done: Mapping[tuple[str, int], int],
    last: Mapping[str, Any],
    pace_s: Mapping[str, float],
) -> tuple[int | None, float | None]:
    """Steps that are still to be done, and the seconds they take at the pace of each phase; None: nobody can know.

    Phases before that of the `last` record count as done: one may end before its last step.
    """
    if not phases or not pace_s:
        return None, None
    names = [(phase["name"], phase["round"]) for phase in phases]
    current = (last["phase"], last["round"])
    begin = names.index(current) if current in names else 0
    usual_s = statistics.median(pace_s.values())
    steps, seconds = 0, 0.0
    for phase, key in zip(phases[begin:], names[begin:], strict=True):
        remaining = max(phase["steps"] - done.get(key, 0), 0)
        steps += remaining
        seconds += remaining * pace_s.get(phase["name"], usual_s)
    return steps, seconds


def warnings_of(record: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What a step's metrics say went wrong."""
    step = record["step"]
    found = [f"step {step}: {name}: {message}" for name, message in record.get("signatures", {}).items()]
    found += [f"step {step}: {name} {record[name]}" for name in WARNED_OF if record.get(name)]
    if record.get("bad_samples", 0) > before.get("bad_samples", 0):
        found.append(f"step {step}: bad_samples {before.get('bad_samples', 0)} -> {record['bad_samples']}")
    return found


def engine_states(timeline: Timeline) -> dict[str, dict[str, Any]]:
    """What is known of each engine that was not replaced; `since_us` is when its standing was noted first."""
    states: dict[str, dict[str, Any]] = {}
    for note in sorted(timeline.engines, key=lambda note: note.at_us):
        state = states.setdefault(note.url, {})
        if note.values.get("standing", state.get("standing")) != state.get("standing"):
            state["since_us"] = note.at_us
        state |= note.values
    return {url: state for url, state in states.items() if state.get("standing") != "replaced"}


def waits_now(spans: Sequence[Span], now_s: float) -> list[str]:
    """Who waits for whom in spans that have not ended, and what those are doing who have not arrived.

    Only waits of some seconds are in the files before their end; a rank that arrived a moment ago may count as missing.
    """
    members: dict[str, set[int]] = defaultdict(set)
    together: dict[tuple[int, str, int], list[Span]] = defaultdict(list)
    alone: list[Span] = []
    doing: dict[int, Span] = {}
    newest = max((span.start for span in spans), default=0)
    for span in spans:
        if span.start != newest:
            continue
        if "meet" in span.details:
            members[span.details["meet"]].add(span.rank)
        if not span.is_open or span.what == "step":
            continue
        if "meet" in span.details:
            together[span.start, span.details["meet"], span.details["n"]].append(span)
        elif "for" in span.details:
            alone.append(span)
        else:
            doing[span.rank] = max(span, doing.get(span.rank, span), key=lambda each: each.begin_us)
    lines = [
        f"rank {span.rank} waits for {span.details['for']} in {span.what!r}{_since(span, now_s)}" for span in alone
    ]
    for (_, group, _), arrived in together.items():
        first = min(arrived, key=lambda span: span.begin_us)
        missing = sorted(members[group] - {span.rank for span in arrived})
        if "root" in first.details:
            missing = [rank for rank in missing if rank == first.details["root"]]
        awaited = f"for rank {_list(missing)}" if missing else "though all have arrived"
        ranks = _list(sorted(span.rank for span in arrived))
        lines.append(f"rank {ranks} waits in {first.what!r} {awaited}{_since(first, now_s)}")
        lines += [
            f"    rank {rank} is in {doing[rank].what!r}{_since(doing[rank], now_s)}"
            for rank in missing[:4]
            if rank in doing
        ]
    return lines


def _since(span: Span, now_s: float) -> str:
    return f", since {max(now_s - span.begin_us / 1e6, 0.0):.0f} s"


def _list(ranks: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, ranks[:most]))
    return shown if len(ranks) <= most else f"{shown} and {len(ranks) - most} more"


def _tails(folder: Path) -> Timeline:
    """The end of every rank's file, behind its header."""
    timeline = Timeline()
    for path in sorted(folder.glob("rank-?????.jsonl")):
        with path.open("rb") as file:
            head = file.readline()
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, len(head)))
            lines = file.read().splitlines()
        if size > len(head) + TAIL_BYTES:
            del lines[:1]
        read_rank(timeline, int(path.stem[5:]), [head, *lines])
    return timeline


def _newest(folder: Path) -> float | None:
    """When a file that a running process touches was written last; the stall watchdog's board is, all the time."""
    named = [folder / name for name in ("metrics.jsonl", "run.json", "stalls/board")]
    files = [*named, *folder.glob(f"{FOLDER}/*.jsonl")]
    return max((path.stat().st_mtime for path in files if path.is_file()), default=None)
