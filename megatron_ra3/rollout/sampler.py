"""Samples latents before the expert's lines, exactly, with few requests (method.md 4).

While the choice is `<act>` the continuation is known, so one teacher-forced pass over the next lines scores many
gates at once; only a rationale makes the future unknown again. Every draw is keyed by snippet, rollout and line instead
of coming from one running generator: otherwise window, batch and layout would change what is sampled. Pure Python.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ra3.latents import LatentFormat, Snippet, Trajectory, log1mexp
from megatron_ra3.rollout.engine import Engine, EngineError, GateQuery, GateScores, GenerateQuery, StopRule

LARGEST_AUTO_WINDOW_LINES = 64
LINE_BY_LINE_THINK_RATE = 0.3
FIRST_THINK_RATE = 0.125
THINK_RATE_STEP = 1 / 256


@dataclass(frozen=True)
class SamplerConfig:
    """How latents are sampled.

    `window`: lines whose gates one query scores ahead (1: line by line, "auto": from the running think rate); it
    changes the cost, never the law. `gate_exploration` (epsilon): the gate is drawn from (1-epsilon) q + epsilon/2.
    `gate`: "sampled" from the engine's law, or written unsampled, "always" `<think>` or "never".
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

    `forced_acts` are lines written as `<act>` without a draw: a rationale would not have fitted any more, or never
    thinking was asked for.
    """

    rollouts: int = 0
    gate_queries: int = 0
    gate_rows: int = 0
    generate_requests: int = 0
    prompt_tokens: int = 0
    rationale_tokens: int = 0
    lines: int = 0
    thinks: int = 0
    forced_acts: int = 0


@dataclass(slots=True)
class _Rollout:
    snippet: Snippet
    number: int
    trajectory: Trajectory

    @property
    def lines_left(self) -> tuple[tuple[int, ...], ...]:
        return self.snippet.lines[self.trajectory.num_lines :]


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

    def sample(self, snippets: Sequence[Snippet], *, seed: int) -> list[list[Trajectory]]:
        """Per snippet its G rollouts, a function of `seed`, the snippets and the engine's law alone.

        Works in waves of two engine calls: score the coming gates of all unfinished rollouts, draw up to the first
        think of each; then write the rationales of all that think. Raises ValueError for a snippet longer than
        `max_sequence_tokens` without any rationale, EngineError from the engine.
        """
        self.stats = SamplerStats()
        groups = self._begin(snippets)
        self.stats.rollouts = sum(map(len, groups))
        unfinished = self._still_open([rollout for group in groups for rollout in group])
        while unfinished:
            self._write_rationales(self._decide(unfinished, seed), seed)
            unfinished = self._still_open(unfinished)
        return [[rollout.trajectory for rollout in group] for group in groups]

    def _decide(self, rollouts: Sequence[_Rollout], seed: int) -> list[_Rollout]:
        """Advance every rollout to its next `<think>`, at most by its window; returns those that got there."""
        if self._config.gate == "sampled":
            scores = zip(rollouts, self._score_gates(rollouts), strict=True)
            return [rollout for rollout, score in scores if self._draws_think(rollout, score, seed)]
        for rollout in rollouts:
            self._format.append_think(rollout.trajectory)
        self.stats.lines += len(rollouts)
        self.stats.thinks += len(rollouts)
        return list(rollouts)

    def _begin(self, snippets: Sequence[Snippet]) -> list[list[_Rollout]]:
        """Number the rollouts per snippet id, so that a snippet given twice is not drawn twice alike."""
        groups = []
        numbered: Counter[str] = Counter()
        for snippet in snippets:
            first = numbered[snippet.snippet_id]
            numbers = range(first, first + self._config.rollouts_per_snippet)
            groups.append([_Rollout(snippet, number, self._format.begin(snippet)) for number in numbers])
            numbered[snippet.snippet_id] = numbers.stop
            tokens = self._tokens_if_act(groups[-1][0])
            if tokens > self._config.max_sequence_tokens:
                raise ValueError(
                    f"snippet {snippet.snippet_id}: {tokens} tokens without any rationale, but max_sequence_tokens="
                    f"{self._config.max_sequence_tokens}; cut the snippet or raise the limit"
                )
        return groups

    def _still_open(self, rollouts: Sequence[_Rollout]) -> list[_Rollout]:
        """Rollouts that may still think; those that may not, or have no room to, are finished with `<act>`."""
        for rollout in rollouts:
            if self._config.gate == "never" or not self._room_to_think(rollout):
                for line in rollout.lines_left:
                    self._format.append_act(rollout.trajectory, line)
                    self.stats.lines += 1
                    self.stats.forced_acts += 1
        return [rollout for rollout in rollouts if rollout.lines_left]

    def _score_gates(self, rollouts: Sequence[_Rollout]) -> list[GateScores]:
        """Score the gates in the window of every rollout; rollouts that are still alike share one query."""
        window = self._window_lines()
        queries = [self._gate_query(rollout, window) for rollout in rollouts]
        distinct = list(dict.fromkeys(queries))
        self.stats.gate_queries += len(distinct)
        self.stats.gate_rows += sum(len(query.rows) for query in distinct)
        self.stats.prompt_tokens += sum(len(query.token_ids) for query in distinct)
        scores = dict(zip(distinct, self._engine.gate_logprobs(distinct), strict=True))
        assert all(len(scores[query].logprobs) == len(query.rows) for query in distinct)
        return [scores[query] for query in queries]

    def _gate_query(self, rollout: _Rollout, window: int) -> GateQuery:
        """The next lines as if each were preceded by `<act>`, up to the last gate row."""
        prefix, act = self._format.gate_prefix, self._format.gate_prefix + self._format.act_suffix
        tokens = list(rollout.trajectory.token_ids)
        rows = []
        for line in rollout.lines_left[:window]:
            rows.append(len(tokens) + len(prefix) - 1)
            tokens += act + line
        return GateQuery(tuple(tokens[: rows[-1] + 1]), tuple(rows))

    def _draws_think(self, rollout: _Rollout, scores: GateScores, seed: int) -> bool:
        """Draw gates from left to right until one thinks; its rationale and line are then still to be written."""
        trajectory, version = rollout.trajectory, scores.weight_version
        for gate_logprobs, line in zip(scores.logprobs, rollout.lines_left, strict=False):
            think_logprob, act_logprob = self._gate_law(rollout, gate_logprobs)
            thinks = _uniform("gate", seed, rollout) < math.exp(think_logprob)
            self.stats.lines += 1
            self.think_rate += THINK_RATE_STEP * (thinks - self.think_rate)
            if thinks:
                self.stats.thinks += 1
                self._format.append_think(trajectory, logprob=think_logprob, weight_version=version)
                return True
            self._format.append_act(trajectory, line, logprob=act_logprob, weight_version=version)
        return False

    def _gate_law(self, rollout: _Rollout, gate_logprobs: Sequence[float]) -> tuple[float, float]:
        """Log-probs (nats) of think and act under the behaviour law, exploration included."""
        policy = min(self._format.think_logprob(gate_logprobs), 0.0)
        if math.isnan(policy):
            trajectory = rollout.trajectory
            raise EngineError(f"gate log-prob is NaN: snippet {trajectory.snippet_id}, line {trajectory.num_lines}")
        explore = self._config.gate_exploration
        if explore == 0.0:
            return policy, log1mexp(policy)
        return (
            math.log((1.0 - explore) * math.exp(policy) + explore / 2),
            math.log((1.0 - explore) * -math.expm1(policy) + explore / 2),
        )

    def _write_rationales(self, rollouts: Sequence[_Rollout], seed: int) -> None:
        """Generate the rationale of every rollout that thinks, and write it with the line that follows."""
        if not rollouts:
            return
        queries = [
            GenerateQuery(tuple(rollout.trajectory.token_ids), _keyed_draw("rationale", seed, rollout))
            for rollout in rollouts
        ]
        self.stats.generate_requests += len(queries)
        self.stats.prompt_tokens += sum(len(query.token_ids) for query in queries)
        for rollout, drawn in zip(rollouts, self._engine.generate(queries, self._stop), strict=True):
            self.stats.rationale_tokens += len(drawn.token_ids)
            self._format.append_rationale(
                rollout.trajectory,
                drawn.token_ids,
                rollout.lines_left[0],
                logprobs=drawn.logprobs,
                weight_version=drawn.weight_version,
            )

    def _window_lines(self) -> int:
        if self._config.window != "auto":
            return self._config.window
        if self.think_rate > LINE_BY_LINE_THINK_RATE:
            return 1
        return round(2 / max(self.think_rate, 2 / LARGEST_AUTO_WINDOW_LINES))

    def _tokens_if_act(self, rollout: _Rollout) -> int:
        """Length of the finished trajectory if it never thinks again."""
        act = len(self._format.gate_prefix) + len(self._format.act_suffix)
        return len(rollout.trajectory.token_ids) + sum(act + len(line) for line in rollout.lines_left)

    def _room_to_think(self, rollout: _Rollout) -> bool:
        """Whether one more rationale of full length fits; acting does not change the answer."""
        longer_gate = len(self._format.think_suffix) - len(self._format.act_suffix)
        rationale = self._config.max_rationale_tokens + len(self._format.close)
        return self._tokens_if_act(rollout) + longer_gate + rationale <= self._config.max_sequence_tokens


def _uniform(purpose: str, seed: int, rollout: _Rollout) -> float:
    """A number in [0, 1) of 53 bits."""
    return (_keyed_draw(purpose, seed, rollout) >> 10) / 2**53


def _keyed_draw(purpose: str, seed: int, rollout: _Rollout) -> int:
    """63 bits that depend on nothing but the purpose, the seed, the snippet, the rollout and its current line."""
    key = (purpose, seed, rollout.snippet.snippet_id, rollout.number, rollout.trajectory.num_lines)
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1
