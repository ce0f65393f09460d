"""The reference policy: always the initial weights, and never a trace of them left in the model."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ra3.model import names, parallel
from megatron_ra3.model.reference import Reference
from tests.tiny_model import initialize, next_token_batch, open_trainer, qwen2, random_folder, sequences, train, weights


@pytest.fixture(params=[False, True], ids=["replicated", "distributed"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple]:
    """A trainer, and the folder of other weights with their scores."""
    layout = initialize()
    names.init_hf(tmp_path / "other", qwen2(), 7)
    batch = next_token_batch(sequences(3))
    expected = open_trainer(tmp_path / "other", qwen2(), layout).score([batch])[0]
    folder = random_folder(tmp_path / "model", qwen2())
    trainer = open_trainer(folder, qwen2(), layout, distributed=request.param)
    yield trainer, tmp_path / "other", batch, expected
    parallel.destroy()


def _equal(before: dict, after: dict) -> bool:
    return all(torch.equal(before[name], after[name]) for name in before)


def test_scores_are_those_of_the_folder_whatever_is_trained_meanwhile(opened):
    trainer, folder, batch, expected = opened
    reference = Reference(trainer, folder)
    own = trainer.score([batch])[0]
    before = weights(trainer)
    assert torch.equal(reference.score([batch])[0], expected)
    assert (own - expected).abs().max() > 0.1
    assert _equal(before, weights(trainer))
    assert torch.equal(trainer.score([batch])[0], own)
    train(trainer, 1, range(2))
    trained = weights(trainer)
    assert not _equal(before, trained)
    shutil.rmtree(folder)  # read once, then kept
    assert torch.equal(reference.score([batch])[0], expected)
    assert _equal(trained, weights(trainer))


def test_training_goes_on_as_if_the_reference_had_not_been_asked(opened):
    trainer, folder, batch, _ = opened
    reference = Reference(trainer, folder)
    start = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    reference.score([batch])
    asked = train(trainer, 2, range(2))
    assert not _equal(start, weights(trainer))
    fresh = open_trainer(folder.parent / "model", qwen2(), trainer.layout)
    assert torch.allclose(torch.tensor(train(fresh, 2, range(2))), torch.tensor(asked), rtol=1e-6, atol=0)


def test_a_failure_while_scoring_leaves_the_weights_as_they_were(opened):
    trainer, folder, batch, _ = opened
    before = weights(trainer)
    batch.rows[0] = 10**6
    with pytest.raises(IndexError):
        Reference(trainer, folder).score([batch])
    assert _equal(before, weights(trainer))


def test_a_folder_that_is_gone_is_reported_and_leaves_the_weights_alone(opened):
    trainer, folder, batch, _ = opened
    before = weights(trainer)
    with pytest.raises(OSError, match="nowhere"):
        Reference(trainer, folder / "nowhere").score([batch])
    assert _equal(before, weights(trainer))
