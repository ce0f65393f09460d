"""One task of a SLURM job step: it meets its peers, runs the command, and leaves word of how that ended.

`python -m megatron_ra3.launch.task trainer|engine PYTHON COMMAND CONFIG [key=value...]`, started by slurm/lib.sh.

Prevents ports made up by arithmetic, which two jobs on one node may share: every port is given out by the kernel of the
node where it is needed, kept until its server listens, and published in a folder that no other start of any job uses.
Prevents, too, that a launcher's exit code (srun's is the highest of all ranks') hides what the ranks themselves said.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

from megatron_ra3 import durable
from megatron_ra3.rollout import ports

TRY_AGAIN = 75
"""Exit status of a task whose peers did not come: as for a run that stopped, the same command may go on."""
PEERS_TIMEOUT_S = 900.0
"""Pulling a container image may take one node minutes longer than another."""
POLL_S = 0.2
RENDEZVOUS = "rendezvous"
SAVED = "saved"
PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""SLURM sends them to every process of a step, so the command has its own: this process only has to outlive it."""


@dataclass(frozen=True)
class Task:
    """Where this task stands among those of its step, and where all tasks of this start of the job meet.

    Args:
        rank: number in the step.
        local_rank: number on this node.
        world_size: tasks of the step.
        local_world_size: tasks of the step on each of its nodes.
        cpus: CPUs of the job on this node.
        address: where other nodes reach this one.
        meeting: folder that all nodes see and no other start of any job uses.
        engines: how many engine tasks publish their address there.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    cpus: int
    address: str
    meeting: Path
    engines: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """From SLURM's variables and those of slurm/lib.sh; ValueError naming one that is missing."""
        try:
            world_size = int(environment["SLURM_STEP_NUM_TASKS"])
            addresses = dict(pair.split("=", 1) for pair in environment["RA3_ADDRESSES"].split())
            return cls(
                rank=int(environment["SLURM_PROCID"]),
                local_rank=int(environment["SLURM_LOCALID"]),
                world_size=world_size,
                local_world_size=world_size // int(environment["SLURM_STEP_NUM_NODES"]),
                cpus=int(environment["SLURM_CPUS_ON_NODE"]),
                address=addresses[environment["SLURMD_NODENAME"]],
                meeting=Path(environment["RA3_START"]),
                engines=int(environment["RA3_ENGINES"]),
            )
        except KeyError as error:
            raise ValueError(f"no {error} in the environment: a task is started by slurm/lib.sh, under srun") from error


def main(argv: Sequence[str]) -> int:
    """Be one task; returns the command's exit status, 128 + N where signal N ended it (2: bad input, 75: no peers)."""
    role, python, command, config, *overrides = argv
    run = [python, "-m", "megatron_ra3", command, config, *overrides]
    try:
        task = Task.of(os.environ)
        if role == "engine":
            return _serve(task, run)
        return _train(task, run, run_folder(Path(config), overrides))
    except (ValueError, OSError) as error:
        print(f"{role} task: {error}", file=sys.stderr, flush=True)
        return TRY_AGAIN if isinstance(error, TimeoutError) else 2


def _serve(task: Task, command: Sequence[str]) -> int:
    per_engine = int(os.environ.get("RA3_GPUS_PER_ENGINE", "0"))
    devices = share_of_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), task.local_rank, per_engine)
    own = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
    with closing(ports.reserve("")) as held:
        port = held.getsockname()[1]
        durable.write(_engine(task.meeting, task.rank), f"http://{task.address}:{port}".encode())
        return _outlive([*command, "engine.host=0.0.0.0", f"engine.port={port}"], own)


def _train(task: Task, command: Sequence[str], folder: Path | None) -> int:
    leads = task.rank == 0
    saved = f"{steps_saved(folder)}\n"
    if leads:
        durable.write(task.meeting / SAVED, saved.encode())
    with _rendezvous(task) as address:
        urls = [await_text(_engine(task.meeting, index)) for index in range(task.engines)]
        where = [f"engine.urls=[{','.join(urls)}]"] if urls else []
        status = _outlive([*command, *where], rank_environment(task, address))
    if leads:
        durable.write(task.meeting / SAVED, f"{saved}{steps_saved(folder)}\n".encode())
    durable.write(task.meeting / f"exit-{task.rank}", f"{status}\n".encode())
    return status


@contextmanager
def _rendezvous(task: Task) -> Iterator[str]:
    """Address and port at which the ranks meet; rank 0's process keeps the port until it ends."""
    if task.rank:
        yield await_text(task.meeting / RENDEZVOUS)
        return
    with closing(ports.reserve("")) as held:
        address = f"{task.address}:{held.getsockname()[1]}"
        durable.write(task.meeting / RENDEZVOUS, address.encode())
        yield address


def rank_environment(task: Task, rendezvous: str) -> dict[str, str]:
    """What torch.distributed reads, and a fair share of the node's CPUs for OpenMP unless it is set."""
    address, _, port = rendezvous.rpartition(":")
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, task.cpus // task.local_world_size)))
    return {
        "RANK": str(task.rank),
        "LOCAL_RANK": str(task.local_rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_WORLD_SIZE": str(task.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
    }


def share_of_devices(visible: str | None, index: int, count: int) -> str:
    """The `count` devices of task `index` on its node, out of CUDA_VISIBLE_DEVICES or, without it, of all; "" for 0."""
    first = index * count
    devices = visible.split(",") if visible else [str(number) for number in range(first + count)]
    if len(devices) < first + count:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible}: engine {index} of this node needs numbers {first} to {first + count - 1} "
            "of it; lower RA3_ENGINES_PER_NODE or ask for more GPUs"
        )
    return ",".join(devices[first : first + count])


def run_folder(config: Path, overrides: Sequence[str]) -> Path | None:
    """`run_folder` of a configuration, of whatever command; None where it cannot be told: the command says why."""
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        if key.strip() == "run_folder":
            return Path(value.strip())
    try:
        tree = yaml.safe_load(config.read_bytes())
    except (OSError, yaml.YAMLError):
        return None
    named = tree.get("run_folder") if isinstance(tree, dict) else None
    return Path(named) if isinstance(named, str) else None


def steps_saved(folder: Path | None) -> int:
    """The newest checkpoint's step; 0 without one."""
    names = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")] if folder else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def await_text(path: Path, timeout_s: float = PEERS_TIMEOUT_S) -> str:
    """What a peer publishes at `path`; TimeoutError naming what did not come."""
    deadline = time.monotonic() + timeout_s
    while path.name not in os.listdir(path.parent):  # noqa: PTH208  NFS: a listing is fresh where a look-up may not be
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was not published in {path.parent} within {timeout_s:g} s")
        time.sleep(POLL_S)
    return path.read_text(encoding="utf-8")


def _engine(meeting: Path, index: int) -> Path:
    return meeting / f"engine-{index}"


def _outlive(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `command` to its end, whatever signal comes meanwhile."""
    for number in PASSED_ON:
        signal.signal(number, lambda *_: None)
    status = subprocess.run(command, env=os.environ | environment, check=False).returncode
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
