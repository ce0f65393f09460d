"""What one shard of the vocabulary knows of a row, and how shards become log-probs (docs/kernels.md).

Every backend hands over four numbers per row; everything after them is shared, so that a kernel can only be wrong in
its sums. One all-gather of 16 bytes a row and rank takes the place of the all-reduces other heads need, and merging in
rank order makes the result bitwise the same on every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

MAX, SUM, WEIGHTED, TARGET = range(4)
"""Rows of a partial [4, N]: m, the largest logit; sum of exp(z - m); sum of exp(z - m) (z - m); the target's logit, 0
where the shard does not hold it. A shard without a real token has m = NOTHING and 0 elsewhere."""
NOTHING = -1e30
"""The logit of a column that does not count: exp(NOTHING - m) is 0, and unlike -inf it makes no NaN."""


class Normaliser(NamedTuple):
    """What log-softmax subtracts, in two parts that keep their precision: lse = row_max + log_sum, [N] each."""

    row_max: Tensor
    log_sum: Tensor


class Merged(NamedTuple):
    """What all shards together know of rows: log-prob of the target and entropy (nats), normaliser; [N] each."""

    logprob: Tensor
    entropy: Tensor
    norm: Normaliser


def empty(rows: int, like: Tensor) -> Tensor:
    """Partials [4, rows] of a shard that holds nothing."""
    found = like.new_zeros(4, rows)
    found[MAX] = NOTHING
    return found


def merge(local: Tensor, tp_group: ProcessGroup | None) -> Merged:
    """Add up this rank's partials [4, N] with those of its group.

    Log-probs are never above 0. The entropy means nothing where the backend left `WEIGHTED` at 0.
    """
    shards = _gathered(local, tp_group)
    row_max, total, weighted = add_up(shards)
    target = shards[:, TARGET].sum(dim=0)  # of one number and zeros
    log_sum = total.log()
    logprob = ((target - row_max) - log_sum).clamp(max=0.0)
    return Merged(logprob, (log_sum - weighted / total).clamp(min=0.0), Normaliser(row_max, log_sum))


def add_up(parts: Tensor) -> Tensor:
    """Add up the first three rows of partials of disjoint parts of the vocabulary, [parts, 3 or 4, N]: [3, N].

    In order, one after the other: the order in which torch's sum adds depends on N, and a row's result must not.
    """
    if len(parts) == 1:
        return parts[0, :TARGET]
    row_max = parts[:, MAX].amax(dim=0)
    shift = parts[:, MAX] - row_max
    scaled = shift.exp()[:, None] * torch.stack([parts[:, SUM], parts[:, WEIGHTED] + shift * parts[:, SUM]], dim=1)
    total = scaled[0]
    for part in scaled[1:]:
        total = total + part
    return torch.stack([row_max, *total])


def _gathered(local: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    if tp_group is None or tp_group.size() == 1:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(tp_group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=tp_group)
    return torch.stack(parts)
