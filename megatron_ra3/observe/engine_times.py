"""When engines were busy, out of service, or the only one still at work, from what was noted of them. Pure Python."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megatron_ra3.observe.reading import EngineNote


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
