"""Save, die, load, go on: the same bits as without the interruption."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ra3.model import names, parallel
from megatron_ra3.model.state import load_state, load_weights, stage_state
from tests.distributed import run_ranks
from tests.tiny_model import initialize, llama, open_trainer, qwen2, random_folder, train, weights

# (tp, pp, distributed optimizer)
LAYOUTS = {1: [(1, 1, False)], 2: [(2, 1, False), (1, 2, False), (1, 1, True), (1, 2, True)]}


def save_state(folder: Path, model: Any, optimizer: Any) -> None:
    staged = stage_state(folder, model, optimizer)
    staged.write()
    model.layout.barrier("all shares written")
    staged.commit()


def _draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002


def _name(tp: int, pp: int, distributed: bool) -> str:
    return f"tp{tp}pp{pp}{'distributed' if distributed else ''}"


def _uninterrupted(layouts: list[tuple[int, int, bool]], folder: Path, root: Path) -> list[dict[str, Any]]:
    found = []
    for tp, pp, distributed in layouts:
        layout = initialize(tp, pp)
        trainer = open_trainer(folder, qwen2(), layout, distributed=distributed)
        random.seed(layout.rank)
        torch.manual_seed(layout.rank)
        train(trainer, 2, range(3))
        save_state(root / _name(tp, pp, distributed), trainer.model, trainer.optimizer)
        curve = train(trainer, 2, range(3, 6))
        found.append({"curve": curve, "weights": weights(trainer), "draws": _draws()})
    parallel.destroy()
    return found


def _resumed(layouts: list[tuple[int, int, bool]], folder: Path, root: Path) -> list[dict[str, Any]]:
    found = []
    for tp, pp, distributed in layouts:
        trainer = open_trainer(folder, qwen2(), initialize(tp, pp), distributed=distributed)
        load_state(root / _name(tp, pp, distributed), trainer.model, trainer.optimizer)
        curve = train(trainer, 2, range(3, 6))
        found.append({"curve": curve, "weights": weights(trainer), "draws": _draws()})
    parallel.destroy()
    return found


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_resume_is_bitwise_in_fresh_processes(world_size, tmp_path):
    folder = random_folder(tmp_path / "model", qwen2())
    names.init_hf(tmp_path / "other", qwen2(), 99)  # the second run starts from other weights, so all must be loaded
    arguments = (LAYOUTS[world_size], folder, tmp_path)
    straight = run_ranks(_uninterrupted, 2, *arguments) if world_size == 2 else [_uninterrupted(*arguments)]
    resumed = run_ranks(_resumed, world_size, LAYOUTS[world_size], tmp_path / "other", tmp_path)
    for rank in range(world_size):
        for layout, one, two in zip(LAYOUTS[world_size], straight[rank], resumed[rank], strict=True):
            assert one["curve"] == two["curve"], layout
            assert one["draws"] == two["draws"], layout
            assert all(torch.equal(tensor, two["weights"][name]) for name, tensor in one["weights"].items()), layout
    assert len({tuple(rank[0]["draws"]) for rank in straight}) == world_size


def _saved_by_two(models: dict[str, dict[str, Any]], root: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    found: dict[str, list[dict[str, torch.Tensor]]] = {family: [] for family in models}
    for family, config in models.items():
        for tp, pp, distributed in LAYOUTS[2]:
            trainer = open_trainer(root / family, config, initialize(tp, pp), distributed=distributed)
            train(trainer, 2, range(1))
            save_state(root / f"{family}-{_name(tp, pp, distributed)}", trainer.model, trainer.optimizer)
            found[family].append(weights(trainer))
    parallel.destroy()
    return found


def test_one_process_loads_the_weights_of_any_layout(tmp_path):
    """Embeddings tied and untied; two tensor-parallel ranks pad the 321 tokens to 322."""
    models = {"qwen2": qwen2(), "llama": llama()}
    for family, config in models.items():
        random_folder(tmp_path / family, config)
        names.init_hf(tmp_path / f"other-{family}", config, 99)
    saved, _ = run_ranks(_saved_by_two, 2, models, tmp_path)
    for family, config in models.items():
        trainer = open_trainer(tmp_path / f"other-{family}", config, initialize())
        assert trainer.model.padded_vocab_size == 321
        for layout, expected in zip(LAYOUTS[2], saved[family], strict=True):
            load_weights(tmp_path / f"{family}-{_name(*layout)}", trainer.model)
            loaded = weights(trainer)
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items()), (family, layout)


# By kind of optimizer, which a run keeps: the layouts of two ranks that save and load.
RESHARDED = {False: [(2, 1), (1, 2), (1, 1)], True: [(1, 1), (2, 1), (1, 2)]}
MODELS = {"qwen2": qwen2(), "llama": llama()}  # embeddings tied and untied


def _curves(root: Path, distributed: bool, source: str) -> dict[tuple[str, str], Any]:
    """Losses and gradient norms of three steps after loading `source`; without it, after three steps and a save."""
    curves: dict[tuple[str, str], Any] = {}
    for family, config in MODELS.items():
        for tp, pp in RESHARDED[distributed]:
            name = _name(tp, pp, distributed)
            folder = root / (f"other-{family}" if source else family)
            trainer = open_trainer(folder, config, initialize(tp, pp), distributed=distributed)
            if source:
                load_state(root / f"{family}-{source}", trainer.model, trainer.optimizer, generators=False)
            else:
                train(trainer, 2, range(3))
                save_state(root / f"{family}-{name}", trainer.model, trainer.optimizer)
            curves[family, name] = train(trainer, 2, range(3, 6))
    parallel.destroy()
    return curves


@pytest.mark.parametrize("distributed", RESHARDED)
def test_training_goes_on_in_another_layout(distributed, tmp_path):
    for family, config in MODELS.items():
        random_folder(tmp_path / family, config)
        names.init_hf(tmp_path / f"other-{family}", config, 99)
    saved, _ = run_ranks(_curves, 2, tmp_path, distributed, "")
    for (family, name), expected in saved.items():
        trainer = open_trainer(tmp_path / f"other-{family}", MODELS[family], initialize(), distributed=distributed)
        load_state(tmp_path / f"{family}-{name}", trainer.model, trainer.optimizer, generators=False)
        assert np.allclose(train(trainer, 2, range(3, 6)), expected, rtol=1e-4), (family, name)
    save_state(tmp_path / "llama-single", trainer.model, trainer.optimizer)
    after = train(trainer, 2, range(3, 6))
    (tmp_path / "qwen2-single").symlink_to(tmp_path / f"qwen2-{_name(2, 1, distributed)}")
    moved, _ = run_ranks(_curves, 2, tmp_path, distributed, "single")
    for (family, name), found in moved.items():
        assert np.allclose(found, after if family == "llama" else saved[family, name], rtol=1e-4), (family, name)


def test_weights_of_another_model_are_refused(tmp_path):
    trainer = open_trainer(random_folder(tmp_path / "model", qwen2()), qwen2(), initialize())
    save_state(tmp_path / "state", trainer.model, trainer.optimizer)
    wider = open_trainer(
        random_folder(tmp_path / "wider", qwen2(hidden_size=128)), qwen2(hidden_size=128), initialize()
    )
    with pytest.raises(ValueError, match=r"state cannot be loaded: .*shape mismatch.* written by another model"):
        load_weights(tmp_path / "state", wider.model)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    folder = random_folder(tmp_path / "model", qwen2())
    trainer = open_trainer(folder, qwen2(), initialize())
    with pytest.raises(FileNotFoundError, match="holds no complete training state"):
        load_state(folder, trainer.model, trainer.optimizer)
    with pytest.raises(FileExistsError, match="is not empty: remove it"):
        save_state(folder, trainer.model, trainer.optimizer)


def test_state_before_the_first_step_can_be_saved(tmp_path):
    """torch's AdamW fails here: it has no step count yet."""
    folder = random_folder(tmp_path / "model", qwen2())
    for distributed in (False, True):
        trainer = open_trainer(folder, qwen2(), initialize(), distributed=distributed)
        save_state(tmp_path / str(distributed), trainer.model, trainer.optimizer)
        expected = train(trainer, 1, range(1))
        fresh = open_trainer(folder, qwen2(), initialize(), distributed=distributed)
        train(fresh, 1, range(5, 7))
        load_state(tmp_path / str(distributed), fresh.model, fresh.optimizer)
        assert train(fresh, 1, range(1)) == expected
