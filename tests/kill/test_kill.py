"""The kill matrix, a trial or two of every kind; `ra3 chaos --trials N` runs as many as one likes."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_ra3.chaos.faults import FAULTS
from megatron_ra3.chaos.trial import LAYOUTS, Outcome, World, _compare, run_trial, summarize
from megatron_ra3.cli import main

TRIALS = [(fault, "data" if fault.least_ranks > 1 else "single") for fault in FAULTS]
TRIALS += [(fault, "data") for fault in FAULTS if fault.name == "kill_rank"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.build(tmp_path_factory.mktemp("chaos"), ["single", "data"])


@pytest.mark.parametrize(("fault", "layout"), TRIALS, ids=lambda item: getattr(item, "name", item))
def test_a_broken_run_ends_as_the_one_that_was_not(world, fault, layout):
    outcome = run_trial(world, f"{fault.name}-{layout}", fault, layout, random.Random(f"{fault.name}-{layout}"))
    assert not outcome.problems
    assert outcome.starts > 1


def _tampered(world: World, name: str) -> Path:
    shutil.copytree(world.folder / "whole-single" / "run", world.folder / name / "run")
    return world.folder / name / "run"


def _found(world: World, name: str) -> Outcome:
    outcome = Outcome("none", "single")
    _compare(world, name, outcome)
    return outcome


def _edit_step(run: Path, step: int, **changes: object) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[step - 1] = json.dumps(json.loads(lines[step - 1]) | changes)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_comparison_finds_what_it_looks_for(world):
    assert not _found(world, "whole-single").problems
    _edit_step(_tampered(world, "sample"), 4, samples_digest="0" * 32)
    repeated = _found(world, "sample")
    assert repeated.lost_or_repeated
    _edit_step(_tampered(world, "loss"), 4, loss=1.0)
    assert _found(world, "loss").problems == ["other figures than in the uninterrupted run from step 4 on"]
    (_tampered(world, "weights") / "export" / "model.safetensors").write_bytes(b"other")
    assert _found(world, "weights").problems == ["other weights than those of the uninterrupted run"]
    next((_tampered(world, "torn") / "checkpoints").glob("step-*/state/common.pt")).write_bytes(b"torn")
    torn = _found(world, "torn")
    assert "unreadable: checkpoint" in torn.problems[0]
    summary = summarize([repeated, torn, Outcome("none", "single", starts=2)], seed=1, seconds=2.0)
    assert (summary["trials"], summary["identical"], summary["lost_or_repeated"]) == (3, 1, 1)
    assert summary["unreadable"] == 1
    assert summary["faults"] == {"none": {"trials": 3, "identical": 1, "starts": 2}}


def test_the_command_ends_with_its_figures(capsys):
    assert main(["chaos", "--trials", "1", "--faults", "stop_signal", "--layouts", "single", "--seed", "3"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["trials"], figures["identical"], figures["lost_or_repeated"]) == (1, 1, 0)
    assert LAYOUTS.keys() == {"single", "tensor", "data"}
    assert main(["chaos", "--trials", "1", "--faults", "frozen_rank", "--layouts", "single"]) == 2
    assert "--faults frozen_rank: needs a layout of 2 ranks" in capsys.readouterr().err
