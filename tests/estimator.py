"""The package's policy gradient on the tabular model of `tabular`, and its exact mean, z-scores and learning curves.

Shared by the ground-truth tests and by `benchmarks/ground_truth.py`, so that a published figure is a tested one.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ra3 import objective
from megatron_ra3.presets import ObjectiveConfig
from tests import tabular
from tests.tabular import Model, Paths, Policy

SEEDS = range(5)
KEEP = 0.7
"""alpha' of the sticky prior."""
Advantages = Callable[[Tensor, Tensor, ObjectiveConfig], Tensor]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "penalty, group": {},
    "penalty, group, H=2, gamma=0.7": {"horizon": 2, "discount": 0.7},
    "penalty, group, epsilon=0.1": {"gate_exploration": 0.1},
    "penalty, counterfactual": {"baseline": "counterfactual"},
    "penalty, both": {"baseline": "both"},
    "penalty, both, H=2, PPO clip 0.2": {"baseline": "both", "horizon": 2, "ppo_clip": 0.2},
    "sticky KL, group": {"latent_cost": "sticky_kl"},
    "sticky KL, group, H=2, gamma=0.7": {"latent_cost": "sticky_kl", "horizon": 2, "discount": 0.7},
    "sticky KL, group, epsilon=0.1": {"latent_cost": "sticky_kl", "gate_exploration": 0.1},
    "sticky KL, counterfactual": {"latent_cost": "sticky_kl", "baseline": "counterfactual"},
    "sticky KL, both": {"latent_cost": "sticky_kl", "baseline": "both"},
    "sticky KL, both, mask": {"latent_cost": "sticky_kl", "baseline": "both", "importance_weight": "mask"},
}
"""Settings whose gradient on sampled rollouts is held against the exact one; given the policy itself as sampling law,
neither clip nor mask may change its mean."""


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """[..., T, K+1, 1+K]: the gate's logit, then those of the new latent."""
    gate, content = gradients
    return torch.cat([gate.unsqueeze(-1), content], -1)


