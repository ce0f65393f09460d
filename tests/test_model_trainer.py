"""The trainer gives the same numbers however the work is split, and scores what it says it scores."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import build_model
from megatron_ra3.model.trainer import MicroBatch, Trainer, build_optimizer
from tests.distributed import run_ranks
from tests.tiny_model import (
    VOCABULARY,
    initialize,
    llama,
    next_token_batch,
    open_trainer,
    qwen2,
    random_folder,
    sequences,
    share,
    train,
    weights,
)

# tied Qwen2: the embedding's gradient crosses pipeline stages. (tp, pp, micro-batches over all replicas, distributed)
SPLITS = {
    1: [(1, 1, 1, False), (1, 1, 4, False), (1, 1, 2, True)],
    2: [(2, 1, 2, False), (1, 2, 1, False), (1, 2, 4, True), (1, 1, 2, False), (1, 1, 3, True)],
    4: [(2, 2, 2, False), (2, 1, 2, True), (1, 2, 4, True)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("trainer") / "model", qwen2())


def _train_all(splits: list[tuple[int, int, int, bool]], folder: Path) -> list[dict[str, Any]]:
    found = []
    for tp, pp, parts, distributed in splits:
        trainer = open_trainer(folder, qwen2(), initialize(tp, pp), distributed=distributed)
        before = trainer.score([next_token_batch(sequences(3))])[0]
        curve = train(trainer, parts, range(5))
        found.append({"before": before, "curve": curve, "weights": weights(trainer)})
    parallel.destroy()
    return found


def test_training_does_not_depend_on_the_split(folder):
    reference = _train_all(SPLITS[1][:1], folder)[0]
    assert min(norm for _, norm in reference["curve"]) > 1.0, "clipping must be at work"
    original = load_file(folder / "model.safetensors")
    assert all((tensor - original[name]).abs().max() > 3e-3 for name, tensor in reference["weights"].items())
    runs = [(split, run) for split, run in zip(SPLITS[1][1:], _train_all(SPLITS[1][1:], folder), strict=True)]
    for world_size in (2, 4):
        for rank in run_ranks(_train_all, world_size, SPLITS[world_size], folder):
            runs += zip(SPLITS[world_size], rank, strict=True)
    for split, run in runs:
        torch.testing.assert_close(run["before"], reference["before"], rtol=1e-5, atol=0)
        assert run["curve"] == [pytest.approx(step, rel=1e-5) for step in reference["curve"]], split
        for name, tensor in reference["weights"].items():
            assert run["weights"][name].norm().item() == pytest.approx(tensor.norm().item(), rel=1e-5), (split, name)
            torch.testing.assert_close(run["weights"][name], tensor, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def trainer(folder) -> Trainer:
    return open_trainer(folder, qwen2(), initialize())


def test_score_is_log_softmax_of_the_logits(trainer):
    batches = [next_token_batch(sequences(3, seed=1)), next_token_batch(sequences(2, seed=2))]
    for batch, scores in zip(batches, trainer.score(batches), strict=True):
        logits = trainer.logits(batch.token_ids, batch.rows)
        expected = logits.double().log_softmax(dim=1).gather(1, batch.targets[:, None]).squeeze(1)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)


def test_padding_and_neighbours_do_not_change_a_score(trainer):
    short, long = sequences(2, seed=3)[0][:6], sequences(2, seed=3)[1]
    alone = trainer.score([next_token_batch([short])])[0]
    together = trainer.score([next_token_batch([short, torch.cat([long, long])])])[0]
    torch.testing.assert_close(together[:5], alone, rtol=0, atol=1e-5)
    assert trainer.score([]) == []


def test_widening_moves_the_rows_with_their_tokens(trainer):
    tokens = torch.randint(VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(3))
    batch = MicroBatch(tokens, torch.tensor([0, 12, 13, 25, 38]), torch.tensor([1, 2, 3, 4, 5]))
    wide = batch.widened(8)
    assert wide.token_ids.shape == (3, 16)
    assert wide.rows.tolist() == [0, 12, 16, 28, 44]
    assert torch.allclose(trainer.score([wide])[0], trainer.score([batch])[0], atol=1e-6)


def test_rows_choose_what_is_scored(trainer):
    batch = next_token_batch(sequences(2, seed=4))
    everything = trainer.score([batch])[0]
    some = torch.tensor([7, 0, 3])
    chosen = trainer.score([MicroBatch(batch.token_ids, batch.rows[some], batch.targets[some])])[0]
    torch.testing.assert_close(chosen, everything[some], rtol=0, atol=1e-6)


def test_a_step_follows_its_loss_and_leaves_the_rest(folder):
    """The gradient of log p(target) raises that token's score; lr=0 with no decay changes nothing."""
    trainer = open_trainer(folder, qwen2(), initialize(), weight_decay=0.0)
    batch = next_token_batch(sequences(2, seed=5))
    before = trainer.score([batch])[0]
    result = trainer.step([batch], lambda _, logprobs: -logprobs[4] * 3.0, lr=0.0)
    assert result["loss"] == pytest.approx(-3.0 * before[4].item(), rel=1e-6)
    assert torch.equal(trainer.score([batch])[0], before)
    trainer.step([batch], lambda _, logprobs: -logprobs[4], lr=1e-3)
    assert trainer.score([batch])[0][4] > before[4] + 0.01


