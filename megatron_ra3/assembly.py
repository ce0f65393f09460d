"""From a configuration to ranks, tokenizer, model and optimizer, with every clash between them found first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ra3.config import RunConfig
from megatron_ra3.corpus.tokenizer import CodeTokenizer, load_tokenizer
from megatron_ra3.latents import LatentFormat
from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import RA3Model, build_model
from megatron_ra3.model.trainer import Trainer, build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Assembly:
    """What a run computes with. `initial_folder` is the Hugging Face folder the weights came from."""

    config: RunConfig
    layout: parallel.ParallelLayout
    tokenizer: CodeTokenizer
    format: LatentFormat
    model: RA3Model
    trainer: Trainer
    initial_folder: Path

    def reset_weights(self) -> None:
        """Put back the initial weights; the optimizer starts anew."""
        names.import_hf(self.model, self.initial_folder)
        self.trainer.optimizer = _optimizer(self.config, self.model)


def assemble(config: RunConfig) -> Assembly:
    """Join the process group and build the model; collective over all ranks.

    ValueError, OSError: a setting that does not fit the model, the tokenizer or the number of ranks.
    """
    layout = parallel.initialize(
        config.parallel.tensor, config.parallel.pipeline, seed=config.seed, timeout_s=config.parallel.timeout_s
    )
    _check_batch_sizes(config, layout)
    tokenizer = load_tokenizer(config.tokenizer_folder)
    hf_config, initial_folder = _initial_model(config, layout, tokenizer)
    _check_model(config, hf_config, tokenizer.vocab_size)
    model = build_model(
        hf_config,
        layout,
        dtype=DTYPES[config.model.dtype],
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    names.import_hf(model, initial_folder)
    return Assembly(
        config=config,
        layout=layout,
        tokenizer=tokenizer,
        format=LatentFormat.build(config.latents.surface, tokenizer),
        model=model,
        trainer=Trainer(model, _optimizer(config, model), layout),
        initial_folder=initial_folder,
    )


def _optimizer(config: RunConfig, model: RA3Model) -> Any:
    settings = config.optimizer
    return build_optimizer(
        model,
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad_norm,
        distributed=config.parallel.distributed_optimizer,
    )


def _initial_model(
    config: RunConfig, layout: parallel.ParallelLayout, tokenizer: CodeTokenizer
) -> tuple[dict[str, Any], Path]:
    folder = Path(config.model.folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.folder={folder}: has no config.json; give a Hugging Face folder")
    hf_config = json.loads(path.read_text(encoding="utf-8"))
    if config.model.init == "random":
        hf_config["vocab_size"] = tokenizer.vocab_size
        folder = Path(config.run_folder) / "initial"
        if layout.rank == 0 and not folder.exists():
            names.init_hf(folder, hf_config, config.seed, config.tokenizer_folder)
        layout.barrier("initial weights")
    return hf_config, folder


def _check_model(config: RunConfig, hf_config: dict[str, Any], vocab_size: int) -> None:
    if hf_config["vocab_size"] < vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer_folder} has {vocab_size} tokens but model.folder={config.model.folder} "
            f"embeds {hf_config['vocab_size']}: give the tokenizer of that model"
        )
    longest = hf_config["max_position_embeddings"]
    if longest < config.max_sequence_tokens:
        raise ValueError(
            f"corpus.max_snippet_tokens={config.corpus.max_snippet_tokens}: with rationales a trajectory may take "
            f"{config.max_sequence_tokens} tokens but the model has {longest} positions; lower it to {longest // 2}"
        )


def _check_batch_sizes(config: RunConfig, layout: parallel.ParallelLayout) -> None:
    sizes = {
        "warmup.snippets_per_step": config.warmup.snippets_per_step,
        "estep.snippets_per_step": config.estep.snippets_per_step,
        "mstep.snippets_per_step": config.mstep.snippets_per_step,
        "evaluate.snippets": config.evaluate.snippets,
    }
    for key, value in sizes.items():
        if value < layout.dp_size:
            raise ValueError(f"{key}={value}: must be at least the {layout.dp_size} data-parallel replicas")
