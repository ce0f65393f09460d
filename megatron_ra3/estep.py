"""E-step: policy gradient on latents, with the likelihood of the expert's line as reward (method.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3 import objective
from megatron_ra3.batching import LatentBatch, LatentScores, pack
from megatron_ra3.latents import LatentFormat, Trajectory
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.presets import ObjectiveConfig
from megatron_ra3.report.metrics import global_means


class EStep:
    """One policy-gradient update per call of `update`."""

    def __init__(
        self,
        settings: ObjectiveConfig,
        learning_rate: float,
        trainer: Trainer,
        layout: ParallelLayout,
        latent_format: LatentFormat,
        micro_batch_tokens: int,
    ) -> None:
        self.settings = settings
        self.learning_rate = learning_rate
        self.trainer = trainer
        self.layout = layout
        self.format = latent_format
        self.micro_batch_tokens = micro_batch_tokens

    def update(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """Score the rollouts, form advantages and take one optimizer step.

        Where no group holds two different rollouts there is nothing to learn and no step is taken: Adam would blow
        rounding noise up to a full-sized update.

        Args:
            groups: this replica's snippets, each with its G rollouts.

        Returns:
            Metrics over all replicas; rewards and log-probs in nats.
        """
        rollouts = _Rollouts.of(groups)
        packing = pack([len(item.token_ids) for item in rollouts.items], self.micro_batch_tokens)
        scored = [self._batch(rollouts, indices, with_lines=True) for indices in packing]
        logprobs = self.trainer.score([batch.micro_batch for batch in scored])
        scores = [batch.read(values.cpu()) for batch, values in zip(scored, logprobs, strict=True)]
        rewards = [self._rewards(batch, score) for batch, score in zip(scored, scores, strict=True)]
        advantages = rollouts.advantages(_per_item(rewards, packing, rollouts.items), self.settings)
        result = {"loss": 0.0, "grad_norm": 0.0}
        if self.layout.sum_number_over_dp(sum(float(item.abs().sum()) for item in advantages)):
            result = self._policy_gradient(rollouts, packing, advantages)
        line_counts = [rollouts.per_line(rollouts.counts, indices) for indices in packing]
        line_advantage = _joined([torch.cat([advantages[index] for index in indices]) for indices in packing])
        return result | self._metrics(scored, scores, rewards, line_counts, line_advantage)

    def _batch(self, rollouts: _Rollouts, indices: Sequence[int], *, with_lines: bool) -> LatentBatch:
        return LatentBatch([rollouts.items[index] for index in indices], self.format, with_lines=with_lines)

    def _rewards(self, batch: LatentBatch, scores: LatentScores) -> Tensor:
        assert scores.line is not None
        return objective.line_rewards(
            scores.line,
            batch.line_tokens,
            batch.thought,
            batch.well_formed,
            penalty=self.settings.penalty,
            format_penalty=self.settings.format_penalty,
            line_reward=self.settings.line_reward,
        )

    def _sampling_law(self, batch: LatentBatch, policy: Tensor) -> Tensor:
        """What the engine's log-probs of the decisions should be, were it the trainer."""
        gates = int(batch.gate_sampled.sum())
        return torch.cat([objective.explored(policy[:gates], self.settings.gate_exploration), policy[gates:]])

    def _policy_gradient(
        self, rollouts: _Rollouts, packing: Sequence[Sequence[int]], advantages: Sequence[Tensor]
    ) -> dict[str, float]:
        batches = [self._batch(rollouts, indices, with_lines=False) for indices in packing]
        credit = [count * advantage for count, advantage in zip(rollouts.counts, advantages, strict=True)]
        line_credit = [torch.cat([credit[index] for index in indices]) for indices in packing]
        decisions = sum(count * sum(item.sampled) for count, item in zip(rollouts.counts, rollouts.items, strict=True))
        global_count = int(self.layout.sum_number_over_dp(decisions))

        def loss(index: int, logprobs: Tensor) -> Tensor:
            batch = batches[index]
            policy, behaviour, line = _decisions(batch, batch.read(logprobs))
            weights = objective.importance_weights(
                policy, behaviour.to(policy.device), maximum=self.settings.max_importance_weight
            )
            return objective.policy_gradient_loss(
                policy, weights, line_credit[index][line].to(policy.device), global_count=global_count
            )

        return self.trainer.step([batch.micro_batch for batch in batches], loss, lr=self.learning_rate)

    def _metrics(
        self,
        batches: Sequence[LatentBatch],
        scores: Sequence[LatentScores],
        rewards: Sequence[Tensor],
        line_counts: Sequence[Tensor],
        advantage: Tensor,
    ) -> dict[str, float]:
        decisions = [_decisions(batch, score) for batch, score in zip(batches, scores, strict=True)]
        policy = _joined([item[0] for item in decisions])
        expected = _joined([self._sampling_law(batch, item[0]) for batch, item in zip(batches, decisions, strict=True)])
        behaviour = _joined([item[1] for item in decisions])
        drawn = _joined([count[item[2]] for count, item in zip(line_counts, decisions, strict=True)])
        weights = objective.importance_weights(policy, behaviour, maximum=self.settings.max_importance_weight)
        reward, count = _joined(rewards), _joined(line_counts)
        nats = -_joined([score.line for score in scores if score.line is not None])
        thought = _joined([batch.thought for batch in batches])
        malformed = 1.0 - _joined([batch.well_formed for batch in batches])
        rationale_tokens = _joined([batch.rationale_tokens for batch in batches])
        lines, thinks, draws = count.sum(), (count * thought).sum(), drawn.sum()
        sums = {
            "reward": ((count * reward).sum(), lines),
            "reward_think": ((count * thought * reward).sum(), thinks),
            "reward_act": ((count * (1.0 - thought) * reward).sum(), lines - thinks),
            "advantage_think": ((count * thought * advantage).sum(), thinks),
            "nats_per_line": ((count * nats).sum(), lines),
            "think_rate": (thinks, lines),
            "rationale_tokens": ((count * rationale_tokens).sum(), thinks),
            "malformed_rate": ((count * malformed).sum(), thinks),
            "mismatch": ((drawn * (expected - behaviour).abs()).sum(), draws),
            "importance_weight": ((drawn * weights).sum(), draws),
            "square": ((drawn * weights**2).sum(), draws),
        }
        means = global_means(self.layout, {name: (float(a), float(b)) for name, (a, b) in sums.items()})
        square = means.pop("square")
        return means | {"effective_samples": means["importance_weight"] ** 2 / square if square else 1.0}


