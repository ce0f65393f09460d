"""One call's shard of the output layer: hidden states, the real rows of the weight, targets numbered from its first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Precision = Literal["fp32", "bf16", "fp8", "fp8_rescored"]


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
    weight_dtype: torch.dtype
    """What `weight` was before it was rounded, and its gradient should be."""

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
        precision: Precision,
        with_entropy: bool = False,
    ) -> Problem:
        """Round the operands, drop padded rows of `weight` [V_padded/tp, H], number the targets from its first row."""
        weight_dtype = weight.dtype
        if precision != "fp32":
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        first = weight.shape[0] * (tp_group.rank() if tp_group is not None else 0)
        real = min(max(vocab_size - first, 0), weight.shape[0])
        local = targets.long() - first
        owned = (local >= 0) & (local < real)
        local = torch.where(owned, local, 0)
        return cls(hidden, weight[:real], local, owned, 1.0 / temperature, with_entropy, weight_dtype)


class Gradients(NamedTuple):
    """Upstream gradients [N] of log-probs and, where asked for, of entropies."""

    logprob: Tensor
    entropy: Tensor | None


class LossGradients(NamedTuple):
    """Log-probs [N], and a loss's gradients of hidden [N, H], this shard's part, and of weight [V, H]."""

    logprob: Tensor
    hidden: Tensor
    weight: Tensor


def checked_vocab_size(
    weight: Tensor,
    targets: Tensor,
    tp_group: ProcessGroup | None,
    vocab_size: int | None,
    temperature: float,
    precision: Precision,
    ignore_index: int | None = None,
) -> int:
    """The number of real tokens; ValueError names what is wrong with a call."""
    padded = weight.shape[0] * (tp_group.size() if tp_group is not None else 1)
    vocab_size = padded if vocab_size is None else vocab_size
    if not 0 < vocab_size <= padded:
        raise ValueError(f"vocab_size={vocab_size} must be in 1..{padded}, the rows of the output layer")
    if temperature <= 0.0:
        raise ValueError(f"temperature={temperature} must be positive")
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r} must be one of {', '.join(get_args(Precision))}")
    if not targets.is_cuda:
        wrong = (targets < 0) | (targets >= vocab_size)
        if ignore_index is not None:
            wrong &= targets != ignore_index
        if wrong.any():
            raise ValueError(f"target {int(targets[wrong][0])} is outside the vocabulary [0, {vocab_size})")
    return vocab_size


def whole_weight_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the real rows, in the dtype of `weight` [V_padded/tp, H] and with zeros for its padding."""
    return torch.nn.functional.pad(grad.to(weight.dtype), (0, 0, 0, len(weight) - len(grad)))
