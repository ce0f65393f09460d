"""The maths of RA3 as pure functions of tensors (method.md 2, 3, 5).

Nothing here knows of ranks, models or engines. Losses are sums divided by a global count that the caller knows
before the first backward pass, so that no split over micro-batches or ranks changes the number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LineReward = Literal["mean", "sum"]


def log1mexp(logprob: Tensor) -> Tensor:
    """log(1 - exp(logprob)) for log-probs < 0, any shape, differentiable (Maechler 2012)."""
    logprob = logprob.clamp(max=-1e-7)
    near_one = logprob > -0.6931
    return torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, logprob, torch.full_like(logprob, -0.5)))),
        torch.log1p(-torch.exp(torch.where(near_one, torch.full_like(logprob, -1.0), logprob))),
    )


def line_rewards(
    line_logprob: Tensor,
    line_tokens: Tensor,
    thought: Tensor,
    well_formed: Tensor,
    *,
    penalty: float,
    format_penalty: float,
    line_reward: LineReward,
) -> Tensor:
    """r_t = log pi(a_t | s_t, z_t) - c 1{think} - f 1{malformed}, in nats (method.md 3).

    Args:
        line_logprob: [T] summed log-prob of each expert line, nats.
        line_tokens: [T] tokens of each line; `line_reward="mean"` divides by it.
        thought: [T] bool, the latent is a rationale.
        well_formed: [T] bool, the latent is `<act>` or a proper rationale.
        penalty: c, nats per rationale.
        format_penalty: f, nats per malformed rationale.
        line_reward: token mean or sum.

    Returns:
        [T] rewards, no gradient.
    """
    value = line_logprob.detach()
    if line_reward == "mean":
        value = value / line_tokens
    return value - penalty * thought.to(value) - format_penalty * (~well_formed).to(value)


def truncated_returns(rewards: Tensor, *, horizon: int, discount: float) -> Tensor:
    """R_t = sum_{k=t}^{min(t+H-1, T)} gamma^(k-t) r_k over the last axis of `rewards` [..., T] (method.md 3)."""
    steps = rewards.shape[-1]
    returns = torch.zeros_like(rewards)
    for ahead in range(min(horizon, steps)):
        returns[..., : steps - ahead] += discount**ahead * rewards[..., ahead:]
    return returns


def leave_one_out(returns: Tensor) -> Tensor:
    """A_t^i = R_t^i - mean_{j != i} R_t^j for `returns` [G, T], G >= 2 (method.md 3); exactly 0 where all are equal."""
    group = returns.shape[0]
    relative = returns - returns[:1]
    return (relative - relative.mean(dim=0, keepdim=True)) * (group / (group - 1))


def explored(policy_logprobs: Tensor, exploration: float) -> Tensor:
    """log((1 - epsilon) q + epsilon/2): log-prob of a gate's choice when it explores (method.md 6), any shape."""
    return torch.log((1.0 - exploration) * torch.exp(policy_logprobs) + exploration / 2)


def importance_weights(policy_logprobs: Tensor, engine_logprobs: Tensor, *, maximum: float) -> Tensor:
    """w_u = min(exp(policy - engine), maximum), detached, same shape: trainer against sampling law (method.md 3)."""
    return torch.exp(policy_logprobs.detach() - engine_logprobs).clamp(max=maximum)


def policy_gradient_loss(policy_logprobs: Tensor, weights: Tensor, advantages: Tensor, *, global_count: int) -> Tensor:
    """-sum_u A_u w_u log q(z_u) / N over latent decisions [U]; N counts them over all ranks (method.md 3)."""
    return -(advantages * weights * policy_logprobs).sum() / max(global_count, 1)


def next_token_loss(logprobs: Tensor, weights: Tensor, *, global_weight: float) -> Tensor:
    """-sum_u w_u log pi(u) / W over tokens [U]; W is the sum of weights over all ranks (method.md 5)."""
    return -(weights * logprobs).sum() / max(global_weight, 1e-30)