@dataclass(frozen=True, slots=True)
class _Rollouts:
    """Rollouts of all groups, each different one once: at low think rates most rollouts of a group are the same.

    `counts` says how often each of `items` was drawn, `groups` which item each rollout of a group is.
    """

    items: list[Trajectory]
    counts: list[int]
    groups: list[list[int]]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Trajectory]]) -> _Rollouts:
        rollouts = cls([], [], [])
        for group in groups:
            index_of: dict[tuple[int, ...], int] = {}
            members = []
            for item in group:
                index = index_of.setdefault(tuple(item.token_ids), len(rollouts.items))
                if index == len(rollouts.items):
                    rollouts.items.append(item)
                    rollouts.counts.append(0)
                rollouts.counts[index] += 1
                members.append(index)
            rollouts.groups.append(members)
        return rollouts

    def advantages(self, rewards: Sequence[Tensor], settings: ObjectiveConfig) -> list[Tensor]:
        """Per item [T] the leave-one-out advantage of each line, from its rewards [T]."""
        advantages = [torch.zeros_like(item) for item in rewards]
        for members in self.groups:
            stacked = torch.stack([rewards[index] for index in members])
            returns = objective.truncated_returns(stacked, horizon=settings.horizon, discount=settings.discount)
            for index, advantage in zip(members, objective.leave_one_out(returns), strict=True):
                advantages[index] = advantage
        return advantages

    def per_line(self, values: Sequence[float], indices: Sequence[int]) -> Tensor:
        """Repeat one value per item over the lines of the items at `indices`."""
        lengths = torch.tensor([self.items[index].num_lines for index in indices])
        return torch.tensor([values[index] for index in indices], dtype=torch.float64).repeat_interleave(lengths)


def _per_item(values: Sequence[Tensor], packing: Sequence[Sequence[int]], items: Sequence[Trajectory]) -> list[Tensor]:
    """Cut per-line values of micro-batches into those of each item."""
    found: dict[int, Tensor] = {}
    for indices, batch in zip(packing, values, strict=True):
        found.update(zip(indices, batch.split([items[index].num_lines for index in indices]), strict=True))
    return [found[index] for index in range(len(items))]


def _decisions(batch: LatentBatch, scores: LatentScores) -> tuple[Tensor, Tensor, Tensor]:
    """Policy log-prob, behaviour log-prob and line of every sampled decision: gates drawn, then rationale tokens."""
    drawn = batch.gate_sampled.nonzero().squeeze(1)
    policy = torch.cat([scores.gate[drawn.to(scores.gate.device)], scores.rationale])
    behaviour = torch.cat([batch.gate_behaviour[drawn], batch.rationale_behaviour])
    return policy, behaviour, torch.cat([drawn, batch.line_of_rationale])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One fp64 vector, also of no parts."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(part.double() for part in parts)])
