"""Which (position, target) pairs of a batch are scored, and what each score means.

The trainer only ever sees pairs; this module turns trajectories into pairs and the scored pairs back into gate,
rationale and line log-probs. Doing it in one place keeps reward, loss and engine talking about the same decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_ra3.latents import Kind, LatentFormat, Trajectory
from megatron_ra3.model.trainer import MicroBatch
from megatron_ra3.objective import log1mexp


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequence indices into padded micro-batches of at most `max_tokens` (count times longest) tokens.

    Longest first, so that sequences of like length share a batch; one that is longer than `max_tokens` stays alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class TokenSequence(Protocol):
    """Anything that is scored token by token."""

    @property
    def token_ids(self) -> Sequence[int]:
        """All of it, whatever precedes what is scored included."""


def pad(trajectories: Sequence[TokenSequence]) -> Tensor:
    """Token ids [b, s], right-padded with 0: under a causal mask padding cannot reach what is scored."""
    width = max(len(item.token_ids) for item in trajectories)
    tokens = torch.zeros(len(trajectories), width, dtype=torch.int64)
    for row, item in enumerate(trajectories):
        tokens[row, : len(item.token_ids)] = torch.tensor(item.token_ids)
    return tokens


@dataclass(frozen=True, slots=True)
class LatentScores:
    """Scored decisions of a micro-batch of trajectories with T lines and R sampled rationale tokens, nats."""

    gate: Tensor
    """[T] log-prob of the gate's choice."""
    rationale: Tensor
    """[R] log-prob of each sampled rationale token."""
    line: Tensor | None
    """[T] summed log-prob of each line; None where lines were not scored."""


@dataclass(slots=True)
class _Pairs:
    """(row, target) pairs of the decisions and lines of a micro-batch, with the line each belongs to."""

    gates: list[tuple[int, int]] = field(default_factory=list)
    rationales: list[tuple[int, int]] = field(default_factory=list)
    lines: list[tuple[int, int]] = field(default_factory=list)
    openings: list[tuple[int, int]] = field(default_factory=list)
    line_of_rationale: list[int] = field(default_factory=list)
    line_of_token: list[int] = field(default_factory=list)
    gate_behaviour: list[float] = field(default_factory=list)
    gate_sampled: list[bool] = field(default_factory=list)
    rationale_behaviour: list[float] = field(default_factory=list)

    def add(self, item: Trajectory, latent_format: LatentFormat, offset: int, line_base: int) -> None:
        """Walk one trajectory whose first token has flat index `offset` and whose lines start at `line_base`."""
        ahead = len(latent_format.gate_prefix) - 1
        previous = (int(Kind.PROMPT), -1)
        for position, segment in enumerate(zip(item.kinds, item.line_index, strict=True)):
            kind, line = segment
            pair = (offset + position - 1, item.token_ids[position])
            opens = segment != previous
            if kind == Kind.GATE:
                if opens:
                    self.gates.extend((offset + position + ahead, gate_id) for gate_id in latent_format.gate_ids)
                    self.gate_behaviour.append(0.0)
                    self.gate_sampled.append(False)
                if item.sampled[position]:
                    self.gate_behaviour[-1] = item.engine_logprobs[position]
                    self.gate_sampled[-1] = True
            elif kind == Kind.RATIONALE and item.sampled[position]:
                self.rationales.append(pair)
                self.line_of_rationale.append(line_base + line)
                self.rationale_behaviour.append(item.engine_logprobs[position])
            elif kind == Kind.LINE:
                if opens and latent_format.conditions_line:
                    self.openings.append((pair[0], latent_format.gate_ids[0]))
                self.lines.append(pair)
                self.line_of_token.append(line_base + line)
            previous = segment


