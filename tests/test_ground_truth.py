"""The E-step's maths against exact enumeration of a tabular sticky-latent model (algorithm.md 2, 3).

Expectations over rollouts are sums over every group of paths where that is possible, so most statements hold to
rounding; where sampling is needed, z-scores decide, and a wrong estimator must fail the same test.
"""

import itertools
import math
from typing import Any

import pytest
import torch

from megatron_ra3 import objective
from megatron_ra3.estep import EStep
from megatron_ra3.presets import ObjectiveConfig
from tests import tabular
from tests.estimator import (
    CONFIGURATIONS,
    SEEDS,
    Agreement,
    averaged,
    estimates,
    every_group,
    exact,
    gradient,
    instance,
    learn,
    no_baseline,
    older,
    prior_of,
    relative,
    share_of_optimum,
    z_scores,
)
from tests.tabular import Model, Policy
from tests.tabular_trainer import FORMAT, LAYOUT, TabularTrainer, trajectory

# --- the two exact optima, and what the tests below rest on


@pytest.mark.parametrize("seed", SEEDS)
def test_enumeration_agrees_with_recursion_and_viterbi_with_the_best_path(seed):
    model, policy = instance(seed)
    paths = tabular.all_paths(model)
    assert torch.exp(tabular.step_logprobs(policy, paths).sum(-1)).sum().item() == pytest.approx(1.0, abs=1e-12)
    by_paths, by_recursion = tabular.value(model, policy), tabular.value_by_recursion(model, policy)
    assert by_paths.item() == pytest.approx(by_recursion.item(), abs=1e-12)
    assert torch.allclose(gradient(by_paths, policy), gradient(by_recursion, policy), rtol=0, atol=1e-12)
    best, gains = tabular.viterbi(model)
    totals = tabular.line_values(model, paths).sum(-1)
    assert best == pytest.approx(float(totals.max()), abs=1e-12)
    winner = totals.argmax()
    gain = gains.gather(1, paths.before[winner].unsqueeze(1)).squeeze(1)
    assert (gain > model.penalty).tolist() == paths.thought[winner].tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_elbo_is_below_the_marginal_by_the_divergence_from_the_posterior(seed, alpha):
    model, policy = instance(seed)
    prior = tabular.sticky_prior(model.latents, alpha)
    marginal, posterior, _ = tabular.forward_backward(model, prior)
    assert marginal == pytest.approx(tabular.log_marginal(model, prior), abs=1e-12)
    assert tabular.elbo(model, posterior, prior) == pytest.approx(marginal, abs=1e-12)
    q = tabular.transitions(policy).detach()
    no_lines = Model(torch.zeros_like(model.emission), 0.0)
    divergence = -tabular.elbo(no_lines, q, posterior)
    assert divergence > 0.1
    assert tabular.elbo(model, q, prior) == pytest.approx(marginal - divergence, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_kl_splits_into_a_gate_and_a_content_part(alpha):
    """KL_Bern(rho ‖ 1-alpha') + rho [log(K-1) - H(q~)]; before the first rationale alpha' = alpha and K choices."""
    model, policy = instance(0)
    latents = model.latents
    q = tabular.transitions(policy).detach()
    direct = tabular.divergence(q, tabular.sticky_prior(latents, alpha))
    for t, current in itertools.product(range(model.lines), range(latents + 1)):
        keep = alpha + (1 - alpha) / latents if current < latents else alpha
        rho = 1 - q[t, current, current]
        new = torch.cat([q[t, current, :current], q[t, current, current + 1 :]])[:latents] / rho
        new = new[new > 0]
        gate = rho * torch.log(rho / (1 - keep)) + (1 - rho) * torch.log((1 - rho) / keep)
        split = gate + rho * (math.log(len(new)) + (new * new.log()).sum())
        assert float(split) == pytest.approx(float(direct[t, current]), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.95])
