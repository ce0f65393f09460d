"""The E-step's maths as pure functions of tensors, set by `presets.ObjectiveConfig` (algorithm.md 2, 3, 5).

Nothing here knows of ranks, models or engines. Losses are sums divided by a global count that the caller knows
before the first backward pass, so that no split over micro-batches or ranks changes the number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3.presets import ObjectiveConfig


def log1mexp(logprob: Tensor) -> Tensor:
    """log(1 - exp(logprob)) for log-probs < 0, any shape, differentiable (Maechler 2012)."""
    logprob = logprob.clamp(max=-1e-7)
    near_one = logprob > -0.6931
    return torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, logprob, torch.full_like(logprob, -0.5)))),
        torch.log1p(-torch.exp(torch.where(near_one, torch.full_like(logprob, -1.0), logprob))),
    )


@dataclass(frozen=True, slots=True)
class Lines:
    """What is known of lines a_t and their latents z_t; all of one shape [..., T], log-probs in nats."""

    logprob: Tensor
    """log pi(a_t | s_t, z_t), summed over the line's tokens."""
    tokens: Tensor
    """Tokens of each line."""
    thought: Tensor
    """bool: the latent is a rationale."""
    well_formed: Tensor
    """bool: the latent is `<act>` or a proper rationale."""
    gate_kl: Tensor | None = None
    """KL_Bern of the gate to the sticky prior, 0 where the gate was not sampled; for `latent_cost=sticky_kl`."""
    reference_gap: Tensor | None = None
    """sum_u log q(z_tu) - log q_ref(z_tu) over the rationale's sampled tokens; where the reference is needed."""


def line_values(logprob: Tensor, tokens: Tensor, settings: ObjectiveConfig) -> Tensor:
    """Return a line's log-prob [..., T] as `line_reward` wants it, per token or summed, in nats."""
    return logprob / tokens if settings.line_reward == "mean" else logprob


def line_rewards(lines: Lines, settings: ObjectiveConfig) -> Tensor:
    """Reward of each line in nats, [..., T], without gradient (algorithm.md 2, 3).

    r_t = l_t - cost_t - f 1{malformed} - w sum_u [log q(z_tu) - log q_ref(z_tu)]

    with l_t the line's log-prob as token mean or sum, and by `latent_cost`
    `penalty`: cost_t = c 1{think}; w = beta.
    `sticky_kl`: cost_t = KL_Bern(rho_t || 1 - alpha'); w = 1 + beta. With the new latent's prior q_ref, the two sampled
    or summed terms have the mean of the sequential bound's KL, KL_Bern(rho || 1 - alpha') + rho KL(q~ || q_ref).
    """
    value = line_values(lines.logprob.detach(), lines.tokens, settings)
    value = value - settings.format_penalty * (~lines.well_formed).to(value)
    if settings.latent_cost == "penalty":
        value = value - settings.penalty * lines.thought.to(value)
    else:
        assert lines.gate_kl is not None
        value = value - lines.gate_kl.detach()
    if settings.needs_reference:
        assert lines.reference_gap is not None
        value = value - settings.reference_weight * lines.reference_gap.detach()
    return value


def truncated_returns(rewards: Tensor, *, horizon: int, discount: float) -> Tensor:
    """R_t = sum_{k=t}^{min(t+H-1, T)} gamma^(k-t) r_k over the last axis of `rewards` [..., T] (algorithm.md 3)."""
    steps = rewards.shape[-1]
    returns = torch.zeros_like(rewards)
    for ahead in range(min(horizon, steps)):
        returns[..., : steps - ahead] += discount**ahead * rewards[..., ahead:]
    return returns


def leave_one_out(returns: Tensor) -> Tensor:
    """A_t^i = R_t^i - mean_{j != i} R_t^j for `returns` [G, T], G >= 2 (algorithm.md 3); exactly 0 if all are equal."""
    group = returns.shape[0]
    relative = returns - returns[:1]
    return (relative - relative.mean(dim=0, keepdim=True)) * (group / (group - 1))


def advantages(rewards: Tensor, without_rationale: Tensor | None, settings: ObjectiveConfig) -> Tensor:
    """Advantage of each line's latent, [G, T], from the rewards [G, T] of a group's rollouts (algorithm.md 3).

    `group`: A_t^i = R_t^i - mean_{j != i} R_t^j.
    `counterfactual`: A_t^i = R_t^i - b_t^i, where b_t = l_t(a_t | s_t, <act>) is the line's value had this one latent
    been `<act>`. b_t depends on the past alone, so the mean gradient stays; it must not be taken from later rewards
    of the return, whose own b_k depend on z_t.
    `both`: leave-one-out of R_t - b_t.

    `without_rationale` [G, T]: b_t in nats, as mean or sum like the reward; needed by the last two.
    """
    returns = truncated_returns(rewards, horizon=settings.horizon, discount=settings.discount)
    if settings.baseline != "group":
        assert without_rationale is not None
        returns = returns - without_rationale
    return returns if settings.baseline == "counterfactual" else leave_one_out(returns)


def explored(policy_logprobs: Tensor, exploration: float) -> Tensor:
    """log((1 - epsilon) q + epsilon/2): log-prob of a gate's choice when it explores (algorithm.md 6), any shape."""
    return torch.log((1.0 - exploration) * torch.exp(policy_logprobs) + exploration / 2)


