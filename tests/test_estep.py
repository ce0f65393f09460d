"""The E-step against plain Python: loss and metrics over every rollout, and no step where there is nothing to learn.

The plain walk reads a table of log-probs of all tokens, one rollout at a time, and shares no code with the batches.
"""

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ra3.corpus.actions import regroup
from megatron_ra3.credit import Rollouts
from megatron_ra3.estep import EStep
from megatron_ra3.latents import Kind, LatentFormat, Snippet, Surface, Trajectory
from megatron_ra3.model import names, parallel
from megatron_ra3.model.reference import Reference
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.presets import ObjectiveConfig
from tests.tiny_model import VOCABULARY, initialize, open_trainer, qwen2, random_folder, weights

FORMATS: dict[Surface, LatentFormat] = {
    "newline": LatentFormat(
        "newline", (0,), (1,), (), (2,), (2,), (1,), frozenset({1}), frozenset({0, 1}), frozenset({1})
    ),
    "special": LatentFormat(
        *("special", (0,), (), (3,), (4,), (3, 4), (5,)),
        *(frozenset({5}), frozenset({0, 1, 3, 4, 5}), frozenset({1, 5})),
    ),
}
FIRST_WORD = 6
CONFIG = ObjectiveConfig(penalty=0.3, horizon=2, discount=0.5, format_penalty=2.0, max_importance_weight=1.5)
OPTIONS: dict[str, dict[str, Any]] = {
    "penalty": {},
    "counterfactual, mask": {"baseline": "counterfactual", "importance_weight": "mask"},
    "both, reference, clip": {"baseline": "both", "reference_kl": 0.3, "ppo_clip": 0.2},
    "lines learn": {"line_gradient": 0.7},
    "sticky, sum": {"latent_cost": "sticky_kl", "stickiness": 0.8, "line_reward": "sum"},
    "everything": {
        "latent_cost": "sticky_kl",
        "stickiness": 0.8,
        "baseline": "both",
        "reference_kl": 0.3,
        "ppo_clip": 0.2,
        "gate_entropy_floor": 0.5,
        "gate_entropy_weight": 0.7,
        "gate_exploration": 0.1,
        "line_gradient": 1.0,
    },
}


@dataclass
class World:
    """A tiny model, and another one, in `folder`, as the reference; `walks` are kept per surface."""

    trainer: Trainer
    other: Trainer
    layout: parallel.ParallelLayout
    folder: Path
    walks: dict[Surface, list[list[list["Line"]]]] = dataclasses.field(default_factory=dict)

    def estep(self, settings: ObjectiveConfig, surface: Surface = "newline", learning_rate: float = 0.0) -> EStep:
        """By default one that leaves the weights as they are."""
        reference = Reference(self.trainer, self.folder)
        return EStep(settings, learning_rate, self.trainer, self.layout, FORMATS[surface], 120, reference)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("estep")
    layout = initialize(1, 1)
    trainer = open_trainer(random_folder(folder / "model", qwen2()), qwen2(), layout)
    names.init_hf(folder / "other", qwen2(), 7)
    other = open_trainer(folder / "other", qwen2(), layout)
    yield World(trainer, other, layout, folder / "other")
    parallel.destroy()


@pytest.fixture
def world(opened: World) -> Iterator[World]:
    yield opened
    names.import_hf(opened.trainer.model, opened.folder.with_name("model"))


def _rollout(fmt: LatentFormat, lines: Sequence[Sequence[int]], seed: int, *, gate: str = "sampled") -> Trajectory:
    draw = random.Random(seed)
    trajectory = fmt.begin(Snippet("s", (0,), tuple(map(tuple, lines)), (None,) * len(lines)))
    for line in lines:
        logprob = -draw.random() if gate == "sampled" else None
        if draw.random() < 0.5 or gate == "always":
            closing = list(fmt.close) * draw.randint(0, 1)
            rationale = [draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(3)] + closing
            fmt.append_think(trajectory, logprob=logprob)
            fmt.append_rationale(trajectory, rationale, line, logprobs=[-4 - draw.random() for _ in rationale])
        else:
            fmt.append_act(trajectory, line, logprob=logprob)
    return trajectory


def _lines(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(3)] for _ in range(4)]


def _groups(fmt: LatentFormat) -> list[list[Trajectory]]:
    """Two groups of four rollouts, some of them drawn twice or three times."""
    drawn = ((_lines(0), (1, 2, 1, 1)), (_lines(1), (3, 4, 5, 4)))
    return [[_rollout(fmt, lines, seed) for seed in seeds] for lines, seeds in drawn]


# --- the plain walk


