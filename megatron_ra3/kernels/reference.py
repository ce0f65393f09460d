"""The exact torch backend: what every kernel is held against, and the path where there is no GPU.

Chunked over rows, so that [N, V] never exists, and in fp32 (or fp64) throughout. It prevents three failures seen in
other heads: padded vocabulary rows counted as logit 0, gradients accumulated in bf16, and `p_target - 1` rounded before
the subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_ra3.kernels import partials
from megatron_ra3.kernels.partials import Merged, Normaliser
from megatron_ra3.kernels.problem import Gradients, LossGradients, Problem

MAX_CHUNK_ELEMENTS = 4 * 1024 * 1024
"""Largest block of logits, rows x local vocabulary, that is alive at any time (16 MiB in fp32)."""


def forward(problem: Problem) -> Tensor:
    """Partials [4, N] of this shard (see `partials`), in fp32, or fp64 for fp64 inputs."""
    hidden, weight = _exact(problem.hidden), _exact(problem.weight)
    found = partials.empty(len(hidden), hidden)
    for rows in row_chunks(len(hidden), len(weight)):
        logits = (hidden[rows] @ weight.T).mul_(problem.inverse_temperature)
        target = logits.gather(1, problem.local_targets[rows, None]).squeeze(1)
        found[partials.TARGET, rows] = torch.where(problem.owned[rows], target, 0.0)
        found[: partials.TARGET, rows] = sums(logits, with_entropy=problem.with_entropy)
    return found


def sums(logits: Tensor, *, with_entropy: bool) -> Tensor:
    """The first three rows of partials, [3, n], of logits [n, V], which are overwritten."""
    row_max = logits.amax(dim=1)
    shifted = logits.sub_(row_max[:, None])
    likelihood = shifted.exp()
    weighted = (likelihood * shifted).sum(dim=1) if with_entropy else torch.zeros_like(row_max)
    return torch.stack([row_max, likelihood.sum(dim=1), weighted])


def backward(problem: Problem, norm: Normaliser, entropy: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [N, H], this shard's part, and of weight [V, H]; in fp32, or fp64 for fp64 inputs.

    dz = g (1{target} - p) - e p (log p + entropy), g and e the upstream gradients of log-prob and entropy.
    """
    hidden, weight = _exact(problem.hidden), _exact(problem.weight)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for rows in row_chunks(len(hidden), len(weight)):
        logits = (hidden[rows] @ weight.T).mul_(problem.inverse_temperature)
        logprob = logits.sub_(norm.row_max[rows, None]).sub_(norm.log_sum[rows, None])
        likelihood = logprob.exp()
        factor = grads.logprob[rows, None].to(likelihood)
        if grads.entropy is not None:
            upstream = grads.entropy[rows, None].to(likelihood)
            factor = factor + upstream * (logprob + entropy[rows, None])
        grad_logits = likelihood.mul_(factor).neg_()
        here = (problem.owned[rows] * grads.logprob[rows]).to(likelihood)
        grad_logits.scatter_add_(1, problem.local_targets[rows, None], here[:, None])
        grad_logits.mul_(problem.inverse_temperature)
        torch.mm(grad_logits, weight, out=grad_hidden[rows])
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    return grad_hidden, grad_weight


def cross_entropy(
    problem: Problem, token_weights: Tensor, block_rows: int, merge: Callable[[Tensor], Merged]
) -> LossGradients:
    """Log-probs, and the gradients of -sum_n w_n log p_n, in fp32, or fp64 for fp64 inputs: dz = w (p - 1{target}).

    `block_rows` rows at a time; `merge` turns their partials into log-probs.
    """
    hidden, weight = _exact(problem.hidden), _exact(problem.weight)
    logprob, grad_hidden, grad_weight = (
        hidden.new_empty(len(hidden)),
        torch.empty_like(hidden),
        torch.zeros_like(weight),
    )
    upstream = token_weights.to(hidden)
    for rows in blocks(len(hidden), block_rows):
        logits = (hidden[rows] @ weight.T).mul_(problem.inverse_temperature)
        local = partials.empty(len(logits), logits)
        if len(weight):
            target = logits.gather(1, problem.local_targets[rows, None]).squeeze(1)
            local[partials.TARGET] = torch.where(problem.owned[rows], target, 0.0)
            local[partials.MAX] = logits.amax(dim=1)
            local[partials.SUM] = logits.sub_(local[partials.MAX, :, None]).exp_().sum(dim=1)
        logprob[rows], _, norm = merge(local)
        shrink = (local[partials.MAX] - norm.row_max - norm.log_sum).exp()
        grad_logits = logits.mul_((shrink * upstream[rows])[:, None])
        if len(weight):
            here = torch.where(problem.owned[rows], upstream[rows], 0.0)
            grad_logits.scatter_add_(1, problem.local_targets[rows, None], -here[:, None])
        grad_logits.mul_(problem.inverse_temperature)
        torch.mm(grad_logits, weight, out=grad_hidden[rows])
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    return LossGradients(logprob, grad_hidden, grad_weight)


def gather_dot(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Dot products hidden [N, H] · weight[columns] for columns [N, k] int64: [N, k] in fp32 (fp64 for fp64 inputs)."""
    exact = _exact(hidden)
    found = exact.new_empty(columns.shape)
    for rows in row_chunks(len(hidden), columns.shape[1] * hidden.shape[1]):
        found[rows] = torch.einsum("nkh,nh->nk", _exact(weight[columns[rows]]), exact[rows])
    return found


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Cut `rows` so that a block of `width` columns stays below MAX_CHUNK_ELEMENTS; nothing where either is 0."""
    return blocks(rows if width else 0, max(1, MAX_CHUNK_ELEMENTS // max(width, 1)))


def blocks(rows: int, size: int) -> Iterator[slice]:
    """Cut `rows` into blocks of `size`; the last may be smaller."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
