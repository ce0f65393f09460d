"""Scores read back from pairs equal a naive float64 walk over each trajectory, for both surface forms."""

import math
import random

import pytest
import torch

from megatron_ra3.batching import LatentBatch, TokenBatch, pack
from megatron_ra3.latents import Kind, LatentFormat, Snippet, Trajectory

VOCABULARY = 12
FORMATS = {
    "newline": LatentFormat(
        "newline", (0,), (1,), (), (2,), (2,), (1,), frozenset({1}), frozenset({0, 1}), frozenset({1})
    ),
    "special": LatentFormat(
        "special", (0,), (), (3,), (4,), (3, 4), (5,), frozenset({5}), frozenset({0, 1, 3, 4, 5}), frozenset({1, 5})
    ),
}


def _trajectory(latent_format: LatentFormat, seed: int) -> Trajectory:
    """Three lines: act, think with a sampled rationale that is cut by the cap, forced act."""
    draw = random.Random(seed)
    lines = tuple(tuple(draw.randrange(6, VOCABULARY) for _ in range(draw.randint(1, 4))) for _ in range(3))
    trajectory = latent_format.begin(Snippet(f"s{seed}", (0,), lines, (None, None, None)))
    latent_format.append_act(trajectory, lines[0], logprob=-0.25)
    latent_format.append_think(trajectory, logprob=-1.5)
    latent_format.append_rationale(trajectory, (7, 8, 6), lines[1], logprobs=(-1.0, -2.0, -3.0))
    latent_format.append_act(trajectory, lines[2])
    return trajectory


def _next_token_logprobs(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(length, VOCABULARY, generator=generator, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_gates_rationales_and_lines_equal_a_naive_walk(surface):
    latent_format = FORMATS[surface]
    items = [_trajectory(latent_format, seed) for seed in (1, 2)]
    batch = LatentBatch(items, latent_format, with_lines=True)
    width = batch.micro_batch.token_ids.shape[1]
    laws = torch.cat([_next_token_logprobs(width, seed) for seed in (1, 2)])
    scores = batch.read(laws[batch.micro_batch.rows, batch.micro_batch.targets])

    gates, lines, rationales = [], [], []
    for row, item in enumerate(items):
        law = laws[row * width : (row + 1) * width]
        for line, thought in enumerate(item.thought):
            at = [i for i, of_line in enumerate(item.line_index) if of_line == line]
            gate_end = max(i for i in at if item.kinds[i] == Kind.GATE)
            code = [i for i in at if item.kinds[i] == Kind.LINE]
            if surface == "newline":
                newline = at[0]
                think = law[newline, 2].item()
                act = math.log1p(-math.exp(think))
                not_hash = math.log1p(-math.exp(law[code[0] - 1, 2].item()))
            else:
                both = math.log(sum(math.exp(law[gate_end - 1, token].item()) for token in (3, 4)))
                act, think = law[gate_end - 1, 3].item() - both, law[gate_end - 1, 4].item() - both
                not_hash = 0.0
            gates.append(think if thought else act)
            lines.append(sum(law[i - 1, item.token_ids[i]].item() for i in code) - not_hash)
            rationales += [
                law[i - 1, item.token_ids[i]].item() for i in at if item.kinds[i] == Kind.RATIONALE and item.sampled[i]
            ]
    assert scores.gate.tolist() == pytest.approx(gates, abs=1e-12)
    assert scores.line.tolist() == pytest.approx(lines, abs=1e-12)
    assert scores.rationale.tolist() == pytest.approx(rationales, abs=1e-12)


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_behaviour_and_credit_follow_the_trajectory(surface):
    batch = LatentBatch([_trajectory(FORMATS[surface], 3)], FORMATS[surface], with_lines=False)
    assert batch.thought.tolist() == [False, True, False]
    assert batch.well_formed.tolist() == [True, False, True]
    assert batch.gate_sampled.tolist() == [True, True, False]
    assert batch.gate_behaviour.tolist() == [-0.25, -1.5, 0.0]
    assert batch.rationale_behaviour.tolist() == [-1.0, -2.0, -3.0]
    assert batch.line_of_rationale.tolist() == [1, 1, 1]
    assert batch.rationale_tokens.tolist() == [0, 4, 0]


def test_latents_alone_read_the_same_as_with_lines():
    latent_format = FORMATS["newline"]
    items = [_trajectory(latent_format, 4)]
    full, latents = (LatentBatch(items, latent_format, with_lines=flag) for flag in (True, False))
    law = _next_token_logprobs(full.micro_batch.token_ids.shape[1], 9)
    scores, only = (batch.read(law[batch.micro_batch.rows, batch.micro_batch.targets]) for batch in (full, latents))
    assert torch.equal(scores.gate, only.gate)
    assert torch.equal(scores.rationale, only.rationale)
    assert only.line is None


def test_next_token_batch_scores_everything_after_the_prompt_once():
    item = _trajectory(FORMATS["newline"], 5)
    batch = TokenBatch([item], FORMATS["newline"], latent_weight=0.25)
    assert batch.micro_batch.targets.tolist() == item.token_ids[1:]
    assert batch.micro_batch.rows.tolist() == list(range(len(item.token_ids) - 1))
    opens = [at for at in range(1, len(item.kinds)) if item.kinds[at] == Kind.GATE != item.kinds[at - 1]]
    assert len(opens) == 3
    code = [kind == Kind.LINE or at in opens for at, kind in enumerate(item.kinds)][1:]
    assert batch.is_code.tolist() == code
    assert batch.weights.tolist() == [1.0 if flag else 0.25 for flag in code]


def test_special_gates_are_no_code():
    item = _trajectory(FORMATS["special"], 5)
    batch = TokenBatch([item], FORMATS["special"], latent_weight=0.0)
    assert batch.weights.tolist() == [float(kind == Kind.LINE) for kind in item.kinds[1:]]


def test_packing_keeps_the_budget_and_loses_nothing():
    lengths = [5, 90, 33, 33, 7, 120, 64]
    batches = pack(lengths, 128)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 128 for batch in batches)
    assert batches[0] == [5]
    assert pack([500], 128) == [[0]]
