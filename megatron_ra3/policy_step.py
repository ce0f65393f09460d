"""One step of RLVR on judged answers: score them, form advantages, take optimizer steps, and say what happened.

Equal answers of a group are scored once and counted (`counts`): late in a run most are, and so they stay exactly equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3 import grpo
from megatron_ra3.batching import micro_batch, pack, pad
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.reference import Reference
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.report.metrics import global_means
from megatron_ra3.rlvr_config import RlvrConfig
from megatron_ra3.rollout.answers import Answer


@dataclass(slots=True)
class Group:
    """Different answers to one task, how often each was drawn, and their advantages [B]."""

    answers: list[Answer]
    counts: list[int]
    rewards: list[float]
    advantages: Tensor

    @classmethod
    def of(cls, answers: Sequence[Answer], rewards: Sequence[float | None], settings: RlvrConfig) -> Group | None:
        """From all G answers to a task; None where fewer than two count.

        An answer without a reward is no sample, nor is one that was cut at the cap where those are masked.
        """
        masked = settings.truncated == "mask"
        kept = [
            (answer, reward - grpo.overlong_penalty(len(answer.answer_ids), settings))
            for answer, reward in zip(answers, rewards, strict=True)
            if reward is not None and (answer.ended or not masked)
        ]
        if len(kept) < 2:
            return None
        drawn = grpo.advantages(torch.tensor([value for _, value in kept], dtype=torch.float64), settings.advantage)
        group = cls([], [], [], torch.zeros(0))
        index_of: dict[tuple[int, ...], int] = {}
        of_each = []
        for (answer, value), advantage in zip(kept, drawn.tolist(), strict=True):
            index = index_of.setdefault(tuple(answer.answer_ids), len(group.answers))
            if index == len(group.answers):
                group.answers.append(answer)
                group.counts.append(0)
                group.rewards.append(value)
                of_each.append(advantage)
            group.counts[index] += 1
        group.advantages = torch.tensor(of_each, dtype=torch.float64)
        return group

    @property
    def teaches(self) -> bool:
        """Whether rewards differ."""
        return bool(self.advantages.any())


class AnswerBatch:
    """A micro-batch of answers, of which every sampled token is scored. `owner` [K] is the answer of each token."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        tokens = pad(answers)
        targets: list[tuple[int, int]] = []
        for row, item in enumerate(answers):
            first = row * tokens.shape[1] + len(item.prompt_ids) - 1
            targets.extend((first + ahead, token) for ahead, token in enumerate(item.answer_ids))
        self.micro_batch = micro_batch(tokens, targets)
        self.lengths = torch.tensor([len(item.answer_ids) for item in answers])
        self.owner = torch.arange(len(answers)).repeat_interleave(self.lengths)
        self.behaviour = torch.tensor([value for item in answers for value in item.engine_logprobs])


@dataclass(slots=True)
class _Item:
    """One different answer, with what the scoring pass found of its tokens."""

    answer: Answer
    count: int
    advantage: float
    old: Tensor
    entropy: Tensor
    reference: Tensor | None = None


