"""The logs of a run: cut back to a checkpoint or refused, a bar that knows when a run gets shorter, one wandb run."""

import hashlib
import io
import json
import sys
from pathlib import Path

import pytest

from megatron_ra3.report.metrics import MetricsLog
from megatron_ra3.report.samples import SampleLog


class _Characters:
    def decode(self, ids):
        return "".join(chr(token) for token in ids)


def _metrics(folder: Path, *, writes: bool = True, wandb_project: str = "") -> MetricsLog:
    return MetricsLog(folder, total_steps=10, writes=writes, wandb_project=wandb_project, settings={"seed": 0})


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_go_on_from_a_checkpoint_without_a_step_twice(tmp_path):
    log = _metrics(tmp_path)
    for step in (1, 2):
        log.write("warmup", {"step": step})
    saved = log.offset
    assert saved == (tmp_path / "metrics.jsonl").stat().st_size
    log.write("warmup", {"step": 3})
    log.close()
    resumed = _metrics(tmp_path)
    resumed.rewind(saved, 2)
    resumed.write("warmup", {"step": 3})
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


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_ends_full_when_a_phase_ended_early(tmp_path, monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = _metrics(tmp_path)
    log.rewind(0, 3)
    log.shorten(6)
    log.write("mstep", {"step": 4})
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
        _metrics(tmp_path, writes=writes, wandb_project="p")


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "elsewhere").mkdir()
    _metrics(tmp_path / "elsewhere" / "..", wandb_project="ra3").close()
    (recorded,) = (tmp_path / "wandb").glob("offline-run-*")
    assert recorded.name.rpartition("-")[2] == hashlib.sha1(str(tmp_path.resolve()).encode()).hexdigest()[:12]
