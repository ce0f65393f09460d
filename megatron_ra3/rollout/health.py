"""Which engines of a replica serve, with which weights, and what becomes of the others. Pure Python.

An engine that is dead, stuck, or back with the weights it was started with must get no query: a silent one holds the
whole run, an old one trains on samples of another policy. It comes back in one way only: it answers again (`ready`),
is sent the current weights by a sync, and is admitted under their version.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from megatron_ra3.observe.spans import TIMELINE

Standing = Literal["starting", "ready", "serving", "lost", "given up"]
LONGEST_PAUSE_S = 60.0


@dataclass(slots=True)
class _Engine:
    standing: Standing
    version: int | None = None
    reason: str = ""


class Roster:
    """The engines of one replica by URL; the only thing that its threads share, so every method holds its lock.

    Three threads meet here: the one that samples asks `serving` and calls `lose`; the one that sends weights calls
    `admit` and `lose`, inside `moving_weights`; the keeper starts engines anew and calls `ready`. Each sees what the
    others did at its next look, and none waits for another.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._engines: dict[str, _Engine] = {}
        self._counts: Counter[str] = Counter()
        self._moved_s = 0.0
        self._moving_since: float | None = None

    @classmethod
    def of(cls, urls: Sequence[str]) -> Self:
        """Engines that serve whatever weights they have."""
        roster = cls()
        for url in urls:
            roster.add(url, "serving")
        return roster

    def add(self, url: str, standing: Standing) -> None:
        """Know one more engine."""
        with self._lock:
            self._put(url, _Engine(standing))

    def replace(self, url: str, new_url: str) -> None:
        """Put the process that is started in place of a lost one there, wherever it listens."""
        with self._lock:
            TIMELINE.forget_engine(url)
            self._engines = {
                new_url if known == url else known: _Engine("starting") if known == url else engine
                for known, engine in self._engines.items()
            }
            TIMELINE.engine(new_url, standing="starting")

    def serving(self) -> dict[str, int | None]:
        """Engines that may be asked, and the weight version each was sent; None: none was."""
        with self._lock:
            return {url: engine.version for url, engine in self._engines.items() if engine.standing == "serving"}

    def present(self) -> dict[str, int | None]:
        """Engines that can be sent weights: those that serve, with their version, and those that are ready (None)."""
        with self._lock:
            return {url: each.version for url, each in self._engines.items() if each.standing in ("serving", "ready")}

    def standing(self, url: str) -> Standing:
        """What is known of an engine."""
        with self._lock:
            return self._engines[url].standing

    def lose(self, url: str, reason: str) -> bool:
        """Take an engine out; False where it was out already, which leaves the first reason."""
        with self._lock:
            engine = self._engines[url]
            if engine.standing in ("lost", "given up"):
                return False
            self._counts["engines_lost"] += engine.standing == "serving"
            self._put(url, _Engine("lost", None, reason))
            left = sum(other.standing == "serving" for other in self._engines.values())
        print(f"engine {url} is out: {reason}; engines that serve on: {left}", flush=True)
        return True

    def give_up(self, url: str, reason: str) -> None:
        """Expect a lost engine no more."""
        with self._lock:
            self._put(url, _Engine("given up", None, f"{self._engines[url].reason}; {reason}"))
        print(f"engine {url} is given up: {reason}", flush=True)

    def ready(self, url: str) -> None:
        """Note that an engine answers, with weights that nobody knows."""
        with self._lock:
            self._put(url, _Engine("ready"))
            self._counts["engines_returned"] += 1
        print(f"engine {url} answers again; it serves from the next weight sync on", flush=True)

    def admit(self, url: str, version: int) -> None:
        """Let an engine serve that has been sent weights; not one that was lost meanwhile."""
        with self._lock:
            if self._engines[url].standing in ("ready", "serving"):
                self._put(url, _Engine("serving", version))

    def urls(self) -> list[str]:
        """All engines, but for those that others took the place of."""
        with self._lock:
            return list(self._engines)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a metric."""
        with self._lock:
            self._counts[name] += number

    def take_counts(self) -> Counter[str]:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def described(self) -> str:
        """The engines that do not serve, and why."""
        with self._lock:
            out = {url: engine for url, engine in self._engines.items() if engine.standing != "serving"}
        return "; ".join(f"{url} {each.standing}{each.reason and f' ({each.reason})'}" for url, each in out.items())

    @property
    def is_hopeless(self) -> bool:
        """Whether no engine serves or can come back."""
        with self._lock:
            return all(engine.standing == "given up" for engine in self._engines.values())

    @contextlib.contextmanager
    def moving_weights(self) -> Iterator[None]:
        """Engines are paused meanwhile: `at_work_s` stands still, so that no query misses its deadline by it."""
        with self._lock:
            self._moving_since = self._clock()
        try:
            yield
        finally:
            with self._lock:
                assert self._moving_since is not None
                self._moved_s += self._clock() - self._moving_since
                self._moving_since = None

    @property
    def is_moving_weights(self) -> bool:
        """Whether weights are being sent."""
        with self._lock:
            return self._moving_since is not None

    def at_work_s(self) -> float:
        """Seconds on a clock that stands still while weights are sent."""
        with self._lock:
            now = self._clock() if self._moving_since is None else self._moving_since
            return now - self._moved_s

    def _put(self, url: str, engine: _Engine) -> None:
        self._engines[url] = engine
        TIMELINE.engine(url, standing=engine.standing, version=engine.version, reason=engine.reason)


def overdue(open_s: float, silent_s: float, timeout_s: float) -> Literal["", "slow", "stuck"]:
    """What a query says of its engine that has been open for `open_s`, `silent_s` after the engine's last answer.

    An engine that has answered nothing since the query was sent is stuck; else it is only slow with this one.
    """
    if open_s <= timeout_s:
        return ""
    return "stuck" if silent_s >= open_s else "slow"


class Restarts:
    """How long to wait before a process that ended is started again, and when to give up.

    Pauses double from `first_pause_s` to a minute, `limit` times in a row; a process that has served for `settled_s`
    ends the row.
    """

    def __init__(self, limit: int, first_pause_s: float, settled_s: float) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._first_pause_s = first_pause_s
        self._settled_s = settled_s

    def next_pause_s(self, served_s: float) -> float | None:
        """Seconds until the next start of a process that has served for `served_s` (0: never); None: give up."""
        if served_s >= self._settled_s:
            self.in_a_row = 0
        if self.in_a_row >= self.limit:
            return None
        self.in_a_row += 1
        return min(self._first_pause_s * 2.0 ** (self.in_a_row - 1), LONGEST_PAUSE_S)