def importance_weights(policy_logprobs: Tensor, behaviour_logprobs: Tensor, settings: ObjectiveConfig) -> Tensor:
    """Detached weight of each decision, trainer against sampling law, w = exp(policy - behaviour) (algorithm.md 3).

    `truncate`: min(w, w_max). `mask`: w where 1/w_max <= w <= w_max, else 0: the decision is left out.
    """
    weights = torch.exp(policy_logprobs.detach() - behaviour_logprobs)
    maximum = settings.max_importance_weight
    if settings.importance_weight == "truncate":
        return weights.clamp(max=maximum)
    return torch.where((weights <= maximum) & (weights >= 1.0 / maximum), weights, torch.zeros_like(weights))


def policy_gradient_loss(
    policy_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    credit: Tensor,
    settings: ObjectiveConfig,
    *,
    global_count: int,
) -> Tensor:
    """Loss over latent decisions u [U], gate choices and rationale tokens, of all rollouts (algorithm.md 3).

    -sum_u A_u w_u log q(z_u) / N, or with `ppo_clip` = e > 0
    -sum_u min(w_u A_u, clip(w_u, 1 - e, 1 + e) A_u) / N, w_u then carrying the gradient.

    Args:
        policy_logprobs: [U] log q(z_u) in nats, with gradient.
        behaviour_logprobs: [U] of the law that sampled them.
        credit: [U] advantage of the decision's line, times how many rollouts share the decision.
        settings: which of the two, and the importance weight.
        global_count: N, sampled decisions over all rollouts and ranks.
    """
    if settings.ppo_clip > 0.0:
        ratio = torch.exp(policy_logprobs - behaviour_logprobs)
        clipped = ratio.clamp(1.0 - settings.ppo_clip, 1.0 + settings.ppo_clip)
        return -torch.minimum(ratio * credit, clipped * credit).sum() / max(global_count, 1)
    weights = importance_weights(policy_logprobs, behaviour_logprobs, settings)
    return -(credit * weights * policy_logprobs).sum() / max(global_count, 1)


@dataclass(frozen=True, slots=True)
class GateLaw:
    """Log-probs of thinking and of acting at gates, nats, any shape."""

    think: Tensor
    act: Tensor

    @classmethod
    def of(cls, choice_logprobs: Tensor, thought: Tensor) -> GateLaw:
        """From the log-prob of what each gate chose and whether that was to think."""
        other = log1mexp(choice_logprobs)
        return cls(torch.where(thought, choice_logprobs, other), torch.where(thought, other, choice_logprobs))

    def kl(self, stickiness: float) -> Tensor:
        """KL_Bern(rho || 1 - alpha') in nats, rho the probability of thinking (algorithm.md 2)."""
        rho, keep = torch.exp(self.think), torch.exp(self.act)
        return rho * (self.think - math.log1p(-stickiness)) + keep * (self.act - math.log(stickiness))

    def entropy(self) -> Tensor:
        """H(rho) in nats."""
        return -(torch.exp(self.think) * self.think + torch.exp(self.act) * self.act)


def gate_regulariser(
    gates: GateLaw, counts: Tensor, settings: ObjectiveConfig, *, global_decisions: int, global_gates: int
) -> Tensor:
    """What the loss charges sampled gates for their law itself, on top of the policy gradient (algorithm.md 2, 3).

    `latent_cost=sticky_kl`: sum_t n_t KL_Bern(rho_t || 1 - alpha') / (N (1 - epsilon)). The rewards carry the same term
    for the sake of earlier decisions; its own gradient at t is taken here exactly, and not by sampling. Where gates
    explore (`gate_exploration` = epsilon), the policy gradient's gates are 1/(1 - epsilon) times too large, hence so
    is this.
    `gate_entropy_floor` = h > 0: lambda sum_t n_t max(0, h - H(rho_t)) / N_gates.

    Args:
        gates: laws [M], with gradient.
        counts: [M] n_t, how many rollouts share each gate.
        settings: which terms, alpha', epsilon, h and lambda.
        global_decisions: N of `policy_gradient_loss`, as the KL belongs to the same objective.
        global_gates: sampled gates over all rollouts and ranks.
    """
    loss = gates.think.new_zeros(())
    if settings.latent_cost == "sticky_kl":
        divergence = (counts * gates.kl(settings.stickiness)).sum() / (1.0 - settings.gate_exploration)
        loss = loss + divergence / max(global_decisions, 1)
    if settings.gate_entropy_floor > 0.0:
        gap = (settings.gate_entropy_floor - gates.entropy()).clamp(min=0.0)
        loss = loss + settings.gate_entropy_weight * (counts * gap).sum() / max(global_gates, 1)
    return loss


def line_loss(
    logprob: Tensor, tokens: Tensor, counts: Tensor, settings: ObjectiveConfig, *, global_count: int
) -> Tensor:
    """-mu sum_t n_t l_t / N over the lines [T] of all rollouts, l_t as the reward has it (algorithm.md 3).

    The gradient of J = E sum_t r_t has two parts where one set of weights is both q and pi: that of the law of the
    latents, which is `policy_gradient_loss`, and that of the rewards themselves, which is this with mu = 1.

    Args:
        logprob: [T] log pi(a_t | s_t, z_t) in nats, summed over the line's tokens, with gradient.
        tokens: [T] of each line.
        counts: [T] n_t, how many rollouts share the line.
        settings: mu (`line_gradient`), and whether l_t is a token mean or a sum.
        global_count: N of `policy_gradient_loss`.
    """
    return -settings.line_gradient * (counts * line_values(logprob, tokens, settings)).sum() / max(global_count, 1)


def next_token_weights(weights: Tensor, *, global_weight: float) -> Tensor:
    """w_u / W [U] of the loss -sum_u w_u log pi(u) / W; W is the sum of weights over all ranks (algorithm.md 5)."""
    return weights / max(global_weight, 1e-30)
