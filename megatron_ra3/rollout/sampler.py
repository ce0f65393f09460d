"""Samples latents before the expert's lines, exactly, with few requests (algorithm.md 4).

While the choice is `<act>` the continuation is known, so one teacher-forced pass over the next lines scores many
gates at once; only a rationale makes the future unknown again. The number that decides a gate is keyed by snippet,
rollout and line instead of coming from one running generator. So window, batch and layout cannot change what is
sampled, and `window` can foresee where the next think will be. Pure Python.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_ra3.latents import Kind, LatentFormat, Snippet, Trajectory, log1mexp
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.rollout import window
from megatron_ra3.rollout.engine import (
    Answer,
    Engine,
    EngineError,
    GateQuery,
    GenerateQuery,
    Generation,
    Query,
    StopRule,
)

FIRST_THINK_RATE = 0.125
THINK_RATE_STEP = 1 / 256
LINES_BEHIND_THE_THINK_RATE = 32
"""How many lines of its own a rollout needs to see for them to count as much as the running think rate."""


class SamplingStoppedError(Exception):
    """`Sampler.stop` was called while it sampled, or before."""


@dataclass(frozen=True)
class SamplerConfig:
    """How latents are sampled.

    `window`: lines whose gates one query scores ahead (1: line by line, "auto": planned by the expected cost); it
    changes the cost, never what is sampled. `gate_exploration` (epsilon): a gate is drawn from (1-epsilon) q +
    epsilon/2. `gate`: "sampled" from the engine's law, or written unsampled, "always" `<think>` or "never".
    `max_rationale_tokens` counts sampled tokens, the closing one included. ValueError names a bad value and the fix.
    """

    rollouts_per_snippet: int
    max_rationale_tokens: int
    max_sequence_tokens: int
    window: Literal["auto"] | int = "auto"
    gate_exploration: float = 0.0
    gate: Literal["sampled", "always", "never"] = "sampled"

    def __post_init__(self) -> None:
        for name in ("rollouts_per_snippet", "max_rationale_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_sequence_tokens <= self.max_rationale_tokens:
            raise ValueError(
                f"max_sequence_tokens={self.max_sequence_tokens} has no room for a rationale of "
                f"max_rationale_tokens={self.max_rationale_tokens}: raise the former or lower the latter"
            )
        if self.window != "auto" and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f'window={self.window!r}: must be "auto" or a number of lines, at least 1')
        if not 0.0 <= self.gate_exploration <= 1.0:
            raise ValueError(f"gate_exploration={self.gate_exploration}: must lie in [0, 1]; 0 draws from the policy")
        if self.gate not in ("sampled", "always", "never"):
            raise ValueError(f'gate={self.gate!r}: must be "sampled", "always" or "never"')


@dataclass(slots=True)
class SamplerStats:
    """What one `sample` call asked of the engine and what came of it.

    A generate request may score gate rows too. `forced_acts` are lines written as `<act>` without a draw: a rationale
    would not have fitted any more, or never thinking was asked for. Discarded are rationales generated together with
    gates that then decided otherwise; `rationale_tokens` does not count them.
    """

    rollouts: int = 0
    gate_queries: int = 0
    gate_rows: int = 0
    generate_requests: int = 0
    prompt_tokens: int = 0
    rationale_tokens: int = 0
    discarded_rationales: int = 0
    discarded_tokens: int = 0
    lines: int = 0
    thinks: int = 0
    forced_acts: int = 0

    @property
    def requests(self) -> int:
        """Queries that went to the engine."""
        return self.gate_queries + self.generate_requests


@dataclass(frozen=True, slots=True)
class _Gate:
    """Behaviour log-probs (nats) of both choices."""

    think: float
    act: float
    weight_version: int


@dataclass(slots=True, eq=False)
class _Past:
    """What the rollouts of a group share that have written the same rationales at the same lines.

    `gates` are those known after these rationales, by line; `asked` is the query that will add more.
    """

    gates: dict[int, _Gate] = field(default_factory=dict)
    after: dict[tuple[int, tuple[int, ...]], _Past] = field(default_factory=dict)
    asked: Query | None = None


@dataclass(slots=True, eq=False)
class _Rollout:
    """`origin` is the group's past without any rationale."""

    snippet: Snippet
    number: int
    seed: int
    trajectory: Trajectory
    origin: _Past
    past: _Past

    @property
    def lines_left(self) -> tuple[tuple[int, ...], ...]:
        return self.snippet.lines[self.trajectory.num_lines :]

    @property
    def is_thinking(self) -> bool:
        """Whether a `<think>` was written whose rationale was not."""
        return self.trajectory.kinds[-1] == Kind.GATE


