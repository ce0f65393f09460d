"""Phases and learning rates are arithmetic."""

import pytest

from megatron_ra3.config import NextTokenConfig, load_config
from megatron_ra3.schedule import Phase, learning_rate, phase_fraction, phases

NEEDED = ["run_folder=r", "corpus.folder=c", "model.folder=m", "warmup.steps=5", "estep.steps=3", "mstep.steps=4"]


def test_em_rounds_repeat_estep_bootstrap_mstep_evaluate():
    assert phases(load_config(None, [*NEEDED, "em.rounds=2"])) == [
        Phase("warmup", 0, 5),
        *(
            Phase(name, number, steps)
            for number in (1, 2)
            for name, steps in (("estep", 3), ("bootstrap", 4), ("mstep", 4), ("evaluate", 1))
        ),
    ]


def test_without_rounds_the_run_is_next_token_training():
    assert phases(load_config(None, [*NEEDED, "em.rounds=0"])) == [Phase("warmup", 0, 5), Phase("evaluate", 0, 1)]


def test_learning_rate_rises_linearly_then_follows_a_cosine():
    config = NextTokenConfig(steps=100, learning_rate=1.0, lr_warmup_fraction=0.1, lr_final_fraction=0.2)
    assert learning_rate(config, 0.0) == pytest.approx(0.01 / 0.11)
    assert learning_rate(config, 0.05) == pytest.approx(0.06 / 0.11)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.6)
    assert learning_rate(config, 1.0) == pytest.approx(0.2)


def test_a_token_budget_moves_the_phase_ahead_of_its_steps():
    config = NextTokenConfig(steps=100, max_tokens=1000)
    assert phase_fraction(config, step=10, tokens=600) == 0.6
    assert phase_fraction(NextTokenConfig(steps=100), step=10, tokens=600) == 0.1
