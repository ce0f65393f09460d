"""`linear_cross_entropy`: next-token loss straight from hidden states, with its gradients taken on the way.

A loss that is a weighted sum of log-probs, the weights known beforehand, needs no second look at the logits: a block of
rows is projected, normalised, turned into the gradient of its logits and multiplied into both gradients before the
next block comes. Three products in all, where `linear_logprob` with autograd takes four.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ra3.kernels import backends, partials, reference
from megatron_ra3.kernels.linear_logprob import linear_logprob
from megatron_ra3.kernels.problem import Precision, Problem, checked_vocab_size, whole_weight_gradient


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    precision: Precision = "fp32",
) -> Tensor:
    """Return -sum_n token_weights[n] log softmax(hidden @ weight.T / temperature)[n, targets[n]], nats, a scalar.

    Differentiable once in `hidden` and `weight`; `fp8_rescored` and calls without a gradient go by `linear_logprob`.

    Args:
        hidden: [N, H], identical on all ranks of `tp_group`.
        weight: [V_padded/tp, H], this rank's rows of the output layer.
        targets: [N] integer global token ids; one outside [0, vocab_size) makes the loss NaN on a GPU.
        token_weights: [N], taken as constants.
        tp_group: ranks among which the vocabulary is split.
        vocab_size: number of real tokens; weight rows beyond it are padding and never read.
        temperature: divides the logits.
        precision: as for `linear_logprob`.

    Raises:
        ValueError: as `linear_logprob`.
    """
    vocab_size = checked_vocab_size(weight, targets, tp_group, vocab_size, temperature, precision)
    if precision in ("fp32", "bf16") and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        options = _Options(tp_group, vocab_size, temperature, precision)
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, options)
        return loss
    logprob = linear_logprob(
        hidden, weight, targets,
        tp_group=tp_group, vocab_size=vocab_size, temperature=temperature, precision=precision,
    )  # fmt: skip
    assert isinstance(logprob, Tensor)
    return -(token_weights * logprob).sum()


GPU_BLOCK_ROWS = 4096
"""Rows whose logits are alive at a time on a GPU: fewer, and adding up the gradient of `weight` costs too much."""


def _block_rows(weight: Tensor) -> int:
    """The same on all ranks, of whose shards only the last may hold padding."""
    return GPU_BLOCK_ROWS if weight.is_cuda else max(1, reference.MAX_CHUNK_ELEMENTS // len(weight))


class _Options(NamedTuple):
    tp_group: ProcessGroup | None
    vocab_size: int
    temperature: float
    precision: Precision


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradients; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, options: _Options
    ) -> Tensor:
        group = options.tp_group
        problem = Problem.of(
            hidden,
            weight,
            targets,
            group,
            vocab_size=options.vocab_size,
            temperature=options.temperature,
            precision=options.precision,
        )
        grads = backends.choose(problem, options.precision).cross_entropy(
            problem, token_weights, _block_rows(weight), lambda local: partials.merge(local, group)
        )
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(grads.hidden, group=group)
        ctx.save_for_backward(hidden, weight, grads.hidden, grads.weight)
        logprob = grads.logprob
        if targets.is_cuda:
            logprob = torch.where((targets >= 0) & (targets < options.vocab_size), logprob, torch.nan)
        return -(token_weights * logprob).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, grad_hidden, grad_weight = ctx.saved_tensors
        scaled = (grad_hidden * upstream[0]).to(hidden.dtype)
        return scaled, whole_weight_gradient(grad_weight * upstream[0], weight), None, None, None