def _table(trainer: Trainer, tokens: Sequence[int]) -> Tensor:
    """log p(. | tokens up to here), [s, vocabulary]."""
    logits = trainer.logits(torch.tensor([list(tokens)]), torch.arange(len(tokens)))
    return torch.log_softmax(logits.double(), -1)


@dataclass
class Line:
    """What a plain walk reads off one line: log-probs of the gate's think and act, of the line, and its decisions."""

    think: float = 0.0
    act: float = 0.0
    logprob: float = 0.0
    acted: float = 0.0
    """Log-prob of the line had its own latent been `<act>`."""
    gap: float = 0.0
    tokens: int = 0
    gate_sampled: bool = False
    decisions: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """Policy and behaviour log-prob."""

    @property
    def gate_kl(self) -> float:
        rho, keep = math.exp(self.think), math.exp(self.act)
        return rho * (self.think - math.log(0.2)) + keep * (self.act - math.log(0.8)) if self.gate_sampled else 0.0

    @property
    def entropy(self) -> float:
        return -(math.exp(self.think) * self.think + math.exp(self.act) * self.act)


def _line_logprob(fmt: LatentFormat, table: Tensor, tokens: Sequence[int], first: int, count: int) -> float:
    """Of `count` tokens from position `first`; the newline form conditions on not starting with the hash."""
    total = sum(float(table[p - 1, tokens[p]]) for p in range(first, first + count))
    if fmt.surface == "newline":
        total -= math.log1p(-math.exp(float(table[first - 1, fmt.think_suffix[0]])))
    return total


def _walk(world: World, fmt: LatentFormat, item: Trajectory) -> list[Line]:
    tokens = item.token_ids
    table, reference = _table(world.trainer, tokens), _table(world.other, tokens)
    lines = []
    for index in range(item.num_lines):
        own = [p for p, (kind, at) in enumerate(zip(item.kinds, item.line_index, strict=True)) if at == index]
        gate = [p for p in own if item.kinds[p] == Kind.GATE]
        code = [p for p in own if item.kinds[p] == Kind.LINE]
        line = Line(tokens=len(code), gate_sampled=item.sampled[gate[-1]])
        if fmt.surface == "newline":
            line.think = float(table[gate[0], 2])
            line.act = math.log1p(-math.exp(line.think))
        else:
            both = torch.log_softmax(table[gate[0] - 1, [4, 3]], -1)
            line.think, line.act = both.tolist()
        if line.gate_sampled:
            chosen = line.think if item.thought[index] else line.act
            line.decisions.append((chosen, item.engine_logprobs[gate[-1]]))
        for p in own:
            if item.kinds[p] == Kind.RATIONALE and item.sampled[p]:
                policy = float(table[p - 1, tokens[p]])
                line.decisions.append((policy, item.engine_logprobs[p]))
                line.gap += policy - float(reference[p - 1, tokens[p]])
        line.logprob = _line_logprob(fmt, table, tokens, code[0], len(code))
        text = [tokens[p] for p in code]
        plain = [*tokens[: gate[0]], *([1] if fmt.surface == "newline" else [3]), *text]
        line.acted = _line_logprob(fmt, _table(world.trainer, plain), plain, len(plain) - len(text), len(text))
        lines.append(line)
    return lines


def _rewards(item: Trajectory, lines: Sequence[Line], settings: ObjectiveConfig) -> list[float]:
    rewards = []
    for line, thought, well_formed in zip(lines, item.thought, item.well_formed, strict=True):
        value = line.logprob / (line.tokens if settings.line_reward == "mean" else 1)
        value -= 2.0 * (not well_formed)
        if settings.latent_cost == "sticky_kl":
            value -= line.gate_kl + (1 + settings.reference_kl) * line.gap
        else:
            value -= settings.penalty * thought + settings.reference_kl * line.gap
        rewards.append(value)
    return rewards


def _weighted(policy: float, behaviour: float, advantage: float, settings: ObjectiveConfig) -> float:
    """What a decision brings to -N times the loss."""
    ratio = math.exp(policy - behaviour)
    if settings.ppo_clip:
        return min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    if settings.importance_weight == "mask":
        return advantage * policy * (ratio if 1 / 1.5 <= ratio <= 1.5 else 0.0)
    return advantage * policy * min(ratio, 1.5)


