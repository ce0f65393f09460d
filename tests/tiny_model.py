"""Tiny models and one way to train them, for tests that compare layouts."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import build_model
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.trainer import MicroBatch, Trainer, build_optimizer

VOCABULARY = 321
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def qwen2(**changes: Any) -> dict[str, Any]:
    """A two-layer Qwen2 with tied embeddings and a vocabulary that no tensor-parallel size divides."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "vocab_size": VOCABULARY,
        **changes,
    }


def llama(**changes: Any) -> dict[str, Any]:
    """A two-layer Llama 3.1: grouped queries, its rope scaling, heads wider than hidden/heads, untied embeddings."""
    return qwen2(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        head_dim=32,
        rope_parameters=LLAMA3_ROPE,
        tie_word_embeddings=False,
        **changes,
    )


def random_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Write a model whose norms and biases are random too, so that a mixed-up tensor cannot hide."""
    draw = torch.Generator().manual_seed(1)
    names.init_hf(folder, config, 0)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor += 0.1 * torch.randn(tensor.shape, generator=draw)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def open_trainer(
    folder: str | Path, config: dict[str, Any], layout: ParallelLayout, *, distributed: bool = False, **optimizer: Any
) -> Trainer:
    """Build, import and wrap a model in fp32."""
    model = build_model(config, layout, dtype=torch.float32, distributed_optimizer=distributed)
    names.import_hf(model, folder)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0, **optimizer}
    return Trainer(model, build_optimizer(model, distributed=distributed, **settings), layout)


def sequences(count: int, seed: int = 0) -> list[Tensor]:
    """Random token sequences of 5 to 16 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 17, (count,), generator=draw).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=draw) for length in lengths]


def next_token_batch(group: list[Tensor]) -> MicroBatch:
    """One right-padded micro-batch that predicts every token but the first of each sequence."""
    width = max(len(tokens) for tokens in group)
    token_ids = torch.stack([torch.nn.functional.pad(tokens, (0, width - len(tokens))) for tokens in group])
    rows = [torch.arange(len(tokens) - 1) + index * width for index, tokens in enumerate(group)]
    return MicroBatch(token_ids, torch.cat(rows), torch.cat([tokens[1:] for tokens in group]))


def share(items: list[Tensor], parts: int, layout: ParallelLayout) -> list[MicroBatch]:
    """Cut `items` into `parts` micro-batches and return those of this replica."""
    groups = [items[part::parts] for part in range(parts)]
    return [next_token_batch(group) for group in groups[layout.dp_rank :: layout.dp_size]]


def train(trainer: Trainer, parts: int, steps: range) -> list[tuple[float, float]]:
    """Next-token steps, taken both ways in turn, on data that depends on the step alone: (loss, grad_norm) of each."""
    curve = []
    for step in steps:
        items = sequences(8, seed=step)
        count = sum(len(tokens) - 1 for tokens in items)
        batches = share(items, parts, trainer.layout)
        if step % 2:
            result = trainer.step(batches, lambda _, logprobs, count=count: -logprobs.sum() / count, lr=1e-3)  # type: ignore[misc]
        else:
            result = trainer.fit(batches, [torch.full((len(batch.rows),), 1.0 / count) for batch in batches], lr=1e-3)
        curve.append((result["loss"], result["grad_norm"]))
    return curve


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Copy the full weights under their Hugging Face names."""
    return {name: tensor.clone() for name, tensor in names.export_hf(trainer.model)}


def initialize(tp: int = 1, pp: int = 1) -> ParallelLayout:
    """Join or re-split the test's processes."""
    return parallel.initialize(tp, pp, seed=0, timeout_s=120)
