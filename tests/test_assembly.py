"""What does not fit is found before anything trains, by name, and on every rank at once."""

import json
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_ra3.assembly import Assembly, assemble
from megatron_ra3.config import RunConfig
from megatron_ra3.corpus.tokenizer import tokenizer_fingerprint, train_tokenizer
from megatron_ra3.model import names, parallel
from tests.distributed import run_ranks
from tests.small import MODEL, make_config

LOOPBACK, EVERYWHERE = ("engine.kind=vllm",), ("engine.kind=vllm", "engine.host=0.0.0.0")


def _lacking(*keys: str) -> str:
    return json.dumps({key: value for key, value in MODEL.items() if key not in keys})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            _lacking("num_attention_heads", "rms_norm_eps"),
            r"config\.json: the model config lacks num_attention_heads, rms_norm_eps: each must be",
        ),
        (_lacking("max_position_embeddings"), r"config\.json: the model config lacks max_position_embeddings:"),
        (_lacking("model_type"), r"config\.json: model_type=None is not supported"),
        (
            '{"model_type": "qwen2",\n "hidden_size" 3}',
            r"config\.json: is not valid JSON: Expecting ':' delimiter: line 2 column 16",
        ),
        ("[1, 2]", r"config\.json: must be an object, got list"),
    ],
)
def test_a_bad_model_config_is_named_before_weights_are_drawn(small_corpus, tmp_path, text, message):
    config = make_config(small_corpus, tmp_path)
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        assemble(config)
    assert str(tmp_path / "model") in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_initial_weights_are_drawn_once_and_belong_to_their_seed_config_and_tokenizer(small_corpus, tmp_path):
    config = make_config(small_corpus, tmp_path, "seed=3")
    initial = tmp_path / "run" / "initial"
    assembly = assemble(config)
    names.init_hf(tmp_path / "expected", {**MODEL, "vocab_size": 400}, 3)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in names.export_hf(assembly.model))
    origin = json.loads((initial / "origin.json").read_text())
    assert origin == {"seed": 3, "tokenizer": assembly.tokenizer.fingerprint, "config": {**MODEL, "vocab_size": 400}}
    before = (initial / "model.safetensors").stat().st_mtime_ns
    assemble(config)
    assert (initial / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"initial holds initial weights made from another seed: .* remove the folder"):
        assemble(make_config(small_corpus, tmp_path, "seed=4"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**MODEL, "rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="made from another config: set that back"):
        assemble(config)
    (initial / "origin.json").unlink()
    with pytest.raises(ValueError, match="cannot tell what its weights were made from"):
        assemble(config)
    shutil.rmtree(initial)
    assert assemble(config).model.config.layernorm_epsilon == 1e-5


def test_a_pretrained_model_keeps_its_own_tokenizer(small_corpus, tmp_path):
    own, corpus_tokenizer, model = tmp_path / "own", small_corpus / "tokenizer", tmp_path / "model"
    train_tokenizer(["return value"] * 9, 270, own)
    names.init_hf(model, {**MODEL, "vocab_size": 400}, 0, own)

    def assembled(*overrides: str) -> Assembly:
        config = make_config(small_corpus, tmp_path, "model.init=pretrained", *overrides)
        (model / "config.json").write_text(json.dumps({**MODEL, "vocab_size": 400}))
        return assemble(config)

    assert tokenizer_fingerprint(own) != tokenizer_fingerprint(corpus_tokenizer)
    assert assembled().tokenizer.folder == model
    assert assembled().tokenizer.fingerprint == tokenizer_fingerprint(own)
    assert assembled(f"corpus.tokenizer={own}").tokenizer.folder == own
    with pytest.raises(ValueError, match=r"leave corpus\.tokenizer empty") as caught:
        assembled(f"corpus.tokenizer={corpus_tokenizer}")
    assert f"corpus.tokenizer={corpus_tokenizer} is not the tokenizer of model.folder={model}" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"model\.folder=/nonexistent: has no config"):
        assembled("model.folder=/nonexistent")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"corpus\.tokenizer.*model holds no tokenizer\.json"):
        assembled()
    assert assembled(f"corpus.tokenizer={corpus_tokenizer}").tokenizer.vocab_size == 400


def _error(work: Callable[[], object]) -> str:
    try:
        work()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _save_with_a_late_rank(config: RunConfig, folder: Path) -> str:
    assembly = assemble(config)
    time.sleep(assembly.layout.rank)  # replica 0 has renamed its folder when the other one comes
    return _error(lambda: names.save_hf(assembly.model, folder, assembly.model.hf_config, None))


def _two_replicas(configs: dict[str, RunConfig], folder: Path) -> dict[str, str]:
    found = {}
    layout = parallel.initialize(1, 1, seed=0, timeout_s=60)
    with mock.patch.object(socket, "gethostname", return_value=f"node{layout.rank}"):
        found["loopback"] = _error(lambda: assemble(configs["loopback"]))
        found["everywhere"] = _error(lambda: assemble(configs["everywhere"]))
    for name in ("one host", "urls", "port"):
        found[name] = _error(lambda name=name: assemble(configs[name]))  # type: ignore[misc]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if layout.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    found["full disk"] = _error(lambda: assemble(configs["full disk"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found["first save"] = _save_with_a_late_rank(configs["one host"], folder)
    found["second save"] = _save_with_a_late_rank(configs["one host"], folder)
    parallel.destroy()
    return found


def test_every_rank_learns_what_is_wrong(small_corpus, tmp_path):
    def config(name: str, *overrides: str) -> RunConfig:
        return make_config(small_corpus, tmp_path / name, "parallel.timeout_s=60", *overrides)

    configs = {
        "loopback": config("a", *LOOPBACK),
        "everywhere": config("a", *EVERYWHERE),
        "one host": config("a", *LOOPBACK),
        "urls": config("a", "engine.kind=vllm", "engine.urls=[http://a:1]"),
        "port": config("a", "engine.kind=vllm", "engine.port=8000"),
        "full disk": config("b"),
    }
    first, second = run_ranks(_two_replicas, 2, configs, tmp_path / "export")
    assert first == second
    assert "engine.host=127.0.0.1: the replicas' servers run on node0, node1" in first["loopback"]
    assert "set engine.host=0.0.0.0" in first["loopback"]
    assert first["urls"].startswith("ValueError: engine.urls names 1 servers but there are 2 data-parallel replicas")
    assert first["port"].startswith("ValueError: engine.port=8000: 2 servers (data-parallel replicas x engine.")
    assert first["full disk"].startswith("OSError: cannot write ")
    assert list((tmp_path / "b" / "run").iterdir()) == []
    assert first["second save"].startswith("FileExistsError: folder ")
    assert [first[name] for name in ("everywhere", "one host", "first save")] == ["", "", ""]
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"config.json", "model.safetensors"}
