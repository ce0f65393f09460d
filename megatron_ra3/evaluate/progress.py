"""How far an evaluation is: a bar with the time left on a terminal, a line now and then in a job's log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_LOG_INTERVAL_S = 30.0


class EvaluationProgress:
    """Counts judged samples of one suite and model; used by several threads. A context manager.

    `done` samples of `total` were judged before.
    """

    def __init__(self, label: str, *, total: int, done: int) -> None:
        self._label = label
        self._total = total
        self._before = self._judged = done
        self._drawn = self._passed = self._masked = 0
        self._start = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit="sample", dynamic_ncols=True)

    def drawn(self) -> None:
        """One more answer is there."""
        with self._lock:
            self._drawn += 1

    def judged(self, outcome: str) -> None:
        """One more verdict."""
        with self._lock:
            self._judged += 1
            self._passed += outcome == "pass"
            self._masked += outcome == "infrastructure"
            if self._bar is not None:
                self._bar.set_postfix(passed=self._passed, masked=self._masked, refresh=False)
                self._bar.update()
            elif time.monotonic() - self._said >= _LOG_INTERVAL_S:
                self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        new = self._judged - self._before
        left_s = (self._said - self._start) / new * (self._total - self._judged) if new else 0.0
        eta = time.strftime("%H:%M:%S", time.gmtime(left_s)) if left_s < 86400 else f"{left_s / 3600:.0f} h"
        print(
            f"{self._label}: {self._judged}/{self._total} judged, {self._drawn} drawn now, {self._passed} passed, "
            f"{self._masked} infrastructure errors, {eta} left",
            flush=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            else:
                self._say()
