"""From a configuration to ranks, tokenizer, model and optimizer, with every clash between them found first."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_ra3.config import TrainerConfig
from megatron_ra3.corpus.tokenizer import CodeTokenizer, load_tokenizer, tokenizer_fingerprint
from megatron_ra3.kernels import Precision
from megatron_ra3.kernels.tuning import tuning
from megatron_ra3.latents import LatentFormat
from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import RA3Model, build_model
from megatron_ra3.model.geometry import Split, check_config
from megatron_ra3.model.trainer import Trainer, build_optimizer
from megatron_ra3.observe.spans import TIMELINE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ORIGIN = "origin.json"
"""File beside random initial weights: the seed, model config and tokenizer they were made from."""


@dataclass(slots=True)
class Assembly:
    """What a run computes with. `initial_folder` is the Hugging Face folder the weights came from."""

    config: TrainerConfig
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


def assemble(config: TrainerConfig) -> Assembly:
    """Join the process group and build the model; collective over all ranks.

    ValueError, OSError: a setting that does not fit the model, the tokenizer or the number of ranks, or a broken table
    of kernel tiles.
    """
    tuning()
    with TIMELINE.span("rendezvous"):
        layout = parallel.initialize(
            config.parallel.tensor, config.parallel.pipeline, seed=config.seed, timeout_s=config.parallel.timeout_s
        )
    _check_batch_sizes(config, layout)
    _check_engines(config, layout)
    hf_config, tokenizer = read_model(config, layout)
    initial_folder = _initial_folder(config, layout, hf_config, tokenizer)
    with TIMELINE.span("model load"):
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
        trainer=Trainer(
            model,
            _optimizer(config, model),
            layout,
            reward_precision=precision_of(config, config.model.reward_precision),
            loss_precision=precision_of(config, config.model.loss_precision),
        ),
        initial_folder=initial_folder,
    )


def read_model(config: TrainerConfig, split: Split) -> tuple[dict[str, Any], CodeTokenizer]:
    """The model's config and the tokenizer that is trained with it.

    ValueError, OSError: one is missing or broken, or they clash with each other, the settings or the split.
    """
    hf_config = _read_model_config(config)
    tokenizer = _load_tokenizer(config)
    if config.model.init == "random":
        hf_config["vocab_size"] = tokenizer.vocab_size
    _check_model(config, split, hf_config, tokenizer.vocab_size)
    return hf_config, tokenizer


def precision_of(config: TrainerConfig, given: Precision | Literal["auto"]) -> Precision:
    """A precision of the output layer as set, `auto` resolved."""
    return config.model.dtype if given == "auto" else given


def _optimizer(config: TrainerConfig, model: RA3Model) -> Any:
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


def _load_tokenizer(config: TrainerConfig) -> CodeTokenizer:
    """Load the tokenizer; a pretrained model must not be trained on the ids of another one."""
    try:
        tokenizer = load_tokenizer(config.tokenizer_folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"the tokenizer (corpus.tokenizer, else the model's): {error}") from error
    own = tokenizer_fingerprint(Path(config.model.folder))
    if config.model.init == "pretrained" and own not in ("", tokenizer.fingerprint):
        raise ValueError(
            f"corpus.tokenizer={config.tokenizer_folder} is not the tokenizer of model.folder={config.model.folder} "
            "(their tokenizer.json differ): leave corpus.tokenizer empty to use the model's"
        )
    return tokenizer


def _read_model_config(config: TrainerConfig) -> dict[str, Any]:
    path = Path(config.model.folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.folder={path.parent}: has no config.json; give a Hugging Face folder")
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(hf_config, dict):
        raise ValueError(f"{path}: must be an object, got {type(hf_config).__name__}")
    return hf_config


def _initial_folder(
    config: TrainerConfig, layout: parallel.ParallelLayout, hf_config: dict[str, Any], tokenizer: CodeTokenizer
) -> Path:
    """The folder the weights come from; rank 0 draws random ones, and its failure is raised on all ranks."""
    if config.model.init == "pretrained":
        return Path(config.model.folder)
    folder = Path(config.run_folder) / "initial"
    failure: ValueError | OSError | None = None
    if layout.rank == 0:
        origin = {"seed": config.seed, "tokenizer": tokenizer.fingerprint, "config": hf_config}
        try:
            if folder.exists():
                _check_origin(folder, origin)
            else:
                _draw_weights(folder, origin, config.tokenizer_folder)
        except (ValueError, OSError) as error:
            failure = error
    failure = layout.gather_from_ranks(failure)[0]
    if failure is not None:
        raise failure
    return folder


def _draw_weights(folder: Path, origin: dict[str, Any], tokenizer_folder: Path) -> None:
    """Write random weights with a note of their origin; a folder of that name is always complete."""
    staging = folder.with_name(".initial.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        names.init_hf(staging, origin["config"], origin["seed"], tokenizer_folder)
        (staging / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Refuse weights that were drawn from another seed, model config or tokenizer."""
    try:
        found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: cannot tell what its weights were made from ({error}); remove it") from error
    changed = [key for key in origin if found.get(key) != origin[key]]
    if changed:
        raise ValueError(
            f"{folder} holds initial weights made from another {', '.join(changed)}: set that back, or remove the "
            "folder to draw new ones"
        )


