"""What the sampler asks of a sampling engine.

Only token ids travel. Two real engines stand behind the protocol: `vllm_engine.VllmEngine` (servers over HTTP) and
`inprocess.InProcessEngine` (the trainer's own Megatron weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class EngineError(RuntimeError):
    """An engine cannot serve: unreachable, dead, or serving something else. The message names the engine."""


class EnginesLostError(EngineError):
    """No engine is left to ask; the message says what became of each. Once one is back, the work can begin anew."""


@dataclass(frozen=True, slots=True)
class GateQuery:
    """A teacher-forced prefix and the rows (positions in `token_ids`) whose next-token law decides a gate.

    Queries of one `group` share a long beginning, which the engine that has answered one of them still knows; where it
    is empty, those are taken for a group that begin alike.
    """

    token_ids: tuple[int, ...]
    rows: tuple[int, ...]
    group: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class GateScores:
    """Per queried row, the full-vocabulary log-probs (nats) of the format's `gate_ids`."""

    logprobs: tuple[tuple[float, ...], ...]
    weight_version: int


@dataclass(frozen=True, slots=True)
class GenerateQuery:
    """A prefix to continue; `seed` makes the draw reproducible. Gate `rows` of the prefix are scored on the way.

    `group` is as in `GateQuery`.
    """

    token_ids: tuple[int, ...]
    seed: int
    rows: tuple[int, ...] = ()
    group: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Generation:
    """Sampled tokens with their log-probs (nats) under the sampling law; a stop token, if drawn, is included.

    All tokens are of one weight version. `gate_logprobs` are as in `GateScores`, for the query's rows, and of
    `gate_version` where that is given: they were scored by another request then.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: int
    gate_logprobs: tuple[tuple[float, ...], ...] = ()
    gate_version: int | None = None


@dataclass(frozen=True, slots=True)
class StopRule:
    """A generation ends after the first of `stop_ids`, or after `max_tokens` tokens."""

    stop_ids: frozenset[int]
    max_tokens: int


Query = GateQuery | GenerateQuery
Answer = GateScores | Generation
Reply = Callable[[Query, Answer], Sequence[Query]]
"""Takes an answer and returns what to ask next because of it."""


class Engine(Protocol):
    """Sampling engine; `fleet.ServedEngine.lead` says which ranks call it."""

    @property
    def scores_while_generating(self) -> bool:
        """Whether a `GenerateQuery` may have gate rows, at less than the cost of two queries."""

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        """Score gate rows of many prefixes; answers in the order of the queries."""

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        """Sample continuations; answers in the order of the queries."""

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        """Ask `queries`, and whatever `reply` returns for each answer, until nothing is left to ask.

        EnginesLostError: no engine is left, and some of it is unanswered.
        """

    def health(self) -> None:
        """Return when every engine can serve; EngineError naming the one that cannot."""

    def close(self) -> None:
        """Release connections; the engine must not be used afterwards."""


def converse_in_batches(engine: Engine, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
    """`Engine.converse` for an engine that works best on large batches, always in the same order.

    A gate costs one forward pass and a rationale many, so rationales wait until no gate is left to score.
    """
    rationales: list[GenerateQuery] = []
    asked = queries
    while asked or rationales:
        gates = [query for query in asked if isinstance(query, GateQuery)]
        rationales += [query for query in asked if isinstance(query, GenerateQuery)]
        if gates:
            answered: list[tuple[Query, Answer]] = [*zip(gates, engine.gate_logprobs(gates), strict=True)]
        else:
            answered = [*zip(rationales, engine.generate(rationales, stop), strict=True)]
            rationales = []
        asked = [new for query, answer in answered for new in reply(query, answer)]


def refuse_other_weights(versions: Iterable[int], current: int) -> None:
    """EngineError unless all `versions`, those of the weights that samples came with, are `current`."""
    others = sorted(set(versions) - {current})
    if others:
        raise EngineError(
            f"rollouts came with weight versions {others}, the trainer is at {current}: give every run engines of its "
            "own (engine.urls)"
        )
