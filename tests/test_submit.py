"""`ra3 submit` prints what sbatch is to be given, for one job, two kinds of nodes and a chain, and refuses mistakes."""

import shlex
from pathlib import Path

import pytest

from megatron_ra3.cli import main
from megatron_ra3.launch import submit
from megatron_ra3.launch.submit import Submission

SLURM = Path(__file__).parents[1] / "slurm"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{run_folder: run, corpus: {folder: corpus}, model: {folder: model}}")
    return str(path)


def printed(capsys, *arguments):
    assert main(["submit", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_job(config, capsys):
    options = ["--nodes", "3", "--engine-nodes=2", "--time=1:00:00", "--partition=p", "--account=a", "--sbatch=--qos=q"]
    (line,) = printed(capsys, *options, config, "em.rounds=2", "model.folder=a model")
    assert shlex.split(line) == [
        "sbatch", "--parsable", "--nodes=3", "--export=ALL,RA3_ENGINE_NODES=2", "--time=1:00:00", "--partition=p",
        "--account=a", "--qos=q", str(SLURM / "ra3_midtrain.sbatch"), config, "em.rounds=2", "model.folder=a model",
    ]  # fmt: skip


def test_engines_on_nodes_of_another_kind(tmp_path, capsys):
    config = str(tmp_path / "rlvr.yaml")
    tasks = "tasks: {file: tasks.jsonl, format: input_output}, evaluate: {every_steps: 0}"
    Path(config).write_text(f"{{run_folder: run, model: {{folder: model}}, {tasks}}}")
    (line,) = printed(
        capsys, "--job=rlvr", "--nodes=5", "--engine-nodes=3", "--time=60", "--engine-sbatch=--partition=e", config
    )
    assert shlex.split(line) == [
        "sbatch", "--parsable", "--nodes=2", "--export=ALL,RA3_ENGINE_NODES=3", "--time=60",
        ":", "--nodes=3", "--exclusive", "--mem=0", "--time=60", "--partition=e",
        str(SLURM / "ra3_rlvr.sbatch"), config,
    ]  # fmt: skip


def test_the_settings_are_read_before_anything_is_submitted(config, capsys):
    for job, key in (("midtrain", "rlvr"), ("rlvr", "corpus")):
        assert main(["submit", f"--job={job}", config, "rlvr.steps=2"]) == 2
        assert f"unknown config key {key!r}" in capsys.readouterr().err


def test_a_chain_waits_for_one_another_and_shares_its_logs(config, capsys):
    script = SLURM / "ra3_midtrain.sbatch"
    later = f"--no-requeue --dependency=afterany:$previous {script} {config}"
    assert printed(capsys, "--chain=3", config) == [
        f"previous=$(sbatch --parsable --nodes=2 --export=ALL,RA3_ENGINE_NODES=1 --no-requeue {script} {config})",
        "first=$previous",
        *[f"previous=$(sbatch --parsable --nodes=2 --export=ALL,RA3_ENGINE_NODES=1,RA3_CHAIN=$first {later})"] * 2,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes=2", "--engine-nodes=2"], "one node must be left for the trainers"),
        (["--engine-nodes=0", "--engine-sbatch=--partition=e"], "there are no engine nodes"),
        (["--chain=0"], "--chain 0: must be at least 1"),
        (["em.rouds=2"], "em.rounds"),
    ],
)
def test_mistakes_show_before_the_queue(arguments, message, config, capsys):
    assert main(["submit", config, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_refusal_names_what_is_queued_already(config, monkeypatch, tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\n[ ! -e submitted ] || { echo 'no more jobs' >&2; exit 1; }\ntouch submitted\necho '7;here'\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no more jobs after 7, which stay in the queue"):
        Submission(job="midtrain", config=Path(config), chain=2).submit()


def test_without_a_checkout_there_is_no_script(config, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(submit, "SCRIPTS", tmp_path)
    assert main(["submit", config]) == 2
    assert "submit from a checkout" in capsys.readouterr().err