class Sampler:
    """Draws G trajectories per snippet from the engine's law.

    `stats` describes the last `sample` call. `think_rate` is the running estimate behind the automatic window; keep it
    with a checkpoint where a resumed run must send the same requests.
    """

    def __init__(self, engine: Engine, latent_format: LatentFormat, config: SamplerConfig) -> None:
        self.stats = SamplerStats()
        self.think_rate = FIRST_THINK_RATE
        self._engine = engine
        self._format = latent_format
        self._config = config
        self._stop = StopRule(latent_format.stop_ids, config.max_rationale_tokens)
        self._stopped = False

    def stop(self) -> None:
        """End a `sample` call in another thread at its next answer, and every later one, by SamplingStoppedError."""
        self._stopped = True

    def sample(self, snippets: Sequence[Snippet], *, seed: int) -> list[list[Trajectory]]:
        """Per snippet its G rollouts, a function of `seed`, the snippets and the engine's law alone.

        Each rollout asks for its next gates or rationale as soon as it has the answer before; what is known of a past
        is never asked again. Where the engine's weights change on the way, every decision carries the version of its
        own law, which may depend on what was decided before, and on other rollouts, but not on the number that decides.
        Raises ValueError for a snippet longer than `max_sequence_tokens` without any rationale, EngineError from the
        engine.
        """
        self.stats = SamplerStats()
        groups = self._begin(snippets, seed)
        self.stats.rollouts = sum(map(len, groups))
        waiting: dict[Query, list[_Rollout]] = {}

        def ask(rollouts: Iterable[_Rollout]) -> list[Query]:
            new = []
            for rollout in rollouts:
                query = self._next_query(rollout)
                if query is None:
                    continue
                if query not in waiting:
                    waiting[query] = []
                    new.append(query)
                    self._count(query)
                waiting[query].append(rollout)
            return new

        def reply(query: Query, answer: Answer) -> list[Query]:
            if self._stopped:
                raise SamplingStoppedError
            rollouts = waiting.pop(query)
            self._take(rollouts, query, answer)
            return ask(rollouts)

        queries = ask(rollout for group in groups for rollout in group)
        if queries:
            with TIMELINE.span("sampling"):
                self._engine.converse(queries, reply, self._stop)
        assert not waiting
        self._follow_think_rate()
        return [[rollout.trajectory for rollout in group] for group in groups]

    def _begin(self, snippets: Sequence[Snippet], seed: int) -> list[list[_Rollout]]:
        """Number the rollouts per snippet id, so that a snippet given twice is not drawn twice alike."""
        groups = []
        numbered: Counter[str] = Counter()
        for snippet in snippets:
            first = numbered[snippet.snippet_id]
            numbers = range(first, first + self._config.rollouts_per_snippet)
            origin = _Past()
            groups.append(
                [_Rollout(snippet, number, seed, self._format.begin(snippet), origin, origin) for number in numbers]
            )
            numbered[snippet.snippet_id] = numbers.stop
            tokens = self._tokens_if_act(groups[-1][0])
            if tokens > self._config.max_sequence_tokens:
                raise ValueError(
                    f"snippet {snippet.snippet_id}: {tokens} tokens without any rationale, but max_sequence_tokens="
                    f"{self._config.max_sequence_tokens}; cut the snippet or raise the limit"
                )
        return groups

    def _next_query(self, rollout: _Rollout) -> Query | None:
        """What the rollout needs to know next; None where nothing is left to draw."""
        if not rollout.is_thinking:
            self._decide(rollout)
        if not rollout.lines_left:
            return None
        if rollout.is_thinking:
            return self._rationale_query(rollout)
        if rollout.past.asked is None:
            rollout.past.asked = self._gates_query(rollout, self._plan(rollout))
        return rollout.past.asked

    def _decide(self, rollout: _Rollout) -> None:
        """Write lines up to the first `<think>` or unknown gate; where none may think any more, all of them."""
        told = self._config.gate if self._room_to_think(rollout) else "never"
        while rollout.lines_left and not rollout.is_thinking:
            if told == "sampled":
                gate = rollout.past.gates.get(rollout.trajectory.num_lines)
                if gate is None:
                    return
                self._draw(rollout, gate)
            elif told == "always":
                self._format.append_think(rollout.trajectory)
            else:
                self._format.append_act(rollout.trajectory, rollout.lines_left[0])
                self.stats.forced_acts += 1
            self.stats.lines += 1
            self.stats.thinks += rollout.is_thinking

    def _draw(self, rollout: _Rollout, gate: _Gate) -> None:
        trajectory, version = rollout.trajectory, gate.weight_version
        if _uniform(rollout, trajectory.num_lines) < math.exp(gate.think):
            self._format.append_think(trajectory, logprob=gate.think, weight_version=version)
        else:
            self._format.append_act(trajectory, rollout.lines_left[0], logprob=gate.act, weight_version=version)

    def _plan(self, rollout: _Rollout) -> window.Plan:
        """How far to look ahead; all that is left, where the group shares it and guesses its later gates from it."""
        seen, lines = rollout.trajectory.num_lines, len(rollout.lines_left)
        if self._config.window != "auto":
            return window.Plan(min(self._config.window, lines), generates=False)
        if rollout.past is rollout.origin and self._config.rollouts_per_snippet > 1:
            return window.Plan(min(window.LARGEST_WINDOW_LINES, lines), generates=False)
        prior = LINES_BEHIND_THE_THINK_RATE
        rate = (prior * self.think_rate + sum(rollout.trajectory.thought)) / (prior + seen)
        return window.plan(
            (self._think_probability(rollout, line, rate) for line in range(seen, seen + lines)),
            may_generate=self._engine.scores_while_generating,
        )

    def _think_probability(self, rollout: _Rollout, line: int, rate: float) -> float:
        known = rollout.origin.gates.get(line)
        return window.think_probability(
            _uniform(rollout, line),
            rate if known is None else math.exp(known.think),
            window.UNKNOWN_SPREAD if known is None else window.KNOWN_SPREAD,
        )

    def _gates_query(self, rollout: _Rollout, plan: window.Plan) -> Query:
        """The next lines as if each were preceded by `<act>`, up to the last gate row or the `<think>` after it."""
        prefix, act = self._format.gate_prefix, self._format.gate_prefix + self._format.act_suffix
        tokens = list(rollout.trajectory.token_ids)
        rows = []
        for line in rollout.lines_left[: plan.lines]:
            rows.append(len(tokens) + len(prefix) - 1)
            tokens += act + line
        scored = tuple(tokens[: rows[-1] + 1])
        if not plan.generates:
            return GateQuery(scored, tuple(rows), rollout.snippet.snippet_id)
        line_index = rollout.trajectory.num_lines + plan.lines - 1
        draw = _keyed_draw("rationale", rollout, line_index)
        return GenerateQuery(scored + self._format.think_suffix, draw, tuple(rows), rollout.snippet.snippet_id)

    def _rationale_query(self, rollout: _Rollout) -> GenerateQuery:
        trajectory = rollout.trajectory
        draw = _keyed_draw("rationale", rollout, trajectory.num_lines)
        return GenerateQuery(tuple(trajectory.token_ids), draw, group=rollout.snippet.snippet_id)

    def _take(self, rollouts: Sequence[_Rollout], query: Query, answer: Answer) -> None:
        """Note the gates for all that wait for them; the rationale, if it was for those, is the first one's alone."""
        gates, version = _gates_of(answer)
        for past, rollout in {rollout.past: rollout for rollout in rollouts}.items():
            if past.asked == query:
                past.asked = None
            for line, logprobs in enumerate(gates, rollout.trajectory.num_lines):
                past.gates[line] = self._gate_law(rollout, line, logprobs, version)
        if isinstance(answer, Generation):
            self._take_rationale(rollouts[0], query, answer)

    def _take_rationale(self, rollout: _Rollout, query: Query, drawn: Generation) -> None:
        """Write the rationale with the line that follows, unless the gates before it have decided otherwise."""
        if query.rows:
            self._decide(rollout)
        if tuple(rollout.trajectory.token_ids) != query.token_ids:
            self.stats.discarded_rationales += 1
            self.stats.discarded_tokens += len(drawn.token_ids)
            return
        self.stats.rationale_tokens += len(drawn.token_ids)
        written = rollout.trajectory.num_lines, drawn.token_ids
        rollout.past = rollout.past.after.setdefault(written, _Past())
        self._format.append_rationale(
            rollout.trajectory,
            drawn.token_ids,
            rollout.lines_left[0],
            logprobs=drawn.logprobs,
            weight_version=drawn.weight_version,
        )

    def _gate_law(self, rollout: _Rollout, line: int, gate_logprobs: Sequence[float], version: int) -> _Gate:
        """The behaviour law of a gate, exploration included."""
        policy = min(self._format.think_logprob(gate_logprobs), 0.0)
        if math.isnan(policy):
            raise EngineError(f"gate log-prob is NaN: snippet {rollout.snippet.snippet_id}, line {line}")
        explore = self._config.gate_exploration
        if explore == 0.0:
            return _Gate(policy, log1mexp(policy), version)
        think = math.log((1.0 - explore) * math.exp(policy) + explore / 2)
        return _Gate(think, math.log((1.0 - explore) * -math.expm1(policy) + explore / 2), version)

    def _count(self, query: Query) -> None:
        self.stats.gate_rows += len(query.rows)
        self.stats.prompt_tokens += len(query.token_ids)
        if isinstance(query, GateQuery):
            self.stats.gate_queries += 1
        else:
            self.stats.generate_requests += 1

    def _follow_think_rate(self) -> None:
        """Move the estimate once per call, so that it cannot depend on the order of answers."""
        drawn = self.stats.lines - self.stats.forced_acts
        if drawn and self._config.gate == "sampled":
            weight = 1.0 - (1.0 - THINK_RATE_STEP) ** drawn
            self.think_rate += weight * (self.stats.thinks / drawn - self.think_rate)

    def _tokens_if_act(self, rollout: _Rollout) -> int:
        """Length of the finished trajectory if it never thinks again."""
        act = len(self._format.gate_prefix) + len(self._format.act_suffix)
        return len(rollout.trajectory.token_ids) + sum(act + len(line) for line in rollout.lines_left)

    def _room_to_think(self, rollout: _Rollout) -> bool:
        """Whether one more rationale of full length fits; acting does not change the answer."""
        longer_gate = len(self._format.think_suffix) - len(self._format.act_suffix)
        rationale = self._config.max_rationale_tokens + len(self._format.close)
        return self._tokens_if_act(rollout) + longer_gate + rationale <= self._config.max_sequence_tokens


def _gates_of(answer: Answer) -> tuple[tuple[tuple[float, ...], ...], int]:
    """Scored gates, and the weight version that scored them."""
    if not isinstance(answer, Generation):
        return answer.logprobs, answer.weight_version
    version = answer.weight_version if answer.gate_version is None else answer.gate_version
    return answer.gate_logprobs, version


def _uniform(rollout: _Rollout, line: int) -> float:
    """The number in [0, 1), of 53 bits, that decides a line's gate."""
    return (_keyed_draw("gate", rollout, line) >> 10) / 2**53


def _keyed_draw(purpose: str, rollout: _Rollout, line: int) -> int:
    """63 bits that depend on nothing but the purpose, the seed, the snippet, the rollout and the line."""
    key = (purpose, rollout.seed, rollout.snippet.snippet_id, rollout.number, line)
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
