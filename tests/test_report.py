"""The logs of a run: cut back to a checkpoint or refused, a bar that knows when a run gets shorter, one wandb run."""

import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_ra3.config import LoggingConfig, load_config
from megatron_ra3.evaluate.commands import score_metrics
from megatron_ra3.report.metrics import MetricsLog
from megatron_ra3.report.samples import SampleLog
from megatron_ra3.report.signatures import Detector
from megatron_ra3.report.summary import summarize, table
from megatron_ra3.report.wandb_run import open_wandb


class _Characters:
    def decode(self, ids):
        return "".join(chr(token) for token in ids)


def _metrics(folder: Path, *, writes: bool = True) -> MetricsLog:
    config = load_config(None, ["run_folder=r", "corpus.folder=c", "model.folder=m", "mstep.steps=32"])
    return MetricsLog(
        folder,
        total_steps=10,
        writes=writes,
        detector=Detector(config),
    )


def _step(number: int, phase: str = "warmup", **metrics: float) -> dict[str, Any]:
    return {"step": number, "phase": phase, "round": 1, "seconds": 1.0, **metrics}


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_go_on_from_a_checkpoint_without_a_step_twice(tmp_path):
    log = _metrics(tmp_path)
    for step in (1, 2):
        log.write("warmup", _step(step))
    saved = log.offset
    assert saved == (tmp_path / "metrics.jsonl").stat().st_size
    log.write("warmup", _step(3))
    log.close()
    resumed = _metrics(tmp_path)
    resumed.rewind(saved, 2)
    resumed.write("warmup", _step(3))
    resumed.close()
    assert _steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("left", ["", "12345"])
def test_a_log_that_lost_bytes_is_refused_and_left_alone(tmp_path, name, left):
    (tmp_path / name).write_text(left)
    is_metrics = name == "metrics.jsonl"
    log = _metrics(tmp_path) if is_metrics else SampleLog(tmp_path, _Characters(), writes=True)
    with pytest.raises(
        ValueError, match=rf"{name}: holds {len(left)} bytes but the checkpoint counts 6; .* restore it"
    ):
        log.rewind(6, 2) if is_metrics else log.rewind(6)
    assert (tmp_path / name).read_text() == left


def test_a_signature_is_logged_once_also_when_the_run_resumes_and_stands_in_the_table(tmp_path, capsys):
    log = _metrics(tmp_path)
    for step in range(1, 17):
        log.write("mstep", _step(step, "mstep", loss=2.0, tokens=8))
    saved = log.offset
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17
    message = lines[-1].partition(" signature ce_not_falling: ")[2]
    assert message.startswith("M-step cross-entropy 2.0000 -> 2.0000 nats, a fall of 0 % < 1 % over 16 steps: noisy")

    resumed = _metrics(tmp_path)
    resumed.rewind(saved, 16)
    for step in range(17, 33):
        resumed.write("mstep", _step(step, "mstep", loss=2.0, tokens=8))
    held_out = {"nats_per_code_token": 1.5, "act_nats_per_code_token": 1.6, "nats_code_only": 1.4}
    resumed.write("evaluate", _step(33, "evaluate", **held_out))
    resumed.close()
    assert "signature" not in capsys.readouterr().out
    carriers = [json.loads(line).get("signatures") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert carriers == [*[None] * 15, {"ce_not_falling": message}, *[None] * 17]

    healthy = tmp_path / "healthy"
    healthy.mkdir()
    (healthy / "metrics.jsonl").write_text(json.dumps(_step(1, "evaluate", **held_out)) + "\n")
    summary = summarize({"ntp": healthy, "ra3": tmp_path})
    entry = {"step": 16, "phase": "mstep", "round": 1, "name": "ce_not_falling", "message": message}
    assert summary["signatures"] == {"ntp": [], "ra3": [entry]}
    assert table(summary).splitlines()[-2:] == ["failure signatures", f"  ra3     ce_not_falling, round 1: {message}"]
    assert table(summarize({"ntp": healthy})).splitlines()[-1] == "failure signatures: none"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_ends_full_when_a_phase_ended_early(tmp_path, monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = _metrics(tmp_path)
    log.rewind(0, 3)
    log.shorten(6)
    log.write("mstep", _step(4, "mstep", loss=1.0))
    log.close()
    shown = terminal.getvalue()
    assert " 0/10 [" in shown
    assert " 3/4 [" in shown
    assert shown.rstrip().rpartition("\r")[2].startswith("100%")
    _metrics(tmp_path, writes=False).shorten(6)


@pytest.mark.parametrize("writes", [True, False])
def test_wandb_without_its_package_is_an_error_on_every_rank(tmp_path, monkeypatch, writes):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb_project='p': .* pip install wandb"):
        _open_wandb(tmp_path, "midtrain", writes=writes)


def _open_wandb(folder: Path, job_type: str, *, group: str = "", start: Path | None = None, writes: bool = True) -> Any:
    folder.mkdir(exist_ok=True)
    logging = LoggingConfig(wandb_project="p", wandb_group=group)
    return open_wandb(folder, logging, job_type=job_type, settings={"seed": 0}, start=start, writes=writes)


def test_a_run_is_one_wandb_run_in_one_group_with_what_it_goes_back_to(tmp_path, monkeypatch):
    """A stand-in gives back what wandb.init is called with."""
    stand_in = ModuleType("wandb")
    stand_in.__spec__ = ModuleSpec("wandb", None, origin="here")
    stand_in.init = lambda **arguments: arguments
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run = tmp_path / "ra3"
    first = _open_wandb(run, "midtrain", start=tmp_path / "models" / "base")
    assert first == {
        "project": "p", "dir": str(run), "id": first["id"], "name": "ra3", "group": "ra3", "job_type": "midtrain",
        "resume": "allow", "config": {"seed": 0},
    }  # fmt: skip
    assert len(first["id"]) == 12
    run = run.rename(tmp_path / "moved")
    requeued = _open_wandb(run, "midtrain")
    assert (requeued["id"], requeued["group"]) == (first["id"], "ra3")
    after = _open_wandb(tmp_path / "after", "rlvr", start=run / "export")
    assert (after["group"], after["job_type"], after["name"]) == ("ra3", "rlvr", "after")
    assert after["id"] != first["id"]
    assert _open_wandb(tmp_path / "scores", "eval", start=tmp_path / "after")["group"] == "ra3"
    assert _open_wandb(tmp_path / "other", "rlvr", start=run / "export", group="mine")["group"] == "mine"
    renamed = _open_wandb(run, "midtrain", group="mine")
    assert (renamed["id"], renamed["group"]) == (first["id"], "mine")
    assert _open_wandb(run, "midtrain", writes=False) is None
    assert open_wandb(run, LoggingConfig(), job_type="rlvr", settings={}) is None


def test_scores_of_an_evaluation_are_metrics_of_wandb():
    scores = {"pass@1": {"value": 0.5, "low": 0.4, "high": 0.6}, "pass@10": None}
    result = {"suites": {"humaneval": {"models": {"ra3": {"scores": scores}}}}}
    assert score_metrics(result) == {"humaneval/ra3/pass@1": 0.5}
