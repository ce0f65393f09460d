"""Tasks of a SLURM step without SLURM: ports that no two servers share, waits that end, and word of how it ended."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ra3.launch.task import Task, await_text, rank_environment, run_folder, share_of_devices, steps_saved

# Called as `-m megatron_ra3 COMMAND CONFIG ...`: a server listens on its port for a while; a rank leaves what it was
# given, then does what $PLAY says.
STAND_IN = """\
#!{python}
import json, os, pathlib, signal, socket, sys, time
if sys.argv[3] == "serve":
    listener = socket.create_server(("", int(sys.argv[-1].removeprefix("engine.port="))))
    time.sleep(60)
given = {{"argv": sys.argv[3:]}} | {{name: os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")}}
pathlib.Path("told-" + os.environ["RANK"]).write_text(json.dumps(given))
exec(os.environ["PLAY"])
"""


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Starts a task in tmp_path; returns its process."""
    stand_in = tmp_path / "stand_in"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    (tmp_path / "start").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    started = []

    def start(role, command, *, rank=0, tasks=1, engines=0, play=""):
        environment = {
            "SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": tasks,
            "SLURM_CPUS_ON_NODE": 2, "SLURMD_NODENAME": "n1", "RA3_ADDRESSES": "n0=127.0.0.2 n1=127.0.0.1",
            "RA3_START": tmp_path / "start", "RA3_ENGINES": engines, "PLAY": play,
        }  # fmt: skip
        argv = [sys.executable, "-m", "megatron_ra3.launch.task", role, str(stand_in), command, "run.yaml"]
        variables = os.environ | {name: str(value) for name, value in environment.items()}
        started.append(subprocess.Popen(argv, env=variables, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.kill()
        process.wait()


def test_servers_of_a_node_share_no_port_and_ranks_find_them(step, tmp_path):
    for index in range(2):
        step("engine", "serve", rank=index, tasks=2)
    ranks = [step("trainer", "midtrain", rank=rank, tasks=2, engines=2) for rank in range(2)]
    assert [rank.wait(30) for rank in ranks] == [0, 0]
    urls = [await_text(tmp_path / "start" / f"engine-{index}", 1) for index in range(2)]
    told = [json.loads((tmp_path / f"told-{rank}").read_text()) for rank in range(2)]
    for rank, given in enumerate(told):
        assert given["argv"] == ["midtrain", "run.yaml", f"engine.urls=[{','.join(urls)}]"]
        assert (given["RANK"], given["MASTER_ADDR"]) == (str(rank), "127.0.0.1")
    ports = [told[0]["MASTER_PORT"], *(url.removeprefix("http://127.0.0.1:") for url in urls)]
    assert told[1]["MASTER_PORT"] == ports[0]
    assert len(set(ports)) == 3


def test_the_rendezvous_is_rank_0s_alone_until_it_ends(step, tmp_path):
    rank = step("trainer", "midtrain", play="time.sleep(60)")
    port = int(await_text(tmp_path / "start" / "rendezvous", 20).rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    with socket.socket() as listener:  # as torch's store does
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
    assert rank.poll() is None


def test_how_a_rank_ended_and_what_was_saved_are_told(step, tmp_path):
    (tmp_path / "run.yaml").write_text("run_folder: run")
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    play = "pathlib.Path('run/checkpoints/step-00000007').mkdir(); os.kill(os.getpid(), signal.SIGKILL)"
    assert step("trainer", "midtrain", play=play).wait(30) == 137
    assert (tmp_path / "start" / "exit-0").read_text() == "137\n"
    assert (tmp_path / "start" / "saved").read_text() == "4\n7\n"


def test_a_task_outlives_the_signals_that_its_command_gets_itself(step, tmp_path):
    task = step("trainer", "midtrain", play="time.sleep(1); sys.exit(75)")
    while not (tmp_path / "told-0").exists():
        assert task.poll() is None
    for number in (signal.SIGUSR1, signal.SIGTERM):
        task.send_signal(number)
    assert task.wait(30) == 75


def test_a_peer_that_does_not_come_is_named(tmp_path):
    with pytest.raises(TimeoutError, match=r"engine-3 was not published in .* within 0.1 s"):
        await_text(tmp_path / "engine-3", 0.1)


def test_what_a_task_needs_is_named():
    with pytest.raises(ValueError, match="no 'SLURM_STEP_NUM_TASKS' in the environment"):
        Task.of({})


def test_ranks_divide_the_cpus_of_a_node(monkeypatch):
    task = Task(3, 1, world_size=8, local_world_size=2, cpus=9, address="a", meeting=Path(), engines=0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert rank_environment(task, "fe80::1:2:29500") == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "fe80::1:2", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "4",
    }  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(task, "a:1")["OMP_NUM_THREADS"] == "7"


def test_engines_divide_the_devices_of_a_node():
    assert [share_of_devices(None, index, 2) for index in range(2)] == ["0,1", "2,3"]
    assert share_of_devices("4,5,6,7", 1, 2) == "6,7"
    assert share_of_devices("4,5", 1, 0) == ""
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=4,5: engine 1"):
        share_of_devices("4,5", 1, 2)


def test_the_run_folder_is_read_off_any_configuration(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("run_folder: one\nother: {run_folder: no}")
    assert run_folder(config, ["em.rounds=1"]) == Path("one")
    assert run_folder(config, ["run_folder=two", "run_folder = three"]) == Path("three")
    config.write_text("- a list")
    assert run_folder(config, []) is None
    assert run_folder(tmp_path / "none.yaml", []) is None


def test_only_whole_checkpoints_count_as_saved(tmp_path):
    assert steps_saved(None) == steps_saved(tmp_path) == 0
    for name in ("step-00000040", "step-00000100", ".saving-step-00000200", "damaged-step-00000300", "step-new"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_saved(tmp_path) == 100
