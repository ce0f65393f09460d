"""The folder a run starts from: does this code take its model, with these weights, this tokenizer, cut as asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ra3.config import TrainerConfig
from megatron_ra3.doctor.findings import Finding


@dataclass(frozen=True)
class _Split:
    tp_size: int
    pp_size: int


def model(config: TrainerConfig) -> Iterator[Finding]:
    """What `assembly.assemble` would refuse, found without building anything; reads no weights, only their headers."""
    from megatron_ra3.assembly import read_model
    from megatron_ra3.latents import LatentFormat
    from megatron_ra3.model import names

    folder = Path(config.model.folder)
    try:
        hf_config, tokenizer = read_model(config, _Split(config.parallel.tensor, config.parallel.pipeline))
    except (ValueError, OSError) as error:
        yield Finding("model", "folder", "failed", str(error), "see model, parallel and tokenizer settings of the run")
        return
    text = f"{folder}: {hf_config['model_type']}, {hf_config['vocab_size']} embedded tokens"
    yield Finding("model", "folder", "ok", f"{text}, {hf_config['max_position_embeddings']} positions")
    try:
        LatentFormat.build(config.latents.surface, tokenizer)
    except ValueError as error:
        yield Finding("model", "tokenizer", "failed", str(error), "another tokenizer, or another latents.surface")
    else:
        text = f"{tokenizer.vocab_size} tokens, latents.surface={config.latents.surface}"
        yield Finding("model", "tokenizer", "ok", text)
    if config.model.init == "random":
        yield Finding("model", "weights", "ok", "model.init=random: will be drawn")
        return
    try:
        files = names.check_hf(folder, hf_config)
    except (ValueError, OSError) as error:
        yield Finding("model", "weights", "failed", str(error), "copy or export the whole folder again")
    else:
        yield Finding("model", "weights", "ok", f"all {len(files)} tensors in {len(set(files.values()))} files")
