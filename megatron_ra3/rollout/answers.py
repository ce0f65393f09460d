"""Samples whole answers to prompts: ordinary text, rationales and code in one, until a stop string or the cap.

Engines only know token ids, and stop strings may lie across tokens. So an answer is asked for piece by piece and looked
at in between; what was sampled after its end is dropped, which leaves the law of what stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_ra3.evaluate.problems import Problem
from megatron_ra3.evaluate.prompts import prompt_tokens, stopped
from megatron_ra3.latents import LatentFormat, Tokenizer
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.rollout.engine import Answer as EngineAnswer
from megatron_ra3.rollout.engine import Engine, GenerateQuery, Generation, Query, StopRule


class Decoder(Tokenizer, Protocol):
    """A tokenizer in both directions."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


@dataclass(slots=True)
class Answer:
    """One sampled answer; `engine_logprobs` (nats) and `weight_versions` have one entry per token of `answer_ids`."""

    task_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: list[int] = field(default_factory=list)
    engine_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    text: str = ""
    """What it says, without what the special form of latents adds."""
    ended: bool = False
    """By itself, and not at the cap."""

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt_ids, *self.answer_ids]


@dataclass(frozen=True, slots=True)
class Posed:
    """A problem with its prompt as token ids, and what its random draws depend on beside the number of the answer."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    draw: str


def prompt_ids(problem: Problem, latent_format: LatentFormat, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt as token ids; in the special form with `<act>` before each line of code."""
    act = latent_format.act_suffix if latent_format.surface == "special" else None
    return (*latent_format.start, *prompt_tokens(problem.prompt, tokenizer.encode, act))


class AnswerSampler:
    """Samples groups of answers from an engine.

    Args:
        engine: where from.
        tokenizer: of the model.
        latent_format: surface form that the model was mid-trained in.
        max_tokens: an answer is cut there.
        check_tokens: so many are asked for at a time; divides `max_tokens`.
    """

    def __init__(
        self, engine: Engine, tokenizer: Decoder, latent_format: LatentFormat, *, max_tokens: int, check_tokens: int
    ) -> None:
        assert max_tokens % check_tokens == 0
        self._engine = engine
        self._tokenizer = tokenizer
        self._format = latent_format
        self._max_tokens = max_tokens
        self._check_tokens = check_tokens
        self._enders: dict[tuple[str, ...], frozenset[int]] = {}

    def sample(self, posed: Sequence[Posed], count: int) -> list[list[Answer]]:
        """Sample `count` answers to each problem.

        The draws of an answer depend on nothing but `Posed.draw` and which of the answers it is.
        """
        groups = [[Answer(item.problem.task.task_id, item.prompt_ids) for _ in range(count)] for item in posed]
        asked: dict[Query, tuple[Posed, int, Answer]] = {}

        def ask(item: Posed, number: int, answer: Answer) -> Query:
            query = GenerateQuery(tuple(answer.token_ids), _seed((item.draw, number, len(answer.answer_ids))))
            asked[query] = (item, number, answer)
            return query

        def reply(query: Query, found: EngineAnswer) -> list[Query]:
            assert isinstance(found, Generation)
            item, number, answer = asked.pop(query)
            self._take(item.problem, answer, found)
            done = answer.ended or len(answer.answer_ids) == self._max_tokens
            return [] if done else [ask(item, number, answer)]

        first = [
            ask(item, number, answer)
            for item, group in zip(posed, groups, strict=True)
            for number, answer in enumerate(group)
        ]
        stop = StopRule(self._stop_ids([item.problem for item in posed]), self._check_tokens)
        with TIMELINE.span("sampling"):
            self._engine.converse(first, reply, stop)
        return groups

    def _take(self, problem: Problem, answer: Answer, found: Generation) -> None:
        """Append what was sampled, up to the end of the answer if that is in it."""
        before = len(answer.answer_ids)
        answer.answer_ids += found.token_ids
        answer.engine_logprobs += found.logprobs
        answer.weight_versions += [found.weight_version] * len(found.token_ids)
        end = self._end(problem, answer.answer_ids, before)
        if end is not None:
            answer.ended = True
            del answer.answer_ids[end:], answer.engine_logprobs[end:], answer.weight_versions[end:]
        answer.text = self._text(answer.answer_ids)

    def _end(self, problem: Problem, ids: Sequence[int], before: int) -> int | None:
        """With how many tokens, more than `before`, the answer is complete; None: it is not."""
        eos = self._tokenizer.eos_id
        lengths = [place + 1 for place in range(before, len(ids)) if ids[place] == eos]
        if stopped(problem.prompt, self._text(ids)):
            low, high = before, len(ids)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if stopped(problem.prompt, self._text(ids[:middle])) else (middle, high)
            lengths.append(high)
        return min(lengths, default=None)

    def _text(self, ids: Sequence[int]) -> str:
        kept = [i for i in self._format.code_ids(ids) if i != self._tokenizer.eos_id]
        return self._tokenizer.decode(kept)

    def _stop_ids(self, problems: Sequence[Problem]) -> frozenset[int]:
        """End of text, and tokens that end any answer by themselves: what would follow need not be sampled."""
        common = set.intersection(*(set(problem.prompt.stop) for problem in problems)) if problems else set()
        key = tuple(sorted(common))
        if key not in self._enders:
            spelled = [stop.encode() for stop in key]
            ids = range(self._tokenizer.vocab_size)
            ending = {i for i in ids if any(stop in self._tokenizer.token_bytes(i) for stop in spelled)}
            self._enders[key] = frozenset(ending | {self._tokenizer.eos_id})
        return self._enders[key]


def _seed(key: tuple[object, ...]) -> int:
    """63 bits that depend on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
