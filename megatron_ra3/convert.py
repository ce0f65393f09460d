"""`ra3 import` and `ra3 export`: Hugging Face folders in and out of Megatron checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ra3.assembly import DTYPES
from megatron_ra3.checkpoint import model_digest
from megatron_ra3.config import RunConfig, TrainerConfig
from megatron_ra3.corpus.tokenizer import tokenizer_fingerprint
from megatron_ra3.manifest import finished, read_manifest
from megatron_ra3.model import names, parallel, state
from megatron_ra3.model.build import build_model
from megatron_ra3.run import Run


def export_checkpoint(config: TrainerConfig, out: Path) -> Path:
    """Write the run's newest checkpoint as a Hugging Face folder `out`; returns the checkpoint.

    Runs as one process whatever layout wrote the checkpoint, and holds the whole model in memory. Only reads in the run
    folder, so it may be called beside the run itself; where that removes the checkpoint meanwhile, call it again.
    ValueError: the run has no checkpoint yet, or one of another model or tokenizer than `config` names;
    FileExistsError: `out` exists.
    """
    layout = parallel.initialize(1, 1, seed=config.seed, timeout_s=config.parallel.timeout_s)
    try:
        folder = Path(config.run_folder) / "checkpoints"
        saved = finished(folder)
        if not saved:
            raise ValueError(f"{folder} holds no checkpoint: run_folder is another run's, or it has not saved yet")
        newest = saved[-1]
        manifest = read_manifest(newest)
        hf_config = _hf_config(config, newest, manifest)
        if tokenizer_fingerprint(config.tokenizer_folder) != manifest["tokenizer"]:
            raise ValueError(
                f"{config.tokenizer_folder} holds another tokenizer than {newest} was trained with, or none: set "
                "corpus.tokenizer to the one it was"
            )
        model = build_model(hf_config, layout, dtype=DTYPES[manifest["config"]["model"]["dtype"]])
        state.load_weights(newest / "state", model)
        names.save_hf(model, out, hf_config, config.tokenizer_folder)
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


def _hf_config(config: TrainerConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model that the run trains, whose folder may have moved since the checkpoint."""
    random = manifest["config"]["model"]["init"] == "random"
    folder = Path(config.run_folder) / "initial" if random else Path(config.model.folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: put back the folder that the run of {checkpoint} started from")
    hf_config = json.loads(path.read_text(encoding="utf-8"))
    if model_digest(hf_config) != manifest.get("model"):
        raise ValueError(f"{path} describes another model than {checkpoint}: set model.folder to the one it came from")
    return hf_config
