"""Five optimizer steps of every loss are the same number under every layout and micro-batch size."""

import random
from pathlib import Path

import pytest
import torch

from megatron_ra3.estep import EStep
from megatron_ra3.latents import LatentFormat, Snippet, Trajectory
from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import build_model
from megatron_ra3.model.reference import Reference
from megatron_ra3.model.trainer import Trainer, build_optimizer
from megatron_ra3.mstep import NextToken
from megatron_ra3.policy_step import Group, PolicyStep
from megatron_ra3.presets import ObjectiveConfig
from megatron_ra3.rlvr_config import RlvrConfig
from megatron_ra3.rollout.answers import Answer
from tests.distributed import run_ranks
from tests.small import MODEL

VOCABULARY = 64
FORMAT = LatentFormat("newline", (0,), (1,), (), (2,), (2,), (1,), frozenset({1}), frozenset({0, 1}), frozenset({1}))
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2)]}
GROUPS, ROLLOUTS, STEPS = 4, 3, 5
EVERYTHING = ObjectiveConfig(
    latent_cost="sticky_kl",
    stickiness=0.8,
    baseline="both",
    reference_kl=0.3,
    ppo_clip=0.2,
    gate_entropy_floor=0.5,
    line_reward="sum",
    line_gradient=0.5,
)
ESTEPS = {"estep": ObjectiveConfig(), "everything": EVERYTHING}
OBJECTIVES = [*ESTEPS, "next_token", "rlvr"]
RLVR = RlvrConfig(reference_kl=0.3, entropy_bonus=0.1, clip_high=0.3, overlong_tokens=4, max_answer_tokens=8)
RLVR_FIGURES = ["loss", "grad_norm", "entropy", "kl", "mismatch", "importance_weight"]
FIGURES = ["loss", "grad_norm", "reward", "mismatch", "advantage_think", "gain_per_think", "gate_kl", "reference_kl"]


def _groups(step: int) -> list[list[Trajectory]]:
    """Groups of rollouts with random latents, the same on every rank."""
    draw = random.Random(step)
    return [[_rollout(draw, lines) for _ in range(ROLLOUTS)] for lines in (_lines(draw) for _ in range(GROUPS))]


def _lines(draw: random.Random) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 5))) for _ in range(draw.randint(2, 6))
    )


def _rollout(draw: random.Random, lines: tuple[tuple[int, ...], ...]) -> Trajectory:
    trajectory = FORMAT.begin(Snippet("s", (0,), lines, (None,) * len(lines)))
    for line in lines:
        if draw.random() < 0.4:
            rationale = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 3))] + [1]
            FORMAT.append_think(trajectory, logprob=-1.0)
            FORMAT.append_rationale(trajectory, rationale, line, logprobs=[-3.0] * len(rationale))
        else:
            FORMAT.append_act(trajectory, line, logprob=-0.4)
    return trajectory


def _answers(step: int) -> list[Group]:
    """Groups of answers with random rewards, two of which are equal."""
    draw = random.Random(step)
    groups = []
    for _ in range(GROUPS):
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 6)))
        answers = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 8))] for _ in range(ROLLOUTS)]
        drawn = [
            Answer("t", prompt, ids, [-4.0] * len(ids), [0] * len(ids), ended=True) for ids in [*answers, answers[0]]
        ]
        rewards: list[float | None] = [1.0, 0.0, float(draw.random() < 0.5), 1.0]
        groups += [group for group in [Group.of(drawn, rewards, RLVR)] if group is not None]
    return groups


def _train(tp: int, pp: int, folder: Path, micro_batch_tokens: int, objective: str) -> list[list[list[float]]]:
    """Metrics per step; every rank returns the same."""
    layout = parallel.initialize(tp, pp, seed=0, timeout_s=60)
    model = build_model({**MODEL, "vocab_size": VOCABULARY}, layout, dtype=torch.float32)
    names.import_hf(model, folder)
    trainer = Trainer(model, build_optimizer(model, lr=0.0), layout)
    settings = ESTEPS.get(objective, EVERYTHING)
    reference = Reference(trainer, folder.with_name("reference"))
    estep = EStep(settings, 1e-4, trainer, layout, FORMAT, micro_batch_tokens, reference)
    next_token = NextToken(trainer, layout, FORMAT, micro_batch_tokens)
    policy = PolicyStep(RLVR, trainer, layout, micro_batch_tokens, reference)
    curve: list[list[float]] = []
    for step in range(STEPS):
        groups = _groups(step)[layout.dp_rank :: layout.dp_size]
        if objective in ESTEPS:
            metrics = estep.update(groups)
            figures = FIGURES if settings is EVERYTHING else FIGURES[:4]
            curve.append([metrics[name] for name in figures])
        elif objective == "rlvr":
            metrics = policy.update(_answers(step)[layout.dp_rank :: layout.dp_size], 1e-3)
            curve.append([metrics[name] for name in RLVR_FIGURES])
        else:
            flat = [item for group in groups for item in group]
            metrics = next_token.update(flat, latent_weight=0.5, lr=1e-2)
            curve.append([metrics["loss"], metrics["grad_norm"]])
    return curve


def _train_all(
    layouts: list[tuple[int, int]], folder: Path, sizes: list[int]
) -> dict[tuple[object, ...], list[list[float]]]:
    results = {
        (objective, layout, size): _train(*layout, folder, size, objective)
        for layout in layouts
        for size in sizes
        for objective in OBJECTIVES
    }
    parallel.destroy()
    return results


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, ...], list[list[float]]]:
    folder: Path = tmp_path_factory.mktemp("invariance") / "model"
    for seed, path in enumerate((folder, folder.with_name("reference"))):
        names.init_hf(path, {**MODEL, "vocab_size": VOCABULARY}, seed)
    sizes = {1: [100_000, 150, 40], 2: [150], 4: [150]}
    found: dict[tuple[object, ...], list[list[float]]] = {}
    for world_size, layouts in LAYOUTS.items():
        for result in run_ranks(_train_all, world_size, layouts, folder, sizes[world_size]):
            for (objective, layout, size), curve in result.items():
                key = (objective, (*layout, world_size // (layout[0] * layout[1])), size)
                assert found.setdefault(key, curve) == curve, f"ranks disagree about {key}"
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_do_not_depend_on_the_split(curves, objective):
    reference = torch.tensor(curves[objective, (1, 1, 1), 100_000])
    scale = reference.norm(dim=0)
    assert (scale > 0.01).all()
    if objective == "everything":  # a gain is the small difference of two values as large as rewards
        scale[FIGURES.index("gain_per_think")] = scale[FIGURES.index("reward")]
    others = {key: curve for key, curve in curves.items() if key[0] == objective}
    assert {key[1] for key in others} == {(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)}
    for key, curve in others.items():
        assert ((torch.tensor(curve) - reference).norm(dim=0) < 1e-5 * scale).all(), key