def _expected_loss(
    groups: Sequence[Sequence[Trajectory]], walked: Sequence[Sequence[list[Line]]], settings: ObjectiveConfig
) -> float:
    brought, gate_kl, below_floor, decisions, gates = 0.0, 0.0, 0.0, 0, 0
    for group, walks in zip(groups, walked, strict=True):
        returns = []
        for item, lines in zip(group, walks, strict=True):
            rewards = _rewards(item, lines, settings)
            found = [r + 0.5 * after for r, after in zip(rewards, [*rewards[1:], 0.0], strict=True)]
            if settings.baseline != "group":
                per = [line.tokens if settings.line_reward == "mean" else 1 for line in lines]
                found = [r - line.acted / n for r, line, n in zip(found, lines, per, strict=True)]
            returns.append(found)
        for i, lines in enumerate(walks):
            for t, line in enumerate(lines):
                others = [returns[j][t] for j in range(len(group)) if j != i]
                advantage = returns[i][t]
                if settings.baseline != "counterfactual":
                    advantage -= sum(others) / len(others)
                brought += sum(_weighted(*pair, advantage, settings) for pair in line.decisions)
                per = line.tokens if settings.line_reward == "mean" else 1
                brought += settings.line_gradient * line.logprob / per
                decisions += len(line.decisions)
                gate_kl += line.gate_kl
                gates += line.gate_sampled
                below_floor += max(0.0, settings.gate_entropy_floor - line.entropy) * line.gate_sampled
    loss = -brought / decisions
    if settings.latent_cost == "sticky_kl":
        loss += gate_kl / (1 - settings.gate_exploration) / decisions
    if settings.gate_entropy_floor:
        loss += settings.gate_entropy_weight * below_floor / gates
    return loss


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("surface", FORMATS)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_metrics_equal_a_plain_walk_over_all_rollouts(world, name, surface):
    settings = dataclasses.replace(CONFIG, **OPTIONS[name])
    fmt = FORMATS[surface]
    groups = _groups(fmt)
    if surface not in world.walks:
        world.walks[surface] = [[_walk(world, fmt, item) for item in group] for group in groups]
    walked = world.walks[surface]
    items = [item for group in groups for item in group]
    lines = [line for walks in walked for walk in walks for line in walk]
    rewards = []
    for item, walk in zip(items, [walk for walks in walked for walk in walks], strict=True):
        rewards += _rewards(item, walk, settings)
    estep = world.estep(settings, surface)
    before = weights(world.trainer)

    held_out = estep.evaluate(items)
    assert held_out["objective"] == pytest.approx(_mean(rewards), rel=1e-5)
    bound = [line.logprob - (line.gate_kl if settings.stickiness == 0.8 else _sticky(line)) for line in lines]
    tokens = sum(item.kinds.count(Kind.LINE) for item in items)
    assert held_out["elbo"] == pytest.approx(sum(bound) / tokens, rel=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(world.trainer).items())

    metrics = estep.update(groups)
    assert metrics["loss"] == pytest.approx(_expected_loss(groups, walked, settings), rel=1e-5)
    assert metrics["grad_norm"] > 0
    assert metrics["reward"] == pytest.approx(_mean(rewards), rel=1e-5)
    if not settings.gate_exploration:
        gaps = [abs(policy - behaviour) for line in lines for policy, behaviour in line.decisions]
        assert metrics["mismatch"] == pytest.approx(_mean(gaps), rel=1e-5)
    thinks = sum(sum(item.thought) for item in items)
    assert metrics["think_rate"] == pytest.approx(thinks / 32)
    assert metrics["rationale_tokens"] == pytest.approx(sum(sum(item.rationale_lengths()) for item in items) / thinks)
    assert metrics["gate_entropy"] == pytest.approx(_mean([line.entropy for line in lines]), rel=1e-5)
    if settings.needs_reference:
        assert metrics["reference_kl"] == pytest.approx(sum(line.gap for line in lines) / thinks, rel=1e-5)


def _sticky(line: Line) -> float:
    """KL of a gate to the default prior, alpha' = 0.9."""
    rho, keep = math.exp(line.think), math.exp(line.act)
    return rho * (line.think - math.log(0.1)) + keep * (line.act - math.log(0.9))


def test_rollouts_that_do_not_differ_leave_the_weights_alone(world):
    estep, groups = world.estep(CONFIG, learning_rate=1e-4), _groups(FORMATS["newline"])
    before = weights(world.trainer)
    estep.update(groups)
    moved = weights(world.trainer)
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    metrics = estep.update([[group[0]] * 4 for group in groups])
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    assert all(torch.equal(moved[name], tensor) for name, tensor in weights(world.trainer).items())


def test_equal_rollouts_of_different_weights_are_rewarded_alike(world):
    """To the last bit: else what is left of rounding would pass for an advantage."""
    fmt = FORMATS["newline"]
    one, other = (_rollout(fmt, _lines(0), 1) for _ in range(2))
    other.weight_versions = [version + 1 for version in other.weight_versions]
    rollouts = Rollouts.of([[one, other, one]])
    assert (len(rollouts.items), rollouts.counts, rollouts.groups) == (2, [2, 1], [[0, 1, 0]])
    rewards = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    for advantage in rollouts.advantages([rewards, rewards + 1e-6], None, CONFIG):
        assert not advantage.any()


