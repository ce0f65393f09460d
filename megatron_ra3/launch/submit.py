"""`ra3 submit`: the sbatch command of a run, or of a chain of jobs that follow each other, printed or carried out.

The configuration is read first: a mistake in it shows here and not hours later, when the job has come out of the queue.
Nothing here knows a site: what a cluster wants in addition is handed on to sbatch as it is.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_ra3.config import load_config
from megatron_ra3.rlvr_config import load_rlvr_config

SCRIPTS = Path(__file__).parents[2] / "slurm"
Job = Literal["midtrain", "rlvr"]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What to run, and on what.

    Args:
        job: which script.
        config: YAML file.
        overrides: `key=value` settings.
        nodes: of the job, engine nodes included.
        engine_nodes: of these, how many only serve.
        options: of sbatch, as they are.
        engine_options: of sbatch for engine nodes of another kind, which makes the job heterogeneous; None: it is not.
        chain: jobs that follow each other, whatever becomes of them. The one after the end of the run does nothing.
    """

    job: Job
    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 2
    engine_nodes: int = 1
    options: tuple[str, ...] = ()
    engine_options: tuple[str, ...] | None = None
    chain: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.engine_nodes < self.nodes:
            raise ValueError(
                f"--engine-nodes {self.engine_nodes} of --nodes {self.nodes}: one node must be left for the trainers"
            )
        if self.engine_options is not None and not self.engine_nodes:
            raise ValueError("--engine-sbatch: there are no engine nodes; raise --engine-nodes")
        if self.chain < 1:
            raise ValueError(f"--chain {self.chain}: must be at least 1")

    @property
    def script(self) -> Path:
        """The job script; FileNotFoundError outside of a checkout."""
        path = SCRIPTS / f"ra3_{self.job}.sbatch"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: submit from a checkout, which has the slurm folder")
        return path

    def command(self, *, first: str = "", previous: str = "") -> list[str]:
        """The sbatch command; for a later job of a chain with the ids of its first and its last job so far."""
        variables = [f"RA3_ENGINE_NODES={self.engine_nodes}"]
        options = list(self.options)
        if self.chain > 1:
            options.append("--no-requeue")  # the next job of the chain takes over
        if previous:
            variables.append(f"RA3_CHAIN={first}")
            options.append(f"--dependency=afterany:{previous}")
        engines: list[str] = []
        nodes = self.nodes
        if self.engine_options is not None:
            nodes -= self.engine_nodes
            engines = [":", f"--nodes={self.engine_nodes}", "--exclusive", "--mem=0", *self.engine_options]
        return [
            "sbatch",
            "--parsable",
            f"--nodes={nodes}",
            f"--export=ALL,{','.join(variables)}",
            *options,
            *engines,
            str(self.script),
            str(self.config),
            *self.overrides,
        ]

    def shell(self) -> str:
        """The commands as text for a shell."""
        commands = []
        for number in range(self.chain):
            ids = {"first": "@first@", "previous": "@previous@"} if number else {}
            text = shlex.join(self.command(**ids)).replace("@first@", "$first").replace("@previous@", "$previous")
            commands.append(text if self.chain == 1 else f"previous=$({text})")
        if self.chain > 1:
            commands.insert(1, "first=$previous")
        return "\n".join(commands)

    def submit(self) -> list[str]:
        """Submit the jobs and return their ids; ValueError with sbatch's words when it refuses one."""
        ids: list[str] = []
        for _ in range(self.chain):
            command = self.command(first=ids[0], previous=ids[-1]) if ids else self.command()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                before = f" after {', '.join(ids)}, which stay in the queue" if ids else ""
                raise ValueError(f"{shlex.join(command)}: {done.stderr.strip()}{before}")
            ids.append(done.stdout.strip().partition(";")[0])  # in a federation the cluster follows
        return ids


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that `run_submit` reads."""
    add = parser.add_argument
    add("config", type=Path, help="YAML file")
    add("overrides", nargs="*", metavar="key=value", help="for instance objective.penalty=0.05")
    add("--job", choices=get_args(Job), default="midtrain", help="default: %(default)s")
    add("--nodes", type=int, default=2, metavar="N", help="of the job, engine nodes included (default %(default)s)")
    add("--engine-nodes", type=int, default=1, metavar="M", help="of these, how many only serve (default %(default)s)")
    add("--gpus-per-node", type=int, metavar="N", help="default: what the script asks for")
    add("--time", help="limit of each job, as sbatch takes it")
    add("--partition")
    add("--account")
    add("--chain", type=int, default=1, metavar="N", help="jobs that follow each other, for short time limits")
    add(
        "--sbatch", action="append", default=[], metavar="OPTION", help="further option of sbatch, for instance --qos=x"
    )
    add(
        "--engine-sbatch",
        action="append",
        metavar="OPTION",
        help="option of sbatch for engine nodes of another kind: the job becomes heterogeneous",
    )
    add("--submit", action="store_true", help="submit; otherwise the commands are printed")


def run_submit(arguments: argparse.Namespace) -> int:
    """Prints or submits."""
    load = load_config if arguments.job == "midtrain" else load_rlvr_config
    load(arguments.config, arguments.overrides)
    named = {"gpus-per-node": arguments.gpus_per_node, "time": arguments.time}
    named |= {"partition": arguments.partition, "account": arguments.account}
    common = [f"--{name}={value}" for name, value in named.items() if value is not None]
    engines = arguments.engine_sbatch
    submission = Submission(
        job=arguments.job,
        config=arguments.config,
        overrides=tuple(arguments.overrides),
        nodes=arguments.nodes,
        engine_nodes=arguments.engine_nodes,
        options=(*common, *arguments.sbatch),
        engine_options=None if engines is None else (*common, *engines),
        chain=arguments.chain,
    )
    if arguments.submit:
        print(f"submitted {', '.join(submission.submit())}")
    else:
        print(submission.shell())
    return 0
