"""FP8 likelihoods: quantisation to e4m3, its cache, and the exact rescoring that makes eight bits enough.

Rounding to three mantissa bits moves a log-prob by some 0.07 nats, whatever the scales. Three things undo it:

- Most of it comes from the few largest logits and the target's. So the target is kept out of the FP8 sum, the largest
  logit of each group of columns is a candidate, and the best `CANDIDATES` of these and the target are computed again in
  high precision and put back. Mixing an exact target with an FP8 sum that contains it would give log-probs above 0.
- What is left are sums over the rest of the vocabulary, in which only errors count that many columns share: those of
  the hidden state, and of the weights along it. They share them along few directions, the principal ones of the head's
  columns. The products of `RANK` such directions with the rounding errors are written behind the channels of both
  operands, so that the same matrix product adds what rounding took: x w = x^ w^ + (P dx) (P w) + (P x) (P dw) + rest.
- Beside those directions the mean of the columns under the law still points where the hidden state does. Every rounded
  row is scaled so that it keeps its projection on the original, in the metric of the second moments that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3.kernels import partials, reference
from megatron_ra3.kernels.problem import Problem

E4M3_MAX = 448.0
TILE = 256
"""Rows of the weight that share a scale."""
MAX_GROUPS = 160
"""Most groups of columns that the logits are cut into; only the largest of a group can be a candidate."""
CANDIDATES = 8
RANK = 64
"""Directions along which rounding errors are kept: 128 channels more, as much as one step of the matrix product."""
SPREAD = 16.0
"""What the products of errors are multiplied by, and their partners divided, so that both lie in the range of e4m3."""
SAMPLED_ROWS = 4096
"""Rows of the head, at equal distances, that its principal directions are found from."""
SUBSPACE_ITERATIONS = 4


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
    return Quantized(values, _fill(values, tensor, rows_per_scale), rows_per_scale)


def _fill(values: Tensor, tensor: Tensor, rows_per_scale: int) -> Tensor:
    """Write `tensor` [rows, H] into `values` in e4m3; the scales."""
    scales = torch.ones(-(-len(tensor) // rows_per_scale), device=tensor.device)
    blocks = max(1, reference.MAX_CHUNK_ELEMENTS // (tensor.shape[1] * rows_per_scale))
    for first in range(0, len(scales), blocks):
        rows = slice(first * rows_per_scale, (first + blocks) * rows_per_scale)
        exact = tensor[rows].float()
        amax = torch.nn.functional.pad(exact.abs().amax(dim=1), (0, -len(exact) % rows_per_scale))
        amax = amax.view(-1, rows_per_scale).amax(dim=1)
        scale = torch.where(amax == 0.0, 1.0, amax / E4M3_MAX)
        values[rows] = _to_e4m3(exact / scale.repeat_interleave(rows_per_scale)[: len(exact), None])
        scales[first : first + blocks] = scale
    return scales


def _to_e4m3(tensor: Tensor) -> Tensor:
    return tensor.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer's weight in e4m3 [V, H + 2 r], and what hidden states are rounded by."""

    weight: Quantized
    moments: Tensor
    """Mean square [H] of each channel, of what the directions leave."""
    directions: Tensor
    """Principal directions [H, r] of the columns of logits, the rows of the weight; bf16."""

    @classmethod
    def of(cls, weight: Tensor) -> Head:
        """Of `weight` [V, H]; a shard without a real token has moments of 1."""
        rows, width = weight.shape
        directions = principal_directions(weight)
        rank, exact_directions = directions.shape[1], directions.float()
        values = torch.empty(rows, width + 2 * rank, dtype=torch.float8_e4m3fn, device=weight.device)
        found = Quantized(values, _fill(values[:, :width], weight, TILE), TILE)
        scales, squares = found.row_scales()[:, None], torch.zeros(width, device=weight.device)
        for part in reference.row_chunks(rows, width):
            exact, scale = weight[part].float(), scales[part]
            projected = exact @ exact_directions
            squares += (exact - projected @ exact_directions.T).square().sum(dim=0)
            lost = (exact - scale * values[part, :width].float()) @ exact_directions
            values[part, width : width + rank] = _to_e4m3(projected / (SPREAD * scale))
            values[part, width + rank :] = _to_e4m3(lost * SPREAD / scale)
        return cls(found, squares / rows if rows else torch.ones_like(squares), directions)


