"""`ra3 doctor`: what this machine has, and which likelihood kernels a run on it would use, or why it would not."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, get_args

from megatron_ra3.config import RunConfig, load_config

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "vllm", "webdataset")
COMMANDS = ("nvidia-smi", "sbatch", "srun")
DEFAULT_WIDTH = 4096
"""Hidden size that kernels are asked about without a configuration."""


class Finding(NamedTuple):
    """One line of the report; `amiss` is what a run asked for and would not get."""

    topic: str
    name: str
    text: str
    amiss: bool = False


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """An optional run to look at."""
    parser.add_argument("config", nargs="?", type=Path, help="YAML file of a run; its model and precisions are tried")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the findings; returns 1 if the run would not get what it asks for, else 0."""
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    findings = list(examine(config))
    for finding in findings:
        print(f"{finding.topic:<10}{finding.name:<20}{'NOT AS ASKED: ' if finding.amiss else ''}{finding.text}")
    return int(any(finding.amiss for finding in findings))


def examine(config: RunConfig | None = None) -> Iterator[Finding]:
    """Everything there is to say about this machine, and about a run on it where one is given."""
    import torch

    yield Finding("machine", "python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        yield Finding("package", package, _version(package))
    for command in COMMANDS:
        yield Finding("command", command, shutil.which(command) or "not found")
    if not torch.cuda.is_available():
        yield Finding("device", "GPU", "none that torch can use")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Finding("device", f"GPU {index}", f"{found.name}, {size}")
    yield from kernels(config)


def kernels(config: RunConfig | None = None) -> Iterator[Finding]:
    """Which backend takes each precision of the output layer, and what it is for in the run."""
    import torch

    from megatron_ra3.assembly import precision_of
    from megatron_ra3.kernels import Precision, backends
    from megatron_ra3.kernels.problem import Options
    from megatron_ra3.kernels.tuning import table_path, tuning

    tuning()
    yield Finding("kernels", "tiles", f"{table_path()}" if table_path().is_file() else "as shipped")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = _hidden_size(config) if config else DEFAULT_WIDTH
    hidden, target = torch.zeros(1, width, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    uses: dict[Precision, list[str]] = {}
    if config:
        uses.setdefault(precision_of(config, config.model.reward_precision), []).append("rewards")
        uses.setdefault(precision_of(config, config.model.loss_precision), []).append("losses and all else")
    for precision in get_args(Precision):
        problem = Options(None, 1, 1.0, precision).problem(hidden, hidden, target)
        reason = None if precision == "fp32" else backends.refusal(problem, precision)
        backend = "torch, exact" if precision == "fp32" else f"torch: {reason}" if reason else "Triton"
        wanted = uses.get(precision, [])
        text = f"{backend}, at hidden size {width}" + (f"; this run's {' and '.join(wanted)}" if wanted else "")
        yield Finding("kernels", precision, text, amiss=bool(reason and wanted))


def _hidden_size(config: RunConfig) -> int:
    path = Path(config.model.folder) / "config.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