def gradient(value: Tensor, policy: Policy, exploration: float = 0.0) -> Tensor:
    """Gradient of `value`, 0 where it does not depend on the policy; its gate part divided by 1 - epsilon."""
    gate, content = torch.autograd.grad(
        value, policy.tensors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return flat((gate / (1 - exploration), content))


def leaves(policy: Policy) -> Policy:
    """The policy as new leaves that take gradients."""
    return Policy(*(item.detach().clone().requires_grad_() for item in policy.tensors))


def instance(seed: int, *, lines: int = 4) -> tuple[Model, Policy]:
    """A random model and a random policy that takes gradients."""
    model = tabular.random_model(seed, lines=lines)
    return model, leaves(tabular.random_policy(model, seed))


def older(policy: Policy, seed: int, drift: float) -> Policy:
    """Weights from which `policy` has moved by random steps of this standard deviation, in logits."""
    generator = torch.Generator().manual_seed(500 + seed)
    steps = [torch.randn(item.shape, dtype=item.dtype, generator=generator) for item in policy.tensors]
    return Policy(*(item.detach() - drift * step for item, step in zip(policy.tensors, steps, strict=True)))


def sticky_prior(model: Model, seed: int, keep: float = KEEP) -> Policy:
    """A sticky prior whose law of a new latent is random and differs from gate to gate."""
    return tabular.sticky(model, keep, torch.softmax(tabular.random_policy(model, 50 + seed).content, -1))


def prior_of(model: Model, seed: int, settings: dict[str, Any]) -> Policy | None:
    """The sticky prior where `settings` ask for one."""
    return sticky_prior(model, seed) if settings.get("latent_cost") == "sticky_kl" else None


def no_baseline(rewards: Tensor, _without: Tensor, settings: ObjectiveConfig) -> Tensor:
    """The return itself."""
    return objective.truncated_returns(rewards, horizon=settings.horizon, discount=settings.discount)


def estimates(
    model: Model,
    policy: Policy,
    paths: Paths,
    *,
    prior: Policy | None = None,
    behaviour: Policy | None = None,
    advantages: Advantages = objective.advantages,
    whole_path_weight: bool = False,
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """The package's policy gradient for groups of `paths` [G, B, T]: -N/G times the loss's gradient, and N, per group.

    Gradients come back as [B, T, K+1, 1+K] (see `flat`). `prior` is that of the sticky KL, whose content is q_ref's;
    `behaviour` is the law that drew the paths, if not `policy`; `changes` are settings of the objective.
    """
    group, count, lines = paths.thought.shape
    own = policy.copies(count)
    gate, content = tabular.decision_logprobs(own, paths)
    settings = _settings(model, prior, changes)
    law = objective.GateLaw.of(gate, paths.thought)
    advantage = advantages(*_rewards(model, paths, law, content, prior, settings), settings)
    drawn = torch.cat([torch.ones_like(paths.thought), paths.thought])
    logprobs = torch.cat([gate, content])
    drew = tabular.decision_logprobs(behaviour or policy, paths)
    sampling = torch.cat([objective.explored(drew[0], settings.gate_exploration), drew[1]]).detach()
    if whole_path_weight:  # one weight for all decisions of a rollout: their product
        gap = (logprobs.detach() - sampling).view(2, group, count, lines).sum((0, 3))
        sampling = logprobs.detach() - gap.unsqueeze(-1).repeat(2, 1, lines)
    decisions = int(drawn.sum())
    credit = torch.cat([advantage, advantage])
    loss = objective.policy_gradient_loss(
        logprobs[drawn], sampling[drawn], credit[drawn], settings, global_count=decisions
    )
    counts = torch.ones_like(gate.detach())
    loss = loss + objective.gate_regulariser(
        law, counts, settings, global_decisions=decisions, global_gates=counts.numel()
    )
    return flat(torch.autograd.grad(-loss * decisions / group, own.tensors)), drawn.sum(dim=(0, 2))


def _settings(model: Model, prior: Policy | None, changes: dict[str, Any]) -> ObjectiveConfig:
    defaults = {"penalty": model.penalty, "horizon": 99, "max_importance_weight": math.inf, "format_penalty": 7.0}
    if prior is not None:
        defaults |= {"latent_cost": "sticky_kl", "stickiness": float(torch.sigmoid(-prior.gate[0, 0]))}
    return ObjectiveConfig(**{**defaults, **changes})


def _rewards(
    model: Model,
    paths: Paths,
    law: objective.GateLaw,
    content: Tensor,
    prior: Policy | None,
    settings: ObjectiveConfig,
) -> tuple[Tensor, Tensor]:
    """Rewards [G, B, T] and what each line is worth had its own latent been `<act>`."""
    tokens = torch.arange(1, model.lines + 1)
    acted = Paths(paths.before, paths.before, torch.zeros_like(paths.thought))
    lines = objective.Lines(
        logprob=tabular.line_logprobs(model, paths) * tokens,
        tokens=tokens,
        thought=paths.thought,
        well_formed=torch.ones_like(paths.thought),
        gate_kl=None if prior is None else law.kl(settings.stickiness),
        reference_gap=None if prior is None else content - tabular.decision_logprobs(prior, paths)[1],
    )
    without = objective.line_values(tabular.line_logprobs(model, acted) * tokens, tokens, settings)
    return objective.line_rewards(lines, settings), without


def every_group(model: Model, policy: Policy, group: int, exploration: float = 0.0) -> tuple[Paths, Tensor]:
    """All groups of paths [G, B, T] and their probabilities [B]."""
    paths = tabular.all_paths(model)
    members = torch.tensor(list(itertools.product(range(len(paths.thought)), repeat=group))).T
    probability = torch.exp(tabular.step_logprobs(policy, paths, exploration).sum(-1)).detach()
    return paths[members], probability[members].prod(0)


def averaged(probability: Tensor, gradients: Tensor) -> Tensor:
    return torch.einsum("b,btsk->tsk", probability, gradients)


def relative(difference: Tensor, truth: Tensor) -> float:
    return float(difference.norm() / truth.norm())


def z_scores(samples: Tensor, truth: Tensor) -> Tensor:
    """Of each coordinate that can be reached at all."""
    error = samples.std(0) / math.sqrt(len(samples))
    reached = error > 0
    assert torch.equal(truth[~reached], torch.zeros_like(truth[~reached]))
    return ((samples.mean(0) - truth) / error)[reached]


@dataclass(frozen=True)
class Agreement:
    """Sampled gradients against the exact one over several models; `variance` is relative to no baseline, the worst."""

    z: Tensor
    baseline_z: Tensor
    """Of the difference that the baseline makes, against zero."""
    variance: float

    @classmethod
    def of(cls, settings: dict[str, Any], *, groups: int, seeds: Sequence[int] = SEEDS, size: int = 4) -> Agreement:
        """Measure on `groups` sampled groups of `size` rollouts of one model per seed."""
        found, moved, spread = [], [], []
        exploration = settings.get("gate_exploration", 0.0)
        for seed in seeds:
            model, policy = instance(seed)
            prior = prior_of(model, seed, settings)
            generator = torch.Generator().manual_seed(seed)
            paths = tabular.sample_paths(policy, (size, groups), generator, exploration)
            samples, _ = estimates(model, policy, paths, prior=prior, **settings)
            plain, _ = estimates(model, policy, paths, prior=prior, advantages=no_baseline, **settings)
            found.append(z_scores(samples, exact(model, policy, settings, prior)))
            moved.append(z_scores(samples - plain, torch.zeros_like(samples[0])))
            spread.append(float(samples.var(0).sum() / plain.var(0).sum()))
        return cls(torch.cat(found), torch.cat(moved), max(spread))


def exact(model: Model, policy: Policy, settings: dict[str, Any], prior: Policy | None) -> Tensor:
    """The gradient that an estimator with these settings is meant to have."""
    credit = {key: settings[key] for key in ("horizon", "discount") if key in settings}
    exploration = settings.get("gate_exploration", 0.0)
    surrogate = tabular.credited_value(model, policy, exploration=exploration, prior=prior, **credit)
    return gradient(surrogate, policy, exploration)


def learning(
    model: Model,
    policy: Policy,
    steps: int,
    *,
    groups: int,
    prior: Policy | None = None,
    learning_rate: float = 0.1,
    staleness: int = 0,
    **settings: Any,
) -> Iterator[float]:
    """Adam on the gradient of `groups` sampled groups of eight, or on the exact one if 0; J after every step.

    Groups are drawn from the policy of `staleness` steps ago.
    """
    drawing: deque[Policy] = deque(maxlen=staleness + 1)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.tensors, lr=learning_rate, maximize=True)
    exploration = settings.get("gate_exploration", 0.0)
    for _ in range(steps):
        if groups:
            drawing.append(Policy(*(item.detach().clone() for item in policy.tensors)))
            paths = tabular.sample_paths(drawing[0], (8, groups), generator, exploration)
            settings = {"max_importance_weight": 2.0, **settings}
            found = estimates(model, policy, paths, prior=prior, behaviour=drawing[0], **settings)[0].mean(0)
        else:
            found = gradient(tabular.value(model, policy, exploration, prior), policy, exploration)
        policy.gate.grad, policy.content.grad = found[..., 0], found[..., 1:]
        optimizer.step()
        with torch.no_grad():
            yield float(tabular.value_by_recursion(model, policy, prior))


def learn(model: Model, policy: Policy, steps: int, **options: Any) -> list[float]:
    """All of `learning`: J after every step."""
    return list(learning(model, policy, steps, **options))


def share_of_optimum(model: Model, policy: Policy, prior: Policy | None = None) -> float:
    """1 is the best J there is; 0 is never thinking, or with a prior the better of that and following the prior."""
    reached = tabular.value_by_recursion(model, policy, prior).item()
    if prior is None:
        best, least = tabular.viterbi(model)[0], model.act_value
    else:
        best = tabular.posterior(model, prior)[0]
        never = model.act_value + float(torch.nn.functional.logsigmoid(-prior.gate[:, -1]).sum())
        least = max(never, float(tabular.value_by_recursion(model, prior, prior)))
    return (reached - least) / (best - least)
