"""FP8 likelihoods: quantisation to e4m3, its cache, and the exact rescoring that makes eight bits enough.

Rounding to three mantissa bits moves a log-prob by about 0.08 nats, whatever the scales, and nearly all of it comes
from the few largest logits and the target's. So the target is kept out of the FP8 sum, the largest logit of each group
of `GROUP` columns is a candidate, and the best `CANDIDATES` of these and the target are computed again in high
precision and put back. Mixing an exact target with an FP8 sum that contains it would give log-probs above 0.

Of what is left most comes from the hidden state: its rounding error moves all logits of a row together, along the
columns' mean under the law, which points where the hidden state does. `quantize_hidden` therefore scales every rounded
row so that it keeps its projection on the original, in the metric of the head's second moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3.kernels import partials, reference
from megatron_ra3.kernels.problem import Problem

E4M3_MAX = 448.0
TILE = 256
"""Rows of the weight that share a scale."""
GROUP = 1024
"""Columns of the logits of which only the largest can be a candidate."""
CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Quantized:
    """e4m3 values [rows, H] and fp32 scales, one per `rows_per_scale` rows: values · scale is the tensor."""

    values: Tensor
    scales: Tensor
    rows_per_scale: int

    def dequantized(self) -> Tensor:
        """[rows, H] in fp32."""
        return self.values.float() * self.row_scales()[:, None]

    def row_scales(self) -> Tensor:
        """Scale of every row."""
        return self.scales.repeat_interleave(self.rows_per_scale)[: len(self.values)]


def quantize(tensor: Tensor, rows_per_scale: int) -> Quantized:
    """To e4m3 [rows, H], each block of rows scaled so that its largest magnitude becomes 448; zeros stay zeros.

    A NaN or an infinity spoils the rows that share its scale, and no others.
    """
    rows = len(tensor)
    amax = tensor.abs().amax(dim=1).float()
    padded = torch.nn.functional.pad(amax, (0, -rows % rows_per_scale))
    block = padded.view(-1, rows_per_scale).amax(dim=1)
    scales = torch.where(block == 0.0, 1.0, block / E4M3_MAX)
    by_row = scales.repeat_interleave(rows_per_scale)[:rows, None]
    values = (tensor.float() / by_row).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Quantized(values, scales, rows_per_scale)


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer's weight in e4m3, and the mean square [H] of each of its channels."""

    weight: Quantized
    moments: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Head:
        """Of `weight` [V, H]; a shard without a real token has moments of 1."""
        if not len(weight):
            return cls(quantize(weight, TILE), torch.ones(weight.shape[1], device=weight.device))
        squares = torch.zeros(weight.shape[1], device=weight.device)
        for rows in reference.row_chunks(len(weight), weight.shape[1]):
            squares += weight[rows].float().square().sum(dim=0)
        return cls(quantize(weight, TILE), squares / len(weight))


def quantize_hidden(hidden: Tensor, head: Head) -> Quantized:
    """Hidden states [N, H] in e4m3, every row scaled to keep sum_h m_h x_h x^_h = sum_h m_h x^_h^2 for moments m."""
    rounded = quantize(hidden, 1)
    values = rounded.values.float()
    weighted = values * head.moments
    own, square = (hidden.float() * weighted).sum(dim=1), (values * weighted).sum(dim=1)
    return Quantized(rounded.values, torch.where(square == 0.0, rounded.scales, own / square), 1)


class HeadCache:
    """Quantises the output layer once for a pass over many micro-batches; a pass over other weights needs a new one.

    Nothing shorter-lived would do: an optimizer that writes through `.data` does not move torch's own version counter,
    so a cache cannot see by itself that it is stale.
    """

    def __init__(self) -> None:
        self._head: Head | None = None

    def get(self, weight: Tensor) -> Head:
        """`weight` [V, H] in e4m3, as it was when first asked for."""
        if self._head is None:
            self._head = Head.of(weight)
        return self._head


@dataclass(frozen=True, slots=True)
class GroupMaxima:
    """The largest FP8 logit of every group and its column, [groups, N] each, targets left out; NOTHING where none is.

    A logit must be the very number that went into the sum, or taking it out again leaves a remainder.
    """

    logits: Tensor
    columns: Tensor


def forward(problem: Problem, head: Head, *, rescored: bool) -> Tensor:
    """Partials [4, N] (see `partials`) from e4m3 operands, in plain torch; `rescored` as the module says."""
    hidden, weight = quantize_hidden(problem.hidden, head).dequantized(), head.weight.dequantized()
    found = partials.empty(len(hidden), hidden)
    groups = -(-len(weight) // GROUP)
    maxima = GroupMaxima(
        hidden.new_full((groups, len(hidden)), partials.NOTHING),
        torch.zeros(groups, len(hidden), dtype=torch.int64, device=hidden.device),
    )
    columns = torch.arange(len(weight), device=hidden.device)
    for rows in reference.row_chunks(len(hidden), len(weight)):
        logits = (hidden[rows] @ weight.T).mul_(problem.inverse_temperature)
        is_target = problem.owned[rows, None] & (columns == problem.local_targets[rows, None])
        if rescored:
            logits.masked_fill_(is_target, partials.NOTHING)
            _keep_maxima(maxima, rows, logits)
        else:
            found[partials.TARGET, rows] = (logits * is_target).sum(dim=1)
        found[: partials.TARGET, rows] = reference.sums(logits, with_entropy=problem.with_entropy)
    return rescore(problem, found, maxima, reference.gather_dot) if rescored else found


def _keep_maxima(maxima: GroupMaxima, rows: slice, logits: Tensor) -> None:
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % GROUP), value=partials.NOTHING)
    best, column = padded.view(len(logits), -1, GROUP).max(dim=2)
    maxima.logits[:, rows] = best.T
    maxima.columns[:, rows] = column.T + GROUP * torch.arange(len(maxima.columns), device=column.device)[:, None]


def rescore(
    problem: Problem, found: Tensor, maxima: GroupMaxima, gather_dot: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Partials [4, N] from sums over all but the target, [3 or 4, N]: its exact logit and the best candidates' enter.

    A candidate's FP8 logit leaves the sums and its exact one enters, so no column counts twice.
    """
    count = min(CANDIDATES, len(maxima.logits))
    rough, group = maxima.logits.topk(count, dim=0)
    columns = maxima.columns.gather(0, group)
    all_columns = torch.cat([problem.local_targets[None], columns])
    if len(problem.weight):
        exact = gather_dot(problem.hidden, problem.weight, all_columns.T).T * problem.inverse_temperature
    else:
        exact = torch.zeros_like(all_columns, dtype=found.dtype)
    counts = torch.cat([problem.owned[None], rough > partials.NOTHING])
    exact = torch.where(counts, exact, partials.NOTHING)
    row_max = torch.maximum(found[partials.MAX], exact.amax(dim=0))
    shift = found[partials.MAX] - row_max
    total = found[partials.SUM] * shift.exp()
    weighted = (found[partials.WEIGHTED] + shift * found[partials.SUM]) * shift.exp()
    for out in rough - row_max:
        total, weighted = total - out.exp(), weighted - out.exp() * out
    total = total.clamp(min=0.0)
    for entering in exact - row_max:
        total, weighted = total + entering.exp(), weighted + entering.exp() * entering
    target = torch.where(problem.owned, exact[0], 0.0)
    return torch.stack([row_max, total, weighted if problem.with_entropy else torch.zeros_like(total), target])
