"""Servers in miniature, without weights: a fixed law over tokens, so that who samples when cannot change what is drawn.

Stands where `fleet.Servers` stands. A sync waits for the question being answered, as vLLM's pause does.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_ra3.latents import LatentFormat
from megatron_ra3.rollout.engine import (
    GateQuery,
    GateScores,
    GenerateQuery,
    Generation,
    Query,
    Reply,
    StopRule,
    converse_in_batches,
)

T = TypeVar("T")
WORDS = (70, 71, 72)


class FakeFleet:
    """`fleet.ServedEngine` and `engine.Engine` at once.

    `before_answer` is called in the asking thread before every batch of answers; `asked_by` names those threads.
    """

    scores_while_generating = True

    def __init__(
        self, latent_format: LatentFormat, before_answer: Callable[[FakeFleet], None] = lambda _: None
    ) -> None:
        self.version = -1
        self.asked_by: list[str] = []
        self.closed = False
        self._close_token = latent_format.close[0]
        self._before_answer = before_answer
        self._serving = threading.Lock()

    @property
    def engine(self) -> FakeFleet:
        return self

    def sync(self, version: int) -> None:
        with self._serving:
            self.version = version

    def lead(self, work: Callable[[], T]) -> T:
        return work()

    def take_counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.closed = True

    def health(self) -> None:
        pass

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        converse_in_batches(self, queries, reply, stop)

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        with self._answering():
            return [GateScores(_gates(query), self.version) for query in queries]

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        with self._answering():
            return [self._rationale(query) for query in queries]

    def _answering(self) -> threading.Lock:
        self._before_answer(self)
        self.asked_by.append(threading.current_thread().name)
        return self._serving

    def _rationale(self, query: GenerateQuery) -> Generation:
        tokens = (random.Random(query.seed).choice(WORDS), self._close_token)
        return Generation(tokens, (-math.log(len(WORDS)), -1e-9), self.version, _gates(query))


def _gates(query: Query) -> tuple[tuple[float, ...], ...]:
    """Thinking with a probability of 0.1 to 0.4 that depends on all that precedes the gate."""
    ids = query.token_ids
    return tuple((math.log(0.1 + 0.3 * random.Random(repr(ids[: row + 1])).random()),) for row in query.rows)