@pytest.mark.parametrize("baseline", ["group", "counterfactual", "both"])
def test_a_replica_without_snippets_takes_its_part(world, baseline):
    """It may have been dealt snippets that are all too long; the others wait for it in every collective."""
    metrics = world.estep(dataclasses.replace(CONFIG, baseline=baseline)).update([])
    assert (metrics["loss"], metrics["think_rate"], metrics["effective_samples"]) == (0.0, 0.0, 1.0)


def test_no_sample_is_effective_where_the_mask_drops_all(world):
    groups = _groups(FORMATS["newline"])
    settings = dataclasses.replace(CONFIG, importance_weight="mask", max_importance_weight=1.0 + 1e-12)
    metrics = world.estep(settings).update(groups)
    assert (metrics["importance_weight"], metrics["effective_samples"]) == (0.0, 0.0)


def test_gates_learn_their_own_law_and_lines_what_they_are_even_where_rollouts_do_not_differ(world):
    """Sticky KL, entropy floor and the reward's own gradient need no contrast between rollouts."""
    same = [[group[0]] * 4 for group in _groups(FORMATS["newline"])]
    for changes in ({"latent_cost": "sticky_kl"}, {"gate_entropy_floor": 0.6}, {"line_gradient": 1.0}):
        before = weights(world.trainer)
        metrics = world.estep(dataclasses.replace(CONFIG, **changes), learning_rate=1e-4).update(same)
        assert metrics["loss"] > 0
        assert any(not torch.equal(before[name], tensor) for name, tensor in weights(world.trainer).items())


@pytest.mark.parametrize("surface", FORMATS)
def test_a_gate_that_was_told_pays_nothing_for_its_law(world, surface):
    fmt = FORMATS[surface]
    settings = dataclasses.replace(CONFIG, **OPTIONS["sticky, sum"], gate="always")
    group = [_rollout(fmt, _lines(0), seed, gate="always") for seed in (1, 2, 3)]
    walked = [_walk(world, fmt, item) for item in group]
    estep = world.estep(settings, surface)
    held_out = estep.evaluate(group)
    tokens = sum(item.kinds.count(Kind.LINE) for item in group)
    assert held_out["elbo"] == pytest.approx(sum(line.logprob for walk in walked for line in walk) / tokens, rel=1e-5)
    metrics = estep.update([group])
    assert metrics["loss"] == pytest.approx(_expected_loss([group], [walked], settings), rel=1e-5)
    assert metrics["gate_kl"] == 0.0


@pytest.mark.parametrize("surface", FORMATS)
def test_one_rationale_for_a_snippet_is_brite(world, surface):
    """`snippet` merged from lines, and a single line of the same tokens under ra3 with c = 0: one and the same loss."""
    fmt = FORMATS[surface]
    lines = _lines(0)
    merged = regroup(
        Snippet("s", (0,), tuple(map(tuple, lines)), (None,) * 4), ["a", "b", "c", "d"], "snippet", fmt
    ).lines
    glued = [token for line in lines for token in (*fmt.gate_prefix, *line)][len(fmt.gate_prefix) :]
    brite = ObjectiveConfig.of("brite", format_penalty=2.0, max_importance_weight=1.5)
    single = dataclasses.replace(CONFIG, penalty=0.0, gate="always", line_reward="sum", reference_kl=1.0)
    found = []
    for actions, settings in ((merged, brite), ([glued], dataclasses.replace(single, horizon=1)), ([glued], single)):
        group = [_rollout(fmt, actions, seed, gate="always") for seed in (1, 2, 3)]
        walked = [[_walk(world, fmt, item) for item in group]]
        metrics = world.estep(settings, surface).update([group])
        assert metrics["loss"] == pytest.approx(_expected_loss([group], walked, settings), rel=1e-5)
        found.append((metrics["loss"], metrics["grad_norm"], metrics["reward"], metrics["think_rate"]))
    assert found[0] == found[1] == found[2]
    assert found[0][3] == 1.0


def test_rlp_advantage_is_what_a_rationale_adds_to_the_log_prob_of_its_token(world):
    fmt = FORMATS["special"]
    tokens = [[token] for line in _lines(0) for token in line][:5]
    group = [_rollout(fmt, tokens, seed, gate="always") for seed in (1, 2)]
    lines = [line for item in group for line in _walk(world, fmt, item)]
    settings = ObjectiveConfig.of("rlp", format_penalty=0.0)
    metrics = world.estep(settings, "special").update([group])
    gain = _mean([line.logprob - line.acted for line in lines])
    assert metrics["advantage_think"] == pytest.approx(gain, rel=1e-4)
    assert metrics["gain_per_think"] == pytest.approx(gain, rel=1e-4)
