"""RLVR, small and in process: what it writes, that stopping anywhere changes nothing, and that it learns.

Verdicts come from a rule on the text in place of the jail, which has tests of its own.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_ra3 import rlvr_run
from megatron_ra3.chaos.world import MODEL
from megatron_ra3.cli import main
from megatron_ra3.evaluate.judge import Attempt
from megatron_ra3.evaluate.sandbox import Verdict
from megatron_ra3.lifecycle import StopRequestedError
from megatron_ra3.model import names
from megatron_ra3.observe.timeline import read_timeline
from megatron_ra3.policy_step import PolicyStep
from megatron_ra3.report.rlvr_summary import rlvr_table, summarize_rlvr
from megatron_ra3.rlvr import rlvr
from megatron_ra3.rlvr_config import JailConfig, RlvrRunConfig, load_rlvr_config
from megatron_ra3.settings import to_dict
from tests.support import open_jail

TASKS = 5


class Rule:
    """Passes answers with an early letter; the jail breaks over those with a digit."""

    def __init__(self, config: JailConfig) -> None:
        del config

    def verdicts(self, attempts: Sequence[Attempt]) -> list[Verdict]:
        return [self._verdict(item.text) for item in attempts]

    def _verdict(self, text: str) -> Verdict:
        if any(letter.isdigit() for letter in text):
            return Verdict(outcome="infrastructure", reason="jail")
        return Verdict(outcome="pass" if any(letter in "abcdefgh" for letter in text) else "fail")

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlvr_run, "Judge", Rule)


@pytest.fixture(scope="module")
def world(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and its tokenizer, and files of tasks."""
    folder = tmp_path_factory.mktemp("rlvr")
    names.init_hf(folder / "model", {**MODEL, "vocab_size": 400}, 0, small_corpus / "tokenizer")
    for name, count in (("train", TASKS), ("heldout", 3)):
        records = [
            {
                "task_id": f"{name}/{number}",
                "prompt": f"x={number}\n",
                "stop": ["\n"],
                "head": "",
                "function": "f",
                "tests": [[[], number]],
                "max_new_tokens": 4,
            }
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _config(world: Path, folder: Path, *overrides: str) -> RlvrRunConfig:
    settings = [
        f"run_folder={folder}",
        f"model.folder={world / 'model'}",
        f"tasks.file={world / 'train.jsonl'}",
        f"heldout.file={world / 'heldout.jsonl'}",
        "rlvr.steps=4",
        "rlvr.tasks_per_step=3",
        "rlvr.samples_per_task=4",
        "rlvr.max_prompt_tokens=32",
        "rlvr.max_answer_tokens=4",
        "rlvr.check_tokens=2",
        "rlvr.learning_rate=1e-2",
        "rlvr.reference_kl=0.05",
        "rlvr.entropy_bonus=0.01",
        "rlvr.updates_per_step=2",
        "evaluate.every_steps=2",
        "evaluate.tasks=3",
        "evaluate.samples_per_task=2",
        "parallel.micro_batch_tokens=100",
        "checkpoint.every_steps=1000",
        "engine.kind=inprocess",
        *overrides,
    ]
    return load_rlvr_config(None, settings)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlvr_run, "Judge", Rule)
        rlvr(_config(world, folder))
    return folder


def test_a_run_trains_evaluates_and_exports(whole):
    metrics = _metrics(whole)
    assert [record["phase"] for record in metrics] == [
        "evaluate",
        "rlvr",
        "rlvr",
        "evaluate",
        "rlvr",
        "rlvr",
        "evaluate",
    ]
    steps = [record for record in metrics if record["phase"] == "rlvr"]
    assert all(record["answers"] == 12 for record in steps)
    assert all(record["mismatch"] < 1e-5 for record in steps)
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert steps[-1]["kl"] > 1e-4
    assert all(record["updates"] == 2 for record in steps)
    assert steps[0]["entropy"] > 4.0
    assert 0 < steps[0]["pass_rate"] < 1
    assert sum(record["infrastructure_errors"] for record in steps) > 0
    assert metrics[0]["answers"] == 6
    assert (whole / "trained_tasks.txt").read_text().split() == [f"train/{number}" for number in range(TASKS)]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 4
    assert samples[0]["prompt"] == "x=0\n"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (whole / "export").iterdir()
    }
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["evaluate"]["pass_rate"] == metrics[-1]["pass_rate"]
    done = {span.what for span in read_timeline(whole).spans}
    assert {"sampling", "judging", "scoring", "scoring, reference", "backward", "optimizer", "checkpoint"} <= done
    assert json.loads((whole / "run.json").read_text())["kind"] == "rlvr"