def test_posterior_gate_is_the_sigmoid_of_gain_minus_logit(alpha):
    """rho* = sigmoid(gain - logit alpha') at every line and latent, and no gate on a grid does better."""
    model, _ = instance(1)
    latents = model.latents
    _, posterior, values = tabular.forward_backward(model, tabular.sticky_prior(latents, alpha))
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:-1]
    for t, current in itertools.product(range(model.lines), range(latents + 1)):
        keep = alpha + (1 - alpha) / latents if current < latents else alpha
        after = model.emission[t] + values[t + 1]
        others = [z for z in range(latents) if z != current]
        gain = float(torch.logsumexp(after[others], 0) - math.log(len(others)) - after[current])
        best = 1 / (1 + math.exp(math.log(keep / (1 - keep)) - gain))
        assert best == pytest.approx(1 - float(posterior[t, current, current]), abs=1e-12)
        divergence = grid * torch.log(grid / (1 - keep)) + (1 - grid) * torch.log((1 - grid) / keep)
        assert float(grid[(grid * gain - divergence).argmax()]) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_fixed_cost_the_best_gate_thinks_iff_the_gain_exceeds_it(seed):
    """Changing one gate of a policy to any value on a grid: J is best at the indicator, whatever precedes."""
    model, policy = instance(seed)
    _, gains = tabular.viterbi(model)
    t = model.lines - 1
    for current in range(model.latents + 1):
        sure = policy.content.detach().clone()
        sure[t] = 200.0 * torch.nn.functional.one_hot(model.emission[t, :-1].argmax(), model.latents)
        by_gate = []
        for logit in torch.linspace(-40.0, 40.0, 9, dtype=torch.float64):
            gate = policy.gate.detach().clone()
            gate[t, current] = logit
            by_gate.append(tabular.value(model, Policy(gate, sure)).item())
        assert (by_gate == sorted(by_gate)) == bool(gains[t, current] > model.penalty)
        assert by_gate in (sorted(by_gate), sorted(by_gate, reverse=True))


# --- the gradient, as an expectation over every group of rollouts


@pytest.mark.parametrize(("lines", "group"), [(2, 2), (2, 3), (3, 2)])
def test_expected_gradient_over_every_group_is_that_of_j(lines, group):
    """Exactly: E[N loss] has gradient -G grad J, with the baseline and without."""
    model, policy = instance(lines, lines=lines)
    truth = gradient(tabular.value(model, policy), policy)
    paths, probability = every_group(model, policy, group)
    for advantages in (objective.advantages, no_baseline):
        samples, _ = estimates(model, policy, paths, advantages=advantages)
        assert torch.allclose(averaged(probability, samples), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("horizon", "discount"), [(1, 1.0), (2, 1.0), (2, 0.6), (3, 0.6)])
def test_shorter_credit_has_the_gradient_of_its_own_surrogate(horizon, discount):
    model, policy = instance(3, lines=3)
    truth = gradient(tabular.credited_value(model, policy, horizon=horizon, discount=discount), policy)
    paths, probability = every_group(model, policy, 2)
    samples, _ = estimates(model, policy, paths, horizon=horizon, discount=discount)
    assert torch.allclose(averaged(probability, samples), truth, rtol=0, atol=1e-12)
    full = gradient(tabular.value(model, policy), policy)
    assert relative(truth - full, full) > 0.1
    whole = gradient(tabular.credited_value(model, policy, horizon=3, discount=1.0), policy)
    assert torch.allclose(whole, full, rtol=0, atol=1e-12)


