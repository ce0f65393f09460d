"""An engine with an explicit law over a tiny vocabulary, for tests of the sampler."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_ra3.latents import Kind, LatentFormat, Snippet, Surface, Trajectory
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
from megatron_ra3.rollout.sampler import Sampler, SamplerConfig
from tests.table_tokenizer import TableTokenizer

EOS, NEWLINE, HASH, WORD, BLANK_LINE, ACT, THINK, END, X, Y = range(10)
TOKENS = ("<eos>", "\n", "#", "a", "\n\n", "<act>", "<think>", "</think>", "x", "y")
LINES = ((X,), (Y, X), (X, X, Y), (Y,), (X, Y))
SNIPPET = Snippet("s", (EOS, Y), LINES, (None,) * len(LINES))
CAP = 2

Path = tuple[tuple[int, ...] | None, ...]  # per line: no rationale, or its sampled tokens


FORMATS: dict[str, LatentFormat] = {
    surface: LatentFormat.build(surface, TableTokenizer(TOKENS, EOS)) for surface in ("newline", "special")
}


class Law:
    """A fixed pseudo-random function of the whole prefix, so that a shifted row or a lost token shows."""

    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.rationale_ids = (WORD, END, NEWLINE) if surface == "special" else (WORD, NEWLINE, BLANK_LINE)
        self._known: dict[tuple[int, ...], list[float]] = {}

    def think(self, prefix: tuple[int, ...]) -> float:
        return 0.05 + 0.5 * self._numbers(prefix)[0]

    def gate(self, prefix: tuple[int, ...]) -> tuple[float, ...]:
        think = self.think(prefix)
        if self.surface == "newline":
            return (math.log(think),)
        mass = 0.01 + 0.1 * self._numbers(prefix)[1]  # the two gate tokens hold a small part of the vocabulary's law
        return (math.log((1 - think) * mass), math.log(think * mass))

    def rationale(self, prefix: tuple[int, ...]) -> dict[int, float]:
        weights = [0.1 + number for number in self._numbers(prefix)[2:]]
        return {token: weight / sum(weights) for token, weight in zip(self.rationale_ids, weights, strict=True)}

    def _numbers(self, prefix: tuple[int, ...]) -> list[float]:
        if prefix not in self._known:
            generator = random.Random(repr(prefix))
            self._known[prefix] = [generator.random() for _ in range(5)]
        return self._known[prefix]


LAWS: dict[str, Law] = {"newline": Law("newline"), "special": Law("special")}


@dataclass
class TabularEngine:
    law: Any
    version: int = 0
    scores_while_generating: bool = True
    gate_calls: list[list[GateQuery]] = field(default_factory=list)
    generate_calls: list[list[GenerateQuery]] = field(default_factory=list)

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        assert len(set(queries)) == len(queries)
        assert all(len(query.token_ids) == query.rows[-1] + 1 for query in queries)
        self.gate_calls.append(list(queries))
        self.version += 1
        return [GateScores(self._gates(query), self.version) for query in queries]

    def _gates(self, query: Query) -> tuple[tuple[float, ...], ...]:
        return tuple(self.law.gate(query.token_ids[: row + 1]) for row in query.rows)

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        assert self.scores_while_generating or not any(query.rows for query in queries)
        self.generate_calls.append(list(queries))
        self.version += 1
        return [replace(self._generate(query, stop), gate_logprobs=self._gates(query)) for query in queries]

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        converse_in_batches(self, queries, reply, stop)

    def _generate(self, query: GenerateQuery, stop: StopRule) -> Generation:
        generator, drawn, logprobs = random.Random(query.seed), [], []
        while len(drawn) < stop.max_tokens and not (drawn and drawn[-1] in stop.stop_ids):
            law = self.law.rationale((*query.token_ids, *drawn))
            drawn += generator.choices(list(law), list(law.values()))
            logprobs.append(math.log(law[drawn[-1]]))
        return Generation(tuple(drawn), tuple(logprobs), self.version)

    def health(self) -> None:
        pass

    def close(self) -> None:
        pass


class DisorderlyEngine(TabularEngine):
    """Answers one of the open queries at a time, in no order."""

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        generator, pending = random.Random(0), list(queries)
        while pending:
            query = pending.pop(generator.randrange(len(pending)))
            is_gate = isinstance(query, GateQuery)
            (answer,) = self.gate_logprobs([query]) if is_gate else self.generate([query], stop)
            pending += reply(query, answer)


def make_sampler(engine: Any, surface: Surface, rollouts: int, **settings: Any) -> Sampler:
    settings = {"max_rationale_tokens": CAP, "max_sequence_tokens": 100} | settings
    return Sampler(engine, FORMATS[surface], SamplerConfig(rollouts_per_snippet=rollouts, **settings))


def path_of(trajectory: Trajectory) -> Path:
    """What was sampled, read back from a trajectory."""
    rationales: list[tuple[int, ...]] = [() for _ in trajectory.thought]
    for token, kind, line, sampled in zip(
        trajectory.token_ids, trajectory.kinds, trajectory.line_index, trajectory.sampled, strict=True
    ):
        if kind == Kind.RATIONALE and sampled:
            rationales[line] += (token,)
    return tuple(
        rationale if thought else None for rationale, thought in zip(rationales, trajectory.thought, strict=True)
    )


class ThinkAt:
    """Thinks almost surely before the lines (0-based) in `lines`, never elsewhere; every line is the token X."""

    def __init__(self, *lines: int) -> None:
        self.lines = lines

    def gate(self, prefix: tuple[int, ...]) -> tuple[float, ...]:
        return (-1e-300,) if prefix.count(X) in self.lines else (-1000.0,)

    def rationale(self, prefix: tuple[int, ...]) -> dict[int, float]:
        return {WORD: 0.5, NEWLINE: 0.5}


TWELVE = Snippet("twelve", (EOS,), ((X,),) * 12, (None,) * 12)
