"""The `ra3` command: weights in and out, the table, wandb, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megatron_ra3.cli import main
from megatron_ra3.config import RunConfig
from megatron_ra3.em import midtrain
from megatron_ra3.settings import to_dict
from tests.distributed import run_ranks
from tests.small import make_config


def _write_config(folder: Path, corpus: Path, *overrides: str) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(make_config(corpus, folder, *overrides))))
    return str(path)


def test_weights_pass_through_a_checkpoint_unchanged(small_corpus, tmp_path, capsys):
    config = _write_config(tmp_path, small_corpus)
    assert main(["import", config]) == 0
    assert main(["export", config, str(tmp_path / "out")]) == 0
    assert "step-00000000" in capsys.readouterr().out
    original = load_file(tmp_path / "run" / "initial" / "model.safetensors")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert original.keys() == exported.keys()
    assert all(original[name].equal(exported[name]) for name in original)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["import", config]) == 2
    assert "give the import a run_folder of its own" in capsys.readouterr().err


def test_exporting_beside_a_stopped_run_changes_nothing_in_it(small_corpus, tmp_path):
    config = _write_config(tmp_path, small_corpus, "checkpoint.every_steps=2", "em.rounds=0", "warmup.steps=3")
    midtrain(make_config(small_corpus, tmp_path, "checkpoint.every_steps=2", "em.rounds=0", "warmup.steps=3"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(["export", config, str(tmp_path / "out")]) == 0
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


def _midtrain(config: RunConfig) -> None:
    midtrain(config)


@pytest.mark.parametrize("override", ["parallel.tensor=2", "parallel.distributed_optimizer=true"])
def test_one_process_exports_what_two_ranks_saved(small_corpus, tmp_path, override):
    overrides = ("em.rounds=0", override)
    config = _write_config(tmp_path, small_corpus, *overrides)
    run_ranks(_midtrain, 2, make_config(small_corpus, tmp_path, *overrides))
    assert main(["export", config, str(tmp_path / "out")]) == 0
    at_the_end = {path.name: path.read_bytes() for path in (tmp_path / "run" / "export").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= at_the_end.keys()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == at_the_end
    initial = load_file(tmp_path / "run" / "initial" / "model.safetensors")
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(initial[name].equal(trained[name]) for name in initial)


def test_exporting_with_another_models_config_is_an_error(small_corpus, tmp_path, capsys):
    config = _write_config(tmp_path, small_corpus)
    assert main(["import", config]) == 0
    path = tmp_path / "run" / "initial" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5.0}))
    assert main(["export", config, str(tmp_path / "out")]) == 2
    assert "describes another model than" in capsys.readouterr().err
    path.unlink()
    assert main(["export", config, str(tmp_path / "out")]) == 2
    assert "config.json does not exist: put back" in capsys.readouterr().err


def test_exporting_a_run_without_checkpoint_is_an_error(small_corpus, tmp_path, capsys):
    assert main(["export", _write_config(tmp_path, small_corpus), str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_report_puts_runs_side_by_side(tmp_path, capsys):
    for name, nats in (("base", 4.0), ("ra3", 3.5)):
        folder = tmp_path / name
        folder.mkdir()
        records = [
            {"phase": "estep", "reward": -5.0, "seconds": 1.5},
            {"phase": "estep", "reward": -3.0, "seconds": 2.5},
            {"phase": "mstep", "tokens": 100.0, "seconds": 1.0},
            {
                "phase": "evaluate",
                "nats_per_code_token": nats,
                "act_nats_per_code_token": nats + 0.25,
                "think_rate": 0.2,
                "rationale_tokens": 6.0,
                "seconds": 1.0,
            },
        ]
        kept = records if name == "ra3" else records[2:]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    out = tmp_path / "summary.json"
    assert main(["report", f"base={tmp_path / 'base'}", f"ra3={tmp_path / 'ra3'}", "--out", str(out)]) == 0
    summary = json.loads(out.read_text())
    assert summary["nats_per_code_token"] == {"base": 4.0, "ra3": 3.5}
    assert summary["act_only"] == {"base": 4.25, "ra3": 3.75}
    assert (summary["reward_first"], summary["reward_last"], summary["think_rate"]) == (-5.0, -3.0, 0.2)
    assert summary["seconds"]["ra3.estep"] == 4.0
    printed = capsys.readouterr().out
    assert "3.5000" in printed
    assert "think rate        20.0 %" in printed
    assert main(["report", f"base={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_config_typo_is_one_line_and_status_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_folder: r\nobjective: {penalti: 1}\n")
    command = [sys.executable, "-m", "megatron_ra3", "midtrain", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "ra3 midtrain: unknown config key 'objective.penalti'; did you mean 'objective.penalty'?\n"


def test_a_reader_that_has_enough_ends_the_command_silently(small_corpus):
    """More is printed than a pipe holds; the reader takes a line of it and leaves."""
    command = [sys.executable, "-m", "megatron_ra3", "corpus", "head", str(small_corpus), "-n", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("==> ")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_another_broken_pipe_is_an_error_as_any(monkeypatch, capfd):
    def lose_a_connection(_folder):
        raise BrokenPipeError(32, "Broken pipe", "engine")

    monkeypatch.setattr("megatron_ra3.corpus.commands.Manifest.load", lose_a_connection)
    assert main(["corpus", "stats", "c"]) == 2
    assert capfd.readouterr().err == "ra3 corpus: [Errno 32] Broken pipe: 'engine'\n"


def test_wandb_gets_the_metrics_offline(small_corpus, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    midtrain(make_config(small_corpus, tmp_path, "em.rounds=0", "logging.wandb_project=ra3"))
    assert wandb.run is None
    (recorded,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"act_nats_per_code_token" in recorded.read_bytes()