def test_a_thought_that_pays_off_later_needs_a_horizon():
    """Thinking first costs 0.5 and gives 0.2 on each of four lines: worth it with H >= 3 only; H = 1 is the reward."""
    emission = torch.full((4, 2), -1.0, dtype=torch.float64)
    emission[:, 0] = -0.8
    model = Model(emission, penalty=0.5)
    policy = Policy(torch.full((4, 2), -30.0, dtype=torch.float64), torch.zeros(4, 2, 1, dtype=torch.float64))
    policy.gate[0] = 0.0
    rewards = tabular.line_values(model, tabular.all_paths(model))
    assert torch.equal(objective.truncated_returns(rewards, horizon=1, discount=0.5), rewards)
    for horizon in (1, 2, 3, 4):
        own = Policy(*(item.clone().requires_grad_() for item in policy.tensors))
        paths, probability = every_group(model, own, 2)
        samples, _ = estimates(model, own, paths, horizon=horizon)
        # d/d logit at a half is a quarter of what thinking brings
        assert float(averaged(probability, samples)[0, 1, 0]) == pytest.approx((0.2 * horizon - 0.5) / 4, abs=1e-9)


def test_dividing_by_the_random_number_of_decisions_leaves_a_bias_that_fades_with_the_batch():
    """N counts thinks too: the gradient divided by N is a ratio, right as N's spread vanishes, of order 1/groups."""
    model, policy = instance(2, lines=2)
    truth = gradient(tabular.value(model, policy), policy)
    paths, probability = every_group(model, policy, 2)
    samples, decisions = estimates(model, policy, paths)
    by_count = torch.zeros(int(decisions.max()) + 1, *truth.shape, dtype=torch.float64)
    by_count.index_add_(0, decisions, probability.view(-1, 1, 1, 1) * samples)
    law = torch.zeros(len(by_count), dtype=torch.float64).index_add_(0, decisions, probability)
    mean = float(law @ torch.arange(len(law), dtype=torch.float64))
    others, biases = torch.ones(1, dtype=torch.float64), []
    for groups in range(1, 65):
        total = torch.arange(len(law)).unsqueeze(1) + torch.arange(len(others))
        inverse = (others / total.clamp(min=1)).sum(1)  # E[1/N] given the decisions of one of the groups
        expected = groups * torch.einsum("n,ntsk->tsk", inverse, by_count) * mean
        biases.append(relative(expected - truth, truth))
        others = torch.nn.functional.conv1d(others.view(1, 1, -1), law.flip(0).view(1, 1, -1), padding=len(law) - 1)
        others = others.flatten()
    assert 0.05 < biases[0] < 0.1
    assert [groups * biases[groups - 1] for groups in (8, 16, 32)] == pytest.approx([64 * biases[63]] * 3, rel=0.02)


# --- exploration


@pytest.mark.parametrize(("rarer", "least", "most"), [(0.0, 0.2, 0.22), (4.0, 15.0, 19.0)])
@pytest.mark.parametrize("exploration", [0.0, 0.01, 0.1, 0.5])
def test_explored_gradient_is_that_of_the_exploring_policy(exploration, rarer, least, most):
    """Weights per decision ascend J of (1-eps) q + eps/2, exactly; only the whole path's weight ascends J of q itself.

    Relative to the gradient of J of q they are off by 0.2 eps where every other gate thinks, by 15 to 19 eps where two
    in a hundred do.
    """
    model, policy = instance(4, lines=2)
    policy = Policy(policy.gate - rarer, policy.content)
    truth = gradient(tabular.value(model, policy), policy)
    paths, probability = every_group(model, policy, 2, exploration)
    expected = averaged(probability, estimates(model, policy, paths, gate_exploration=exploration)[0])
    ascended = gradient(tabular.value(model, policy, exploration), policy, exploration)
    assert torch.allclose(expected, ascended, rtol=0, atol=1e-12)
    bias = relative(expected - truth, truth)
    assert least * exploration <= bias <= most * exploration + 1e-12
    # Never above 1/(1-eps), so the default truncation at 2 is idle up to eps = 1/2.
    truncated = averaged(
        probability, estimates(model, policy, paths, gate_exploration=exploration, max_importance_weight=2.0)[0]
    )
    assert torch.allclose(truncated, expected, rtol=0, atol=1e-12)
    options = {"gate_exploration": exploration, "advantages": no_baseline, "whole_path_weight": True}
    whole = averaged(probability, estimates(model, policy, paths, **options)[0])
    assert torch.allclose(whole, truth, rtol=0, atol=1e-12)


