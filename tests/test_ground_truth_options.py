"""Every option of the objective against exact enumeration: sticky KL, baselines, clip, mask, floor, and the presets.

Most statements are sums over every group of rollouts and hold to rounding; a wrong variant must fail beside the right.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ra3 import objective
from megatron_ra3.estep import EStep
from megatron_ra3.latents import Snippet
from megatron_ra3.presets import ObjectiveConfig
from tests import tabular
from tests.estimator import (
    CONFIGURATIONS,
    KEEP,
    SEEDS,
    averaged,
    estimates,
    every_group,
    exact,
    gradient,
    instance,
    learn,
    leaves,
    no_baseline,
    prior_of,
    relative,
    share_of_optimum,
    sticky_prior,
)
from tests.tabular import Model, Policy
from tests.tabular_trainer import EOS, FORMAT, LATENT, LAYOUT, LINE, NEWLINE, TabularTrainer, trajectory

# --- the mean over every group


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("lines", "group"), [(2, 3), (3, 2)])
def test_expected_gradient_over_every_group_is_the_exact_one(name, lines, group):
    settings = CONFIGURATIONS[name]
    model, policy = instance(lines, lines=lines)
    prior = prior_of(model, lines, settings)
    paths, probability = every_group(model, policy, group, settings.get("gate_exploration", 0.0))
    truth = exact(model, policy, settings, prior)
    samples, _ = estimates(model, policy, paths, prior=prior, **settings)
    assert truth.norm() > 0.3
    assert torch.allclose(averaged(probability, samples), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("latent_cost", ["penalty", "sticky_kl"])
@pytest.mark.parametrize("around", [no_baseline, objective.leave_one_out], ids=["counterfactual", "both"])
def test_a_no_think_value_taken_from_later_rewards_too_biases_the_gradient(latent_cost, around):
    """b_k of a later line depends on z_t, so it is no baseline for it."""

    def wrong(rewards: Tensor, without: Tensor, settings: ObjectiveConfig) -> Tensor:
        returns = no_baseline(rewards - without, without, settings)
        return returns if around is no_baseline else around(returns)

    model, policy = instance(2, lines=2)
    settings = {"latent_cost": latent_cost}
    prior = prior_of(model, 2, settings)
    truth = exact(model, policy, settings, prior)
    paths, probability = every_group(model, policy, 2)
    samples, _ = estimates(model, policy, paths, prior=prior, advantages=wrong)
    assert relative(averaged(probability, samples) - truth, truth) > 0.1


def test_without_its_direct_term_the_sticky_gradient_is_another(monkeypatch):
    """The reward's gate KL alone, a function of the state, teaches a gate nothing about its own law."""
    model, policy = instance(2, lines=2)
    prior = sticky_prior(model, 2)
    truth = gradient(tabular.value(model, policy, prior=prior), policy)
    paths, probability = every_group(model, policy, 2)
    monkeypatch.setattr(objective, "gate_regulariser", lambda law, *_, **__: law.think.new_zeros(()))
    samples, _ = estimates(model, policy, paths, prior=prior)
    assert relative(averaged(probability, samples) - truth, truth) > 0.1


