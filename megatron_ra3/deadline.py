"""When a process has to save and leave by itself, before its time is up.

A scheduler's signal may be sent too late for a long step, or not reach the ranks at all. The end is fixed once, at the
start, on the monotonic clock: a wall clock that is set by hours later on neither ends a run nor keeps it from saving.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

SLURM_END = "SLURM_JOB_END_TIME"
"""Environment variable with the end of the job in seconds since the epoch."""


class Deadline:
    """The earlier of SLURM's end of the job and `limit_s` seconds from now (0: no such limit).

    `margin_s` is kept free besides the longest step and the longest save seen so far. An end that lies in the past
    cannot be that of a running job: this machine's clock is wrong, or the job has none, and it is left out.
    ValueError: SLURM's variable is not a number.
    """

    def __init__(
        self,
        *,
        limit_s: float,
        margin_s: float,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.margin_s = margin_s
        self._clock = clock
        self._longest_step_s = 0.0
        ends = [(clock() + limit_s, f"checkpoint.wall_clock_limit_s={limit_s:g}")] if limit_s else []
        if SLURM_END in environment:
            remaining_s = _seconds(environment[SLURM_END]) - wall_clock()
            if remaining_s > 0:
                ends.append((clock() + remaining_s, SLURM_END))
        self._end, self._name = min(ends, default=(float("inf"), ""))

    def is_near(self, *, step_s: float, longest_save_s: float) -> str:
        """Why to save and leave now, after a step of `step_s`; empty while another step and a save fit."""
        self._longest_step_s = max(self._longest_step_s, step_s)
        left_s = self._end - self._clock()
        if left_s > self._longest_step_s + longest_save_s + self.margin_s:
            return ""
        return (
            f"{self._name}: {left_s:.0f} s are left, a step takes up to {self._longest_step_s:.0f} s, a save "
            f"{longest_save_s:.0f} s, and checkpoint.stop_before_s={self.margin_s:g}"
        )


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{SLURM_END}={text!r}: must be seconds since the epoch; unset it or correct it") from None