def test_content_learns_from_explored_thoughts_at_the_rate_they_are_drawn():
    """One line: the gate's gradient is that of J whatever epsilon; a new latent's is b(think)/q(think) times it."""
    model, policy = instance(0, lines=1)
    policy = Policy(policy.gate - 5.0, policy.content)
    paths, probability = every_group(model, policy, 2, exploration=0.1)
    samples, _ = estimates(model, policy, paths, gate_exploration=0.1)
    expected, truth = averaged(probability, samples)[0, -1], gradient(tabular.value(model, policy), policy)[0, -1]
    think = torch.sigmoid(policy.gate[0, -1]).item()
    assert expected[0].item() == pytest.approx(truth[0].item(), rel=1e-9)
    assert (expected[1:] / truth[1:]).tolist() == pytest.approx([(0.9 * think + 0.05) / think] * 3, rel=1e-9)


# --- latents of older weights


@pytest.mark.parametrize("exploration", [0.0, 0.1])
@pytest.mark.parametrize("seed", SEEDS)
def test_weights_per_decision_make_each_stale_decision_right(seed, exploration):
    """Exactly, also where weights change between the lines of a rollout; without weights it is far off."""
    model, policy = instance(seed, lines=2)
    first, second = older(policy, seed, 0.2), older(policy, seed + 10, 0.1)
    changing = (torch.stack([a[0], b[1]]) for a, b in zip(first.tensors, second.tensors, strict=True))
    behaviour = Policy(*changing)
    truth = gradient(tabular.weighted_value(model, policy, behaviour, exploration), policy)
    paths, probability = every_group(model, behaviour, 2, exploration)
    stale = {"behaviour": behaviour, "gate_exploration": exploration}
    expected = averaged(probability, estimates(model, policy, paths, **stale)[0])
    assert torch.allclose(expected, truth, rtol=0, atol=1e-12)
    truncated = averaged(probability, estimates(model, policy, paths, max_importance_weight=2.0, **stale)[0])
    assert torch.allclose(truncated, expected, rtol=0, atol=1e-12)  # no weight is so large
    unweighted = averaged(probability, estimates(model, policy, paths)[0])
    assert relative(unweighted - truth, truth) > 0.015


def test_what_older_weights_leave_is_first_order_in_the_drift():
    """What precedes and follows a decision stays that of the older weights; only the whole path's weight undoes it."""
    model, policy = instance(0, lines=2)
    truth = gradient(tabular.value(model, policy), policy)
    for drift in (0.01, 0.03, 0.1):
        behaviour = older(policy, 0, drift)
        paths, probability = every_group(model, behaviour, 2)
        by_decision, unweighted, by_path = (
            relative(averaged(probability, estimates(model, policy, paths, **options)[0]) - truth, truth) / drift
            for options in ({"behaviour": behaviour}, {}, {"behaviour": behaviour, "whole_path_weight": True})
        )
        assert by_decision == pytest.approx(0.465, abs=0.01)
        assert unweighted == pytest.approx(1.03, abs=0.01)
        assert by_path < 1e-9


def test_truncation_cuts_what_drifted_far_and_nothing_else():
    model, policy = instance(3, lines=2)
    paths, probability = every_group(model, older(policy, 3, 0.6), 2)
    plain, truncated, masked = (
        averaged(probability, estimates(model, policy, paths, behaviour=older(policy, 3, 0.6), **options)[0])
        for options in ({}, {"max_importance_weight": 2.0}, {"max_importance_weight": 2.0, "importance_weight": "mask"})
    )
    assert 0.05 < relative(truncated - plain, plain) < relative(masked - plain, plain) < 0.9


