"""`ra3 bench logprob` measures what it says, on a small problem: every provider's error, and what cannot run here."""

import json

import pytest
import torch

from megatron_ra3.bench.logprob import PROVIDERS, LogprobBench, measure, random_inputs, table
from megatron_ra3.cli import main
from megatron_ra3.corpus.tokenizer import train_tokenizer
from megatron_ra3.kernels import linear_logprob
from megatron_ra3.model import names
from tests.tiny_model import VOCABULARY, qwen2

SMALL = {"rows": 48, "hidden": 64, "vocab": 9000, "repeats": 2}


def test_every_provider_is_measured_or_named_with_its_reason():
    result = measure(LogprobBench(**SMALL))
    assert result["providers"].keys() | result["skipped"].keys() == set(PROVIDERS)
    assert {"ours bf16", "ours fp8_rescored", "torch eager", "torch chunked"} <= result["providers"].keys()
    errors = {name: row["rms_error"] for name, row in result["providers"].items()}
    assert errors["ours bf16"] < 1e-5 < errors["ours fp8_rescored"] < errors["ours fp8"]
    assert errors["ours bf16"] < errors["torch eager"]
    assert not any(row["positive"] for name, row in result["providers"].items() if name.startswith("ours"))
    assert "forward_backward_ms" not in result["providers"]["ours fp8"]
    assert "forward_backward_ms" in result["providers"]["ours fp8_rescored"]
    peers = [result["providers"][name]["forward_ms"] for name in ("torch eager", "torch chunked")]
    own = result["providers"]["ours fp8_rescored"]["forward_ms"]
    assert result["fp8_rescored_vs_best_bf16_peer"] == pytest.approx(min(peers) / own)
    assert all(name in table(result) for name in result["providers"])


def test_gradients_are_of_the_inputs_own_quantised_head():
    """Sets of inputs rotate: a head kept from another set would give another set's log-probs."""
    bench = LogprobBench(**SMALL)
    first, second = random_inputs(bench, 0), random_inputs(bench, 1)
    provider = PROVIDERS["ours fp8_rescored"]
    for given in (first, second, first):
        with torch.no_grad():
            assert torch.equal(
                provider(given.leaves()),
                linear_logprob(given.hidden, given.weight, given.targets, precision="fp8_rescored"),
            )


def test_the_command_prints_one_json_object_last(capsys, tmp_path):
    out = tmp_path / "result.json"
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = ["bench", "logprob", *options, "--no-backward", "--providers", "ours fp8_rescored", "torch eager"]
    assert main([*arguments, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert set(result["providers"]) == {"ours fp8_rescored", "torch eager"}
    assert main(["bench", "logprob", "--providers", "nobody"]) == 2
    assert "providers nobody: known are ours fp32" in capsys.readouterr().err


def test_hidden_states_and_head_can_be_those_of_a_model(tmp_path):
    names.init_hf(tmp_path / "model", qwen2(), 0)
    train_tokenizer(["x = 1\n"], VOCABULARY, tmp_path / "model")
    (tmp_path / "text.py").write_text("x = 1\n" * 400)
    result = measure(
        LogprobBench(
            rows=40, repeats=1, backward=False, model=str(tmp_path / "model"), text=str(tmp_path / "text.py"),
            providers=("ours bf16",),
        )
    )  # fmt: skip
    assert result["shape"] == {"rows": 40, "hidden": 64, "vocab": VOCABULARY}
    assert result["providers"]["ours bf16"]["rms_error"] < 1e-5
