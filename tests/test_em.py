"""The whole loop, small and in process: what it writes, that stopping anywhere changes nothing, and its errors."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ra3.cli import main
from megatron_ra3.config import RunConfig
from megatron_ra3.corpus.manifest import Manifest, TokenForm
from megatron_ra3.corpus.pretokenize import pretokenize_shards
from megatron_ra3.em import midtrain
from megatron_ra3.latents import LatentFormat
from megatron_ra3.lifecycle import StopRequestedError
from megatron_ra3.observe.shares import awaited, shares
from megatron_ra3.observe.timeline import meetings, read_timeline
from megatron_ra3.rollout.engine import EngineError, EnginesLostError
from megatron_ra3.rollout.fleet import InProcess
from megatron_ra3.rollout.inprocess import InProcessEngine
from megatron_ra3.settings import to_dict
from tests.distributed import run_ranks
from tests.small import make_config

PHASES = ["warmup"] * 2 + ["estep"] * 3 + ["bootstrap"] * 2 + ["mstep"] * 2 + ["evaluate"]


def _metrics(config: RunConfig) -> list[dict[str, Any]]:
    lines = Path(config.run_folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def whole(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An uninterrupted run; that a step of it is profiled changes nothing."""
    config = make_config(small_corpus, tmp_path_factory.mktemp("whole"), "profile.steps=[4,4]")
    midtrain(config)
    return config


