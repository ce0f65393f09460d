"""The job scripts under a real Slurm: ranks, ports, addresses, logs, starts, exit codes, and nothing left behind.

A shell script stands in for the `ra3` command here, so that only the launch is under test.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from megatron_ra3.cli import main

pytestmark = pytest.mark.slurm

SCRIPTS = Path(__file__).parents[2] / "slurm"

# Called as `-m megatron_ra3 serve|midtrain|rlvr ...`; leaves what it saw in $SEEN/<command>-<SLURM_PROCID>. Then a rank
# plays $PLAY; $start is the number of the job's start, and `save N` leaves checkpoint N.
STAND_IN = """\
#!/usr/bin/env bash
[[ $2 == megatron_ra3 ]] || exec "$REAL_PYTHON" "$@"
command=$3 start=${RA3_START##*-}
save() { mkdir -p "run/checkpoints/step-0000000$1"; }
trap 'echo "told to stop"; save 1; exit 75' USR1
{
    printf 'pid=%s\\n' $$
    env | grep -E '^((LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|SLURMD_NODENAME|CUDA_VISIBLE_DEVICES|MARK)='
    env | grep -E '^(SLURM_JOB_END_TIME|SLURM_RESTART_COUNT)='
    printf 'argv=%s\\n' "$*"
} >"$SEEN/.$command-$SLURM_PROCID"
mv "$SEEN/.$command-$SLURM_PROCID" "$SEEN/$command-$SLURM_PROCID"
echo "$command $SLURM_PROCID speaks"
if [[ $command == serve ]]; then
    exec sleep 1000
fi
for ((tick = 0; tick < 300; tick++)); do
    if (($(ls "$SEEN" | wc -l) == EXPECTED)); then
        eval "$PLAY"
        exit 0
    fi
    sleep 0.1
done
exit 99
"""


class Cluster:
    """Submits a script from a folder of its own and waits for the end of the job."""

    def __init__(self, slurm, folder):
        self.slurm = slurm
        self.folder = folder
        (folder / "config.yaml").write_text("{run_folder: run, corpus: {folder: corpus}, model: {folder: model}}\n")
        self.stand_in = folder / "stand_in"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(0o755)
        self.seen = folder / "seen"
        self.seen.mkdir()
        self.env = {
            "SEEN": str(self.seen), "RA3_PYTHON": str(self.stand_in), "REAL_PYTHON": sys.executable,
            "RA3_LOG_DIR": str(folder / "logs"), "PLAY": ":",
        }  # fmt: skip

    def submit(self, *options, script="ra3_midtrain", arguments=("config.yaml", "em.rounds=2"), **env):
        """Returns (exit code, what each task saw, logs); `env` is seen by the job."""
        submitted = self.slurm.run(
            "sbatch", "--parsable", f"--chdir={self.folder}", *options, str(SCRIPTS / f"{script}.sbatch"), *arguments,
            timeout_s=20, **(self.env | env),
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        job_id = int(submitted.stdout)
        code = self.slurm.exit_code(job_id, timeout_s=150)
        return code, self.tasks(), self.logs(f"{script.replace('_', '-')}-{job_id}")

    def tasks(self):
        return {
            task.name: dict(line.split("=", 1) for line in task.read_text().splitlines())
            for task in self.seen.iterdir()
        }

    def logs(self, name):
        return {log.name: log.read_text() for log in (self.folder / "logs" / name).glob("*.log")}


@pytest.fixture
def cluster(slurm, tmp_path):
    return Cluster(slurm, tmp_path)


def alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_trainers_and_engines_share_one_allocation(cluster):
    code, tasks, logs = cluster.submit(
        "--nodes=3", "--gpus-per-node=0", RA3_TASKS_PER_NODE="2", RA3_ENGINES_PER_NODE="2", EXPECTED="6",
        RA3_MAX_STARTS="1", PLAY="((SLURM_PROCID != 1)) || exit 7",
    )  # fmt: skip
    assert code == 7, json.dumps(logs, indent=1)
    assert sorted(tasks) == [*(f"midtrain-{rank}" for rank in range(4)), "serve-0", "serve-1"]
    urls = []
    for index in range(2):
        task = tasks[f"serve-{index}"]
        argv, _, port = task["argv"].rpartition("=")
        assert argv == "-m megatron_ra3 serve config.yaml em.rounds=2 engine.host=0.0.0.0 engine.port"
        urls.append(f"http://127.0.0.1:{port}")
        assert task["SLURMD_NODENAME"] == "n3"
        assert "CUDA_VISIBLE_DEVICES" not in task
        assert f"serve {index} speaks" in logs[f"engine-{index}.log"]
    for rank in range(4):
        task = tasks[f"midtrain-{rank}"]
        assert task["argv"] == f"-m megatron_ra3 midtrain config.yaml em.rounds=2 engine.urls=[{','.join(urls)}]"
        assert (task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert (task["LOCAL_WORLD_SIZE"], task["SLURMD_NODENAME"]) == ("2", f"n{1 + rank // 2}")
        assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("127.0.0.1", tasks["midtrain-0"]["MASTER_PORT"])
        assert 0 < float(task["SLURM_JOB_END_TIME"]) - time.time() <= 60 * 60  # the partition's limit
        assert f"midtrain {rank} speaks" in logs[f"trainer-{rank}.log"]
    assert len({tasks["midtrain-0"]["MASTER_PORT"], *(url.rpartition(":")[2] for url in urls)}) == 3
    assert "giving up: 1 starts in a row have saved no new checkpoint; see" in logs["batch.log"]

    deadline = time.monotonic() + 10
    while any(alive(task["pid"]) for task in tasks.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [name for name, task in tasks.items() if alive(task["pid"])]


def test_ranks_and_engines_divide_the_gpus_of_a_node(cluster):
    code, tasks, logs = cluster.submit(
        "--nodes=2", "--gpus-per-node=4", script="ra3_rlvr", RA3_ENGINES_PER_NODE="2", EXPECTED="6",
        RA3_CONTAINER="env MARK=inside",
    )  # fmt: skip
    assert code == 0, json.dumps(logs, indent=1)
    assert [tasks[f"rlvr-{rank}"]["LOCAL_RANK"] for rank in range(4)] == ["0", "1", "2", "3"]
    assert [tasks[f"serve-{index}"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["0,1", "2,3"]
    assert {task["MARK"] for task in tasks.values()} == {"inside"}


def test_components_of_a_heterogeneous_job_are_trainers_and_engines(cluster):
    code, tasks, logs = cluster.submit(
        "--nodes=2", "--gpus-per-node=h100:1", ":", "--nodes=1", "--exclusive", "--gpus-per-node=4",
        RA3_ENGINES_PER_NODE="2", EXPECTED="4",
    )  # fmt: skip
    assert code == 0, json.dumps(logs, indent=1)
    nodes = {name: task["SLURMD_NODENAME"] for name, task in tasks.items()}
    assert nodes == {"midtrain-0": "n1", "midtrain-1": "n2", "serve-0": "n3", "serve-1": "n3"}
    assert tasks["midtrain-1"]["WORLD_SIZE"] == "2"
    assert [tasks[f"serve-{index}"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["0,1", "2,3"]


def test_the_signal_before_the_time_limit_ends_in_a_requeue(cluster):
    signal_itself = '((SLURM_PROCID)) || scancel --batch --signal=USR1 "$SLURM_JOB_ID"; sleep 20 & wait'
    code, tasks, logs = cluster.submit(
        "--nodes=1", "--gpus-per-node=0", RA3_ENGINE_NODES="0", RA3_TASKS_PER_NODE="2", EXPECTED="2",
        PLAY=f"((start > 1)) || {{ {signal_itself}; }}",
    )  # fmt: skip
    assert code == 0, json.dumps(logs, indent=1)
    assert sorted(tasks) == ["midtrain-0", "midtrain-1"]
    assert tasks["midtrain-0"]["argv"] == "-m megatron_ra3 midtrain config.yaml em.rounds=2"
    assert tasks["midtrain-0"]["SLURM_RESTART_COUNT"] == "1"
    for rank in range(2):
        said = logs[f"trainer-{rank}.log"]
        assert (said.count("told to stop"), said.count("speaks")) == (1, 2)
    assert "start 1 ended with exit code 75; 0 starts in a row have saved no new checkpoint" in logs["batch.log"]


def test_a_killed_rank_starts_again_on_the_same_nodes(cluster):
    code, tasks, logs = cluster.submit(
        "--nodes=2", "--gpus-per-node=0", RA3_ENGINE_NODES="0", EXPECTED="2",
        PLAY="((start == 2)) || { save 1; ((SLURM_PROCID)) && kill -KILL $$; sleep 20; }",
    )  # fmt: skip
    assert code == 0, json.dumps(logs, indent=1)
    assert "SLURM_RESTART_COUNT" not in tasks["midtrain-0"]
    assert "start 1 ended with exit code 137; " in logs["batch.log"]
    assert "start 2 ended with exit code 0; " in logs["batch.log"]


def test_starts_that_get_nowhere_end(cluster):
    code, tasks, logs = cluster.submit(
        "--nodes=1", "--gpus-per-node=0", RA3_ENGINE_NODES="0", EXPECTED="1", PLAY="save 4; exit 76"
    )
    assert code == 76
    assert tasks["midtrain-0"]["SLURM_RESTART_COUNT"] == "1", "the last start was on other nodes, or might have been"
    said = logs["batch.log"]
    assert [f"; {count} starts in a row" in said for count in range(4)] == [True] * 4
    assert said.count("no new checkpoint: requeue") == 1
    assert "giving up: 3 starts in a row" in said


def test_too_few_nodes_are_named(cluster):
    code, tasks, logs = cluster.submit("--nodes=1", "--gpus-per-node=0", RA3_ENGINE_NODES="1")
    assert (code, tasks) == (2, {})
    assert "RA3_ENGINE_NODES=1 leaves no trainer node of 1" in logs["batch.log"]


def test_jobs_of_a_chain_go_on_and_return_at_once_behind_the_end(cluster, monkeypatch, capsys):
    environment = {"PLAY": "((start > 1)) || { save 1; exit 75; }", "EXPECTED": "1"}
    for name, value in (cluster.slurm.env | cluster.env | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(cluster.folder)
    options = ["--nodes=1", "--engine-nodes=0", "--gpus-per-node=0", "--chain=3", "--submit"]
    assert main(["submit", *options, "config.yaml", "em.rounds=1"]) == 0
    ids = capsys.readouterr().out.removeprefix("submitted ").strip().split(", ")
    assert [cluster.slurm.exit_code(int(job_id), timeout_s=60) for job_id in ids] == [75, 0, 0]
    logs = cluster.logs(f"ra3-midtrain-{ids[0]}")
    assert logs["trainer-0.log"].count("speaks") == 2
    assert "an earlier job of this chain has finished the run" in logs["batch.log"]
    assert cluster.tasks()["midtrain-0"]["argv"] == "-m megatron_ra3 midtrain config.yaml em.rounds=1"
