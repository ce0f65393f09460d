"""slurm/ra3_midtrain.sbatch under a real Slurm: ranks, ports, addresses, logs, exit code, and nothing left behind.

A shell script stands in for the Python interpreter here, so that only the launch is under test.
"""

import json
import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).parents[2] / "slurm" / "ra3_midtrain.sbatch"

# Called as `-m megatron_ra3 serve|midtrain ...`; leaves what it saw in $SEEN/<command>-<SLURM_PROCID>.
STAND_IN = """\
#!/usr/bin/env bash
command=$3
trap 'echo "told to stop"; exit 9' USR1
{
    printf 'pid=%s\\n' $$
    env | grep -E '^((LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|SLURMD_NODENAME|CUDA_VISIBLE_DEVICES|MARK)='
    printf 'argv=%s\\n' "$*"
} >"$SEEN/.$command-$SLURM_PROCID"
mv "$SEEN/.$command-$SLURM_PROCID" "$SEEN/$command-$SLURM_PROCID"
echo "$command $SLURM_PROCID speaks"
if [[ $command == serve ]]; then
    exec sleep 1000
fi
if [[ -n ${NEAR_TIME_LIMIT:-} && $SLURM_PROCID == 0 ]]; then
    until [[ -e $SEEN/midtrain-1 ]]; do sleep 0.1; done
    scancel --batch --signal=USR1 "$SLURM_JOB_ID"
fi
for ((tick = 0; tick < 300; tick++)); do
    if (($(ls "$SEEN" | wc -l) == EXPECTED)); then
        ((SLURM_PROCID == 1)) && exit "$LAST_EXIT_CODE"
        exit 0
    fi
    sleep 0.1
done
exit 99
"""


@pytest.fixture
def job(slurm, tmp_path):
    """Submit the script from a folder of its own, wait for its end; returns (exit code, what each task saw, logs)."""
    (tmp_path / "config.yaml").write_text("{}\n")
    stand_in = tmp_path / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    seen = tmp_path / "seen"
    seen.mkdir()

    def submit(*options, **env):
        submitted = slurm.run(
            "sbatch", "--parsable", "--gpus-per-node=0", f"--chdir={tmp_path}", *options,
            str(SCRIPT), "config.yaml", "em.rounds=2",
            timeout_s=20, SEEN=str(seen), RA3_PYTHON=str(stand_in), RA3_LOG_DIR=str(tmp_path / "logs"), **env,
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        job_id = int(submitted.stdout)
        code = slurm.exit_code(job_id, timeout_s=150)
        logs = {log.name: log.read_text() for log in (tmp_path / "logs" / f"ra3-midtrain-{job_id}").glob("*")}
        tasks = {
            task.name: dict(line.split("=", 1) for line in task.read_text().splitlines()) for task in seen.iterdir()
        }
        return code, job_id, tasks, logs

    return submit


def alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_trainers_and_engines_share_one_allocation(job):
    code, job_id, tasks, logs = job(
        "--nodes=3", RA3_TASKS_PER_NODE="2", RA3_ENGINES_PER_NODE="2", EXPECTED="6", LAST_EXIT_CODE="7"
    )
    assert code == 7, json.dumps(logs, indent=1)
    port = 10000 + job_id % 88 * 250
    urls = f"engine.urls=[http://127.0.0.1:{port + 1},http://127.0.0.1:{port + 2}]"

    assert sorted(tasks) == [*(f"midtrain-{rank}" for rank in range(4)), "serve-0", "serve-1"]
    for rank in range(4):
        task = tasks[f"midtrain-{rank}"]
        assert task["argv"] == f"-m megatron_ra3 midtrain config.yaml em.rounds=2 {urls}"
        assert (task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert (task["LOCAL_WORLD_SIZE"], task["SLURMD_NODENAME"]) == ("2", f"n{1 + rank // 2}")
        assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("127.0.0.1", str(port))
        assert f"midtrain {rank} speaks" in logs[f"trainer-{rank}.log"]
    listen = "engine.host=0.0.0.0 engine.port"
    for index in range(2):
        task = tasks[f"serve-{index}"]
        assert task["argv"] == f"-m megatron_ra3 serve config.yaml em.rounds=2 {listen}={port + 1 + index}"
        assert task["SLURMD_NODENAME"] == "n3"
        assert "CUDA_VISIBLE_DEVICES" not in task
        assert f"serve {index} speaks" in logs[f"engine-{index}.log"]
    assert "trainers ended with exit code 7" in logs["batch.log"]

    deadline = time.monotonic() + 10
    while any(alive(task["pid"]) for task in tasks.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [name for name, task in tasks.items() if alive(task["pid"])]


def test_ranks_and_engines_divide_the_gpus_of_a_node(job):
    code, _, tasks, logs = job(
        "--nodes=2", RA3_GPUS_PER_NODE="4", RA3_ENGINES_PER_NODE="2", RA3_CONTAINER="env MARK=inside",
        EXPECTED="6", LAST_EXIT_CODE="0",
    )  # fmt: skip
    assert code == 0, json.dumps(logs, indent=1)
    assert [tasks[f"midtrain-{rank}"]["LOCAL_RANK"] for rank in range(4)] == ["0", "1", "2", "3"]
    assert [tasks[f"serve-{index}"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["0,1", "2,3"]
    assert {task["MARK"] for task in tasks.values()} == {"inside"}


def test_the_signal_before_the_time_limit_reaches_the_trainers(job):
    code, _, tasks, logs = job(
        "--nodes=1", RA3_ENGINE_NODES="0", RA3_TASKS_PER_NODE="2", EXPECTED="3", NEAR_TIME_LIMIT="1"
    )
    assert code == 9, json.dumps(logs, indent=1)
    assert sorted(tasks) == ["midtrain-0", "midtrain-1"]
    assert tasks["midtrain-0"]["argv"] == "-m megatron_ra3 midtrain config.yaml em.rounds=2"
    assert all("told to stop" in logs[f"trainer-{rank}.log"] for rank in range(2))


def test_too_few_nodes_are_named(job):
    code, _, tasks, logs = job("--nodes=1", RA3_ENGINE_NODES="1")
    assert (code, tasks) == (2, {})
    assert "RA3_ENGINE_NODES=1 leaves no trainer node of 1" in logs["batch.log"]