def test_a_report_shows_the_curve_and_the_held_out_pass_rate(whole, tmp_path, capsys):
    assert main(["report", f"a={whole}", f"b={whole}", "--out", str(tmp_path / "report.json")]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block[:2] for block in blocks] == ["a:", "b:"]
    found = json.loads((tmp_path / "report.json").read_text())["a"]
    steps = [record for record in _metrics(whole) if record["phase"] == "rlvr"]
    evaluations = [record for record in _metrics(whole) if record["phase"] == "evaluate"]
    assert [(part["first"], part["last"]) for part in found["curve"]] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    for part, step in zip(found["curve"], steps, strict=True):
        assert {name: part[name] for name in ("reward", "kl", "entropy", "truncated", "answer_tokens")} == {
            name: step[name] for name in ("reward", "kl", "entropy", "truncated", "answer_tokens")
        }
        assert part["zero_advantage"] == step["zero_advantage_groups"] / 3
    rates = [record["pass_rate"] for record in evaluations]
    assert found["heldout"] == [[0, rates[0]], [2, rates[1]], [4, rates[2]]]
    assert (found["steps"], found["answers"], found["skipped_steps"]) == (4, 48, 0)
    assert found["infrastructure_errors"] == sum(step["infrastructure_errors"] for step in steps)
    assert f"{rates[0]:.4f} after 0 steps -> {rates[2]:.4f} after 4" in blocks[0]
    row = next(line for line in blocks[0].splitlines() if line.startswith("3-3")).split()
    assert row[1:3] == [f"{steps[2]['reward']:.4f}", f"{steps[2]['pass_rate']:.4f}"]


def test_a_report_takes_one_kind_of_run_and_averages_over_parts(tmp_path, capsys):
    step = {"phase": "rlvr", "answers": 8, "infrastructure_errors": 1, "updates": 1, "groups": 2, "truncated": 0.5}
    step |= {"entropy": 1.0, "mismatch": 1e-3, "answer_tokens": 9.0, "seconds": 1.0, "zero_advantage_groups": 1}
    records = [{**step, "step": number, "reward": number, "pass_rate": 0.0} for number in range(1, 26)]
    curve = tmp_path / "curve"
    curve.mkdir()
    (curve / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (figures,) = summarize_rlvr({"long": curve}).values()
    assert [(part["first"], part["last"], part["reward"]) for part in figures["curve"]][:3] == [
        (1, 2, 1.5),
        (3, 5, 4.0),
        (6, 7, 6.5),
    ]
    assert len(figures["curve"]) == 10
    assert {part["zero_advantage"] for part in figures["curve"]} == {0.5}
    assert {part["kl"] for part in figures["curve"]} == {None}
    assert "never evaluated" in rlvr_table({"long": figures})
    other = tmp_path / "midtrain"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"phase": "warmup", "loss": 1.0}\n')
    assert main(["report", f"rl={curve}", f"mid={other}"]) == 2
    assert "rl: RLVR and mid-training have no figure in common" in capsys.readouterr().err


def _doctor(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[tuple[str, str], dict[str, str]]:
    main(["doctor", str(path), *overrides, "--json"])
    return {(item["topic"], item["name"]): item for item in json.loads(capsys.readouterr().out)}


def test_a_doctor_looks_at_model_tasks_and_jail_and_a_plan_refuses(world, tmp_path, capsys):
    open_jail(1).close()  # skips where there is none
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(_config(world, tmp_path / "run"))))
    found = _doctor(path, capsys)
    sound = {
        ("model", "folder"): "qwen2, 400 embedded tokens, 256 positions",
        ("model", "weights"): "tensors in 1 files",
        ("tasks", "tasks"): f"{TASKS} tasks of {world / 'train.jsonl'} as completions",
        ("tasks", "heldout prompts"): "0 of 3 over rlvr.max_prompt_tokens=32",
        ("tasks", "leaks"): "0 held-out tasks are trained on, 0 were by the model before",
        ("jail", "bubblewrap"): "ms per program",
        ("engine", "kind"): "engine.kind=inprocess",
    }
    assert {key: text in found[key]["text"] for key, text in sound.items()} == dict.fromkeys(sound, True)
    assert {found[key]["status"] for key in sound} == {"ok"}
    broken = tmp_path / "model"
    shutil.copytree(world / "model", broken)
    (broken / "model.safetensors").unlink()
    ill = (f"model.folder={broken}", f"heldout.file={world / 'train.jsonl'}", "jail.isolation=unsafe")
    found = _doctor(path, capsys, *ill, "rlvr.max_prompt_tokens=1")
    assert {key: item["status"] for key, item in found.items() if key[0] in ("model", "tasks", "jail")} == {
        ("model", "folder"): "ok",
        ("model", "tokenizer"): "ok",
        ("model", "weights"): "failed",
        ("tasks", "tasks"): "ok",
        ("tasks", "heldout"): "ok",
        ("tasks", "tasks prompts"): "failed",
        ("tasks", "heldout prompts"): "failed",
        ("tasks", "leaks"): "failed",
        ("jail", "unsafe"): "warning",
    }
    found = _doctor(path, capsys, f"model.folder={tmp_path}", "tasks.file=nowhere.jsonl")
    failed = {key: item["text"] for key, item in found.items() if item["status"] == "failed"}
    assert set(failed) == {("model", "folder"), ("tasks", "tasks")}
    assert "has no config.json" in failed["model", "folder"]
    assert main(["plan", str(path)]) == 2
    assert "a run of RLVR" in capsys.readouterr().err


