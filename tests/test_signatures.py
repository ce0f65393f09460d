"""Failure signatures on made-up histories, sick ones, healthy ones and merely noisy ones, and on a real run."""

import copy
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ra3.cli import main
from megatron_ra3.config import RunConfig, load_config
from megatron_ra3.em import midtrain
from megatron_ra3.lifecycle import StopRequestedError
from megatron_ra3.report.signatures import ADVICE, ESTEP_METRICS, Detector
from tests.small import make_config

NEEDED = ["run_folder=r", "corpus.folder=c", "model.folder=m", "engine.kind=inprocess", "estep.steps=40"]
HEALTHY = {
    "reward": -1.0,
    "advantage_think": 0.02,
    "think_rate": 0.3,
    "rationale_tokens": 6.0,
    "malformed_rate": 0.05,
    "mismatch": 0.01,
    "effective_samples": 0.95,
    "forced_act_rate": 0.01,
    "grad_norm": 0.5,
}
Change = dict[str, Any]


def configure(*overrides: str) -> RunConfig:
    return load_config(None, [*NEEDED, *overrides])


def history(
    *rounds: Change, mstep_start: float = 2.0, mstep_fall: float = 0.3, mstep_noise: float = 0.05, seed: int = 0
) -> list[dict[str, Any]]:
    """Records of whole rounds: each gives what differs from a healthy E-step, and held-out nats (`nats`)."""
    draw, records = random.Random(seed), []
    for number, changes in enumerate(rounds, start=1):
        nats = changes.get("nats", 2.0 - 0.1 * number)
        means = HEALTHY | {"reward": -1.0 + 0.05 * number} | {k: v for k, v in changes.items() if k != "nats"}
        for _ in range(40):
            values = {
                name: value if value in (0.0, 1.0) else value + draw.gauss(0.0, 0.1 * abs(value))
                for name, value in means.items()
            }
            records.append({"phase": "estep", "round": number, **values})
        for step in range(50):
            loss = mstep_start - mstep_fall * step / 49 + draw.gauss(0.0, mstep_noise)
            records.append({"phase": "mstep", "round": number, "loss": loss})
        held_out = {"nats_per_code_token": nats, "nats_code_only": 0.9 * nats}
        records.append({"phase": "evaluate", "round": number, **held_out})
    return [{"step": step, **record} for step, record in enumerate(records, start=1)]