class PolicyStep:
    """RLVR's update; collective over all ranks.

    Args:
        settings: the objective.
        trainer: scores and steps.
        layout: ranks of the trainer.
        micro_batch_tokens: padded tokens per forward pass at most.
        reference: where `settings.reference_kl` needs it.
    """

    def __init__(
        self,
        settings: RlvrConfig,
        trainer: Trainer,
        layout: ParallelLayout,
        micro_batch_tokens: int,
        reference: Reference | None = None,
    ) -> None:
        assert reference is not None or not settings.reference_kl
        self.settings = settings
        self.trainer = trainer
        self.layout = layout
        self.micro_batch_tokens = micro_batch_tokens
        self.reference = reference

    def update(self, groups: Sequence[Group], lr: float) -> dict[str, float]:
        """Take `updates_per_step` optimizer steps on this replica's groups; metrics over all replicas.

        Where no reward differs and no other term asks for a change no step is taken: Adam would move on by momentum.
        """
        settings = self.settings
        parts = [groups[part :: settings.updates_per_step] for part in range(settings.updates_per_step)]
        shares = [self._score(part) for part in parts]
        items = [item for share in shares for item in share]
        means = self._means(items)
        bonus = settings.entropy_bonus
        if settings.entropy_floor and means["entropy"] >= settings.entropy_floor:
            bonus = 0.0
        results = [self._step(share, bonus, lr) for share in shares]
        steps = [result for result in results if result is not None]
        summed = {name: sum(result[name] for result in steps) for name in ("loss", "grad_norm", "clipped", "tokens")}
        tokens = self.layout.sum_number_over_dp(summed["tokens"])
        clipped = self.layout.sum_number_over_dp(summed["clipped"])
        return {
            "loss": summed["loss"] / max(len(steps), 1),
            "grad_norm": summed["grad_norm"] / max(len(steps), 1),
            "clip_fraction": clipped / tokens if tokens else 0.0,
            "updates": float(len(steps)),
            "lr": lr,
            **means,
        }

    def _score(self, groups: Sequence[Group]) -> list[_Item]:
        """Log-probs and entropies before the update, under the reference too where that is asked for."""
        flat = [
            (answer, count, float(advantage))
            for group in groups
            for answer, count, advantage in zip(group.answers, group.counts, group.advantages, strict=True)
        ]
        packing = self._pack([answer for answer, _, _ in flat])
        batches = [AnswerBatch([flat[index][0] for index in indices]) for indices in packing]
        micro_batches = [batch.micro_batch for batch in batches]
        with TIMELINE.span("scoring"):
            scored = [values.cpu() for values in self.trainer.score_with_entropy(micro_batches)]
        reference: Sequence[Tensor | None] = [None] * len(batches)
        if self.reference is not None:
            with TIMELINE.span("scoring, reference"):
                reference = [values.cpu() for values in self.reference.score(micro_batches)]
        items: dict[int, _Item] = {}
        for indices, batch, values, other in zip(packing, batches, scored, reference, strict=True):
            lengths = batch.lengths.tolist()
            old, entropy = (row.split(lengths) for row in values)
            refs = other.split(lengths) if other is not None else [None] * len(indices)
            for index, *found in zip(indices, old, entropy, refs, strict=True):
                items[index] = _Item(*flat[index], *found)
        return [items[index] for index in range(len(flat))]

    def _step(self, items: Sequence[_Item], bonus: float, lr: float) -> dict[str, float] | None:
        """One optimizer step; None where there is nothing to learn."""
        answers, tokens, differing = (
            self.layout.sum_number_over_dp(value)
            for value in (
                float(sum(item.count for item in items)),
                float(sum(item.count * len(item.answer.answer_ids) for item in items)),
                sum(abs(item.advantage) for item in items),
            )
        )
        all_learn = bool(self.settings.reference_kl or bonus)
        if not differing and not (all_learn and answers):
            return None
        totals = grpo.Totals(answers, tokens)
        learning = [item for item in items if all_learn or item.advantage]
        packing = self._pack([item.answer for item in learning])
        batches = [AnswerBatch([learning[index].answer for index in indices]) for indices in packing]
        known = [
            self._tokens(batch, [learning[index] for index in indices], totals)
            for batch, indices in zip(batches, packing, strict=True)
        ]
        clipped = [0.0] * len(batches)

        def loss(index: int, found: Tensor) -> Tensor:
            logprobs, entropies = (found[0], found[1]) if bonus else (found, None)
            at_hand = known[index].to(logprobs.device)
            clipped[index] = float(grpo.is_clipped(logprobs.detach(), at_hand, self.settings).sum())
            return grpo.loss(logprobs, entropies, at_hand, self.settings, entropy_bonus=bonus)

        result = self.trainer.step([batch.micro_batch for batch in batches], loss, lr, with_entropy=bool(bonus))
        seen = self.layout.broadcast_from_last_stage(torch.tensor(clipped, device=self.layout.device).sum())
        return result | {"clipped": float(seen), "tokens": float(sum(len(batch.owner) for batch in batches))}

    def _tokens(self, batch: AnswerBatch, items: Sequence[_Item], totals: grpo.Totals) -> grpo.Tokens:
        counts = torch.tensor([float(item.count) for item in items])
        weights = grpo.token_weights(batch.lengths, counts, totals, self.settings)
        references = [item.reference for item in items if item.reference is not None]
        return grpo.Tokens(
            old_logprobs=torch.cat([item.old for item in items]),
            engine_logprobs=batch.behaviour,
            reference_logprobs=torch.cat(references) if references else None,
            advantage=torch.tensor([item.advantage for item in items], dtype=torch.float32)[batch.owner],
            weight=weights[batch.owner],
        )

    def _means(self, items: Sequence[_Item]) -> dict[str, float]:
        """Over all tokens that were drawn: how random they were, and how far trainer, engine and reference agree."""
        sums = dict.fromkeys(("entropy", "mismatch", "importance_weight", "kl"), 0.0)
        tokens = 0.0
        for item in items:
            tokens += item.count * len(item.answer.answer_ids)
            engine = torch.tensor(item.answer.engine_logprobs)
            gap = item.old - engine
            weights = torch.exp(gap).clamp(max=self.settings.max_importance_weight)
            sums["entropy"] += item.count * float(item.entropy.double().sum())
            sums["mismatch"] += item.count * float(gap.abs().double().sum())
            sums["importance_weight"] += item.count * float(weights.double().sum())
            if item.reference is not None:
                sums["kl"] += item.count * float(grpo.kl_estimate(item.old, item.reference).double().sum())
        if self.reference is None:
            del sums["kl"]
        return global_means(self.layout, {name: (value, tokens) for name, value in sums.items()})

    def _pack(self, answers: Sequence[Answer]) -> list[list[int]]:
        return pack([len(item.prompt_ids) + len(item.answer_ids) for item in answers], self.micro_batch_tokens)
