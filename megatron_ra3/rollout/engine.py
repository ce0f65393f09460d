"""What the sampler asks of a sampling engine.

Only token ids travel. Two real engines stand behind the protocol: `vllm_engine.VllmEngine` (servers over HTTP) and
`inprocess.InProcessEngine` (the trainer's own Megatron weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class EngineError(RuntimeError):
    """An engine cannot serve: unreachable, dead, or serving something else. The message names the engine."""


@dataclass(frozen=True, slots=True)
class GateQuery:
    """A teacher-forced prefix and the rows (positions in `token_ids`) whose next-token law decides a gate."""

    token_ids: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GateScores:
    """Per queried row, the full-vocabulary log-probs (nats) of the format's `gate_ids`."""

    logprobs: tuple[tuple[float, ...], ...]
    weight_version: int


@dataclass(frozen=True, slots=True)
class GenerateQuery:
    """A prefix to continue; `seed` makes the draw reproducible."""

    token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Sampled tokens with their log-probs (nats) under the sampling law; a stop token, if drawn, is included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: int


@dataclass(frozen=True, slots=True)
class StopRule:
    """A generation ends after the first of `stop_ids`, or after `max_tokens` tokens."""

    stop_ids: frozenset[int]
    max_tokens: int


class Engine(Protocol):
    """Sampling engine; `fleet.ServedEngine.lead` says which ranks call it."""

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        """Score gate rows of many prefixes; answers in the order of the queries."""

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        """Sample continuations; answers in the order of the queries."""

    def health(self) -> None:
        """Return when every engine can serve; EngineError naming the one that cannot."""

    def close(self) -> None:
        """Release connections; the engine must not be used afterwards."""