def test_equal_rollouts_of_different_weights_keep_their_own_importance():
    """The whole E-step over every group of three, one of them drawn by older weights than the others."""
    model, policy = instance(0, lines=1)
    laws = [older(policy, 0, 0.5), older(policy, 1, 0.2)]
    paths = tabular.all_paths(model)
    numbers = range(len(paths.thought))
    drawn = [[item.detach() for item in tabular.decision_logprobs(law, paths)] for law in laws]
    probability = [torch.exp(gate + content).sum(-1).tolist() for gate, content in drawn]
    items = [
        [trajectory(model, paths[torch.tensor(i)], (gate[i], content[i]), weight_version=v) for i in numbers]
        for v, (gate, content) in enumerate(drawn)
    ]
    trainer = TabularTrainer(model, policy)
    estep = EStep(ObjectiveConfig(penalty=model.penalty), 1e-4, trainer, LAYOUT, FORMAT, micro_batch_tokens=20)
    expected = torch.zeros_like(trainer.found)
    for a, b, c in itertools.product(numbers, repeat=3):
        trainer.found.zero_()
        group = [items[0][a], items[1][b], items[1][c]]
        assert (estep.update([group])["grad_norm"] > 0) == (len({a, b, c}) > 1)
        decisions = sum(sum(item.sampled) for item in group)
        expected -= probability[0][a] * probability[1][b] * probability[1][c] * trainer.found * decisions / 3
    truth = sum(
        share * gradient(tabular.weighted_value(model, policy, law), policy)
        for share, law in zip((1 / 3, 2 / 3), laws, strict=True)
    )
    assert relative(expected - truth, truth) < 1e-6


# --- sampled rollouts


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sampled_gradients_have_the_exact_mean(name):
    """z-scores over 260 coordinates of five models; the baseline moves the variance only."""
    found = Agreement.of(CONFIGURATIONS[name], groups=10_000)
    for z in (found.z, found.baseline_z):
        assert len(z) == 260
        assert z.abs().max() < 4
        assert 0.8 < (z**2).mean() < 1.2
    assert found.variance < (0.7 if "counterfactual" in name else 0.25)  # relative to no baseline


@pytest.mark.parametrize("latent_cost", ["penalty", "sticky_kl"])
def test_z_scores_find_credit_for_one_line_out(latent_cost):
    model, policy = instance(0)
    settings = {"latent_cost": latent_cost}
    prior = prior_of(model, 0, settings)
    paths = tabular.sample_paths(policy, (4, 10_000), torch.Generator().manual_seed(0))
    samples, _ = estimates(model, policy, paths, prior=prior, horizon=1)
    assert z_scores(samples, exact(model, policy, settings, prior)).abs().max() > 30


# --- learning


@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("groups", [0, 32])
def test_learning_reaches_the_viterbi_optimum(seed, groups):
    model, policy = instance(seed)
    assert share_of_optimum(model, policy) < 0.45
    learn(model, policy, 400, groups=groups)
    assert 0.99 < share_of_optimum(model, policy) < 1.0


def test_learning_from_older_weights_reaches_it_too():
    """Four steps old, of about 0.1 in every logit."""
    model, policy = instance(3)
    learn(model, policy, 400, groups=32, staleness=4)
    assert 0.99 < share_of_optimum(model, policy) < 1.0


@pytest.mark.parametrize("groups", [0, 32])
@pytest.mark.parametrize("exploration", [0.0, 0.1])
def test_a_gate_that_closes_before_its_latents_are_learnt_stays_closed(exploration, groups):
    """The exact gradient stops there too: the first of the optimum's thoughts, worth 6 %, is not tried again."""
    model, policy = instance(1)
    learn(model, policy, 500, groups=groups, gate_exploration=exploration)
    paths = tabular.all_paths(model)
    totals = tabular.line_values(model, paths).sum(-1)
    best, _ = tabular.viterbi(model)
    without = (float(totals[~paths.thought[:, 0]].max()) - model.act_value) / (best - model.act_value)
    assert without == pytest.approx(0.942, abs=1e-3)
    assert without - 0.01 < share_of_optimum(model, policy) < without


