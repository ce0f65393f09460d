"""`linear_logprob`: log-probabilities of given tokens straight from hidden states, [N, V] logits never held.

The likelihood reward, the policy gradient and next-token training all need log p(target) per token. Materialised
logits cost N·V floats (5 GB for 8k tokens of Qwen) and, cast to bf16, 0.01 nats of noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ra3.kernels import backends, partials
from megatron_ra3.kernels.fp8 import HeadCache
from megatron_ra3.kernels.problem import (
    Gradients,
    Options,
    Precision,
    checked_vocab_size,
    whole_weight_gradient,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = None,
    precision: Precision = "fp32",
    with_entropy: bool = False,
    cache: HeadCache | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ weight.T / temperature)[targets] in nats, differentiable in `hidden` and `weight`.

    Args:
        hidden: [N, H], identical on all ranks of `tp_group`.
        weight: [V_padded/tp, H], this rank's rows of the output layer.
        targets: [N] integer global token ids.
        tp_group: ranks among which the vocabulary is split.
        vocab_size: number of real tokens; weight rows beyond it are padding and never read.
        temperature: divides the logits.
        ignore_index: rows with this target are left out: log-prob, entropy and gradient 0.
        precision: of the operands. `bf16` rounds them to bf16, `fp8` to e4m3, and `fp8_rescored` computes the target's
            and the largest logits again in bf16 (see `fp8`). `fp32` takes them as they are; fp64 inputs stay fp64.
            Products are added up in fp32; of FP8 products Hopper's tensor cores are reported to keep 22 bits.
        with_entropy: return the entropy of the law too.
        cache: keeps an FP8 head between the calls of one pass; quantised anew each time if None.

    Returns:
        [N] in fp32 (fp64 for fp64 inputs at `fp32`), never above 0 and bitwise the same on all ranks of `tp_group`;
        with `with_entropy` a pair with the entropies [N]. The gradient of `hidden` is summed over `tp_group`, that of
        `weight` is local. On a GPU, where looking would stall it, rows with a target outside [0, vocab_size) are NaN;
        `ignore_index` stalls it too.

    Raises:
        ValueError: a target outside [0, vocab_size) (on a CPU), a vocab_size that the weight's rows cannot hold, a
            temperature that is not positive, or a gradient asked of `fp8`.
    """
    vocab_size = checked_vocab_size(weight, targets, tp_group, vocab_size, temperature, precision, ignore_index)
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if precision == "fp8" and wants_gradient:
        raise ValueError(
            "precision=fp8 has no gradient: its normaliser is too rough; set fp8_rescored or bf16 for losses"
        )
    options = Options(tp_group, vocab_size, temperature, precision, with_entropy, cache)
    if ignore_index is None:
        logprob, entropy = _LinearLogprob.apply(hidden, weight, targets, options)
    else:
        kept = (targets != ignore_index).nonzero().squeeze(1)
        found = _LinearLogprob.apply(hidden.index_select(0, kept), weight, targets[kept], options)
        logprob, entropy = (part.new_zeros(len(targets)).index_copy(0, kept, part) for part in found)
    return (logprob, entropy) if with_entropy else logprob


class _LinearLogprob(torch.autograd.Function):
    """Forward keeps a few numbers per row; backward computes the logits again, block by block."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        problem = options.problem(hidden, weight, targets)
        backend = backends.choose(problem, options.precision)
        local = backend.forward(problem, options.precision, options.cache)
        logprob, entropy, norm = partials.merge(local, options.tp_group)
        ctx.save_for_backward(hidden, weight, targets, entropy, *norm)
        ctx.options, ctx.backend = options, backend
        if not options.with_entropy:
            entropy = torch.zeros_like(entropy)
            ctx.mark_non_differentiable(entropy)
        return options.checked(logprob, targets), entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, row_max, log_sum = ctx.saved_tensors
        problem = ctx.options.problem(hidden, weight, targets)
        norm = partials.Normaliser(row_max, log_sum)
        grads = Gradients(upstream[0], upstream[1] if ctx.options.with_entropy else None)
        grad_hidden, grad_weight = ctx.backend.backward(problem, norm, entropy, grads)
        ctx.options.sum_over_shards(grad_hidden)
        grad_weight = whole_weight_gradient(grad_weight, len(weight), weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None