def names(config: RunConfig, records: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Name and round of everything found, in order."""
    detector = Detector(config)
    for record in records:
        detector.observe(record)
    return [(item["name"], item["round"]) for item in detector.found]


NTP = {"think_rate": 0.004, "nats": 1.9}
SICK: dict[str, tuple[list[Change], Change, str]] = {
    "think_rate_high": (
        [{"think_rate": 0.93}],
        {},
        r"9\d(\.\d)? % > 80 % over 20 steps: .*raise objective.penalty \(0\.05 now\)",
    ),
    "think_rate_low": (
        [NTP],
        {},
        r"^think rate 0\.\d+ % < 1 % over 20 steps: c is too high, this is NTP; lower objective\.p",
    ),
    "gate_never": (
        [{"think_rate": 0.0, "grad_norm": 0.0}],
        {},
        r"^think rate 0 % < 0\.1 % and no update in each of 20 steps: .*objective\.gate_exploration \(0 now\)",
    ),
    "gate_always": ([{"think_rate": 1.0}], {}, r"^think rate 100 % > 99\.9 % in each of 20 steps: .*raise objective"),
    "no_learning_signal": (
        [{"grad_norm": 0.0}],
        {},
        r"at think rate (29|3\d)(\.\d)? %: all rollouts of every group are alike",
    ),
    "rationales_malformed": ([{"malformed_rate": 0.4}], {}, r"> 20 % over 20 steps: .*format_penalty \(1 now\)"),
    "rationales_cut": (
        [{"malformed_rate": 0.9, "rationale_tokens": 16.5}],
        {},
        r"> 90 % over 20 steps: .*max_rationale_tokens \(16 now\)",
    ),
    "thinking_does_not_pay": (
        [{"advantage_think": -0.05}],
        {},
        r"-0\.0[45]\d* nats < -0\.001 nats over (1\d|20) steps: .*warmup\.steps=0 now",
    ),
    "engine_mismatch": ([{"mismatch": 0.5}], {}, r"nats > 0\.1 nats over 20 steps: .*model\.dtype \(fp32 now\)"),
    "few_effective_samples": ([{"effective_samples": 0.3}], {}, r"< 50 % over 20 .*max_importance_weight \(2 now\)"),
    "acts_forced": ([{"forced_act_rate": 0.3}], {}, r"> 10 % over 20 steps: .*max_snippet_tokens \(512 now\)"),
    "ce_not_falling": (
        [{}],
        {"mstep_fall": -0.3},
        r"cross-entropy 2\.0\d+ -> 2\.\d+ nats, a fall of -\d+\S* % < 1 % over 25",
    ),
    "reward_hacking": (
        [{"reward": -1.0, "nats": 1.9}, {"reward": -0.5, "nats": 2.1}],
        {},
        r"^reward -\S+ -> -\S+ from round 1 to 2, .* 1\.9000 -> 2\.1000, a rise of 10\.5 % > 1 % .*copy the next line",
    ),
}
BESIDES = {
    "gate_never": ["think_rate_low"],
    "gate_always": ["think_rate_high"],
    "rationales_cut": ["rationales_malformed"],
}
"""What the same disease shows besides."""


@pytest.mark.parametrize("name", SICK)
def test_each_signature_fires_once_with_its_threshold_and_advice(name):
    rounds, mstep, message = SICK[name]
    config, records = configure(), history(*rounds, **mstep)
    assert names(config, records) == [(found, len(rounds)) for found in [*BESIDES.get(name, []), name]]
    detector = Detector(config)
    fired = [fired for record in records if (fired := detector.observe(record))]
    texts = {found: text for step in fired for found, text in step.items()}
    assert re.search(message, texts[name]), texts[name]


def test_every_signature_is_tested():
    assert SICK.keys() == ADVICE.keys()


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_shows_none(seed):
    assert names(configure(), history(*[{}] * 5, seed=seed)) == []


@pytest.mark.parametrize("seed", range(8))
def test_noise_alone_shows_none(seed):
    """The gain of thinking is pure noise around 0, as at an optimum; rates touch their limits in single steps."""
    draw, records = random.Random(seed), history(*[{}] * 10, mstep_fall=0.1, mstep_noise=0.2, seed=seed)
    for record in records:
        if record["phase"] == "estep":
            record["advantage_think"] = draw.gauss(0.0, 0.3)
            record["malformed_rate"] = float(draw.random() < 0.1)
            record["mismatch"] = 0.3 if draw.random() < 0.1 else 0.01
            record["think_rate"] = max(0.0, draw.gauss(0.03, 0.02))
    assert names(configure(), records) == []


def test_a_signature_fires_once_per_phase_and_again_in_the_next_round():
    assert names(configure(), history(NTP, {}, NTP)) == [("think_rate_low", 1), ("think_rate_low", 3)]


def test_a_window_does_not_reach_into_the_round_before():
    late = history(NTP, {})[:-1]
    sick = [record for record in late if record["round"] == 1 and record["phase"] == "estep"][:19]
    healthy = [record for record in late if record["round"] == 2]
    assert names(configure(), sick + healthy) == []


def test_a_gate_that_always_thinks_by_order_is_not_blamed():
    assert names(configure("objective.gate=always"), history({"think_rate": 1.0, "advantage_think": -0.05})) == []


def test_advantages_that_hold_later_rewards_say_nothing_of_thinking():
    settings = ("objective.baseline=counterfactual", "objective.horizon=8")
    assert names(configure(*settings), history({"advantage_think": -6.0})) == []
    settings = ("objective.baseline=counterfactual", "objective.horizon=1")
    assert names(configure(*settings), history({"advantage_think": -6.0})) == [("thinking_does_not_pay", 1)]


def test_advice_names_what_makes_thinking_dear():
    config = configure("objective.latent_cost=sticky_kl", "objective.stickiness=0.7")
    detector = Detector(config)
    texts = [text for record in history(NTP) for text in detector.observe(record).values()]
    assert len(texts) == 1
    assert "lower objective.stickiness (0.7 now)" in texts[0]


def test_thresholds_and_window_are_settings():
    config = configure("signatures.window=5", "signatures.min_think_rate=0.5")
    detector = Detector(config)
    first = next(record for record in history({}) if detector.observe(record))
    assert first["step"] == 5
    assert detector.found[0]["message"].startswith("think rate ")
    assert " % < 50 % over 5 steps" in detector.found[0]["message"]


def test_cross_entropy_is_judged_at_half_and_at_the_end_and_not_when_short():
    flat_end = [2.0 - 0.3 * min(step, 25) / 25 for step in range(50)]
    assert names(configure(), _mstep(flat_end)) == []
    rising_end = [2.0 - 0.02 * step for step in range(25)] + [2.5] * 25
    assert names(configure(), _mstep(rising_end)) == [("ce_not_falling", 1)]
    assert names(configure("mstep.steps=15"), _mstep([2.0] * 15)) == []
    assert names(configure("mstep.steps=16"), _mstep([2.0] * 16)) == [("ce_not_falling", 1)]


def _mstep(losses: Sequence[float]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"phase": "mstep", "round": 1, "loss": loss} for loss in losses]
    records.append({"phase": "evaluate", "round": 1, "nats_per_code_token": 2.0, "nats_code_only": 1.9})
    return [{"step": step, **record} for step, record in enumerate(records, start=1)]


@pytest.mark.parametrize(
    ("reward", "nats"), [(-0.5, 1.8), (-1.5, 2.1), (-1.0, 2.1), (-0.5, 1.91)], ids=["learns", "worse", "flat", "slight"]
)
def test_reward_hacking_needs_both_to_rise(reward, nats):
    assert names(configure(), history({"reward": -1.0, "nats": 1.9}, {"reward": reward, "nats": nats})) == []


def test_detector_resumes_from_the_records_at_any_step():
    rounds = [{"reward": -1.0, "nats": 1.9, "think_rate": 0.9}, {"reward": -0.5, "nats": 2.1, "mismatch": 1.0}]
    config, records = configure(), history(*rounds, mstep_fall=-0.3)
    whole, written = Detector(config), []
    for record in copy.deepcopy(records):
        fired = whole.observe(record)
        written.append(record | ({"signatures": fired} if fired else {}))
    assert len(whole.found) == 5
    for cut in range(0, len(records) + 1, 9):
        resumed = Detector(config)
        resumed.replay(json.loads(json.dumps(written[:cut])))
        assert [resumed.observe(record) for record in records[cut:]] == [
            record.get("signatures", {}) for record in written[cut:]
        ]
        assert resumed.found == whole.found


SMALL = (
    "latents.surface=special",
    "objective.gate_exploration=0",
    "objective.format_penalty=0",
    "estep.steps=22",
    "estep.learning_rate=2e-2",
    "warmup.steps=0",
    "signatures.window=8",
)


def _steps(config: RunConfig) -> list[dict[str, Any]]:
    lines = Path(config.run_folder, "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith("seconds")} for line in lines]


def test_a_run_in_which_thinking_is_far_too_dear_says_so_everywhere(small_corpus, tmp_path, capsys):
    dear, free, parts = (
        make_config(small_corpus, tmp_path / name, *SMALL, f"objective.penalty={penalty}")
        for name, penalty in (("dear", 20), ("free", 0), ("parts", 20))
    )
    summary = midtrain(dear)
    found = {item["name"]: item for item in summary["signatures"]}
    low = found["think_rate_low"]
    assert "% < 1 % over 8 steps: c is too high, this is NTP; lower objective.penalty (20 now)" in low["message"]
    assert f"signature think_rate_low: {low['message']}" in capsys.readouterr().out
    steps = _steps(dear)
    assert steps[low["step"] - 1]["signatures"]["think_rate_low"] == low["message"]
    assert set(ESTEP_METRICS) <= steps[0].keys()
    assert json.loads(Path(dear.run_folder, "summary.json").read_text())["signatures"] == summary["signatures"]

    assert "think_rate_low" not in {item["name"] for item in midtrain(free)["signatures"]}
    capsys.readouterr()
    assert main(["report", f"ntp={dear.run_folder}", f"ra3={free.run_folder}", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"  ntp     think_rate_low, round 1: {low['message']}" in shown
    assert "ra3     think_rate_low" not in shown
    assert json.loads((tmp_path / "out").read_text())["signatures"]["ntp"] == summary["signatures"]

    for stop in (low["step"] - 1, 1):
        with pytest.raises(StopRequestedError):
            midtrain(make_config(small_corpus, tmp_path / "parts", *SMALL, "objective.penalty=20", _stop(stop)))
    assert midtrain(parts)["signatures"] == summary["signatures"]
    assert _steps(parts) == steps


def _stop(steps: int) -> str:
    return f"checkpoint.stop_after_steps={steps}"
