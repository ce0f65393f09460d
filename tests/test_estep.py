"""The E-step against plain Python: loss and metrics over every rollout, and no step where there is nothing to learn."""

import math
import random

import pytest
import torch

from megatron_ra3.batching import LatentBatch
from megatron_ra3.estep import EStep
from megatron_ra3.latents import LatentFormat, Snippet, Trajectory
from megatron_ra3.model import names, parallel
from megatron_ra3.presets import ObjectiveConfig
from tests.tiny_model import VOCABULARY, initialize, open_trainer, qwen2, random_folder

FORMAT = LatentFormat("newline", (0,), (1,), (), (2,), (2,), (1,), frozenset({1}), frozenset({0, 1}), frozenset({1}))
CONFIG = ObjectiveConfig(penalty=0.3, horizon=2, discount=0.5, format_penalty=2.0, max_importance_weight=1.5)


@pytest.fixture
def estep(tmp_path):
    layout = initialize(1, 1)
    trainer = open_trainer(random_folder(tmp_path / "model", qwen2()), qwen2(), layout)
    yield EStep(CONFIG, 1e-4, trainer, layout, FORMAT, micro_batch_tokens=120)
    parallel.destroy()


def _rollout(lines: tuple[tuple[int, ...], ...], seed: int) -> Trajectory:
    draw = random.Random(seed)
    trajectory = FORMAT.begin(Snippet("s", (0,), lines, (None,) * len(lines)))
    for line in lines:
        if draw.random() < 0.5:
            rationale = [draw.randrange(3, VOCABULARY) for _ in range(3)] + [1] * draw.randint(0, 1)
            FORMAT.append_think(trajectory, logprob=-draw.random())
            FORMAT.append_rationale(trajectory, rationale, line, logprobs=[-4 - draw.random() for _ in rationale])
        else:
            FORMAT.append_act(trajectory, line, logprob=-draw.random())
    return trajectory


def _groups() -> list[list[Trajectory]]:
    """Two groups of four rollouts, some of them drawn twice or three times."""
    draw = random.Random(0)
    lines = [tuple(tuple(draw.randrange(3, VOCABULARY) for _ in range(3)) for _ in range(4)) for _ in range(2)]
    return [[_rollout(lines[0], seed) for seed in (1, 2, 1, 1)], [_rollout(lines[1], seed) for seed in (3, 4, 5, 4)]]


def _score(estep: EStep, item: Trajectory) -> tuple[list[float], list[tuple[int, float, float]]]:
    """Rewards per line, and (line, policy log-prob, behaviour log-prob) of every decision of one rollout."""
    batch = LatentBatch([item], FORMAT, with_lines=True)
    scores = batch.read(estep.trainer.score([batch.micro_batch])[0])
    rewards = [
        float(scores.line[t]) / 3 - 0.3 * item.thought[t] - 2.0 * (not item.well_formed[t])
        for t in range(item.num_lines)
    ]
    policy = [*scores.gate.tolist(), *scores.rationale.tolist()]
    behaviour = [*batch.gate_behaviour.tolist(), *batch.rationale_behaviour.tolist()]
    return rewards, list(
        zip([*range(item.num_lines), *batch.line_of_rationale.tolist()], policy, behaviour, strict=True)
    )


def test_loss_and_metrics_equal_a_plain_walk_over_all_rollouts(estep):
    groups = _groups()
    loss, count, rewards_seen, gaps = 0.0, 0, [], []
    for group in groups:
        scored = [_score(estep, item) for item in group]
        returns = [[r + 0.5 * after for r, after in zip(rs, [*rs[1:], 0.0], strict=True)] for rs, _ in scored]
        for i, (rewards, decisions) in enumerate(scored):
            rewards_seen += rewards
            for line, policy, behaviour in decisions:
                others = [returns[j][line] for j in range(4) if j != i]
                advantage = returns[i][line] - sum(others) / 3
                loss -= advantage * min(math.exp(policy - behaviour), 1.5) * policy
                gaps.append(abs(policy - behaviour))
                count += 1
    metrics = estep.update(groups)
    assert metrics["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert metrics["reward"] == pytest.approx(sum(rewards_seen) / len(rewards_seen), rel=1e-6)
    assert metrics["mismatch"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    items = [item for group in groups for item in group]
    thinks = sum(sum(item.thought) for item in items)
    assert metrics["think_rate"] == pytest.approx(thinks / 32)
    assert metrics["rationale_tokens"] == pytest.approx(sum(sum(item.rationale_lengths()) for item in items) / thinks)
    assert metrics["grad_norm"] > 0


def test_rollouts_that_do_not_differ_leave_the_weights_alone(estep):
    before = {name: tensor.clone() for name, tensor in names.export_hf(estep.trainer.model)}
    estep.update(_groups())
    moved = {name: tensor.clone() for name, tensor in names.export_hf(estep.trainer.model)}
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    metrics = estep.update([[group[0]] * 4 for group in _groups()])
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    assert all(torch.equal(moved[name], tensor) for name, tensor in names.export_hf(estep.trainer.model))