def test_a_run_writes_every_phase_its_samples_summary_and_export(whole):
    metrics = _metrics(whole)
    assert [record["phase"] for record in metrics] == PHASES
    assert [record["step"] for record in metrics] == list(range(1, 11))
    estep = metrics[2]
    assert 0.1 < estep["think_rate"] < 0.9
    assert estep["reward"] < 0 < estep["nats_per_line"]
    assert estep["mismatch"] < 1e-5
    assert estep["effective_samples"] < 0.99  # the gate is drawn half at random
    summary = json.loads(Path(whole.run_folder, "summary.json").read_text())
    assert summary["evaluate"]["nats_per_code_token"] == metrics[-1]["nats_per_code_token"]
    assert 3 < metrics[-1]["nats_per_code_token"] < 9
    samples = [json.loads(line) for line in Path(whole.run_folder, "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    assert all(sample["text"].startswith("\n") for sample in samples)
    exported = {path.name for path in Path(whole.run_folder, "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported


def test_a_run_can_be_looked_into(whole, capsys):
    run = Path(whole.run_folder)
    assert main(["timeline", str(run)]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{phase} " in printed for phase in set(PHASES))
    trace = json.loads((run / "timeline.json").read_text())["traceEvents"]
    names = {event["name"] for event in trace if event["ph"] == "X"}
    assert {f"{phase} {step}" for step, phase in enumerate(PHASES, 1)} <= names
    assert {"rendezvous", "model load", "corpus", "sampling", "scoring", "backward", "optimizer"} <= names
    assert {"weight sync", "checkpoint", "checkpoint, writing", "export"} <= names
    (profile,) = (run / "profile").iterdir()
    assert profile.name == "step-00000004-rank-00000.json.gz"
    assert any("aten::" in event["name"] for event in json.loads(gzip.decompress(profile.read_bytes()))["traceEvents"])
    assert main(["watch", "--once", str(run)]) == 0
    screen = capsys.readouterr().out
    assert "midtrain on 1 ranks\nstep 10 of 10, evaluate of round 1" in screen
    assert "held-out nats_per_code_token" in screen


def test_stored_token_ids_give_the_same_run_where_they_fit(whole, small_corpus, tmp_path, monkeypatch, capfd):
    corpus = tmp_path / "corpus"
    shutil.copytree(small_corpus, corpus)
    manifest = Manifest.load(corpus)
    form = TokenForm(manifest.tokenizer_sha256, "newline", "observe")
    splits = {
        name: replace(
            split,
            shards=pretokenize_shards(
                [corpus / shard.tar.name for shard in split.shards], corpus / "tokenizer", form, 1
            ),
        )
        for name, split in manifest.splits.items()
    }
    replace(manifest, splits=splits, token_form=form).save(corpus)
    config = make_config(corpus, tmp_path / "fits", "em.rounds=0")
    with monkeypatch.context() as patched:
        patched.delattr(LatentFormat, "tokenize")
        midtrain(config)
    assert _metrics(config)[:2] == _metrics(whole)[:2]
    assert "token ids are not used" not in capfd.readouterr().out
    midtrain(make_config(corpus, tmp_path / "other", "em.rounds=0", "warmup.steps=1", "latents.surface=special"))
    assert capfd.readouterr().out.count("token ids are not used: they were made with surface=newline") == 1


def test_next_token_training_learns(small_corpus, tmp_path):
    config = make_config(small_corpus, tmp_path, "em.rounds=0", "warmup.steps=60")
    midtrain(config)
    losses = [record["loss"] for record in _metrics(config)[:-1]]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5.0


def test_rollouts_of_other_weights_are_refused(small_corpus, tmp_path, monkeypatch):
    """As of an engine that another run shares, or that was restarted with the weights it began with."""
    monkeypatch.setattr(InProcessEngine, "set_version", lambda engine, version: None)
    with pytest.raises(EngineError, match=r"weight versions \[0\], the trainer is at 2: .*engine\.urls"):
        midtrain(make_config(small_corpus, tmp_path))


def test_a_run_without_engines_ends_as_it_was_before_the_step_that_needed_them(
    whole, small_corpus, tmp_path, monkeypatch
):
    lead, calls = InProcess.lead, []

    def lose_engines(engine, work):
        calls.append(work)
        if len(calls) in (3, 8):  # the second E-step, and in the end the bootstrap, which has cleared its store
            raise EnginesLostError("replica 0 has no engine: http://a lost (it died)")
        return lead(engine, work)

    monkeypatch.setattr(InProcess, "lead", lose_engines)
    config = make_config(small_corpus, tmp_path)
    for step in (3, 5):
        with pytest.raises(StopRequestedError, match=rf"stopped after step {step}: replica 0 .*; saved, the same"):
            midtrain(config)
    midtrain(config)
    assert _metrics(config) == _metrics(whole)


@pytest.mark.parametrize("stops", [(4,), (6, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1, 1)])
def test_stopping_anywhere_and_resuming_changes_nothing(whole, small_corpus, tmp_path, stops):
    for steps in stops:
        with pytest.raises(StopRequestedError):
            midtrain(make_config(small_corpus, tmp_path, f"checkpoint.stop_after_steps={steps}"))
    config = make_config(small_corpus, tmp_path)
    midtrain(config)
    assert _metrics(config) == _metrics(whole)
    exports = [Path(run.run_folder, "export", "model.safetensors").read_bytes() for run in (config, whole)]
    assert exports[0] == exports[1]
    samples = [Path(run.run_folder, "samples.jsonl").read_bytes() for run in (config, whole)]
    assert samples[0] == samples[1]


def test_a_killed_process_resumes_by_the_same_command(whole, small_corpus, tmp_path):
    config = make_config(small_corpus, tmp_path, "checkpoint.every_steps=3")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "megatron_ra3", "midtrain", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if "bootstrap r1 1/2" in line:
            process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "resumed from" in done.stdout
    assert _metrics(config) == _metrics(whole)


def test_a_scheduler_signal_saves_and_ends_with_its_own_code(whole, small_corpus, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(make_config(small_corpus, tmp_path))))
    command = [sys.executable, "-m", "megatron_ra3", "midtrain", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if "estep r1 1/3" in line:
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGUSR1)  # as from a launcher's wrapper that passes it on
    assert process.wait() == 75
    assert "by SIGUSR1; saved" in output[-1]
    midtrain(make_config(small_corpus, tmp_path))
    assert _metrics(make_config(small_corpus, tmp_path)) == _metrics(whole)


def _run(config: RunConfig) -> None:
    midtrain(config)


@pytest.mark.parametrize("overrides", [("parallel.tensor=2",), ("parallel.distributed_optimizer=true",)])
def test_two_ranks_resume_bit_for_bit(small_corpus, tmp_path, overrides):
    whole, parts = (make_config(small_corpus, tmp_path / name, *overrides) for name in ("whole", "parts"))
    run_ranks(_run, 2, whole, timeout_s=300)
    stopping = make_config(small_corpus, tmp_path / "parts", *overrides, "checkpoint.stop_after_steps=6")
    with pytest.raises(RuntimeError, match="StopRequestedError"):
        run_ranks(_run, 2, stopping, timeout_s=300)
    run_ranks(_run, 2, parts, timeout_s=300)
    assert [record["phase"] for record in _metrics(parts)] == PHASES
    assert _metrics(parts) == _metrics(whole)
    timeline = read_timeline(Path(parts.run_folder))
    met = list(meetings(timeline.spans))
    assert len({members[0].start for members in met}) == 2  # before and after the stop
    assert all({span.rank for span in members} == {0, 1} for members in met)
    assert len({members[0].what for members in met}) > 3
    assert {"rank 0", "rank 1"} & awaited(shares(timeline)).keys()


def _run_out_of_disk(config: RunConfig) -> str:
    """Let no file grow beyond what a checkpoint needs, as a full disk would; return the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    try:
        midtrain(config)
    except OSError as error:
        return str(error)
    return "no error"


def test_a_save_that_does_not_fit_is_reported_and_loses_nothing(whole, small_corpus, tmp_path):
    with pytest.raises(StopRequestedError):
        midtrain(make_config(small_corpus, tmp_path, "checkpoint.stop_after_steps=3"))
    (message,) = run_ranks(_run_out_of_disk, 1, make_config(small_corpus, tmp_path, "checkpoint.every_steps=5"))
    assert "cannot save checkpoint" in message
    assert "step-00000005" in message
    assert "earlier checkpoints are untouched" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    midtrain(make_config(small_corpus, tmp_path))
    assert _metrics(make_config(small_corpus, tmp_path)) == _metrics(whole)


def test_resuming_something_else_is_refused(whole, small_corpus, tmp_path):
    shutil.copytree(whole.run_folder, tmp_path / "run")
    with pytest.raises(ValueError, match=r"objective\.penalty: 0\.05 in the checkpoint, 0\.2 now"):
        midtrain(make_config(small_corpus, tmp_path, "objective.penalty=0.2"))


def test_a_lost_annotation_file_is_named(small_corpus, tmp_path):
    with pytest.raises(StopRequestedError):
        midtrain(make_config(small_corpus, tmp_path, "checkpoint.stop_after_steps=7"))
    (tmp_path / "run" / "annotated" / "replica-00000.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"replica-00000\.jsonl: holds 0 bytes but the checkpoint counts"):
        midtrain(make_config(small_corpus, tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("corpus.max_snippet_tokens=200",), "model has 256 positions; lower it to 128"),
        (("parallel.tensor=2",), "cannot be split into replicas of tp=2"),
        (("model.folder=/nonexistent",), "has no config.json"),
        (("corpus.tokenizer=/nonexistent",), "nonexistent"),
        (("corpus.folder=/nonexistent",), "nonexistent"),
    ],
)
def test_bad_settings_are_named_before_anything_starts(small_corpus, tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError), match=message):
        midtrain(make_config(small_corpus, tmp_path, *overrides))
