"""`ra3 checkpoint list|verify|prune`: what a run folder holds, whether it is whole, and what may go.

For people at a terminal, on any machine that sees the folder: nothing here needs torch or the run's configuration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.manifest import damage, finished, read_manifest, remove, set_aside, superseded


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the three commands."""
    commands = parser.add_subparsers(dest="action", required=True)
    listing = commands.add_parser("list", help="step, phase, size, age and layout of every checkpoint of a run")
    listing.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    listing.set_defaults(run=run_list)
    verifying = commands.add_parser("verify", help="compare every file with its checksum; exit status 1: damaged")
    verifying.add_argument("folder", type=Path, metavar="RUN_FOLDER|CHECKPOINT")
    verifying.set_defaults(run=run_verify)
    pruning = commands.add_parser("prune", help="remove all but the newest whole checkpoints")
    pruning.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    pruning.add_argument("--keep", type=int, required=True, help="how many of the newest whole ones stay")
    pruning.add_argument(
        "--keep-every", type=int, default=None, help="steps that this divides stay too (default: as the run saved)"
    )
    pruning.add_argument("--dry-run", action="store_true", help="only say what would go")
    pruning.set_defaults(run=run_prune)


def run_list(arguments: argparse.Namespace) -> int:
    """Print a table; sizes of files are checked, their content is not."""
    print(f"{'checkpoint':<24}{'after':<22}{'MB':>12}{'age':>10}{'tp x pp x dp':>14}  state")
    for path in _checkpoints(arguments.folder):
        print(_row(path))
    for path in set_aside(_parent(arguments.folder)):
        print(f"{path.name:<24}set aside by a resumed run as damaged; remove it when it has been looked into")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Read everything; 1 where something is damaged."""
    damaged = 0
    for path in _checkpoints(arguments.folder):
        problems = damage(path)
        damaged += bool(problems)
        print("\n".join(problems) if problems else f"{path}: whole")
    return int(damaged > 0)


def run_prune(arguments: argparse.Namespace) -> int:
    """Remove what is older than the newest whole checkpoints; a damaged one neither counts nor goes."""
    if arguments.keep < 1:
        raise ValueError(f"--keep {arguments.keep}: keep at least 1, or remove the run folder")
    whole = [path for path in _checkpoints(arguments.folder) if not damage(path)]
    if not whole:
        raise ValueError(f"{arguments.folder}: no checkpoint is whole, so none is removed")
    every = arguments.keep_every
    if every is None:
        every = read_manifest(whole[-1])["config"]["checkpoint"]["keep_every_steps"]
    for path in superseded(whole, keep_last=arguments.keep, keep_every_steps=every):
        print(f"{'would remove' if arguments.dry_run else 'removed'} {path} ({_megabytes(read_manifest(path)):.1f} MB)")
        if not arguments.dry_run:
            remove(path)
    return 0


def _checkpoints(folder: Path) -> Sequence[Path]:
    """One checkpoint, or all of a run; ValueError: there is none."""
    if (folder / "manifest.json").is_file() and (folder / "state").is_dir():
        return [folder]
    found = finished(_parent(folder))
    if not found:
        raise ValueError(f"{folder}: is neither a checkpoint nor a run folder with checkpoints")
    return found


def _parent(run_folder: Path) -> Path:
    return run_folder / "checkpoints"


def _row(path: Path) -> str:
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return f"{path.name:<24}{str(error).partition(': ')[2]}"
    layout = manifest["layout"]
    sizes = "x".join(str(layout[name]) for name in ("tensor", "pipeline", "data"))
    age_s = time.time() - (path / "manifest.json").stat().st_mtime
    return (
        f"{path.name:<24}{manifest['at']:<22}{_megabytes(manifest):>12.1f}{_age(age_s):>10}{sizes:>14}  sizes are right"
    )


def _megabytes(manifest: dict[str, Any]) -> float:
    return sum(manifest["files"].values()) / 1e6


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
