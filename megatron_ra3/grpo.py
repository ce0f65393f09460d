"""The maths of RLVR as pure functions of tensors: advantages of a group's answers, and the loss of their tokens.

Sources: GRPO (arXiv 2402.03300), leave-one-out (RLOO, arXiv 2402.14740), DAPO (arXiv 2503.14476), the mean without
standard deviation and the constant divisor (Dr. GRPO, arXiv 2503.20783). Nothing here knows of ranks, models or
engines; every term is divided by a global count that is known before the first backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ra3.objective import leave_one_out
from megatron_ra3.rlvr_config import RlvrConfig

STD_FLOOR = 1e-6


def overlong_penalty(tokens: int, settings: RlvrConfig) -> float:
    """What is taken from the reward of an answer of so many tokens (DAPO, eq. 13).

    0 up to the last `overlong_tokens` of the cap, then linearly more, `overlong_penalty` at the cap.
    """
    if not settings.overlong_tokens:
        return 0.0
    over = tokens - (settings.max_answer_tokens - settings.overlong_tokens)
    return settings.overlong_penalty * max(over, 0) / settings.overlong_tokens


def advantages(rewards: Tensor, kind: Literal["group_normalised", "group_mean", "leave_one_out"]) -> Tensor:
    """Advantage of each answer from the rewards [G] of one group, G >= 2, fp64; exactly 0 where all are equal.

    `group_normalised`: (r - mean) / (std + 1e-6), std of the population; `group_mean`: r - mean; `leave_one_out`:
    r - mean of the others.
    """
    if kind == "leave_one_out":
        return leave_one_out(rewards.unsqueeze(1)).squeeze(1)
    relative = rewards - rewards[:1]
    centred = relative - relative.mean()
    if kind == "group_mean" or not bool(relative.any()):
        return centred
    return centred / (centred.square().mean().sqrt() + STD_FLOOR)


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all answers that take part in an update, over all ranks."""

    answers: float
    tokens: float


def token_weights(lengths: Tensor, counts: Tensor, totals: Totals, settings: RlvrConfig) -> Tensor:
    """What the loss of a token of each answer is multiplied by [B], from the answers' lengths and multiplicities [B].

    `answer`: n_i / (M len_i); `token`: n_i / N; `constant`: n_i / (M L), with M answers, N tokens and the cap L.
    """
    if settings.loss_average == "answer":
        return counts / (lengths * max(totals.answers, 1.0))
    if settings.loss_average == "token":
        return counts / max(totals.tokens, 1.0)
    return counts / (max(totals.answers, 1.0) * settings.max_answer_tokens)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is known of the tokens [K] of a micro-batch of answers before an update; log-probs in nats."""

    old_logprobs: Tensor
    """Of the trainer, at the start of the step."""
    engine_logprobs: Tensor
    """Of the law that sampled them."""
    reference_logprobs: Tensor | None
    advantage: Tensor
    """Of the token's answer."""
    weight: Tensor
    """See `token_weights`."""

    def to(self, device: torch.device) -> Tokens:
        """A copy on `device`."""
        reference = None if self.reference_logprobs is None else self.reference_logprobs.to(device)
        moved = (self.old_logprobs.to(device), self.engine_logprobs.to(device))
        return Tokens(*moved, reference, self.advantage.to(device), self.weight.to(device))


def importance_weights(tokens: Tokens, settings: RlvrConfig) -> Tensor:
    """min(exp(old - engine), w_max) [K]: how much likelier the trainer finds what the engine drew."""
    return torch.exp(tokens.old_logprobs - tokens.engine_logprobs).clamp(max=settings.max_importance_weight)


def is_clipped(logprobs: Tensor, tokens: Tokens, settings: RlvrConfig) -> Tensor:
    """Bool [K]: the clip takes away the token's gradient."""
    if not (settings.clip_low or settings.clip_high):
        return torch.zeros_like(logprobs, dtype=torch.bool)
    ratio = torch.exp(logprobs - tokens.old_logprobs)
    above = (ratio > 1.0 + settings.clip_high) & (tokens.advantage > 0)
    return above | ((ratio < 1.0 - settings.clip_low) & (tokens.advantage < 0))


def loss(
    logprobs: Tensor, entropies: Tensor | None, tokens: Tokens, settings: RlvrConfig, *, entropy_bonus: float
) -> Tensor:
    """Loss of a micro-batch: the policy gradient, beta times the KL to the reference, and the entropy bonus.

    sum_u s_u [ -w_u min(rho_u A_u, clip(rho_u, 1 - low, 1 + high) A_u) + beta/2 (log pi_u - log ref_u)^2 - b H_u ]

    with rho = pi / pi_old and w the detached trainer/engine weight. Half the squared log-ratio is the KL estimate whose
    gradient, over tokens drawn from the policy, is that of KL(policy to reference); the gradient of k3, the usual one,
    is not (it is that of the other direction to first order).

    Args:
        logprobs: [K] log pi in nats, with gradient.
        entropies: [K] of the tokens' laws, with gradient; needed for a bonus.
        tokens: the rest.
        settings: clip and beta.
        entropy_bonus: b.
    """
    ratio = torch.exp(logprobs - tokens.old_logprobs)
    gain = ratio * tokens.advantage
    if settings.clip_low or settings.clip_high:
        clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
        gain = torch.minimum(gain, clipped * tokens.advantage)
    total = -(tokens.weight * importance_weights(tokens, settings) * gain).sum()
    if settings.reference_kl:
        assert tokens.reference_logprobs is not None
        gap = logprobs - tokens.reference_logprobs
        total = total + settings.reference_kl * (tokens.weight * gap.square()).sum() / 2
    if entropy_bonus:
        assert entropies is not None
        total = total - entropy_bonus * (tokens.weight * entropies).sum()
    return total


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1 with d = log ref - log pi, per token [K] in nats: never negative, mean KL(pi to ref)."""
    gap = reference_logprobs - logprobs
    return torch.expm1(gap) - gap
