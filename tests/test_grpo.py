"""RLVR's maths against plain Python, and how groups are formed from rewards."""

import math
from typing import Any

import pytest
import torch

from megatron_ra3 import grpo
from megatron_ra3.grpo import Tokens, Totals, advantages, overlong_penalty, token_weights
from megatron_ra3.policy_step import Group
from megatron_ra3.rlvr_config import RlvrConfig
from megatron_ra3.rollout.answers import Answer

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)


def test_advantages_by_kind():
    assert advantages(REWARDS, "group_mean").tolist() == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])
    deviation = math.sqrt(0.4 * 0.6)
    normalised = advantages(REWARDS, "group_normalised").tolist()
    assert normalised == pytest.approx([value / deviation for value in (0.6, -0.4, -0.4, 0.6, -0.4)], rel=1e-5)
    assert advantages(REWARDS, "leave_one_out").tolist() == pytest.approx([0.75, -0.5, -0.5, 0.75, -0.5])


@pytest.mark.parametrize("kind", ["group_mean", "group_normalised", "leave_one_out"])
def test_equal_rewards_give_exactly_no_advantage(kind):
    assert advantages(torch.full((7,), 0.1, dtype=torch.float64), kind).tolist() == [0.0] * 7


def test_overlong_answers_are_charged_in_the_last_tokens_only():
    settings = RlvrConfig(max_answer_tokens=100, overlong_tokens=20, overlong_penalty=0.5)
    assert [overlong_penalty(count, settings) for count in (1, 80, 90, 100)] == [0.0, 0.0, 0.25, 0.5]
    assert overlong_penalty(100, RlvrConfig(max_answer_tokens=100)) == 0.0


def test_every_average_weighs_tokens_as_it_says():
    lengths, counts, totals = torch.tensor([2, 8]), torch.tensor([3.0, 1.0]), Totals(answers=4.0, tokens=14.0)

    def weights(average: Any) -> list[float]:
        return token_weights(lengths, counts, totals, RlvrConfig(loss_average=average, max_answer_tokens=10)).tolist()

    assert weights("answer") == pytest.approx([3 / (4 * 2), 1 / (4 * 8)])
    assert weights("token") == pytest.approx([3 / 14, 1 / 14])
    assert weights("constant") == pytest.approx([3 / 40, 1 / 40])


def _tokens(count: int = 6) -> Tokens:
    draw = torch.Generator().manual_seed(3)
    old, engine, reference = (-torch.rand(count, generator=draw) * 3 for _ in range(3))
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.0, -1.0])
    return Tokens(old, engine, reference, advantage, torch.rand(count, generator=draw))


def test_the_loss_is_that_of_a_plain_walk_over_tokens():
    settings = RlvrConfig(clip_low=0.2, clip_high=0.3, max_importance_weight=1.5, reference_kl=0.4)
    tokens = _tokens()
    assert tokens.reference_logprobs is not None
    logprobs = tokens.old_logprobs + torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, 0.0])
    entropies = torch.rand(6, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for u in range(6):
        ratio = math.exp(logprobs[u] - tokens.old_logprobs[u])
        clipped = min(max(ratio, 0.8), 1.3)
        gain = min(ratio * float(tokens.advantage[u]), clipped * float(tokens.advantage[u]))
        behaviour = min(math.exp(tokens.old_logprobs[u] - tokens.engine_logprobs[u]), 1.5)
        gap = float(logprobs[u] - tokens.reference_logprobs[u])
        expected += float(tokens.weight[u]) * (-behaviour * gain + 0.2 * gap**2 - 0.7 * float(entropies[u]))
    assert float(grpo.loss(logprobs, entropies, tokens, settings, entropy_bonus=0.7)) == pytest.approx(expected)


def test_clipped_tokens_are_those_without_gradient():
    settings, tokens = RlvrConfig(clip_low=0.2, clip_high=0.3), _tokens()
    logprobs = (tokens.old_logprobs + torch.tensor([0.5, -0.5, 0.1, 0.5, -0.5, 0.0])).requires_grad_()
    grpo.loss(logprobs, None, tokens, settings, entropy_bonus=0.0).backward()
    assert logprobs.grad is not None
    clipped = grpo.is_clipped(logprobs, tokens, settings)
    assert clipped.tolist() == [True, True, False, False, False, False]
    assert (logprobs.grad == 0).tolist() == clipped.tolist()
    free = RlvrConfig(clip_low=0.0, clip_high=0.0)
    assert not grpo.is_clipped(logprobs, tokens, free).any()


def test_the_kl_term_has_the_gradient_of_the_kl():
    """Summed over the policy's own law, for a law of four tokens."""
    logits = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.4, -0.2, 1.0], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    zero = torch.zeros(4, dtype=torch.float64)
    tokens = Tokens(logprobs.detach(), logprobs.detach(), reference, zero, logprobs.detach().exp())
    estimate = grpo.loss(logprobs, None, tokens, RlvrConfig(reference_kl=1.0), entropy_bonus=0.0)
    (found,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    assert found.tolist() == pytest.approx(exact.tolist())
    k3 = (logprobs.exp() * grpo.kl_estimate(logprobs, reference)).sum()
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    assert k3.item() == pytest.approx(kl.item())


def _answers(*ids: int, cut: int = -1) -> list[Answer]:
    return [Answer("t", (0,), [token], [-1.0], [0], ended=number != cut) for number, token in enumerate(ids)]


def test_answers_without_a_verdict_are_no_samples():
    group = Group.of(_answers(5, 6, 7, 5), [1.0, None, 0.0, 1.0], RlvrConfig(advantage="group_mean"))
    assert group is not None
    assert [answer.answer_ids for answer in group.answers] == [[5], [7]]
    assert group.counts == [2, 1]
    assert group.advantages.tolist() == pytest.approx([1 / 3, -2 / 3])
    assert Group.of(_answers(5, 6), [1.0, None], RlvrConfig()) is None


def test_cut_answers_are_masked_or_judged():
    rewards = [1.0, 0.0, 0.0]
    masked = Group.of(_answers(5, 6, 7, cut=0), rewards, RlvrConfig(truncated="mask"))
    judged = Group.of(_answers(5, 6, 7, cut=0), rewards, RlvrConfig(truncated="judge"))
    assert masked is not None
    assert judged is not None
    assert (len(masked.answers), masked.teaches) == (2, False)
    assert (len(judged.answers), judged.teaches) == (3, True)