def principal_directions(weight: Tensor) -> Tensor:
    """Orthonormal directions [H, r] that hold most of the second moment of the rows of `weight` [V, H], in bf16.

    r is `RANK`, in smaller spaces the largest power of two that fits. By subspace iteration from fixed random ones.
    """
    width = weight.shape[1]
    rank = 1 << (min(RANK, width).bit_length() - 1)
    sample = weight[:: max(1, len(weight) // SAMPLED_ROWS)].float()
    found = torch.randn(width, rank, generator=torch.Generator().manual_seed(0)).to(weight.device)
    for _ in range(SUBSPACE_ITERATIONS):
        found = torch.linalg.qr(sample.T @ (sample @ found)).Q
    return found.bfloat16().contiguous()


def quantize_hidden(hidden: Tensor, head: Head) -> Quantized:
    """Hidden states [N, H] in e4m3 [N, H + 2 r]: every row scaled to keep its projection, errors behind (see above)."""
    (rows, width), rank = hidden.shape, head.directions.shape[1]
    directions = head.directions.float()
    values = torch.empty(rows, width + 2 * rank, dtype=torch.float8_e4m3fn, device=hidden.device)
    scales = _fill(values[:, :width], hidden, 1)
    for part in reference.row_chunks(rows, width):
        exact, rounded = hidden[part].float(), values[part, :width].float()
        weighted = rounded * head.moments
        own, square = (exact * weighted).sum(dim=1), (rounded * weighted).sum(dim=1)
        scales[part] = torch.where(square == 0.0, scales[part], own / square)
        scale, projected = scales[part, None], exact @ directions
        lost = projected - scale * (rounded @ directions)
        values[part, width : width + rank] = _to_e4m3(lost * SPREAD / scale)
        values[part, width + rank :] = _to_e4m3(projected / (SPREAD * scale))
    return Quantized(values, scales, 1)


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


def group_columns(vocab: int) -> int:
    """Columns of a group: a power of two of tiles, the fewest with which there are no more than `MAX_GROUPS`."""
    columns = TILE
    while vocab > columns * MAX_GROUPS:
        columns *= 2
    return columns


def forward(problem: Problem, head: Head, *, rescored: bool) -> Tensor:
    """Partials [4, N] (see `partials`) from e4m3 operands, in plain torch; `rescored` as the module says."""
    hidden, weight = quantize_hidden(problem.hidden, head).dequantized(), head.weight.dequantized()
    found = partials.empty(len(hidden), hidden)
    groups = -(-len(weight) // group_columns(len(weight)))
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
    return _rescore(problem, found, maxima) if rescored else found


def _keep_maxima(maxima: GroupMaxima, rows: slice, logits: Tensor) -> None:
    size = group_columns(logits.shape[1])
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % size), value=partials.NOTHING)
    best, column = padded.view(len(logits), -1, size).max(dim=2)
    maxima.logits[:, rows] = best.T
    maxima.columns[:, rows] = column.T + size * torch.arange(len(maxima.columns), device=column.device)[:, None]


def _rescore(problem: Problem, found: Tensor, maxima: GroupMaxima) -> Tensor:
    """Partials [4, N] from sums over all but the target, [3 or 4, N]: its exact logit and the best candidates' enter.

    A candidate's FP8 logit leaves the sums and its exact one enters, so no column counts twice. In fp64, where numbers
    that far apart do not cancel: a rough logit may exceed all exact ones by hundreds of nats.
    """
    count = min(CANDIDATES, len(maxima.logits))
    rough, group = maxima.logits.topk(count, dim=0)
    columns = torch.cat([problem.local_targets[None], maxima.columns.gather(0, group)])
    exact = rough.new_zeros(columns.shape)
    if len(problem.weight):
        exact = reference.gather_dot(problem.hidden, problem.weight, columns.T).T * problem.inverse_temperature
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
