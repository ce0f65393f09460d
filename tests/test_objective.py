"""The maths by value: hand-computed cases and float64 references."""

import dataclasses
import math

import pytest
import torch

from megatron_ra3 import objective
from megatron_ra3.presets import PRESETS, ObjectiveConfig

LINES = objective.Lines(
    logprob=torch.tensor([-6.0, -2.0, -9.0]),
    tokens=torch.tensor([3, 1, 3]),
    thought=torch.tensor([False, True, True]),
    well_formed=torch.tensor([True, True, False]),
    gate_kl=torch.tensor([0.25, 0.5, 0.0]),
    reference_gap=torch.tensor([0.0, 2.0, -1.0]),
)


def test_log1mexp_is_exact_near_both_ends_and_differentiable():
    values = torch.tensor([-40.0, -5.0, -0.7, -0.6931, -0.1, -1e-4], dtype=torch.float64, requires_grad=True)
    expected = [math.log1p(-math.exp(v)) if v < -0.69 else math.log(-math.expm1(v)) for v in values.tolist()]
    result = objective.log1mexp(values)
    assert torch.allclose(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    result.sum().backward()
    gradient = -torch.exp(values.detach()) / -torch.expm1(values.detach())
    assert torch.allclose(values.grad, gradient, rtol=1e-10)


def test_line_reward_subtracts_penalties_from_mean_or_sum():
    settings = {"penalty": 0.5, "format_penalty": 4.0}
    mean = objective.line_rewards(LINES, ObjectiveConfig(**settings, line_reward="mean"))
    total = objective.line_rewards(LINES, ObjectiveConfig(**settings, line_reward="sum"))
    assert mean.tolist() == [-2.0, -2.5, -7.5]
    assert total.tolist() == [-6.0, -2.5, -13.5]


def test_truncated_returns_add_the_next_h_rewards():
    rewards = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    assert objective.truncated_returns(rewards, horizon=2, discount=1.0).tolist() == [[11.0, 110.0, 1100.0, 1000.0]]
    assert objective.truncated_returns(rewards, horizon=99, discount=0.5).tolist() == [[156.0, 310.0, 600.0, 1000.0]]
    assert objective.truncated_returns(rewards, horizon=1, discount=1.0).tolist() == rewards.tolist()


def test_leave_one_out_compares_with_the_mean_of_the_others():
    returns = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
    assert objective.leave_one_out(returns).tolist() == [[-3.0, -1.5], [-1.5, -1.5], [4.5, 3.0]]


def test_equal_returns_have_no_advantage_at_all():
    assert objective.leave_one_out(torch.full((3, 2), -3.8531)).tolist() == [[0.0, 0.0]] * 3


def test_importance_weights_are_truncated_and_carry_no_gradient():
    policy = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -4.0, -1.0])
    weights = objective.importance_weights(policy, behaviour, ObjectiveConfig(max_importance_weight=2.0))
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-2.0)])
    assert not weights.requires_grad


def test_masking_leaves_out_what_truncation_would_cut_and_its_mirror_image():
    policy, behaviour = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.2])), torch.log(torch.tensor([0.5, 0.3, 0.1, 0.5]))
    settings = ObjectiveConfig(importance_weight="mask", max_importance_weight=2.0)
    assert objective.importance_weights(policy, behaviour, settings).tolist() == pytest.approx([1.0, 5 / 3, 0.0, 0.0])


def test_policy_gradient_equals_advantage_times_weight_over_global_count():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -2.0 + math.log(2)])
    loss = objective.policy_gradient_loss(
        policy, behaviour, torch.tensor([3.0, -4.0]), ObjectiveConfig(), global_count=10
    )
    loss.backward()
    assert loss.item() == pytest.approx(-(-3.0 + 4.0) / 10)
    assert policy.grad.tolist() == pytest.approx([-0.3, 0.2])


def test_ppo_clip_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    """Ratios 1.5 and 0.5 at e = 0.2, credit of both signs: only moves back towards 1 keep a gradient."""
    behaviour = torch.full((4,), math.log(0.4))
    policy = torch.log(torch.tensor([0.6, 0.6, 0.2, 0.2])).requires_grad_()
    credit = torch.tensor([1.0, -1.0, 1.0, -1.0])
    settings = ObjectiveConfig(ppo_clip=0.2)
    loss = objective.policy_gradient_loss(policy, behaviour, credit, settings, global_count=2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 2)
    loss.backward()
    assert policy.grad.tolist() == pytest.approx([0.0, 0.75, -0.25, 0.0])
    on_policy = behaviour.clone().requires_grad_()
    objective.policy_gradient_loss(on_policy, behaviour, credit, settings, global_count=2).backward()
    plain = behaviour.clone().requires_grad_()
    objective.policy_gradient_loss(plain, behaviour, credit, ObjectiveConfig(), global_count=2).backward()
    assert torch.equal(on_policy.grad, plain.grad)