def test_gradient_of_a_step_is_autograd_of_transformers(folder):
    """With plain sums over two micro-batches: no hidden division by tokens, micro-batches or sequences."""
    from transformers import AutoModelForCausalLM

    trainer = open_trainer(folder, qwen2(), initialize(), clip_grad=0.0)
    batches = share(sequences(4, seed=6), 2, trainer.layout)
    result = trainer.step(batches, lambda index, logprobs: -(index + 1) * logprobs.sum(), lr=0.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, batch in enumerate(batches):
        logprobs = model(batch.token_ids).logits.flatten(0, 1)[batch.rows].log_softmax(dim=1)
        (-(index + 1) * logprobs.gather(1, batch.targets[:, None]).sum()).backward()
    norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()]).item()
    assert norm > 10
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-5)
    ours = dict(trainer.model.module.named_parameters())
    theirs = dict(model.named_parameters())
    for mine, hf in [
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("decoder.layers.1.mlp.linear_fc2.weight", "model.layers.1.mlp.down_proj.weight"),
    ]:
        expected: Tensor | None = theirs[hf].grad
        assert expected is not None
        torch.testing.assert_close(ours[mine].main_grad, expected, rtol=1e-4, atol=1e-4)


def test_fit_is_a_step_on_the_weighted_log_probs(folder):
    batches = [next_token_batch(sequences(3, seed=7)), next_token_batch(sequences(2, seed=8))]
    weights_of = [torch.rand(len(batch.rows), generator=torch.Generator().manual_seed(9)) for batch in batches]
    found = []
    for way in ("fit", "step"):
        trainer = open_trainer(folder, qwen2(), initialize())
        if way == "fit":
            result = trainer.fit(batches, weights_of, lr=1e-3)
        else:
            result = trainer.step(batches, lambda i, logprobs: -(weights_of[i] * logprobs).sum(), lr=1e-3)
        found.append((result, weights(trainer)))
    (result, after), (expected, expected_after) = found
    assert result == pytest.approx(expected, rel=1e-6)
    for name, tensor in expected_after.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=2e-5)


def test_norms_and_biases_are_not_decayed(folder):
    trainer = open_trainer(folder, qwen2(), initialize(), weight_decay=0.5, eps=1.0)
    before = weights(trainer)
    trainer.step([next_token_batch(sequences(1))], lambda _, logprobs: logprobs.sum() * 0.0, lr=0.1)
    for name, tensor in weights(trainer).items():
        factor = 1.0 if tensor.dim() == 1 else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(tensor, before[name] * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_loss_takes_no_step(folder, poison):
    trainer = open_trainer(folder, qwen2(), initialize())
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="weights are unchanged"):
        trainer.step([next_token_batch(sequences(2))], lambda _, logprobs: logprobs.sum() * poison, lr=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_a_target_outside_the_vocabulary_is_named(trainer):
    batch = next_token_batch(sequences(1))
    wrong = MicroBatch(batch.token_ids, batch.rows, batch.targets.clone().fill_(321))
    with pytest.raises(ValueError, match=r"target 321 is outside the vocabulary \[0, 321\)"):
        trainer.score([wrong])


def test_optimizer_and_model_must_agree_on_sharding(trainer):
    with pytest.raises(ValueError, match="distributed=True differs from build_model's distributed_optimizer"):
        build_optimizer(trainer.model, lr=1e-3, distributed=True)


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_trains_with_fp32_state(tmp_path, distributed):
    """Small updates survive although each is below bf16's spacing, because the optimizer owns fp32 weights."""
    folder = random_folder(tmp_path / "model", llama())
    model = build_model(llama(), initialize(), dtype=torch.bfloat16, distributed_optimizer=distributed)
    names.import_hf(model, folder)
    half = Trainer(model, build_optimizer(model, lr=1e-4, distributed=distributed), model.layout)
    full = open_trainer(folder, llama(), model.layout)
    batch = next_token_batch(sequences(4))
    torch.testing.assert_close(half.score([batch])[0], full.score([batch])[0], rtol=0, atol=0.1)
    losses = [half.step([batch], lambda _, logprobs: -logprobs.mean(), lr=1e-4)["loss"] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(half).values())


def test_only_rewards_are_scored_in_fp8_and_with_the_current_weights(folder):
    """The quantised head lives for one pass: after a step the next score sees the new weights."""
    layout = initialize(1, 1)
    exact = open_trainer(folder, qwen2(), layout)
    rough = Trainer(exact.model, exact.optimizer, layout, reward_precision="fp8_rescored", loss_precision="fp32")
    batch = next_token_batch(sequences(4))
    batch = dataclasses.replace(batch, rewarded=len(batch.rows) - 5)
    gaps, moved = [], []
    for step in range(3):
        true, found = exact.score([batch])[0], rough.score([batch])[0]
        assert torch.equal(true[:5], found[:5])
        gaps.append(float((true - found).abs().mean()))
        before = true
        train(rough, 2, range(step, step + 1))
        moved.append(float((exact.score([batch])[0] - before).abs().mean()))
    parallel.destroy()
    assert 0.0 < 5 * max(gaps) < min(moved)
