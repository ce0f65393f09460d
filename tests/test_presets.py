"""Every preset and granularity through the whole loop, on real parts: what must be special about each, by value."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ra3.em import midtrain
from tests.small import make_config

SPECIAL = ("latents.surface=special", "corpus.max_snippet_tokens=64")


def run(corpus: Path, folder: Path, *overrides: str) -> dict[str, list[dict[str, Any]]]:
    """Records of metrics.jsonl by phase."""
    config = make_config(corpus, folder, "objective.gate_exploration=0", "warmup.steps=0", *overrides)
    midtrain(config)
    records: dict[str, list[dict[str, Any]]] = {}
    for line in (Path(config.run_folder) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["phase"], []).append(record)
    return records


def test_ntp_samples_nothing_and_trains_on_plain_code(small_corpus, tmp_path):
    found = run(small_corpus, tmp_path, "objective.preset=ntp")
    assert set(found) == {"bootstrap", "mstep", "evaluate"}
    assert [item["think_rate"] for item in found["mstep"]] == [0.0, 0.0]
    (held_out,) = found["evaluate"]
    assert held_out["nats_per_code_token"] == held_out["act_nats_per_code_token"]


def test_rlp_thinks_before_every_token_and_is_paid_for_what_that_changes(small_corpus, tmp_path):
    found = run(
        small_corpus, tmp_path, "objective.preset=rlp", "corpus.max_snippet_tokens=24", "latents.surface=special",
        "latents.max_rationale_tokens=3", "estep.rollouts_per_snippet=1", "estep.steps=1",
    )  # fmt: skip
    (step,) = found["estep"]
    assert step["think_rate"] == pytest.approx(1.0 - step["forced_act_rate"])
    assert step["think_rate"] > 0.25
    assert step["gate_entropy"] == 0.0
    assert step["gain_per_think"] != 0.0
    assert step["grad_norm"] > 0.0


@pytest.mark.parametrize(("preset", "beta"), [("brite", 1.0), ("latro", 0.05)])
def test_whole_snippet_presets_start_at_their_reference_and_leave_it(small_corpus, tmp_path, preset, beta):
    found = run(small_corpus, tmp_path, f"objective.preset={preset}", "estep.learning_rate=1e-2")
    first, *later = found["estep"]
    assert first["reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert max(abs(item["reference_kl"]) for item in later) > 1e-3
    assert all(item["think_rate"] == 1.0 for item in found["estep"])
    third = found["estep"][2]
    malformed = third["malformed_rate"]
    assert third["reward"] == pytest.approx(
        -third["nats_per_line"] - malformed - beta * third["reference_kl"], rel=1e-5
    )


def test_every_term_at_once_still_learns(small_corpus, tmp_path):
    found = run(
        small_corpus, tmp_path, "objective.latent_cost=sticky_kl", "objective.baseline=both", "objective.ppo_clip=0.2",
        "objective.reference_kl=0.1", "objective.gate_entropy_floor=0.2",
        "objective.granularity=statement", "objective.line_reward=sum",
    )  # fmt: skip
    for step in found["estep"]:
        assert step["gate_kl"] > 0.0
        assert step["grad_norm"] > 0.0
        assert 0.0 < step["gate_entropy"] < 0.6932


def test_a_coarser_action_holds_more_nats(small_corpus, tmp_path):
    figures = {}
    for granularity in ("line", "snippet", "token"):
        found = run(
            small_corpus,
            tmp_path / granularity,
            *SPECIAL,
            f"objective.granularity={granularity}",
            "objective.gate=never",
            "objective.line_reward=sum",
        )
        figures[granularity] = found["evaluate"][0]
    nats = {name: -figure["objective"] for name, figure in figures.items()}
    assert nats["token"] < nats["line"] < nats["snippet"]
