"""A real Slurm of four nodes on one host: the launch scripts are tested against the scheduler, not a stand-in."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import require

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
NODES = ("n1", "n2", "n3", "n4")
START_TIMEOUT_S = 30
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# A requeued job waits until its credential has expired, and heterogeneous jobs are started by backfill alone: both are
# minutes in usual settings.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
KillWait=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=15 State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster; `env` points Slurm's commands at it."""

    root: Path
    env: dict[str, str]

    def run(self, *command: str, timeout_s: float, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def exit_code(self, job_id: int, timeout_s: float) -> int:
        """Wait for the end of a job (`sbatch --wait` looks only every few seconds)."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.run("scontrol", "show", "job", "--oneliner", str(job_id), timeout_s=20).stdout
            state = re.search(r" JobState=(\w+)", shown)
            ended = re.search(r" ExitCode=(\d+):", shown)
            if state and ended and state[1] in ENDED:
                return int(ended[1])
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} has not ended after {timeout_s} s: {shown}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(ready: Callable[[], bool], what: str, root: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(root.glob("*.log")))
            raise TimeoutError(f"{what} not ready after {START_TIMEOUT_S} s\n{logs}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    require(not missing, f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm munge)")
    require(os.geteuid() == 0, "slurmd starts jobs only as root")
    # Not pytest's tmp_path: socket paths may not exceed 107 characters.
    root = Path(tempfile.mkdtemp(prefix="ra3-slurm-"))
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        yield start_cluster(root, daemons)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(root, ignore_errors=True)


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def start_cluster(root: Path, daemons: list[subprocess.Popen[bytes]]) -> Slurm:
    (root / "state").mkdir()
    ports = free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    user = pwd.getpwuid(os.geteuid()).pw_name
    config = root / "slurm.conf"
    config.write_text(CONFIG.format(host=host, ports=ports, user=user, root=root, nodes=nodes))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    cluster = Slurm(root, env | {"SLURM_CONF": str(config), "PATH": search_path()})

    def daemon(*command: str) -> None:
        with (root / f"{command[0]}.out.log").open("ab") as out:
            daemons.append(subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))

    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    paths = {"key-file": key, "socket": root / "munge.socket", "pid-file": root / "munge.pid"}
    paths |= {"log-file": root / "munge.log", "seed-file": root / "munge.seed"}
    daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
    wait_for((root / "munge.socket").exists, "munged", root)
    daemon("slurmctld", "-D", "-c")
    for name in NODES:
        daemon("slurmd", "-D", "-N", name)

    def idle() -> bool:
        states = cluster.run("sinfo", "--noheader", "--Node", "--format=%T", timeout_s=30).stdout.split()
        return states == ["idle"] * len(NODES)

    wait_for(idle, f"nodes {', '.join(NODES)}", root)
    return cluster
