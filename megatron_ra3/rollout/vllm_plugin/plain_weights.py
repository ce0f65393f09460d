"""Linear weights of a CPU engine kept as they were loaded, so that a weight update is one copy.

vLLM on CPU packs every linear weight for oneDNN and drops the original. Packing is the largest part of an update of an
engine that gets new weights at every step, nothing of it can be compared with the trainer's, and a tied output head
keeps a stale packed copy. What it costs: a large model on a CPU computes many rows at once more slowly.

Servers of this project ask for it by `PLAIN_LINEAR` in their environment; other vLLM processes stay as they are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PLAIN_LINEAR = "RA3_PLAIN_LINEAR"


def install() -> None:
    """Let vLLM leave linear weights alone, where `PLAIN_LINEAR` asks for it; idempotent."""
    if os.environ.get(PLAIN_LINEAR) != "1":
        return
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _leave_plain


def are_plain(model: torch.nn.Module) -> bool:
    """Whether every linear layer and embedding of the model computes with its weight as it was loaded."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    layers = [module for module in model.modules() if isinstance(module, LinearBase | VocabParallelEmbedding)]
    return all(getattr(layer, "cpu_linear", None) is torch.nn.functional.linear for layer in layers)


def _leave_plain(layer: torch.nn.Module, remove_weight: bool) -> None:  # noqa: ARG001 - vLLM's signature
    import torch

    layer.cpu_linear = torch.nn.functional.linear
