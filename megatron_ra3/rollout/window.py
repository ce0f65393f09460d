"""Plans how far ahead the next query looks, and whether it may write a rationale on the way.

The draw behind each gate is a number in [0, 1) that seed, snippet, rollout and line fix before anything is asked; the
gate thinks iff the number is below q(think). A guess of q therefore says where the next think will probably be, and
the query can end there. What is sampled is the same function of those numbers whatever is asked when: a wrong guess
costs a request or a discarded rationale, never the law. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LARGEST_WINDOW_LINES = 64
KNOWN_SPREAD = 0.4
"""Scale (nats) of logit q(think) around its value in the same snippet without rationales."""
UNKNOWN_SPREAD = 1.5
"""The same around the logit of the think rate, where nothing is known of the line."""
WORTH_GENERATING = 0.5
"""Least probability that the next think is at a certain line for its rationale to be generated unconfirmed."""
WORTH_SCORING = 0.1
"""Least probability that a line's gate is reached at all for it to be scored in the same query."""
CLAMP = 1e-9


@dataclass(frozen=True, slots=True)
class Plan:
    """Score the gates of the next `lines` lines; if `generates`, let the last of them think and write its rationale."""

    lines: int
    generates: bool


def think_probability(draw: float, guess: float, spread: float) -> float:
    """P(draw < q) where logit q is logistic around the logit of `guess` with scale `spread` (nats)."""
    distance = (_logit(guess) - _logit(draw)) / spread
    return 1.0 / (1.0 + math.exp(-distance)) if distance > -700.0 else 0.0


def plan(think_probabilities: Iterable[float], *, may_generate: bool) -> Plan:
    """How far to look, given for each line left the probability that its gate thinks if reached."""
    reached = 1.0
    lines = 0
    for probability in think_probabilities:
        lines += 1
        if may_generate and reached * probability >= WORTH_GENERATING:
            return Plan(lines, generates=True)
        reached *= 1.0 - probability
        if reached < WORTH_SCORING or lines == LARGEST_WINDOW_LINES:
            break
    return Plan(lines, generates=False)


def _logit(probability: float) -> float:
    clamped = min(max(probability, CLAMP), 1.0 - CLAMP)
    return math.log(clamped) - math.log1p(-clamped)
