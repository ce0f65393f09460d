"""Log-probabilities of given tokens straight from hidden states, without ever holding [N, V] logits.

The likelihood reward, the policy gradient and next-token training all need log p(target) per token. Materialised
logits cost N·V floats (5 GB for 8k tokens of Qwen) and, cast to bf16, 0.01 nats of noise. This is the exact torch
reference: chunked over tokens, vocab-parallel, fp32 throughout. It prevents three failures seen in other heads:
padded vocabulary rows counted as logit 0, gradients accumulated in bf16, and `p_target - 1` rounded before the
subtraction.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

MAX_CHUNK_ELEMENTS = 4 * 1024 * 1024
"""Largest block of logits, rows x local vocabulary, that is alive at any time (16 MiB in fp32)."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Return log softmax(hidden @ weight.T)[targets], differentiable in `hidden` and `weight`.

    hidden: [N, H], identical on all ranks of `tp_group`. weight: [V_padded/tp, H], this rank's rows of the output
    layer. targets: [N] int64 global token ids. vocab_size: number of real tokens; weight rows beyond it are padding
    and never read. Returns [N] in fp32 (fp64 for fp64 inputs), never above 0 and bitwise the same on all ranks of
    `tp_group`. The gradient of `hidden` is summed over `tp_group`, that of `weight` is local.
    ValueError: a target outside [0, vocab_size), or a vocab_size that the weight's rows cannot hold.
    """
    tp_size = tp_group.size() if tp_group is not None else 1
    padded = weight.shape[0] * tp_size
    vocab_size = padded if vocab_size is None else vocab_size
    if not 0 < vocab_size <= padded:
        raise ValueError(f"vocab_size={vocab_size} must be in 1..{padded}, the rows of the output layer")
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocab_size):
        bad = int(targets[(targets < 0) | (targets >= vocab_size)][0])
        raise ValueError(f"target {bad} is outside the vocabulary [0, {vocab_size})")
    return _LinearLogprob.apply(hidden, weight, targets, tp_group, vocab_size)


class _LinearLogprob(torch.autograd.Function):
    """Forward keeps three numbers per row; backward recomputes the logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp_group: ProcessGroup | None,
        vocab_size: int,
    ) -> Tensor:
        x, w, local_targets, owned = _local_view(hidden, weight, targets, tp_group, vocab_size)
        local = x.new_zeros(3, x.shape[0])  # row maximum, sum of exp(logit - maximum), target logit if owned
        local[0] = -torch.inf
        for rows in _chunks(x.shape[0], w.shape[0]):
            logits = x[rows] @ w.T
            local[0, rows] = logits.amax(dim=1)
            target_logit = logits.gather(1, local_targets[rows, None]).squeeze(1)
            local[2, rows] = torch.where(owned[rows], target_logit, 0.0)
            local[1, rows] = logits.sub_(local[0, rows, None]).exp_().sum(dim=1)
        row_max, log_sum, target_logit = _merge(local, tp_group)
        ctx.save_for_backward(hidden, weight, targets, row_max, log_sum)
        ctx.tp_group, ctx.vocab_size = tp_group, vocab_size
        return ((target_logit - row_max) - log_sum).clamp_(max=0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, row_max, log_sum = ctx.saved_tensors
        x, w, local_targets, owned = _local_view(hidden, weight, targets, ctx.tp_group, ctx.vocab_size)
        upstream = grad_outputs[0].to(x.dtype)
        grad_hidden = torch.zeros_like(x)
        grad_weight = x.new_zeros(weight.shape)
        for rows in _chunks(x.shape[0], w.shape[0]):
            logits = x[rows] @ w.T
            grad_logits = logits.sub_(row_max[rows, None]).sub_(log_sum[rows, None]).exp_().neg_()
            grad_logits.scatter_add_(1, local_targets[rows, None], owned[rows, None].to(x.dtype))
            grad_logits.mul_(upstream[rows, None])
            torch.mm(grad_logits, w, out=grad_hidden[rows])
            grad_weight[: w.shape[0]].addmm_(grad_logits.T, x[rows])
        if ctx.tp_group is not None and ctx.tp_group.size() > 1:
            torch.distributed.all_reduce(grad_hidden, group=ctx.tp_group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None


def _local_view(
    hidden: Tensor, weight: Tensor, targets: Tensor, tp_group: ProcessGroup | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cast to the computing type, drop padded vocabulary rows, and number the targets from this shard's first row."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    first = weight.shape[0] * (tp_group.rank() if tp_group is not None else 0)
    real_rows = min(max(vocab_size - first, 0), weight.shape[0])
    local = targets - first
    owned = (local >= 0) & (local < real_rows)
    return hidden.to(dtype), weight[:real_rows].to(dtype), torch.where(owned, local, 0), owned


def _chunks(rows: int, local_vocab: int) -> list[slice]:
    """Cut `rows` so that a chunk's logits stay below MAX_CHUNK_ELEMENTS; none for a shard that is all padding."""
    if local_vocab == 0:
        return []
    size = max(1, MAX_CHUNK_ELEMENTS // local_vocab)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _merge(local: Tensor, tp_group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Combine every shard's [3, N] partials in rank order: (row maximum, log of the sum, target logit), each [N]."""
    if tp_group is None or tp_group.size() == 1:
        shards = local[None]
    else:
        parts = [torch.empty_like(local) for _ in range(tp_group.size())]
        torch.distributed.all_gather(parts, local, group=tp_group)
        shards = torch.stack(parts)
    row_max = shards[:, 0].amax(dim=0)
    total = (shards[:, 1] * (shards[:, 0] - row_max).exp()).sum(dim=0)
    return row_max, total.log(), shards[:, 2].sum(dim=0)
