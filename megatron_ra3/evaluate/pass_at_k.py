"""Scores with what they are worth: unbiased pass@k, intervals over tasks, and paired comparisons of two models.

Samples of one task are alike, so what is drawn again is tasks, with all their samples; an interval over samples would
be far too narrow. Two models are compared on the same tasks, because most of the noise is which tasks there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_ROWS = 500
"""Resamples drawn at a time, which bounds the memory."""


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its interval of `CONFIDENCE`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """The second model's mean minus the first's, over the tasks both were judged on; `p` is two-sided."""

    difference: Interval
    p: float


@dataclass(frozen=True)
class McNemar:
    """Tasks that only one of two models solves, and the exact two-sided p of such a split by chance."""

    only_first: int
    only_second: int
    p: float


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of `k` of a task's samples, drawn without replacement, passes (Chen et al. 2021, eq. 1).

    Unbiased where samples are independent. ValueError: more than there are are drawn or passed.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {passed} passed: needs 1 <= k <= samples >= passed >= 0")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over tasks, with a percentile bootstrap interval over tasks.

    Where all tasks have 0, or all have 1, drawing again tells nothing: the far end is then the exact binomial one.
    ValueError: no tasks.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        raise ValueError("a mean over no tasks: all of them are masked")
    mean = float(scores.mean())
    tail = (1.0 - CONFIDENCE) / 2
    if scores.min() == scores.max() and mean in (0.0, 1.0):
        reach = 1.0 - tail ** (1.0 / scores.size)
        return Interval(mean, 0.0, reach) if mean == 0.0 else Interval(mean, 1.0 - reach, 1.0)
    low, high = np.quantile(_resampled_means(scores, seed, resamples), [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Paired:
    """The mean difference with its interval, and the bootstrap p of one at least as large if there were none.

    For p the differences are shifted to a mean of 0 before tasks are drawn. The p of no difference at all is 1.
    """
    gains = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if gains.size == 0:
        raise ValueError("a difference over no tasks: none was judged for both models")
    mean = float(gains.mean())
    if not gains.any():
        return Paired(Interval(0.0, 0.0, 0.0), 1.0)
    drawn = _resampled_means(gains, seed, resamples)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    as_large = int(np.sum(np.abs(drawn - mean) >= abs(mean) - 1e-12))
    return Paired(Interval(mean, float(low), float(high)), (as_large + 1) / (resamples + 1))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact McNemar test on one verdict per task and model."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    split = only_first + only_second
    tail = sum(math.comb(split, count) for count in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**split))


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, _ROWS):
        rows = min(_ROWS, resamples - start)
        parts.append(values[draw.integers(values.size, size=(rows, values.size))].mean(axis=1))
    return np.concatenate(parts)
