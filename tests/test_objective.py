"""The maths by value: hand-computed cases and float64 references."""

import math

import pytest
import torch

from megatron_ra3 import objective


def test_log1mexp_is_exact_near_both_ends_and_differentiable():
    values = torch.tensor([-40.0, -5.0, -0.7, -0.6931, -0.1, -1e-4], dtype=torch.float64, requires_grad=True)
    expected = [math.log1p(-math.exp(v)) if v < -0.69 else math.log(-math.expm1(v)) for v in values.tolist()]
    result = objective.log1mexp(values)
    assert torch.allclose(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    result.sum().backward()
    gradient = -torch.exp(values.detach()) / -torch.expm1(values.detach())
    assert torch.allclose(values.grad, gradient, rtol=1e-10)


def test_line_reward_subtracts_penalties_from_mean_or_sum():
    arguments = (
        torch.tensor([-6.0, -2.0, -9.0]),
        torch.tensor([3, 1, 3]),
        torch.tensor([False, True, True]),
        torch.tensor([True, True, False]),
    )
    mean = objective.line_rewards(*arguments, penalty=0.5, format_penalty=4.0, line_reward="mean")
    total = objective.line_rewards(*arguments, penalty=0.5, format_penalty=4.0, line_reward="sum")
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
    weights = objective.importance_weights(policy, torch.tensor([-1.0, -4.0, -1.0]), maximum=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-2.0)])
    assert not weights.requires_grad


def test_policy_gradient_equals_advantage_times_weight_over_global_count():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = objective.policy_gradient_loss(policy, torch.tensor([1.0, 0.5]), torch.tensor([3.0, -4.0]), global_count=10)
    loss.backward()
    assert loss.item() == pytest.approx(-(-3.0 + 4.0) / 10)
    assert policy.grad.tolist() == pytest.approx([-0.3, 0.2])


def test_next_token_loss_is_a_weighted_mean_over_the_global_weight():
    loss = objective.next_token_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 0.5]), global_weight=4.0)
    assert loss.item() == pytest.approx(0.5)


def test_exploration_mixes_the_policy_with_a_coin():
    law = objective.explored(torch.log(torch.tensor([0.9, 0.1])), 0.2)
    assert law.exp().tolist() == pytest.approx([0.82, 0.18])
    assert objective.explored(torch.tensor([-3.0]), 0.0).tolist() == pytest.approx([-3.0])
