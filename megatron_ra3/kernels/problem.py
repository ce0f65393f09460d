"""One call's shard of the output layer: hidden states, the real rows of the weight, targets numbered from its first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Problem:
    """What every backend works on."""

    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V, H]: rows of real tokens only."""
    local_targets: Tensor
    """[N] int64 row of `weight`, 0 where another shard owns the target."""
    owned: Tensor
    """[N] bool."""
    inverse_temperature: float
    with_entropy: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp_group: ProcessGroup | None,
        *,
        vocab_size: int,
        temperature: float,
        with_entropy: bool,
    ) -> Problem:
        """Drop padded rows of `weight` [V_padded/tp, H], and number the targets from this shard's first row."""
        first = weight.shape[0] * (tp_group.rank() if tp_group is not None else 0)
        real = min(max(vocab_size - first, 0), weight.shape[0])
        local = targets - first
        owned = (local >= 0) & (local < real)
        return cls(hidden, weight[:real], torch.where(owned, local, 0), owned, 1.0 / temperature, with_entropy)


class Gradients(NamedTuple):
    """Upstream gradients [N] of log-probs and, where asked for, of entropies."""

    logprob: Tensor
    entropy: Tensor | None