def test_stopping_anywhere_and_resuming_changes_nothing(whole, world, tmp_path):
    for steps in (1, 3):
        with pytest.raises(StopRequestedError):
            rlvr(_config(world, tmp_path / "run", f"checkpoint.stop_after_steps={steps}"))
    rlvr(_config(world, tmp_path / "run"))
    assert _metrics(tmp_path / "run") == _metrics(whole)
    for name in ("export/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_can_be_made_longer_and_other_tasks_are_refused(whole, world, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    other = f"tasks.file={world / 'heldout.jsonl'}"
    with pytest.raises(ValueError, match="3 of 3 tasks were trained on"):
        rlvr(_config(world, tmp_path / "other", other))
    with pytest.raises(ValueError, match=r"corpus: completions .* in the checkpoint, completions .* now"):
        rlvr(_config(world, tmp_path / "run", other, "evaluate.allow_leaks=true"))
    rlvr(_config(world, tmp_path / "run", "rlvr.steps=6"))
    assert _metrics(tmp_path / "run")[:7] == _metrics(whole)
    assert len(_metrics(tmp_path / "run")) == 10


def test_dynamic_sampling_takes_every_task_once_per_epoch_and_leaves_out_equal_groups(world, tmp_path, monkeypatch):
    taken: list[str] = []
    learnt: list[int] = []
    next_tasks, update = rlvr_run.RlvrRun.next_tasks, PolicyStep.update

    def record_tasks(run: rlvr_run.RlvrRun, count: int) -> Any:
        posed = next_tasks(run, count)
        taken.extend(item.problem.task.task_id for item in posed)
        return posed

    def record_groups(policy: PolicyStep, groups: Any, lr: float) -> dict[str, float]:
        assert all(group.teaches for group in groups)
        learnt.append(len(groups))
        return update(policy, groups, lr)

    monkeypatch.setattr(rlvr_run.RlvrRun, "next_tasks", record_tasks)
    monkeypatch.setattr(PolicyStep, "update", record_groups)
    limits = ("rlvr.max_sampling_rounds=3", "rlvr.truncated=judge", "evaluate.every_steps=0")
    rlvr(_config(world, tmp_path / "run", "rlvr.preset=dapo", *limits))
    steps = _metrics(tmp_path / "run")
    assert sum(record["zero_advantage_groups"] + record["too_few_groups"] for record in steps) > 0
    for record, count in zip(steps, learnt, strict=True):
        assert count == record["groups"] - record["zero_advantage_groups"] - record["too_few_groups"]
        assert count <= 3
    assert len(taken) == sum(record["groups"] for record in steps)
    for start in range(0, len(taken) - TASKS + 1, TASKS):
        assert Counter(taken[start : start + TASKS]) == {f"train/{number}": 1 for number in range(TASKS)}
    assert steps[-1]["epoch"] * TASKS + steps[-1]["position"] == len(taken)


def test_verdicts_teach(world, tmp_path):
    settings = ("rlvr.steps=24", "evaluate.every_steps=12", "rlvr.reference_kl=0", "rlvr.entropy_bonus=0")
    more = ("evaluate.samples_per_task=16", "rlvr.samples_per_task=8", "rlvr.updates_per_step=1")
    rlvr(_config(world, tmp_path / "run", *settings, *more, "rlvr.preset=rloo"))
    rates = [record["pass_rate"] for record in _metrics(tmp_path / "run") if record["phase"] == "evaluate"]
    assert rates[0] < 0.8
    assert rates[-1] > rates[0] + 0.15


def test_nothing_to_learn_takes_no_step(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Rule, "_verdict", lambda judge, text: Verdict(outcome="fail"))
    plain = ("rlvr.reference_kl=0", "rlvr.entropy_bonus=0", "evaluate.every_steps=0", "rlvr.steps=1")
    rlvr(_config(world, tmp_path / "run", *plain))
    (record,) = _metrics(tmp_path / "run")
    assert (record["updates"], record["zero_advantage_groups"], record["pass_rate"]) == (0, 3, 0.0)
    before, after = (load_file(path / "model.safetensors") for path in (world / "model", tmp_path / "run" / "export"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