@pytest.mark.parametrize("groups", [0, 32])
def test_a_gate_that_starts_open_learns_what_that_one_never_tries(groups):
    model, policy = instance(1)
    opened = Policy((policy.gate.detach() + 3.0).requires_grad_(), policy.content)
    learn(model, opened, 500, groups=groups)
    assert 0.99 < share_of_optimum(model, opened) < 1.0


def test_where_thinking_costs_too_much_the_best_policy_never_thinks():
    model, policy = instance(0)
    model = Model(model.emission, penalty=50.0)
    best, gains = tabular.viterbi(model)
    assert best == pytest.approx(model.act_value, abs=1e-12)
    assert gains.max() < 50.0
    learn(model, policy, 400, groups=8)
    thinks = torch.sigmoid(policy.gate.detach())[:, model.latents]
    assert thinks.max() < 0.01
    assert -0.5 < tabular.value(model, policy).item() - model.act_value < 0


# --- the whole E-step, from trajectories of tokens to the optimizer's gradient


@pytest.mark.parametrize(("exploration", "horizon"), [(0.0, 2), (0.1, 2), (0.1, 1)])
def test_the_whole_estep_has_the_exact_gradient_over_every_pair_of_rollouts(exploration, horizon):
    """Packing, scoring, advantages, weights and normaliser together; pairs that are alike have no gradient."""
    model, policy = instance(2, lines=2)
    expected = _estep_gradient(model, policy, horizon=horizon, gate_exploration=exploration)
    surrogate = tabular.credited_value(model, policy, horizon=horizon, discount=1.0, exploration=exploration)
    truth = gradient(surrogate, policy, exploration)
    assert relative(expected - truth, truth) < 1e-6


def test_with_the_line_gradient_the_estep_ascends_j_in_weights_that_lines_share():
    """Lines whose log-probs move with the gates' logits: without it the gradient is that of fixed lines, far off."""
    model, policy = instance(2, lines=2)
    shared = Model(model.emission + 0.5 * policy.gate, model.penalty)
    truth = gradient(tabular.value(shared, policy), policy)
    fixed = gradient(tabular.value(Model(shared.emission.detach(), model.penalty), policy), policy)
    assert relative(fixed - truth, truth) > 0.5
    for weight, meant in ((1.0, truth), (0.0, fixed), (0.3, 0.3 * truth + 0.7 * fixed)):
        expected = _estep_gradient(shared, policy, line_gradient=weight)
        assert relative(expected - meant, meant) < 1e-6


def _estep_gradient(model: Model, policy: Policy, **settings: Any) -> torch.Tensor:
    """What `EStep.update` ascends, times N, in the mean over every pair of rollouts."""
    config = ObjectiveConfig(penalty=model.penalty, **{"horizon": 2, **settings})
    exploration = config.gate_exploration
    paths = tabular.all_paths(model)
    gates, contents = (item.detach() for item in tabular.decision_logprobs(policy, paths))
    gates = torch.log((1 - exploration) * torch.exp(gates) + exploration / 2)
    probability = torch.exp((gates + contents).sum(-1)).tolist()
    items = [trajectory(model, paths[torch.tensor(i)], (gates[i], contents[i])) for i in range(len(probability))]
    trainer = TabularTrainer(model, policy)
    estep = EStep(config, 1e-4, trainer, LAYOUT, FORMAT, micro_batch_tokens=20)
    expected = torch.zeros_like(trainer.found)
    for a, b in itertools.combinations_with_replacement(range(len(items)), 2):
        trainer.found.zero_()  # no step is taken where there is nothing to learn
        metrics = estep.update([[items[a], items[b]]])
        assert metrics["mismatch"] < 1e-6
        decisions = sum(items[a].sampled) + sum(items[b].sampled)
        expected -= (1 + (a != b)) * probability[a] * probability[b] * trainer.found * decisions / 2
    return expected
