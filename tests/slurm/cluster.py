"""A real Slurm of four nodes on one host, whose daemons are processes of this one; nodes can be lost and restored."""

import contextlib
import os
import pwd
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
NODES = ("n1", "n2", "n3", "n4")
START_TIMEOUT_S = 60
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}  # NODE_FAIL is passed on the way to a requeue
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
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
KillWait=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster; `env` points Slurm's commands at it."""

    root: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By name; those of nodes have the node's."""

    def start(self, name: str, *command: str) -> None:
        """Start a daemon."""
        with (self.root / f"{name}.out.log").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def stop(self) -> None:
        """End all daemons, the last one first, and what they have left."""
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        kill(self._processes())

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def processes(self, job_id: int, node: str) -> dict[int, list[str]]:
        """What a job runs on a node: the command line by process id."""
        return self._processes(f"SLURM_JOB_ID={job_id}", f"SLURMD_NODENAME={node}")

    def _processes(self, *variables: str) -> dict[int, list[str]]:
        """Those of this cluster that have `variables` in their environment; there may be other clusters beside it."""
        wanted = {f"SLURM_CONF={self.env['SLURM_CONF']}", *variables}
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((entry / "environ").read_text(errors="replace").split("\0")):
                    found[int(entry.name)] = (entry / "cmdline").read_text(errors="replace").split("\0")[:-1]
        return found

    def lose_node(self, name: str, job_id: int) -> None:
        """End everything on a node, as when its power fails, and let the controller know, as it does after a while."""
        processes = self.processes(job_id, name)
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in processes}
        keepers = {pid for pid in parents if Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")}
        self.daemons[name].kill()
        self.daemons[name].wait()
        kill(keepers | processes.keys())
        self.scontrol("update", f"nodename={name}", "state=down", "reason=lost")

    def restore(self) -> None:
        """Bring back all nodes that were lost or drained."""
        for name in NODES:
            if self.daemons[name].poll() is not None:
                self.start_node(name)
            self.run("scontrol", "update", f"nodename={name}", "state=resume", timeout_s=20)
        wait_for(self.idle, f"nodes {', '.join(NODES)}", self.root)

    def idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", timeout_s=30).stdout.split()
        return states == ["idle"] * len(NODES)

    def scontrol(self, *command: str) -> None:
        done = self.run("scontrol", *command, timeout_s=20)
        assert done.returncode == 0, done.stderr

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


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def configure(root: Path) -> Slurm:
    (root / "state").mkdir()
    for number in range(4):
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(f"Name=gpu Type=h100 File={root}/gpu[0-3]\n")
    ports = free_ports(1 + len(NODES))
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:h100:4 State=UNKNOWN"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    user = pwd.getpwuid(os.geteuid()).pw_name
    config = root / "slurm.conf"
    config.write_text(CONFIG.format(host=host, ports=ports, user=user, root=root, nodes=nodes))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return Slurm(root, env | {"SLURM_CONF": str(config), "PATH": search_path()})


def start(cluster: Slurm) -> None:
    root = cluster.root
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    paths = {"key-file": key, "socket": root / "munge.socket", "pid-file": root / "munge.pid"}
    paths |= {"log-file": root / "munge.log", "seed-file": root / "munge.seed"}
    cluster.start("munged", "munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
    wait_for((root / "munge.socket").exists, "munged", root)
    cluster.start("slurmctld", "slurmctld", "-D", "-c")
    for name in NODES:
        cluster.start_node(name)
    wait_for(cluster.idle, f"nodes {', '.join(NODES)}", root)
