"""FP8 likelihoods: quantisation to e4m3, its cache, and the exact rescoring that makes eight bits enough.

Rounding to three mantissa bits moves a log-prob by some 0.07 nats, whatever the scales, and nearly all of it comes from
the few largest logits and the target's. So the target is kept out of the FP8 sum, the largest logit of each group
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
    values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=tensor.device)
    scales = torch.ones(-(-len(tensor) // rows_per_scale), device=tensor.device)
    blocks = max(1, reference.MAX_CHUNK_ELEMENTS // (tensor.shape[1] * rows_per_scale))
    for first in range(0, len(scales), blocks):
        rows = slice(first * rows_per_scale, (first + blocks) * rows_per_scale)
        exact = tensor[rows].float()
        amax = torch.nn.functional.pad(exact.abs().amax(dim=1), (0, -len(exact) % rows_per_scale))
        amax = amax.view(-1, rows_per_scale).amax(dim=1)
        scale = torch.where(amax == 0.0, 1.0, amax / E4M3_MAX)
        by_row = scale.repeat_interleave(rows_per_scale)[: len(exact), None]
        values[rows] = (exact / by_row).clamp_(-E4M3_MAX, E4M3_MAX).to(values.dtype)
        scales[first : first + blocks] = scale
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


Projections = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of x [N, H] and x^ [N, H] in the metric m [H]: sum_h m_h x_h x^_h and sum_h m_h x^_h^2, [N] each."""


def projections(hidden: Tensor, rounded: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """`Projections` in torch."""
    own, square = hidden.new_empty(len(hidden), dtype=torch.float32), moments.new_empty(len(hidden))
    for rows in reference.row_chunks(len(hidden), hidden.shape[1]):
        values = rounded[rows].float()
        weighted = values * moments
        own[rows] = (hidden[rows].float() * weighted).sum(dim=1)
        square[rows] = (values * weighted).sum(dim=1)
    return own, square


def quantize_hidden(hidden: Tensor, head: Head, project: Projections = projections) -> Quantized:
    """Hidden states [N, H] in e4m3, every row scaled to keep its projection on the original (see the module)."""
    rounded = quantize(hidden, 1)
    own, square = project(hidden, rounded.values, head.moments)
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

    A candidate's FP8 logit leaves the sums and its exact one enters, so no column counts twice. In fp64, where numbers
    that far apart do not cancel: a rough logit may exceed all exact ones by hundreds of nats.
    """
    count = min(CANDIDATES, len(maxima.logits))
    rough, group = maxima.logits.topk(count, dim=0)
    columns = torch.cat([problem.local_targets[None], maxima.columns.gather(0, group)])
    exact = rough.new_zeros(columns.shape)
    if len(problem.weight):
        exact = gather_dot(problem.hidden, problem.weight, columns.T).T * problem.inverse_temperature
    counts = torch.cat([problem.owned[None], rough > 0.5 * partials.NOTHING])
    target = torch.where(problem.owned, exact[0], 0.0)
    exact = torch.where(counts, exact, partials.NOTHING).double()
    top = exact.amax(dim=0)
    shift = found[partials.MAX].double() - top
    leaving, entering = rough.double() - top, exact - top
    total, weighted = shift.exp() * torch.stack(
        [found[partials.SUM].double(), found[partials.WEIGHTED] + shift * found[partials.SUM]]
    )
    for term, weighted_term in zip(leaving.exp(), leaving.exp() * leaving, strict=True):
        total, weighted = total - term, weighted - weighted_term
    total = total.clamp(min=0.0)
    for term, weighted_term in zip(entering.exp(), entering.exp() * entering, strict=True):
        total, weighted = total + term, weighted + weighted_term
    log_total = total.log()
    mean_shift = weighted / total - log_total if problem.with_entropy else torch.zeros_like(total)
    return torch.stack([(top + log_total).float(), torch.ones_like(target), mean_shift.float(), target])