def _check_model(config: TrainerConfig, split: Split, hf_config: dict[str, Any], vocab_size: int) -> None:
    try:
        check_config(hf_config, split)
    except ValueError as error:
        raise ValueError(f"{Path(config.model.folder) / 'config.json'}: {error}") from error
    if hf_config["vocab_size"] < vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer_folder} has {vocab_size} tokens but model.folder={config.model.folder} "
            f"embeds {hf_config['vocab_size']}: give the tokenizer of that model"
        )
    positions = hf_config["max_position_embeddings"]
    if positions < config.max_sequence_tokens:
        raise ValueError(config.fitting(positions))


def _check_batch_sizes(config: TrainerConfig, layout: parallel.ParallelLayout) -> None:
    for key, value in config.shared_counts.items():
        if value < layout.dp_size:
            raise ValueError(f"{key}={value}: must be at least the {layout.dp_size} data-parallel replicas")


def _check_engines(config: TrainerConfig, layout: parallel.ParallelLayout) -> None:
    """Refuse servers that the replicas could not share or reach; collective over all ranks."""
    engine, replicas = config.engine, layout.dp_size
    if not config.samples or engine.resolved_kind != "vllm":
        return
    on_trainers_gpu = engine.per_replica * engine.memory_fraction
    if torch.cuda.is_available() and not engine.urls and (replicas > 1 or on_trainers_gpu > 0.5):
        raise ValueError(
            "engine.urls is empty: servers started by the trainers would share the trainers' GPUs; start them on GPUs "
            "of their own (ra3 serve, or the scripts in slurm/) and name them in engine.urls, or with a single "
            "replica set engine.memory_fraction to at most 0.5, over all engine.per_replica"
        )
    if engine.port and not engine.urls and replicas * engine.per_replica > 1:
        raise ValueError(
            f"engine.port={engine.port}: {replicas * engine.per_replica} servers (data-parallel replicas x "
            "engine.per_replica) would be started on one port; set engine.port=0"
        )
    if replicas == 1:
        return
    if engine.urls:
        if len(engine.urls) < replicas:
            raise ValueError(
                f"engine.urls names {len(engine.urls)} servers but there are {replicas} data-parallel replicas: every "
                "replica needs one"
            )
        return
    hosts = set(layout.gather_from_leaders(socket.gethostname()))
    if len(hosts) > 1 and (engine.host == "localhost" or engine.host.startswith(("127.", "::1"))):
        raise ValueError(
            f"engine.host={engine.host}: the replicas' servers run on {', '.join(sorted(hosts))} and could not be "
            "reached from one another; set engine.host=0.0.0.0"
        )
