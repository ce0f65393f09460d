"""The command: all checks in order, on one rank or many; a line each, an exit status, or JSON."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_ra3.config import TrainerConfig
from megatron_ra3.doctor.engine import engine
from megatron_ra3.doctor.files import files
from megatron_ra3.doctor.findings import Finding, any_failed, to_json
from megatron_ra3.doctor.kernels import kernels
from megatron_ra3.doctor.machine import gpus, packages
from megatron_ra3.doctor.model import model
from megatron_ra3.doctor.ranks import hangs, ranks
from megatron_ra3.doctor.rlvr import jail, tasks
from megatron_ra3.doctor.slurm import slurm
from megatron_ra3.doctor.world import MeetingError, World, join
from megatron_ra3.rlvr_config import RlvrRunConfig, load_any_config


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """An optional run to look at."""
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        help="YAML file of a run; its folder, model, engine, and of RLVR tasks and jail, are tried",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=10.0,
        metavar="S",
        help="for one exchange between ranks (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list of findings in the place of lines")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the findings (under torchrun or srun the first rank does); returns 1 if one of them is `failed`, else 0."""
    config = load_any_config(arguments.config, arguments.overrides) if arguments.config else None
    try:
        world = join(arguments.timeout_s)
        findings = list(examine(config, world))
        if world is not None:
            findings = world.gather(findings)
    except MeetingError as error:
        findings, world = [Finding("ranks", "meeting", "failed", str(error))], None
    if world is None or world.rank == world.first:
        show(findings, as_json=arguments.json)
    status = int(any_failed(findings))
    if hangs():
        os._exit(status)
    return status


def examine(config: TrainerConfig | None, world: World | None = None) -> Iterator[Finding]:
    """Everything there is to say about this machine, its ranks, and about a run on them where one is given."""
    yield from packages()
    yield from gpus()
    if world is not None:
        yield from ranks(world)
    if config is not None:
        yield from files(Path(config.run_folder), world)
    if world is None or world.rank == world.first:
        yield from slurm()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once per node: it reads weights and tasks, and imports vLLM
        if config is not None:
            yield from model(config)
        if isinstance(config, RlvrRunConfig):
            yield from tasks(config)
            yield from jail(config.jail)
        yield from engine(config)
    yield from kernels(config)


def show(findings: list[Finding], *, as_json: bool) -> None:
    """Print them."""
    print(json.dumps(to_json(findings)) if as_json else "\n".join(finding.line() for finding in findings), flush=True)
