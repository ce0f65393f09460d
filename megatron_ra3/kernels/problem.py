"""One call's shard of the output layer: hidden states, the real rows of the weight, targets numbered from its first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from megatron_ra3.kernels.fp8 import HeadCache

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


class Options(NamedTuple):
    """What a call asks for beside its tensors; see `linear_logprob`."""

    tp_group: ProcessGroup | None
    vocab_size: int
    temperature: float
    precision: Precision
    with_entropy: bool = False
    cache: HeadCache | None = None

    def problem(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Problem:
        """Round the operands, drop padded rows of `weight` [V_padded/tp, H], number the targets from its first row."""
        weight_dtype = weight.dtype
        if self.precision != "fp32":
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        first = weight.shape[0] * (self.tp_group.rank() if self.tp_group is not None else 0)
        real = min(max(self.vocab_size - first, 0), weight.shape[0])
        local = targets.long() - first
        owned = (local >= 0) & (local < real)
        return Problem(
            hidden,
            weight[:real],
            torch.where(owned, local, 0),
            owned,
            1.0 / self.temperature,
            self.with_entropy,
            weight_dtype,
        )

    def sum_over_shards(self, gradient: Tensor) -> None:
        """Add up the gradients of hidden states, in place."""
        if self.tp_group is not None and self.tp_group.size() > 1:
            torch.distributed.all_reduce(gradient, group=self.tp_group)

    def checked(self, logprob: Tensor, targets: Tensor) -> Tensor:
        """NaN for targets outside the vocabulary on a GPU, where looking beforehand would stall it."""
        if not targets.is_cuda:
            return logprob
        return torch.where((targets >= 0) & (targets < self.vocab_size), logprob, torch.nan)


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


def whole_weight_gradient(grad: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The gradient of the real rows in `dtype`, with zeros for padding up to `rows`."""
    grad = grad.to(dtype)
    return grad if len(grad) == rows else torch.nn.functional.pad(grad, (0, 0, 0, rows - len(grad)))
