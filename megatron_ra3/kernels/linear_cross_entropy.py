"""`linear_cross_entropy`: next-token loss straight from hidden states, with its gradients taken on the way.

A loss that is a weighted sum of log-probs, the weights known beforehand, needs no second look at the logits: a block of
rows is projected, normalised, turned into the gradient of its logits and multiplied into both gradients before the
next block comes. Three products in all, where `linear_logprob` with autograd takes four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_ra3.kernels import backends, partials, reference
from megatron_ra3.kernels.fp8 import HeadCache
from megatron_ra3.kernels.linear_logprob import linear_logprob
from megatron_ra3.kernels.problem import Options, Precision, checked_vocab_size, whole_weight_gradient

BLOCK_ELEMENTS = 2**29
"""Logits that are alive at a time on a GPU: 2 GiB, and half as much for their gradient. With fewer rows to a block,
adding up the gradient of `weight` costs too much."""


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
    cache: HeadCache | None = None,
) -> Tensor:
    """Return -sum_n token_weights[n] log softmax(hidden @ weight.T / temperature)[n, targets[n]], nats, a scalar.

    Differentiable once in `hidden` and `weight`; `fp8_rescored` and calls without a gradient go by `linear_logprob`.
    Beside its gradients a call holds `BLOCK_ELEMENTS` logits at most (on a CPU `reference.MAX_CHUNK_ELEMENTS`).

    Args:
        hidden: [N, H], identical on all ranks of `tp_group`.
        weight: [V_padded/tp, H], this rank's rows of the output layer.
        targets: [N] integer global token ids; one outside [0, vocab_size) makes the loss NaN on a GPU.
        token_weights: [N], taken as constants.
        tp_group: ranks among which the vocabulary is split.
        vocab_size: number of real tokens; weight rows beyond it are padding and never read.
        temperature: divides the logits.
        precision: as for `linear_logprob`.
        cache: keeps an FP8 head between the calls of one pass.

    Raises:
        ValueError: as `linear_logprob`.
    """
    vocab_size = checked_vocab_size(weight, targets, tp_group, vocab_size, temperature, precision)
    if precision in ("fp32", "bf16") and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        options = Options(tp_group, vocab_size, temperature, precision)
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, options)
        return loss
    logprob = linear_logprob(
        hidden,
        weight,
        targets,
        tp_group=tp_group,
        vocab_size=vocab_size,
        temperature=temperature,
        precision=precision,
        cache=cache,
    )
    assert isinstance(logprob, Tensor)
    return -(token_weights.detach() * logprob).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradients; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, options: Options
    ) -> Tensor:
        problem = options.problem(hidden, weight, targets)
        elements = BLOCK_ELEMENTS if weight.is_cuda else reference.MAX_CHUNK_ELEMENTS
        block_rows = max(1, elements // len(weight))  # the same on all ranks, whose shards are equally long
        grads = backends.choose(problem, options.precision).cross_entropy(
            problem, token_weights, block_rows, lambda local: partials.merge(local, options.tp_group)
        )
        options.sum_over_shards(grads.hidden)
        ctx.save_for_backward(
            grads.hidden.to(hidden.dtype), whole_weight_gradient(grads.weight, len(weight), weight.dtype)
        )
        return -(token_weights * options.checked(grads.logprob, targets)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream[0], grad_weight * upstream[0], None, None, None
