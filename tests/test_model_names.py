"""Hugging Face folders in and out: transformers' logits, weights that return bit for bit, bad folders named."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import build_model
from megatron_ra3.model.geometry import Geometry
from megatron_ra3.model.weight_map import Slot, shard, unshard
from tests.distributed import run_ranks
from tests.tiny_model import VOCABULARY, initialize, llama, open_trainer, qwen2, random_folder, weights

CONFIGS = {
    "qwen2": qwen2(),
    "qwen2_untied": qwen2(tie_word_embeddings=False),
    "llama": llama(),
    "llama_old_keys": {key: value for key, value in llama(num_hidden_layers=2).items() if key != "rope_parameters"}
    | {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in llama()["rope_parameters"].items() if k != "rope_theta"}},
}
TOKENS = torch.randint(0, VOCABULARY, (3, 60), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: random_folder(root / name, config) for name, config in CONFIGS.items()}


def _logits_and_weights(
    layouts: list[tuple[int, int]], folders: dict[str, Path], out: Path | None
) -> dict[tuple[Any, ...], tuple[Tensor, dict[str, Tensor]]]:
    results = {}
    for tp, pp in layouts:
        layout = initialize(tp, pp)
        for name, folder in folders.items():
            trainer = open_trainer(folder, CONFIGS[name], layout)
            results[tp, pp, name] = (trainer.logits(TOKENS, torch.arange(TOKENS.numel())), weights(trainer))
            if out is not None:
                names.save_hf(trainer.model, out / name, CONFIGS[name], None)
                with pytest.raises(OSError, match="Not a directory"):  # only rank 0 writes, but all ranks learn of it
                    names.save_hf(trainer.model, out / name / "config.json" / "below", CONFIGS[name], None)
    parallel.destroy()
    return results


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> dict[tuple[Any, ...], tuple[Tensor, dict[str, Tensor]]]:
    found = _logits_and_weights([(1, 1)], folders, None)
    two = run_ranks(_logits_and_weights, 2, [(2, 1), (1, 2)], folders, None)
    out = tmp_path_factory.mktemp("export")
    four = run_ranks(_logits_and_weights, 4, [(2, 2)], folders, out)
    for rank in (*two, *four):
        for key, (logits, tensors) in rank.items():
            known = found.setdefault(key, (logits, tensors))
            assert torch.equal(known[0], logits), f"ranks disagree about the logits of {key}"
            assert all(torch.equal(known[1][name], tensor) for name, tensor in tensors.items())
    for name, folder in folders.items():
        assert load_file(out / name / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
        for tensor_name, tensor in load_file(out / name / "model.safetensors").items():
            assert torch.equal(tensor, load_file(folder / "model.safetensors")[tensor_name])
        config = json.loads((out / name / "config.json").read_text())
        assert config == {**CONFIGS[name], "dtype": "float32"}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, folders, results):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items() if key != "lm_head.weight"} == {
        key: shape for key, shape in names.metadata(CONFIGS[name]) if key != "lm_head.weight"
    }
    with torch.no_grad():
        theirs = model(TOKENS).logits.flatten(0, 1)
    assert theirs.std() > 0.3
    for tp, pp in [(1, 1), (2, 1), (1, 2), (2, 2)]:
        torch.testing.assert_close(results[tp, pp, name][0], theirs, rtol=0, atol=1e-4)


def test_rope_scaling_is_not_ignored(folders, results):
    """Without it the logits differ by far more than the tolerance above."""
    plain = {**CONFIGS["llama"], "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    trainer = open_trainer(folders["llama"], plain, initialize())
    logits = trainer.logits(TOKENS, torch.arange(TOKENS.numel()))
    assert (logits - results[1, 1, "llama"][0]).abs().max() > 0.05
    torch.testing.assert_close(results[1, 1, "llama"][0], results[1, 1, "llama_old_keys"][0], rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise(name, folders, results):
    original = load_file(folders[name] / "model.safetensors")
    for tp, pp in [(1, 1), (2, 1), (1, 2), (2, 2)]:
        exported = results[tp, pp, name][1]
        assert [(key, tuple(value.shape)) for key, value in exported.items()] == names.metadata(CONFIGS[name])
        assert all(torch.equal(exported[key], tensor) for key, tensor in original.items())


def test_qkv_rows_are_grouped_by_kv_head():
    geometry = Geometry.of(qwen2(hidden_size=4, num_attention_heads=4, num_key_value_heads=2, head_dim=1))
    slot = Slot(("x",), 0, ("q", "k", "v"), ((4,), (2,), (2,)), "qkv")
    full = [torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])]
    shards = [shard(slot, full, geometry, rank, 2, 4) for rank in (0, 1)]
    assert [part.tolist() for part in shards] == [[0, 1, 10, 20], [2, 3, 11, 21]]
    assert [part.tolist() for part in unshard(slot, shards, geometry)] == [part.tolist() for part in full]


def test_scratch_model_depends_on_the_seed_alone(tmp_path):
    for name, seed in [("a", 7), ("b", 7), ("c", 8)]:
        names.init_hf(tmp_path / name, qwen2(initializer_range=0.02), seed)
    first, same, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first["model.norm.weight"], torch.ones(64))
    assert torch.equal(first["model.layers.1.self_attn.k_proj.bias"], torch.zeros(32))


def test_large_models_are_split_into_files_with_an_index(tmp_path, monkeypatch, folders):
    monkeypatch.setattr(names, "MAX_FILE_BYTES", 100_000)
    trainer = open_trainer(folders["llama"], CONFIGS["llama"], initialize())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "notes.txt").write_text("not a tokenizer file")
    names.save_hf(trainer.model, tmp_path / "split", CONFIGS["llama"], tmp_path / "tokenizer")
    files = sorted(path.name for path in (tmp_path / "split").iterdir())
    parts = [name for name in files if name.startswith("model-")]
    assert len(parts) > 2
    assert set(files) == {*parts, "config.json", "model.safetensors.index.json", "tokenizer.json"}
    again = open_trainer(tmp_path / "split", CONFIGS["llama"], initialize())
    assert all(torch.equal(tensor, weights(trainer)[name]) for name, tensor in weights(again).items())
    with pytest.raises(FileExistsError, match="split exists"):
        names.save_hf(trainer.model, tmp_path / "split", CONFIGS["llama"], None)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """Make the system refuse to write more than 50 kB into a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, folders, small_files_only):
    trainer = open_trainer(folders["qwen2"], CONFIGS["qwen2"], initialize())
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors"):
        names.save_hf(trainer.model, tmp_path / "export", CONFIGS["qwen2"], None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox' is not supported: use one of llama, qwen2"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"vocab_size": None, "hidden_size": 0}, "the model config lacks hidden_size, vocab_size: each must be"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_type='llama3' lacks high_freq_factor, original_max_position_embeddings",
        ),
    ],
)
def test_unsupported_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(qwen2(**changes), initialize(), dtype=torch.float32)


def _edited(folder: Path, target: Path, edit: Any) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_bad_folders_are_named(folders, tmp_path):
    layout = initialize()
    model = build_model(CONFIGS["qwen2"], layout, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    missing = _edited(folders["qwen2"], tmp_path / "missing", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"missing lacks 1 tensors .* '{name}'"):
        names.import_hf(model, missing)
    shape = _edited(folders["qwen2"], tmp_path / "shape", lambda tensors: tensors.update({name: torch.zeros(96, 63)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(96, 63\), its config asks for \(96, 64\)"):
        names.import_hf(model, shape)
    extra = _edited(folders["qwen2"], tmp_path / "extra", lambda tensors: tensors.update(q_norm=torch.zeros(2)))
    with pytest.raises(ValueError, match="unknown to its config, first 'q_norm'"):
        names.import_hf(model, extra)
    with pytest.raises(FileNotFoundError, match="is it a Hugging Face model"):
        names.import_hf(model, tmp_path)
    torn = tmp_path / "torn"
    shutil.copytree(folders["qwen2"], torn)
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        names.import_hf(model, torn)