# --- the sticky bound and its optimum


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keep", [0.3, 0.95])
def test_the_best_policy_is_the_posterior_and_its_value_the_marginal(seed, keep):
    model, policy = instance(seed)
    prior = sticky_prior(model, seed, keep)
    best, posterior = tabular.posterior(model, prior)
    assert best == pytest.approx(tabular.log_marginal(model, tabular.transitions(prior)), abs=1e-12)
    own = leaves(posterior)
    reached = tabular.value(model, own, prior=prior)
    assert reached.item() == pytest.approx(best, abs=1e-12)
    assert gradient(reached, own).abs().max() < 1e-12
    assert tabular.value(model, policy, prior=prior).item() < best - 0.1
    by_recursion = tabular.value_by_recursion(model, policy, prior)
    assert by_recursion.item() == pytest.approx(tabular.value(model, policy, prior=prior).item(), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("groups", [0, 32])
def test_learning_reaches_the_log_marginal_and_never_exceeds_it(seed, groups):
    """Share of the way from the better of never thinking and following the prior."""
    model, policy = instance(seed)
    prior = sticky_prior(model, seed)
    best, _ = tabular.posterior(model, prior)
    assert share_of_optimum(model, policy, prior) < 0.1
    options = {"learning_rate": 0.05, "baseline": "both"} if groups else {}
    curve = learn(model, policy, 400, groups=groups, prior=prior, **options)
    assert max(curve) <= best + 1e-12
    assert share_of_optimum(model, policy, prior) > (0.99 if groups else 1 - 1e-6)


# --- off-policy weights


def _off_policy_mean(model: Model, policy: Policy, behaviour: Policy, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """sum_t E_b[f(q/b) grad log q (R_t - E_b R_t)], gates and new latents weighted each by itself; by enumeration."""
    paths = tabular.all_paths(model)
    probability = torch.exp(tabular.step_logprobs(behaviour, paths).sum(-1)).detach()
    returns = tabular.line_values(model, paths).flip(-1).cumsum(-1).flip(-1)
    advantage = returns - probability @ returns
    pairs = zip(tabular.decision_logprobs(policy, paths), tabular.decision_logprobs(behaviour, paths), strict=True)
    total = sum((weigh(torch.exp(q - b).detach()) * q * advantage).sum(-1) @ probability for q, b in pairs)
    return gradient(total, policy)


@pytest.mark.parametrize(
    ("kind", "weigh", "least", "most"),
    [
        ("truncate", lambda w: w.clamp(max=1.3), 0.02, 0.04),
        ("mask", lambda w: torch.where((w <= 1.3) & (w >= 1 / 1.3), w, 0.0), 0.4, 0.45),
    ],
)
def test_off_policy_means_are_those_of_their_definitions(kind, weigh, least, most):
    """Weights cut at 1.3 for rollouts of another policy; the bias against uncut weights, 3 % and 43 %, is the price."""
    model, policy = instance(2, lines=2)
    noise = tabular.random_policy(model, 77, scale=0.5)
    behaviour = Policy(*(a.detach() + b for a, b in zip(policy.tensors, noise.tensors, strict=True)))
    paths, probability = every_group(model, behaviour, 2)
    options = {"importance_weight": kind, "max_importance_weight": 1.3}
    samples, _ = estimates(model, policy, paths, behaviour=behaviour, **options)
    expected = averaged(probability, samples)
    assert torch.allclose(expected, _off_policy_mean(model, policy, behaviour, weigh), rtol=0, atol=1e-12)
    uncut = _off_policy_mean(model, policy, behaviour, lambda w: w)
    assert least < relative(expected - uncut, uncut) < most
    untouched, _ = estimates(model, policy, paths, behaviour=behaviour, **options | {"max_importance_weight": 1e9})
    assert torch.allclose(averaged(probability, untouched), uncut, rtol=0, atol=1e-12)


def test_clipping_changes_nothing_at_ratio_one_and_something_off_policy():
    model, policy = instance(3, lines=3)
    generator = torch.Generator().manual_seed(0)
    paths = tabular.sample_paths(policy, (4, 50), generator)
    plain, _ = estimates(model, policy, paths)
    clipped, _ = estimates(model, policy, paths, ppo_clip=0.2)
    assert torch.allclose(clipped, plain, rtol=0, atol=1e-12)
    other = tabular.random_policy(model, 5)
    free, _ = estimates(model, policy, paths, behaviour=other)
    held, _ = estimates(model, policy, paths, behaviour=other, ppo_clip=0.2)
    assert relative(held - free, free) > 0.1


# --- entropy floor


def test_entropy_floor_has_the_gradient_of_the_expected_gap():
    """lambda E sum_t max(0, h - H(rho_t)) / T with the visits held fixed, over every path."""
    floor, weight = 0.6, 0.7
    model, policy = instance(2, lines=3)
    paths = tabular.all_paths(model)
    probability = torch.exp(tabular.step_logprobs(policy, paths).sum(-1)).detach()
    rho = torch.sigmoid(policy.gate)
    entropy = -(rho * torch.log(rho) + (1 - rho) * torch.log(1 - rho))
    at_gates = entropy[torch.arange(model.lines), paths.before]
    assert 0.1 < (at_gates < floor).double().mean() < 0.9
    truth = gradient(weight * (probability @ torch.relu(floor - at_gates)).mean(), policy)
    gates, _ = tabular.decision_logprobs(policy, paths)
    settings = ObjectiveConfig(gate_entropy_floor=floor, gate_entropy_weight=weight)
    counts = probability.unsqueeze(1).expand_as(gates)
    loss = objective.gate_regulariser(
        objective.GateLaw.of(gates, paths.thought), counts, settings, global_decisions=99, global_gates=model.lines
    )
    assert torch.allclose(gradient(loss, policy), truth, rtol=0, atol=1e-12)


def test_entropy_floor_brings_a_collapsed_gate_back():
    """Gates that think three times in ten thousand are never seen to think; with the floor they learn the optimum."""
    model, policy = instance(0)
    shut = {with_floor: leaves(Policy(policy.gate - 8.0, policy.content)) for with_floor in (False, True)}
    before = share_of_optimum(model, shut[False])
    learn(model, shut[False], 150, groups=8)
    assert share_of_optimum(model, shut[False]) < before + 0.05
    floor = {"gate_entropy_floor": 0.3, "gate_entropy_weight": 10.0}
    learn(model, shut[True], 150, groups=8, **floor)
    visited = tabular.visits(shut[True])[0].detach() > 0.1
    rho = torch.sigmoid(shut[True].gate.detach()[visited])
    assert (-(rho * rho.log() + (1 - rho) * (1 - rho).log())).min() > 0.2
    learn(model, shut[True], 250, groups=32)
    assert share_of_optimum(model, shut[True]) > 0.99


# --- corners


@pytest.mark.parametrize("seed", SEEDS)
def test_a_large_cost_makes_it_next_token_prediction(seed):
    """c = 50 and alpha' = 1 - 1e-9: optimum and trained policy have the J of never thinking, the NTP log-likelihood."""
    model, policy = instance(seed)
    ntp = float(model.emission[:, model.latents].sum())
    dear = Model(model.emission, penalty=50.0)
    assert tabular.viterbi(dear)[0] == pytest.approx(ntp, abs=1e-12)
    optimizer = torch.optim.Rprop(policy.tensors, lr=0.1, maximize=True)
    for _ in range(60):
        found = gradient(tabular.value_by_recursion(dear, policy), policy)
        policy.gate.grad, policy.content.grad = found[..., 0], found[..., 1:]
        optimizer.step()
    assert tabular.value_by_recursion(dear, policy).item() == pytest.approx(ntp, abs=1e-6)
    prior = sticky_prior(model, seed, 1 - 1e-9)
    best, posterior = tabular.posterior(model, prior)
    assert best == pytest.approx(ntp, abs=1e-6)
    assert tabular.value(model, posterior, prior=prior).item() == pytest.approx(ntp, abs=1e-6)


def test_ntp_has_nothing_for_the_estep_to_learn():
    model, policy = instance(0, lines=3)
    trainer = TabularTrainer(model, policy)
    estep = EStep(ObjectiveConfig.of("ntp"), 1e-4, trainer, LAYOUT, FORMAT, micro_batch_tokens=20)
    lines = tuple((LINE + t,) * (t + 1) for t in range(3))
    item = FORMAT.render(Snippet("s", (EOS,), lines, (None,) * 3), observe=False)
    metrics = estep.update([[item] * 4, [item] * 4])
    assert (metrics["loss"], metrics["grad_norm"], metrics["think_rate"]) == (0.0, 0.0, 0.0)
    assert not trainer.found.any()
    assert metrics["reward"] == pytest.approx(float(model.emission[:, model.latents].mean()), rel=1e-6)


def _one_thought(model: Model, line: tuple[int, ...], law: Tensor, latent: int):
    item = FORMAT.begin(Snippet("s", (EOS,), (line,), (None,)))
    FORMAT.append_think(item)
    FORMAT.append_rationale(item, (LATENT + latent, NEWLINE), line, logprobs=(float(law[latent]), 0.0))
    return item


@pytest.mark.parametrize("beta", [1.0, 0.05])
def test_brite_is_the_one_action_corner_without_a_penalty(beta):
    """Exact gradient of E_q log pi(a|z) - beta KL(q ‖ q_ref), the same from `ra3` with H = 1, c = 0, gate always."""
    model, policy = instance(1, lines=1)
    prior = sticky_prior(model, 1)
    content, new = (torch.log_softmax(item.content[0, model.latents], -1) for item in (policy, prior))
    truth = gradient((content.exp() * (model.emission[0, :-1] - beta * (content - new))).sum(), policy)
    brite = ObjectiveConfig.of("brite" if beta == 1.0 else "latro")
    corner = ObjectiveConfig(gate="always", penalty=0.0, horizon=1, line_reward="sum", reference_kl=beta)
    law = content.detach()
    items = [_one_thought(model, (LINE,), law, latent) for latent in range(model.latents)]
    found = []
    for settings in (brite, corner):
        trainer = TabularTrainer(model, policy)
        estep = EStep(settings, 1e-4, trainer, LAYOUT, FORMAT, 20, reference=TabularTrainer(model, prior))
        expected = torch.zeros_like(trainer.found)
        for a, b in itertools.combinations(range(len(items)), 2):
            estep.update([[items[a], items[b]]])
            expected -= 2 * float(torch.exp(law[a] + law[b])) * trainer.found * 4 / 2
        found.append(expected)
    assert torch.equal(found[0], found[1])
    assert relative(found[0] - truth, truth) < 1e-6
    if beta == 1.0:  # its optimum is the marginal over one latent
        best = torch.log_softmax(new + model.emission[0, :-1], -1)
        marginal = torch.logsumexp(new + model.emission[0, :-1], -1)
        bound = (best.exp() * (model.emission[0, :-1] - (best - new))).sum()
        assert bound.item() == pytest.approx(marginal.item(), abs=1e-12)


def test_rlp_credits_a_rationale_with_what_it_adds_to_its_own_token():
    """A_t = log pi(a_t|z_t) - log pi(a_t|<act>), whatever the other lines and rollouts are worth."""
    model, _ = instance(0)
    paths = tabular.all_paths(model)
    own = tabular.line_logprobs(model, paths)
    acted = model.emission[torch.arange(model.lines), paths.before]
    lines = objective.Lines(
        logprob=own,
        tokens=torch.ones(model.lines),
        thought=paths.thought,
        well_formed=torch.ones_like(paths.thought),
    )
    settings = ObjectiveConfig.of("rlp")
    advantage = objective.advantages(objective.line_rewards(lines, settings), acted, settings)
    assert torch.equal(advantage, own - acted)
    assert not advantage[~paths.thought].any()
    assert advantage[paths.thought].abs().max() > 1


# --- the whole E-step


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_cost": "sticky_kl", "stickiness": KEEP, "baseline": "both"},
        {"latent_cost": "sticky_kl", "stickiness": KEEP, "baseline": "counterfactual", "ppo_clip": 0.2},
        {"reference_kl": 0.4, "baseline": "counterfactual", "importance_weight": "mask"},
    ],
)
def test_the_whole_estep_has_the_exact_gradient_over_every_pair_of_rollouts(changes):
    model, policy = instance(2, lines=2)
    prior = sticky_prior(model, 2)
    paths = tabular.all_paths(model)
    gates, contents = (item.detach() for item in tabular.decision_logprobs(policy, paths))
    probability = torch.exp((gates + contents).sum(-1)).tolist()
    items = [trajectory(model, paths[torch.tensor(i)], (gates[i], contents[i])) for i in range(len(probability))]
    trainer = TabularTrainer(model, policy)
    settings = ObjectiveConfig(penalty=model.penalty, **changes)
    estep = EStep(settings, 1e-4, trainer, LAYOUT, FORMAT, 40, reference=TabularTrainer(model, prior))
    expected = torch.zeros_like(trainer.found)
    for a, b in itertools.combinations_with_replacement(range(len(items)), 2):
        trainer.found.zero_()
        estep.update([[items[a], items[b]]])
        decisions = sum(items[a].sampled) + sum(items[b].sampled)
        expected -= (1 + (a != b)) * probability[a] * probability[b] * trainer.found * decisions / 2
    if settings.latent_cost == "sticky_kl":
        truth = gradient(tabular.value(model, policy, prior=prior), policy)
    else:
        steps, own = tabular.step_logprobs(policy, paths), tabular.decision_logprobs(policy, paths)[1]
        gap = own - tabular.decision_logprobs(prior, paths)[1]
        total = tabular.line_values(model, paths) - settings.reference_kl * gap
        truth = gradient((torch.exp(steps.sum(-1)) * total.sum(-1)).sum(), policy)
    assert math.isfinite(float(expected.norm()))
    assert relative(expected - truth, truth) < 1e-6
