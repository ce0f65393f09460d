"""Settings of RLVR: presets, what clashes, and the order of tasks."""

from collections import Counter

import pytest

from megatron_ra3.config import RunConfig
from megatron_ra3.rlvr_config import RlvrRunConfig, load_any_config, load_rlvr_config
from megatron_ra3.schedule import rlvr_phases
from megatron_ra3.task_order import TaskOrder

PLACES = ("run_folder=r", "model.folder=m", "tasks.file=t", "heldout.file=h")


def _load(*overrides: str) -> RlvrRunConfig:
    return load_rlvr_config(None, [*PLACES, *overrides])


def test_presets_are_where_settings_start_from():
    grpo, rloo, dapo = (_load(f"rlvr.preset={name}").rlvr for name in ("grpo", "rloo", "dapo"))
    assert (grpo.advantage, grpo.loss_average, grpo.clip_high) == ("group_normalised", "answer", 0.2)
    assert (rloo.advantage, rloo.clip_low, rloo.clip_high) == ("leave_one_out", 0.0, 0.0)
    assert (dapo.clip_low, dapo.clip_high, dapo.loss_average) == (0.2, 0.28, "token")
    assert (dapo.dynamic_sampling, dapo.truncated) == (True, "mask")
    assert not _load("rlvr.preset=dapo", "rlvr.dynamic_sampling=false").rlvr.dynamic_sampling


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rlvr.stps=3", r"unknown config key 'rlvr\.stps'; did you mean 'rlvr\.steps'"),
        ("corpus.folder=c", "unknown config key 'corpus'"),
        ("rlvr.steps=30", r"must be a multiple of evaluate\.every_steps=20"),
        ("rlvr.samples_per_task=1", "at least 2 answers"),
        ("rlvr.check_tokens=100", r"must divide rlvr\.max_answer_tokens=512"),
        ("rlvr.overlong_tokens=600", r"at most rlvr\.max_answer_tokens=512"),
        ("rlvr.updates_per_step=33", r"at most rlvr\.tasks_per_step=32"),
        ("rlvr.entropy_floor=0.5", r"rlvr\.entropy_bonus=0"),
        ("rlvr.clip_low=1.5", "between 0 and 1"),
        ("heldout.file=''", r"evaluate\.every_steps=20"),
        ("tasks.file=''", r"tasks\.file is empty"),
        ("model.init=random", "starts from trained weights"),
        ("engine.temperature=0.5", "full law at temperature 1"),
        ("rlvr.tasks_per_step=0", "must be positive"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        _load(override)


def test_both_kinds_of_runs_are_told_apart(tmp_path):
    rlvr, midtrain = tmp_path / "rlvr.yaml", tmp_path / "midtrain.yaml"
    rlvr.write_text("run_folder: r\nmodel: {folder: m}\ntasks: {file: t}\nheldout: {file: h}\n")
    midtrain.write_text("run_folder: r\nmodel: {folder: m}\ncorpus: {folder: c}\n")
    assert isinstance(load_any_config(rlvr), RlvrRunConfig)
    assert isinstance(load_any_config(midtrain), RunConfig)


def test_an_evaluation_stands_before_and_after_every_round():
    phases = rlvr_phases(_load("rlvr.steps=6", "evaluate.every_steps=3"))
    assert [(phase.name, phase.round, phase.steps) for phase in phases] == [
        ("evaluate", 0, 1), ("rlvr", 1, 3), ("evaluate", 1, 1), ("rlvr", 2, 3), ("evaluate", 2, 1),
    ]  # fmt: skip
    (only,) = rlvr_phases(_load("rlvr.steps=6", "evaluate.every_steps=0"))
    assert (only.name, only.steps) == ("rlvr", 6)


def test_every_task_comes_once_per_epoch_wherever_a_run_resumes():
    whole = TaskOrder(7, seed=3)
    turns = [turn for _ in range(7) for turn in whole.take(3)]
    assert [Counter(turn.index for turn in turns[start : start + 7]) for start in (0, 7, 14)] == [Counter(range(7))] * 3
    assert [turn.serial for turn in turns] == list(range(21))
    epochs = [[turn.index for turn in turns[start : start + 7]] for start in (0, 7)]
    assert epochs[0] != epochs[1]
    resumed, again = TaskOrder(7, seed=3), []
    for count in (5, 1, 8, 7):
        fresh = TaskOrder(7, seed=3)
        fresh.load_state_dict(resumed.state_dict())
        again += fresh.take(count)
        resumed = fresh
    assert again == turns
