"""`ra3 import` and `ra3 export`: Hugging Face folders in and out of Megatron checkpoints."""

from __future__ import annotations

from pathlib import Path

from megatron_ra3.assembly import assemble
from megatron_ra3.checkpoint import Checkpoints, read_manifest
from megatron_ra3.config import RunConfig
from megatron_ra3.model import names, parallel, state
from megatron_ra3.run import Run


def export_checkpoint(config: RunConfig, out: Path) -> Path:
    """Write the run's newest checkpoint as a Hugging Face folder `out`; returns the checkpoint.

    Reads only, so it may be called beside the run itself. ValueError: the run has no checkpoint yet;
    FileExistsError: `out` exists.
    """
    assembly = assemble(config)
    try:
        folder = Path(config.run_folder) / "checkpoints"
        newest = Checkpoints(folder, keep_last=1, layout=assembly.layout).latest()
        if newest is None:
            raise ValueError(f"{folder} holds no checkpoint: run_folder is another run's, or it has not saved yet")
        read_manifest(newest)
        state.load_state(newest / "state", assembly.model, assembly.trainer.optimizer)
        names.save_hf(assembly.model, out, assembly.model.hf_config, config.tokenizer_folder)
    finally:
        parallel.destroy()
    return newest


def import_checkpoint(config: RunConfig) -> Path:
    """Write `model.folder` as checkpoint 0 of a new run; ValueError where the run has checkpoints already."""
    folder = Path(config.run_folder) / "checkpoints"
    if folder.exists():
        raise ValueError(f"{folder} exists: give the import a run_folder of its own")
    with Run(config) as run:
        return run.save()
