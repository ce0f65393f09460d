"""What the time of every phase and rank went to, from a timeline: work by name, waiting by whom, and the exchange.

Spans nest, so a second is counted once, with the innermost span that covers it. Only a rank's main thread counts: what
other threads do goes on beside it, and costs a rank only the waits that are spans of the main thread again.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_ra3.observe.engine_times import alone, busy_intervals, overlap_us
from megatron_ra3.observe.reading import Span, Timeline
from megatron_ra3.observe.spans import MAIN

STEP = "step"
OUTSIDE = "(no step)"
"""The phase of what lies between steps, before the first and after the last: start, resume, export."""
UNNAMED = "(unnamed)"
ENGINES = "engines"


@dataclass(slots=True)
class Share:
    """What the microseconds of one rank in one phase went to."""

    phase: str
    rank: int
    work_us: Counter[str] = field(default_factory=Counter)
    waiting_us: Counter[str] = field(default_factory=Counter)
    exchange_us: int = 0
    parts_us: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """The single stretches of work and of waiting, by name; waiting for X goes by `waiting for X`."""

    @property
    def busy_us(self) -> int:
        """All work."""
        return sum(self.work_us.values())

    @property
    def waited_us(self) -> int:
        """All waiting."""
        return sum(self.waiting_us.values())

    @property
    def us(self) -> int:
        """All together."""
        return self.busy_us + self.waited_us + self.exchange_us

    def add(self, other: Share) -> None:
        """Take in another one."""
        self.work_us.update(other.work_us)
        self.waiting_us.update(other.waiting_us)
        self.exchange_us += other.exchange_us
        for name, parts in other.parts_us.items():
            self.parts_us[name] += parts

    def work(self, name: str, us: int) -> None:
        """Count a stretch of work."""
        self.work_us[name] += us
        self.parts_us[name].append(us)

    def wait(self, whom: str, us: int) -> None:
        """Count a stretch of waiting."""
        self.waiting_us[whom] += us
        self.parts_us[f"waiting for {whom}"].append(us)


def self_us(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Spans of one thread, each with the microseconds that no span inside it covers; sorted by their beginning."""
    ordered = sorted(spans, key=lambda span: (span.begin_us, -span.end_us))
    left = [span.us for span in ordered]
    around: list[int] = []
    for index, span in enumerate(ordered):
        while around and ordered[around[-1]].end_us <= span.begin_us:
            around.pop()
        if around:
            outer = ordered[around[-1]]
            left[around[-1]] -= max(min(span.end_us, outer.end_us) - span.begin_us, 0)
        around.append(index)
    return [(span, max(us, 0)) for span, us in zip(ordered, left, strict=True)]


def shares(timeline: Timeline) -> list[Share]:
    """One per phase and rank, in the order in which phases began."""
    by_rank: dict[int, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        if span.thread == MAIN:
            by_rank[span.rank].append(span)
    found: dict[tuple[str, int], Share] = {}
    for rank, spans in sorted(by_rank.items()):
        own_notes = [note for note in timeline.engines if note.rank == rank]
        lonely = alone(busy_intervals(own_notes))
        phases = _Phases(spans)
        for span, us in self_us(spans):
            phase = phases.of(span)
            share = found.setdefault((phase, rank), Share(phase, rank))
            _add(share, span, us, lonely)
        phases.add_gaps(found, rank, spans)
    order = list(dict.fromkeys(phase for phase, _ in found if phase != OUTSIDE))
    return sorted(found.values(), key=lambda share: ([OUTSIDE, *order].index(share.phase), share.rank))


def _add(share: Share, span: Span, us: int, lonely: Sequence[tuple[int, int, str]]) -> None:
    waited_us = min(span.waited_us, us)
    if span.awaited == ENGINES:
        for url, alone_us in overlap_us(lonely, span.begin_us, span.end_us):
            part_us = min(alone_us, waited_us)
            share.wait(f"engine {url}", part_us)
            waited_us -= part_us
            us -= part_us
    if waited_us:
        share.wait(span.awaited, waited_us)
    if "meet" in span.details:
        share.exchange_us += us - waited_us
    elif us > waited_us:
        share.work(UNNAMED if span.what == STEP else span.what, us - waited_us)


class _Phases:
    """Which phase a moment of one rank belongs to."""

    def __init__(self, spans: Iterable[Span]) -> None:
        steps = sorted((span for span in spans if span.what == STEP), key=lambda span: span.begin_us)
        self._steps = steps
        self._begins = [span.begin_us for span in steps]

    def of(self, span: Span) -> str:
        index = bisect_right(self._begins, span.begin_us) - 1
        if index >= 0 and span.begin_us < max(self._steps[index].end_us, self._begins[index] + 1):
            return str(self._steps[index].details["phase"])
        return OUTSIDE

    def add_gaps(self, found: dict[tuple[str, int], Share], rank: int, spans: Sequence[Span]) -> None:
        """Count what no span covers while a process of the rank was there: imports, and what nobody has named."""
        by_start: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            by_start[span.start].append(span)
        for own in by_start.values():
            covered_us = sum(us for _, us in self_us(own))
            extent_us = max(span.end_us for span in own) - min(span.begin_us for span in own)
            if extent_us > covered_us:
                share = found.setdefault((OUTSIDE, rank), Share(OUTSIDE, rank))
                share.work(UNNAMED, extent_us - covered_us)


def percentile(values: Sequence[int], fraction: float) -> int:
    """The smallest value that so large a part of all does not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(fraction * len(values)) - 1, 0)]


def awaited(found: Iterable[Share]) -> Counter[str]:
    """Microseconds that ranks waited for each, summed over all of them."""
    total: Counter[str] = Counter()
    for share in found:
        total.update(share.waiting_us)
    return total


def by_phase(found: Iterable[Share]) -> dict[str, Share]:
    """All ranks of a phase as one."""
    total: dict[str, Share] = {}
    for share in found:
        total.setdefault(share.phase, Share(share.phase, -1)).add(share)
    return total
