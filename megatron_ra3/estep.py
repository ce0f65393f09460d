"""E-step: policy gradient on latents, with the likelihood of the expert's line as reward (method.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_ra3 import objective
from megatron_ra3.batching import LatentBatch, LatentScores, pack
from megatron_ra3.config import EStepConfig
from megatron_ra3.latents import LatentFormat, Trajectory
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.report.metrics import global_means


class EStep:
    """One policy-gradient update per call of `update`."""

    def __init__(
        self,
        config: EStepConfig,
        trainer: Trainer,
        layout: ParallelLayout,
        latent_format: LatentFormat,
        micro_batch_tokens: int,
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.layout = layout
        self.format = latent_format
        self.micro_batch_tokens = micro_batch_tokens

    def update(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """Score the rollouts, form advantages and take one optimizer step.

        Args:
            groups: this replica's snippets, each with its G rollouts.

        Returns:
            Metrics over all replicas; rewards and log-probs in nats.
        """
        trajectories = [item for group in groups for item in group]
        packing = pack([len(item.token_ids) for item in trajectories], self.micro_batch_tokens)
        members = [[trajectories[index] for index in indices] for indices in packing]
        scored = [LatentBatch(items, self.format, with_lines=True) for items in members]
        logprobs = self.trainer.score([batch.micro_batch for batch in scored])
        scores = [batch.read(values.cpu()) for batch, values in zip(scored, logprobs, strict=True)]
        rewards = [self._rewards(batch, score) for batch, score in zip(scored, scores, strict=True)]
        advantages = _regroup(rewards, packing, [item.num_lines for item in trajectories], groups, self.config)
        result = self._policy_gradient(members, advantages)
        return result | self._metrics(scored, scores, rewards)

    def _rewards(self, batch: LatentBatch, scores: LatentScores) -> Tensor:
        assert scores.line is not None
        return objective.line_rewards(
            scores.line,
            batch.line_tokens,
            batch.thought,
            batch.well_formed,
            penalty=self.config.penalty,
            format_penalty=self.config.format_penalty,
            line_reward=self.config.line_reward,
        )

    def _policy_gradient(
        self, members: Sequence[Sequence[Trajectory]], advantages: Sequence[Tensor]
    ) -> dict[str, float]:
        batches = [LatentBatch(items, self.format, with_lines=False) for items in members]
        global_count = int(self.layout.sum_number_over_dp(sum(batch.num_decisions for batch in batches)))

        def loss(index: int, logprobs: Tensor) -> Tensor:
            batch, advantage = batches[index], advantages[index]
            policy, behaviour, line = _decisions(batch, batch.read(logprobs))
            weights = objective.importance_weights(
                policy, behaviour.to(policy.device), maximum=self.config.max_importance_weight
            )
            return objective.policy_gradient_loss(
                policy, weights, advantage[line].to(policy.device), global_count=global_count
            )

        return self.trainer.step([batch.micro_batch for batch in batches], loss, lr=self.config.learning_rate)

    def _metrics(
        self, batches: Sequence[LatentBatch], scores: Sequence[LatentScores], rewards: Sequence[Tensor]
    ) -> dict[str, float]:
        reward = torch.cat(list(rewards)).double()
        thought = torch.cat([batch.thought for batch in batches])
        line = torch.cat([score.line for score in scores if score.line is not None]).double()
        decisions = [_decisions(batch, score) for batch, score in zip(batches, scores, strict=True)]
        policy = torch.cat([item[0] for item in decisions]).double()
        behaviour = torch.cat([item[1] for item in decisions]).double()
        weights = objective.importance_weights(policy, behaviour, maximum=self.config.max_importance_weight)
        lines, thinks = float(len(reward)), float(thought.sum())
        sums = {
            "reward": (float(reward.sum()), lines),
            "reward_think": (float(reward[thought].sum()), thinks),
            "reward_act": (float(reward[~thought].sum()), lines - thinks),
            "nats_per_line": (-float(line.sum()), lines),
            "think_rate": (thinks, lines),
            "rationale_tokens": (float(sum(batch.rationale_tokens for batch in batches)), thinks),
            "malformed_rate": (float(sum((~batch.well_formed).sum() for batch in batches)), thinks),
            "mismatch": (float((policy - behaviour).abs().sum()), float(len(policy))),
            "importance_weight": (float(weights.sum()), float(len(weights))),
            "effective_samples": (float(objective.effective_sample_fraction(weights)), 1.0),
        }
        return global_means(self.layout, sums)


def _decisions(batch: LatentBatch, scores: LatentScores) -> tuple[Tensor, Tensor, Tensor]:
    """Policy log-prob, behaviour log-prob and line of every sampled decision: gates drawn, then rationale tokens."""
    drawn = batch.gate_sampled.nonzero().squeeze(1)
    policy = torch.cat([scores.gate[drawn.to(scores.gate.device)], scores.rationale])
    behaviour = torch.cat([batch.gate_behaviour[drawn], batch.rationale_behaviour])
    return policy, behaviour, torch.cat([drawn, batch.line_of_rationale])


def _regroup(
    rewards: Sequence[Tensor],
    packing: Sequence[Sequence[int]],
    num_lines: Sequence[int],
    groups: Sequence[Sequence[Trajectory]],
    config: EStepConfig,
) -> list[Tensor]:
    """Advantages in the order of the micro-batches, from rewards in that order: per-line leave-one-out in a group."""
    per_trajectory: dict[int, Tensor] = {}
    for indices, values in zip(packing, rewards, strict=True):
        per_trajectory.update(zip(indices, values.split([num_lines[i] for i in indices]), strict=True))
    starts = list(accumulate((len(group) for group in groups), initial=0))
    advantages: dict[int, Tensor] = {}
    for start, end in pairwise(starts):
        returns = objective.truncated_returns(
            torch.stack([per_trajectory[index] for index in range(start, end)]),
            horizon=config.horizon,
            discount=config.discount,
        )
        advantages.update(enumerate(objective.leave_one_out(returns), start))
    return [torch.cat([advantages[index] for index in indices]) for indices in packing]
