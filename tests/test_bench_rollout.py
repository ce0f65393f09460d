"""`ra3 bench rollout` at a tiny size, on the trainer's own weights."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_ra3.bench.gated_model import GatedModel, SyntheticTokenizer, write_gated_model
from megatron_ra3.bench.rollout import RolloutBench, measure, random_snippets
from megatron_ra3.cli import main
from megatron_ra3.latents import LatentFormat
from megatron_ra3.rollout.sampler import Sampler

TINY = {
    "engine": "inprocess",
    "think-rates": 0.2,
    "snippets": 2,
    "lines": 5,
    "line-tokens": 3,
    "rollouts": 3,
    "rationale-tokens": 2,
    "max-rationale-tokens": 4,
    "repeats": 2,
    "layers": 1,
    "hidden-size": 32,
    "vocab-size": 32,
    "surface": "newline",
    "seed": 3,
}


def test_ratios_are_those_of_the_requests_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[object, list[int]] = {"auto": [], 1: []}
    lines: list[int] = []
    sample = Sampler.sample

    def counted(self, snippets, *, seed):
        groups = sample(self, snippets, seed=seed)
        if seed > 3:  # the first round only warms up
            sent[self._config.window].append(self.stats.gate_queries + self.stats.generate_requests)
            lines.append(self.stats.lines)
        return groups

    monkeypatch.setattr(Sampler, "sample", counted)
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "rollout", *options, "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert [len(calls) for calls in sent.values()] == [2, 2]
    assert result["requests_ratio"] == {"0.2": sum(sent[1]) / sum(sent["auto"])}
    assert result["requests_ratio"]["0.2"] > 1.2
    assert lines == [2 * 3 * 5] * 4
    assert result["requests_ratio_unshared"] == {"0.2": 60 / sum(sent["auto"])}
    assert result["identical_rollouts"] == {"0.2": 1.0}
    jumped, stepped = (result["measured"]["0.2"][mode] for mode in ("jump_ahead", "line_by_line"))
    assert (jumped["requests"], stepped["requests"]) == (sum(sent["auto"]) / 2, sum(sent[1]) / 2)
    assert jumped["decoded_tokens"] == stepped["decoded_tokens"] > 0
    assert result["wall_ratio"]["0.2"] == pytest.approx(stepped["wall_s"] / jumped["wall_s"])
    assert result["settings"]["surface"] == "newline"


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_model_thinks_at_the_rate_asked_for(tmp_path: Path, surface: str) -> None:
    from transformers import AutoModelForCausalLM

    bench = RolloutBench(surface=surface, snippets=3, lines=40, line_tokens=6, vocab_size=200)
    form = LatentFormat.build(surface, SyntheticTokenizer(bench.vocab_size))
    snippets = random_snippets(bench)
    assert all(4 <= len(line) <= 6 for snippet in snippets for line in snippet.lines)
    model = GatedModel(
        latent_format=form, vocab_size=200, layers=2, hidden_size=32, think_rate=0.1, rationale_tokens=5.0
    )
    write_gated_model(tmp_path, model, snippets, seed=7)
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    rates, closing = [], []
    for snippet in snippets:
        tokens = form.render(snippet, observe=False).token_ids
        logprobs = network(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        position = len(snippet.prompt)
        for line in snippet.lines:
            row = position + len(form.gate_prefix) - 1
            rates.append(math.exp(form.think_logprob(logprobs[row, list(form.gate_ids)].tolist())))
            position = row + 1 + len(form.act_suffix) + len(line)
        assert position == len(tokens)
        closing += logprobs[:, form.close[0]].exp().tolist()
    assert sum(rates) / len(rates) == pytest.approx(0.1, abs=1e-4)
    assert min(rates) < 0.07  # a gate depends on its context
    assert max(rates) > 0.13
    assert sum(closing) / len(closing) == pytest.approx(0.2, rel=0.15)


def test_settings_without_sense_are_named() -> None:
    with pytest.raises(ValueError, match="hidden_size=48: must be a multiple of 32"):
        RolloutBench(hidden_size=48)
    with pytest.raises(ValueError, match=r"think_rates=\(0.0,\): needs rates above 0"):
        measure(RolloutBench(think_rates=(0.0,)))
    with pytest.raises(ValueError, match="repeats=0: must be at least 1"):
        RolloutBench(repeats=0)