def test_sticky_cost_takes_the_gate_and_the_content_term_in_the_place_of_the_penalty():
    settings = ObjectiveConfig(latent_cost="sticky_kl", penalty=99.0, format_penalty=4.0, line_reward="sum")
    assert objective.line_rewards(LINES, settings).tolist() == [-6.25, -4.5, -12.0]
    settings = ObjectiveConfig(reference_kl=0.5, penalty=1.0, format_penalty=0.0, line_reward="sum")
    assert objective.line_rewards(LINES, settings).tolist() == [-6.0, -4.0, -9.5]


def test_counterfactual_is_taken_from_the_line_itself_and_not_from_those_after_it():
    rewards, without = torch.tensor([[1.0, 2.0], [3.0, 7.0]]), torch.tensor([[0.5, 2.0], [1.0, 5.0]])
    alone = ObjectiveConfig(baseline="counterfactual", horizon=2)
    assert objective.advantages(rewards, without, alone).tolist() == [[2.5, 0.0], [9.0, 2.0]]
    both = ObjectiveConfig(baseline="both", horizon=2)
    assert objective.advantages(rewards, without, both).tolist() == [[-6.5, -2.0], [6.5, 2.0]]
    group = ObjectiveConfig(horizon=2)
    assert objective.advantages(rewards, None, group).tolist() == [[-7.0, -5.0], [7.0, 5.0]]


def test_gate_law_kl_and_entropy_by_value():
    rho = torch.tensor([0.2, 0.7], dtype=torch.float64)
    thought = torch.tensor([True, False])
    law = objective.GateLaw.of(torch.log(torch.where(thought, rho, 1 - rho)), thought)
    assert torch.allclose(law.think.exp(), rho)
    expected = [r * math.log(r / 0.1) + (1 - r) * math.log((1 - r) / 0.9) for r in (0.2, 0.7)]
    assert law.kl(0.9).tolist() == pytest.approx(expected)
    assert law.entropy().tolist() == pytest.approx([-r * math.log(r) - (1 - r) * math.log(1 - r) for r in (0.2, 0.7)])


def test_gate_regulariser_divides_each_stream_by_its_own_count():
    law = objective.GateLaw.of(torch.log(torch.tensor([0.01, 0.5])), torch.tensor([True, True]))
    counts = torch.tensor([3.0, 2.0])
    floor = ObjectiveConfig(gate_entropy_floor=0.3, gate_entropy_weight=2.0)
    gap = 0.3 - float(law.entropy()[0])
    found = objective.gate_regulariser(law, counts, floor, global_decisions=100, global_gates=10)
    assert found.item() == pytest.approx(2.0 * 3 * gap / 10)
    sticky = ObjectiveConfig(latent_cost="sticky_kl", stickiness=0.8)
    found = objective.gate_regulariser(law, counts, sticky, global_decisions=100, global_gates=10)
    assert found.item() == pytest.approx(float((counts * law.kl(0.8)).sum()) / 100)
    assert objective.gate_regulariser(law, counts, ObjectiveConfig(), global_decisions=1, global_gates=1).item() == 0.0


def test_presets_are_the_corners_they_are_named_after():
    assert ObjectiveConfig.of("ra3") == ObjectiveConfig()
    assert ObjectiveConfig.of("ntp").gate == "never"
    rlp = ObjectiveConfig.of("rlp")
    assert (rlp.granularity, rlp.gate, rlp.penalty, rlp.baseline) == ("token", "always", 0.0, "counterfactual")
    brite, latro = ObjectiveConfig.of("brite"), ObjectiveConfig.of("latro")
    assert (brite.granularity, brite.gate, brite.penalty, brite.reference_kl) == ("snippet", "always", 0.0, 1.0)
    assert latro == dataclasses.replace(brite, preset="latro", reference_kl=0.05, line_gradient=1.0)
    assert ObjectiveConfig.of("rlp", penalty=0.1).penalty == 0.1
    assert set(PRESETS) == {"ra3", "ntp", "rlp", "brite", "latro"}


def test_next_token_weights_are_shares_of_the_global_weight():
    shares = objective.next_token_weights(torch.tensor([1.0, 0.5]), global_weight=4.0)
    assert shares.tolist() == [0.25, 0.125]
    assert objective.next_token_weights(torch.zeros(0), global_weight=0.0).tolist() == []


def test_exploration_mixes_the_policy_with_a_coin():
    law = objective.explored(torch.log(torch.tensor([0.9, 0.1])), 0.2)
    assert law.exp().tolist() == pytest.approx([0.82, 0.18])
    assert objective.explored(torch.tensor([-3.0]), 0.0).tolist() == pytest.approx([-3.0])
