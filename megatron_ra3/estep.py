"""E-step: policy gradient on latents, with the likelihood of the expert's line as reward (algorithm.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3 import objective
from megatron_ra3.batching import FinalLineBatch, LatentBatch, LatentScores, pack
from megatron_ra3.credit import Counterfactuals, Rollouts, per_item
from megatron_ra3.latents import LatentFormat, Trajectory
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.reference import Reference
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.presets import ObjectiveConfig
from megatron_ra3.report.metrics import global_means


class EStep:
    """One policy-gradient update per call of `update`.

    Args:
        settings: the objective.
        learning_rate: of the update.
        trainer: scores and steps.
        layout: ranks of the trainer.
        latent_format: surface form of the latents.
        micro_batch_tokens: padded tokens per forward pass at most.
        reference: q_ref, where the objective needs it.
    """

    def __init__(
        self,
        settings: ObjectiveConfig,
        learning_rate: float,
        trainer: Trainer,
        layout: ParallelLayout,
        latent_format: LatentFormat,
        micro_batch_tokens: int,
        reference: Reference | None = None,
    ) -> None:
        assert reference is not None or not settings.needs_reference
        self.settings = settings
        self.learning_rate = learning_rate
        self.trainer = trainer
        self.layout = layout
        self.format = latent_format
        self.micro_batch_tokens = micro_batch_tokens
        self.reference = reference

    def update(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """Score the rollouts, form advantages and take one optimizer step.

        Where every advantage is 0, as between equal rollouts, there is nothing to learn and no step is taken: Adam
        would blow rounding noise up to a full-sized update. A term on the gate's own law, or on the lines, always has.

        Args:
            groups: this replica's snippets, each with its G rollouts.

        Returns:
            Metrics over all replicas; rewards and log-probs in nats.
        """
        rollouts = Rollouts.of(groups)
        packing = self._pack(rollouts.items)
        scored = self._score(rollouts.items, packing)
        rewards = per_item([item.rewards for item in scored], packing, rollouts.items)
        without = None
        if self.settings.baseline != "group":
            with TIMELINE.span("scoring, counterfactual"):
                without = self._without_rationale(rollouts.items, scored, packing)
        advantages = rollouts.advantages(rewards, without, self.settings)
        result = {"loss": 0.0, "grad_norm": 0.0}
        decisions, gates = (int(self.layout.sum_number_over_dp(count)) for count in rollouts.sampled())
        differing = self.layout.sum_number_over_dp(sum(float(item.abs().sum()) for item in advantages))
        if differing or (gates and self._regularises_gates) or (decisions and self.settings.line_gradient):
            result = self._policy_gradient(rollouts, advantages, decisions, gates)
        lines = _PerLine(
            counts=[rollouts.per_line(rollouts.counts, indices) for indices in packing],
            advantage=_joined([advantages[index] for indices in packing for index in indices]),
            without=None if without is None else _joined([without[index] for indices in packing for index in indices]),
        )
        return result | self._metrics(scored, lines)

    def evaluate(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Held-out objective, without training; nats, over all replicas.

        `objective` is the mean reward of a line. `elbo` is the sum of log pi(a_t | s_t, z_t) - KL_Bern(rho_t || 1 -
        alpha') over the tokens of all lines, so that it can be compared across granularities: the sequential bound with
        the model itself as the law of new latents (algorithm.md 2). Gates that were told are free of charge.
        """
        packing = self._pack(trajectories)
        scored = self._score(trajectories, packing)
        count = float(sum(item.num_lines for item in trajectories))
        lines = [item.scores.line for item in scored if item.scores.line is not None]
        bound = _joined(lines) - _joined([self._gate_kl(item.batch, item.scores) for item in scored])
        rewards = _joined([item.rewards for item in scored])
        tokens = float(sum(item.batch.line_tokens.sum() for item in scored))
        sums = {"objective": (float(rewards.sum()), count), "elbo": (float(bound.sum()), tokens)}
        return global_means(self.layout, sums)

    @property
    def _regularises_gates(self) -> bool:
        return self.settings.latent_cost == "sticky_kl" or self.settings.gate_entropy_floor > 0.0

    def _pack(self, items: Sequence[Trajectory]) -> list[list[int]]:
        return pack([len(item.token_ids) for item in items], self.micro_batch_tokens)

    def _score(self, items: Sequence[Trajectory], packing: Sequence[Sequence[int]]) -> list[_Scored]:
        """Score latents and lines, and reward the lines."""
        with TIMELINE.span("scoring"):
            batches = [self._batch(items, indices, with_lines=True) for indices in packing]
            logprobs = self.trainer.score([batch.micro_batch for batch in batches])
            scores = [batch.read(values.cpu()) for batch, values in zip(batches, logprobs, strict=True)]
        gaps: list[Tensor | None] = [None] * len(batches)
        if self.settings.needs_reference:
            with TIMELINE.span("scoring, reference"):
                gaps = list(self._reference_gaps(items, packing, scores))
        return [
            _Scored(batch, score, self._rewards(batch, score, gap), gap)
            for batch, score, gap in zip(batches, scores, gaps, strict=True)
        ]

    def _batch(self, items: Sequence[Trajectory], indices: Sequence[int], *, with_lines: bool) -> LatentBatch:
        return LatentBatch([items[index] for index in indices], self.format, with_lines=with_lines)

    def _rewards(self, batch: LatentBatch, scores: LatentScores, reference_gap: Tensor | None) -> Tensor:
        assert scores.line is not None
        lines = objective.Lines(
            logprob=scores.line,
            tokens=batch.line_tokens,
            thought=batch.thought,
            well_formed=batch.well_formed,
            gate_kl=self._gate_kl(batch, scores) if self.settings.latent_cost == "sticky_kl" else None,
            reference_gap=reference_gap,
        )
        return objective.line_rewards(lines, self.settings)

    def _gate_kl(self, batch: LatentBatch, scores: LatentScores) -> Tensor:
        """KL_Bern of each line's gate to the sticky prior [T]; 0 where it was not sampled."""
        kl = objective.GateLaw.of(scores.gate, batch.thought).kl(self.settings.stickiness)
        return torch.where(batch.gate_sampled, kl, torch.zeros_like(kl))

    def _reference_gaps(
        self, items: Sequence[Trajectory], packing: Sequence[Sequence[int]], scores: Sequence[LatentScores]
    ) -> list[Tensor]:
        """Per line [T] the sum of log q - log q_ref over its rationale's tokens."""
        assert self.reference is not None
        batches = [self._batch(items, indices, with_lines=False) for indices in packing]
        logprobs = self.reference.score([batch.micro_batch for batch in batches])
        gaps = []
        for batch, score, values in zip(batches, scores, logprobs, strict=True):
            gap = score.rationale - batch.read(values.cpu()).rationale
            gaps.append(torch.zeros_like(score.gate).index_add(0, batch.line_of_rationale, gap))
        return gaps

    def _without_rationale(
        self, items: Sequence[Trajectory], scored: Sequence[_Scored], packing: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Per item [T] the value of each line had its own latent been `<act>`."""
        if not items:
            return []
        own = per_item([self._values(item) for item in scored], packing, items)
        tokens = torch.cat(per_item([item.batch.line_tokens for item in scored], packing, items))
        found = Counterfactuals.of(items, self.format)
        variants = self._pack(found.variants)
        batches = [FinalLineBatch([found.variants[index] for index in indices], self.format) for indices in variants]
        logprobs = self.trainer.score([batch.micro_batch for batch in batches])
        line = torch.zeros(len(found.variants), dtype=own[0].dtype)
        for indices, batch, values in zip(variants, batches, logprobs, strict=True):
            line[torch.tensor(indices)] = batch.read(values.cpu())
        joined, owner = torch.cat(own), torch.tensor(found.owners)
        thought = owner >= 0
        joined[thought] = objective.line_values(line[owner[thought]], tokens[thought], self.settings)
        return list(joined.split([item.num_lines for item in items]))

    def _values(self, scored: _Scored) -> Tensor:
        assert scored.scores.line is not None
        return objective.line_values(scored.scores.line, scored.batch.line_tokens, self.settings)

    def _policy_gradient(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], decisions: int, gates: int
    ) -> dict[str, float]:
        """Step on all rollouts where gates pay for their law or lines learn, else on those that have an advantage."""
        teaches_lines = self.settings.line_gradient > 0.0
        all_learn = self._regularises_gates or teaches_lines
        learning = [i for i, item in enumerate(advantages) if all_learn or bool(item.any())]
        chosen = self._pack([rollouts.items[i] for i in learning])
        packing = [[learning[k] for k in indices] for indices in chosen]
        batches = [self._batch(rollouts.items, indices, with_lines=teaches_lines) for indices in packing]
        credit = [count * advantage for count, advantage in zip(rollouts.counts, advantages, strict=True)]
        line_credit = [torch.cat([credit[index] for index in indices]) for indices in packing]
        line_counts = [rollouts.per_line(rollouts.counts, indices).float() for indices in packing]

        def loss(index: int, logprobs: Tensor) -> Tensor:
            batch = batches[index]
            scores = batch.read(logprobs)
            policy, behaviour, line = _decisions(batch, scores)
            total = objective.policy_gradient_loss(
                policy,
                behaviour.to(policy.device),
                line_credit[index][line].to(policy.device),
                self.settings,
                global_count=decisions,
            )
            if scores.line is not None:
                counts = line_counts[index].to(scores.line.device)
                tokens = batch.line_tokens.to(scores.line.device)
                total = total + objective.line_loss(scores.line, tokens, counts, self.settings, global_count=decisions)
            if not self._regularises_gates:
                return total
            drawn = batch.gate_sampled.nonzero().squeeze(1)
            on_device = drawn.to(policy.device)
            law = objective.GateLaw.of(scores.gate[on_device], batch.thought[drawn].to(policy.device))
            return total + objective.gate_regulariser(
                law,
                line_counts[index][drawn].to(policy.device),
                self.settings,
                global_decisions=decisions,
                global_gates=gates,
            )

        return self.trainer.step([batch.micro_batch for batch in batches], loss, lr=self.learning_rate)

    def _metrics(self, scored: Sequence[_Scored], lines: _PerLine) -> dict[str, float]:
        sums = self._decision_sums(scored, lines) | self._line_sums(scored, lines)
        means = global_means(self.layout, {name: (float(a), float(b)) for name, (a, b) in sums.items()})
        square = means.pop("square")
        drawn = means.pop("drawn")
        return means | {"effective_samples": means["importance_weight"] ** 2 / square if square else 1.0 - drawn}

    def _decision_sums(self, scored: Sequence[_Scored], lines: _PerLine) -> dict[str, tuple[Tensor, Tensor]]:
        """How far trainer and engine agree on what was sampled."""
        decisions = [_decisions(item.batch, item.scores) for item in scored]
        policy = _joined([item[0] for item in decisions])
        law = [self._sampling_law(item.batch, found[0]) for item, found in zip(scored, decisions, strict=True)]
        behaviour = _joined([item[1] for item in decisions])
        drawn = _joined([count[item[2]] for count, item in zip(lines.counts, decisions, strict=True)])
        weights = objective.importance_weights(policy, behaviour, self.settings)
        draws = drawn.sum()
        return {
            "mismatch": ((drawn * (_joined(law) - behaviour).abs()).sum(), draws),
            "importance_weight": ((drawn * weights).sum(), draws),
            "square": ((drawn * weights**2).sum(), draws),
            "drawn": (draws, draws),
        }

    def _sampling_law(self, batch: LatentBatch, policy: Tensor) -> Tensor:
        """What the engine's log-probs of the decisions should be, were it the trainer."""
        gates = int(batch.gate_sampled.sum())
        return torch.cat([objective.explored(policy[:gates], self.settings.gate_exploration), policy[gates:]])

    def _line_sums(self, scored: Sequence[_Scored], lines: _PerLine) -> dict[str, tuple[Tensor, Tensor]]:
        """Rewards and latents per line, over all rollouts."""
        reward, count = _joined([item.rewards for item in scored]), _joined(lines.counts)
        thought = _joined([item.batch.thought for item in scored])
        nats = -_joined([item.scores.line for item in scored if item.scores.line is not None])
        malformed = 1.0 - _joined([item.batch.well_formed for item in scored])
        rationale_tokens = _joined([item.batch.rationale_tokens for item in scored])
        gated = count * _joined([item.batch.gate_sampled for item in scored])
        entropy = _joined([objective.GateLaw.of(item.scores.gate, item.batch.thought).entropy() for item in scored])
        total, thinks = count.sum(), (count * thought).sum()
        sums = {
            "reward": ((count * reward).sum(), total),
            "reward_think": ((count * thought * reward).sum(), thinks),
            "reward_act": ((count * (1.0 - thought) * reward).sum(), total - thinks),
            "advantage_think": ((count * thought * lines.advantage).sum(), thinks),
            "nats_per_line": ((count * nats).sum(), total),
            "think_rate": (thinks, total),
            "rationale_tokens": ((count * rationale_tokens).sum(), thinks),
            "malformed_rate": ((count * malformed).sum(), thinks),
            "gate_entropy": ((gated * entropy).sum(), gated.sum()),
        }
        if lines.without is not None:
            gain = _joined([self._values(item) for item in scored]) - lines.without
            sums["gain_per_think"] = ((count * thought * gain).sum(), thinks)
        if self.settings.latent_cost == "sticky_kl":
            kl = _joined([self._gate_kl(item.batch, item.scores) for item in scored])
            sums["gate_kl"] = ((count * kl).sum(), total)
        if self.settings.needs_reference:
            gap = _joined([item.reference_gap for item in scored if item.reference_gap is not None])
            sums["reference_kl"] = ((count * gap).sum(), thinks)
        return sums


@dataclass(frozen=True, slots=True)
class _Scored:
    """A micro-batch after the reward pass; `rewards` and `reference_gap` are per line [T]."""

    batch: LatentBatch
    scores: LatentScores
    rewards: Tensor
    reference_gap: Tensor | None


@dataclass(frozen=True, slots=True)
class _PerLine:
    """Per line of all micro-batches: how often it was drawn (by micro-batch), its advantage and act value."""

    counts: list[Tensor]
    advantage: Tensor
    without: Tensor | None


def _decisions(batch: LatentBatch, scores: LatentScores) -> tuple[Tensor, Tensor, Tensor]:
    """Policy log-prob, behaviour log-prob and line of every sampled decision: gates drawn, then rationale tokens."""
    drawn = batch.gate_sampled.nonzero().squeeze(1)
    policy = torch.cat([scores.gate[drawn.to(scores.gate.device)], scores.rationale])
    behaviour = torch.cat([batch.gate_behaviour[drawn], batch.rationale_behaviour])
    return policy, behaviour, torch.cat([drawn, batch.line_of_rationale])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One fp64 vector, also of no parts."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(part.double() for part in parts)])