class LatentBatch:
    """A micro-batch of sampled trajectories: the pairs to score, and how the scores are read back.

    Args:
        trajectories: finished trajectories.
        latent_format: their surface form.
        with_lines: score the lines too (the reward pass); the policy-gradient pass needs only latents.
    """

    def __init__(self, trajectories: Sequence[Trajectory], latent_format: LatentFormat, *, with_lines: bool) -> None:
        tokens = pad(trajectories)
        pairs = _Pairs()
        line_base = 0
        for row, item in enumerate(trajectories):
            pairs.add(item, latent_format, row * tokens.shape[1], line_base)
            line_base += item.num_lines
        groups = [pairs.gates, pairs.rationales]
        if with_lines:
            groups += [pairs.lines, pairs.openings]
        self.format = latent_format
        rewarded = sum(map(len, groups[2:]))
        self.micro_batch = micro_batch(tokens, [pair for group in groups for pair in group], rewarded)
        self.num_lines = line_base
        self.thought = torch.tensor([flag for item in trajectories for flag in item.thought])
        self.well_formed = torch.tensor([flag for item in trajectories for flag in item.well_formed])
        self.line_tokens = torch.bincount(torch.tensor(pairs.line_of_token), minlength=line_base)
        self.line_of_rationale = torch.tensor(pairs.line_of_rationale, dtype=torch.int64)
        self.gate_sampled = torch.tensor(pairs.gate_sampled)
        self.gate_behaviour = torch.tensor(pairs.gate_behaviour)
        self.rationale_behaviour = torch.tensor(pairs.rationale_behaviour)
        self.rationale_tokens = torch.tensor([count for item in trajectories for count in item.rationale_lengths()])
        self._group_sizes = [len(group) for group in groups]
        self._line_of_token = torch.tensor(pairs.line_of_token)

    def read(self, logprobs: Tensor) -> LatentScores:
        """Turn the scored pairs [K] of `micro_batch` into log-probs of decisions and lines."""
        gates, rationale, *line_parts = torch.split(logprobs, self._group_sizes)
        per_gate = gates.view(self.num_lines, len(self.format.gate_ids))
        if self.format.surface == "newline":
            think = per_gate[:, 0]
            act = log1mexp(think)
        else:
            act, think = torch.log_softmax(per_gate, dim=1).unbind(dim=1)
        gate = torch.where(self.thought.to(think.device), think, act)
        if not line_parts:
            return LatentScores(gate=gate, rationale=rationale, line=None)
        tokens, openings = line_parts
        line = torch.zeros_like(gate).index_add(0, self._line_of_token.to(gate.device), tokens)
        if self.format.conditions_line:
            line = line - log1mexp(openings)
        return LatentScores(gate=gate, rationale=rationale, line=line)


class FinalLineBatch:
    """A micro-batch in which only each trajectory's last line is scored, whatever precedes it."""

    def __init__(self, trajectories: Sequence[Trajectory], latent_format: LatentFormat) -> None:
        tokens = pad(trajectories)
        lines: list[tuple[int, int]] = []
        openings: list[tuple[int, int]] = []
        owner: list[int] = []
        for row, item in enumerate(trajectories):
            final = item.line_tokens(item.num_lines - 1)
            first = row * tokens.shape[1] + len(item.token_ids) - len(final) - 1
            lines.extend((first + ahead, token) for ahead, token in enumerate(final))
            owner.extend([row] * len(final))
            if latent_format.conditions_line:
                openings.append((first, latent_format.gate_ids[0]))
        self.micro_batch = micro_batch(tokens, lines + openings, len(lines) + len(openings))
        self._owner = torch.tensor(owner)
        self._count = len(trajectories)

    def read(self, logprobs: Tensor) -> Tensor:
        """Summed log-prob [b] of the last lines, nats, from the scored pairs [K]."""
        tokens, openings = logprobs[: len(self._owner)], logprobs[len(self._owner) :]
        line = torch.zeros(self._count, dtype=logprobs.dtype, device=logprobs.device)
        line = line.index_add(0, self._owner.to(logprobs.device), tokens)
        return line - log1mexp(openings) if len(openings) else line


class TokenBatch:
    """A micro-batch for next-token training on annotated snippets: every token after the prompt is a target.

    `is_code` [K] marks tokens of the code as it stood before any rationale: lines, and in the newline form the newline
    that opens a gate and ends the line before it. `weights` [K] is 1 there and `latent_weight` elsewhere.
    """

    def __init__(
        self, trajectories: Sequence[Trajectory], latent_format: LatentFormat, *, latent_weight: float
    ) -> None:
        tokens = pad(trajectories)
        width = tokens.shape[1]
        targets: list[tuple[int, int]] = []
        is_code: list[bool] = []
        for row, item in enumerate(trajectories):
            previous = (int(Kind.PROMPT), -1)
            for position, segment in enumerate(zip(item.kinds, item.line_index, strict=True)):
                kind = segment[0]
                if kind != Kind.PROMPT:
                    targets.append((row * width + position - 1, item.token_ids[position]))
                    ends_line = kind == Kind.GATE and segment != previous and bool(latent_format.gate_prefix)
                    is_code.append(kind == Kind.LINE or ends_line)
                previous = segment
        self.micro_batch = micro_batch(tokens, targets)
        self.is_code = torch.tensor(is_code)
        self.weights = torch.where(self.is_code, 1.0, latent_weight)


def micro_batch(tokens: Tensor, pairs: Sequence[tuple[int, int]], rewarded: int = 0) -> MicroBatch:
    """Padded sequences [b, s] and their (flat row, target) pairs, the last `rewarded` of them for rewards alone."""
    flat = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return MicroBatch(tokens, flat[:, 0].contiguous(), flat[:, 1].contiguous(), rewarded)
