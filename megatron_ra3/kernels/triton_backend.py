"""Launches the Triton kernels and finishes what they leave: merged segments, exact targets, gradient GEMMs.

Written for Triton 3.6 and later on sm_90. Under Triton's interpreter the same code runs on CPU tensors, in fp32 where
the interpreter is wrong about bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ra3.kernels import fp8, partials, reference
from megatron_ra3.kernels.backends import quantized_head
from megatron_ra3.kernels.partials import Merged, Normaliser
from megatron_ra3.kernels.problem import Gradients, LossGradients, Problem
from megatron_ra3.kernels.triton_kernels import (
    cross_entropy_gradient_kernel,
    forward_kernel,
    gather_dot_kernel,
    gradient_kernel,
    projections_kernel,
    row_sums_kernel,
)
from megatron_ra3.kernels.tuning import Tiles, tuning

if TYPE_CHECKING:
    from megatron_ra3.kernels.fp8 import HeadCache
    from megatron_ra3.kernels.problem import Precision

LOG2_E = 1.4426950408889634
SEGMENTS = 12
"""Parts of the vocabulary with sums of their own: fixed, so that a row's result does not depend on the launch."""
GROUP_TILES = fp8.GROUP // fp8.TILE
INTERPRETED_PROGRAMS = 2
COLUMNS_AT_ONCE = 4096
"""Columns that a pass over rows of logits holds at a time."""


class TritonBackend:
    """`reference` and `fp8` with the sums done by `triton_kernels`."""

    def forward(self, problem: Problem, precision: Precision, cache: HeadCache | None) -> Tensor:
        """Partials [4, N] of this shard."""
        if precision == "bf16":
            found, _ = _sums(problem, problem.hidden, problem.weight, tuning().bf16, rescored=False)
            return _with_targets(problem, found, _target_products(problem, problem.hidden, problem.weight))
        head = quantized_head(problem, cache)
        hidden, weight = fp8.quantize_hidden(problem.hidden, head, projections), head.weight
        found, maxima = _sums(problem, hidden, weight, tuning().fp8, rescored=precision == "fp8_rescored")
        if maxima is not None:
            return fp8.rescore(problem, found, maxima, gather_dot)
        scales = hidden.scales * weight.scales[problem.local_targets // fp8.TILE]
        return _with_targets(problem, found, scales * _target_products(problem, hidden.values, weight.values))

    def backward(self, problem: Problem, norm: Normaliser, entropy: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
        """Gradients of hidden [N, H], this shard's part, in fp32, and of weight [V, H]."""
        hidden, weight = problem.hidden, problem.weight
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight, dtype=problem.weight_dtype)
        lse = (norm.row_max + norm.log_sum) * LOG2_E
        for columns in reference.blocks(len(weight), tuning().gradient_columns):
            grad_logits = _gradient(problem, columns, lse, entropy, grads)
            grad_hidden += _product(grad_logits, weight[columns])
            grad_weight[columns] = _product(grad_logits.T, hidden, problem.weight_dtype)
        return grad_hidden, grad_weight

    def cross_entropy(
        self, problem: Problem, token_weights: Tensor, block_rows: int, merge: Callable[[Tensor], Merged]
    ) -> LossGradients:
        """Log-probs and the gradients of -sum(token_weights · log-prob), fp32, `block_rows` rows at a time."""
        hidden, weight = problem.hidden, problem.weight
        device, factor = hidden.device, problem.inverse_temperature * LOG2_E
        logprob, grad_hidden = torch.empty(len(hidden), device=device), torch.empty(hidden.shape, device=device)
        grad_weight = torch.zeros(weight.shape, device=device)
        targets, upstream = torch.where(problem.owned, problem.local_targets, -1), token_weights.float()
        for rows in reference.blocks(len(hidden), block_rows):
            count = rows.stop - rows.start
            logits = _rows(count, len(weight), torch.float32, device)
            _multiply(hidden[rows], weight.T, logits)
            local = partials.empty(count, logits)
            row_sums_kernel[(count,)](
                logits, targets[rows], local, local[partials.TARGET],
                count, len(weight), logits.stride(0), factor, BLOCK_COLUMNS=COLUMNS_AT_ONCE,
            )  # fmt: skip
            for number in (partials.MAX, partials.TARGET):
                local[number] /= LOG2_E
            logprob[rows], _, norm = merge(local)
            grad_logits = _rows(count, len(weight), _gradient_dtype(hidden), device)
            cross_entropy_gradient_kernel[(count, triton.cdiv(len(weight), COLUMNS_AT_ONCE))](
                logits, targets[rows], (norm.row_max + norm.log_sum) * LOG2_E, upstream[rows].contiguous(), grad_logits,
                len(weight), logits.stride(0), grad_logits.stride(0), factor, problem.inverse_temperature,
                BLOCK_COLUMNS=COLUMNS_AT_ONCE,
            )  # fmt: skip
            grad_hidden[rows] = _product(grad_logits, weight)
            _add_product(grad_weight, grad_logits.T, hidden[rows])
        return LossGradients(logprob, grad_hidden, grad_weight)


def _rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [count, width] whose rows all begin at multiples of 32 bytes or more, as fast products want them."""
    return torch.empty(count, triton.cdiv(width, 16) * 16, dtype=dtype, device=device)[:, :width]


def _gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Of the gradient of logits: the interpreter truncates to bf16 where a GPU rounds."""
    return hidden.dtype if hidden.is_cuda else torch.float32


def _product(left: Tensor, right: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Products added up in fp32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left.float() @ right.float()).to(dtype)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`_product` into `out`, fp32."""
    if left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def gather_dot(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Dot products hidden [N, H] · weight[columns] for columns [N, k] int64: [N, k] in fp32."""
    columns = columns.contiguous()
    out = torch.empty(columns.shape, dtype=torch.float32, device=hidden.device)
    gather_dot_kernel[columns.shape](
        hidden.contiguous(), weight.contiguous(), columns, out, hidden.shape[1],
        PER_ROW=columns.shape[1], BLOCK_HIDDEN=_block(hidden),
    )  # fmt: skip
    return out


def projections(hidden: Tensor, rounded: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.Projections`; unlike torch's sums, a row's do not depend on how many rows there are."""
    own, square = torch.empty(2, len(hidden), device=hidden.device)
    projections_kernel[(len(hidden),)](
        hidden.contiguous(), rounded, moments, own, square, hidden.shape[1], BLOCK_HIDDEN=_block(hidden)
    )
    return own, square


def _block(hidden: Tensor) -> int:
    return min(2048, int(triton.next_power_of_2(hidden.shape[1])))


def _target_products(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return gather_dot(hidden, weight, problem.local_targets[:, None]).squeeze(1)


def _with_targets(problem: Problem, sums: Tensor, products: Tensor) -> Tensor:
    """Sums [3, N] and the products of hidden states with their targets' rows as partials [4, N]."""
    target = torch.where(problem.owned, products * problem.inverse_temperature, 0.0)
    return torch.cat([sums, target[None]])


def _sums(
    problem: Problem, hidden: Tensor | fp8.Quantized, weight: Tensor | fp8.Quantized, tiles: Tiles, *, rescored: bool
) -> tuple[Tensor, fp8.GroupMaxima | None]:
    """The first three rows of partials, [3, N], in nats, and the group maxima where they are to be rescored."""
    rows, vocab = len(problem.hidden), len(problem.weight)
    device = problem.hidden.device
    quantized = isinstance(hidden, fp8.Quantized)
    assert not quantized or tiles.columns == fp8.TILE
    x, row_scale = (hidden.values, hidden.scales) if isinstance(hidden, fp8.Quantized) else (hidden, hidden)
    w, tile_scale = (weight.values, weight.scales) if isinstance(weight, fp8.Quantized) else (weight, weight)
    groups = triton.cdiv(vocab, fp8.GROUP)
    sums = torch.empty(SEGMENTS, 3, rows, device=device)
    maxima = torch.empty(groups if rescored else 0, rows, device=device)
    columns = torch.empty(maxima.shape, dtype=torch.int32, device=device)
    row_programs, splits = _launch(rows, tiles.rows, x.shape[1] * x.element_size(), device)
    forward_kernel[(row_programs * splits,)](
        _descriptor(x, tiles.rows, tiles.hidden), _descriptor(w, tiles.columns, tiles.hidden), row_scale, tile_scale,
        torch.where(problem.owned, problem.local_targets, -1), sums, maxima, columns,
        rows, vocab, x.shape[1], problem.inverse_temperature * LOG2_E, row_programs, segment_tiles(vocab, tiles),
        SPLITS=splits, SEGMENTS=SEGMENTS, GROUP_TILES=GROUP_TILES, **tiles.blocks(),
        FP8=quantized, RESCORED=rescored, ENTROPY=problem.with_entropy, UPCAST=_upcasts(x),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    for number in (partials.MAX, partials.WEIGHTED):
        sums[:, number] /= LOG2_E
    return partials.add_up(sums), fp8.GroupMaxima(maxima / LOG2_E, columns.long()) if rescored else None


def segment_tiles(vocab: int, tiles: Tiles) -> int:
    """Tiles of a segment: a whole number of groups, and SEGMENTS of them hold the vocabulary."""
    groups = triton.cdiv(triton.cdiv(vocab, tiles.columns), GROUP_TILES)
    return int(triton.cdiv(groups, SEGMENTS) * GROUP_TILES)


def _gradient(problem: Problem, columns: slice, lse: Tensor, entropy: Tensor, grads: Gradients) -> Tensor:
    """Gradient of the logits of some columns, [N, columns]."""
    tiles = tuning().gradient if grads.entropy is None else tuning().gradient_with_entropy
    rows, width = len(problem.hidden), columns.stop - columns.start
    out = torch.empty(rows, width, dtype=_gradient_dtype(problem.hidden), device=problem.hidden.device)
    upstream = grads.logprob.float().contiguous()
    gradient_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.columns))](
        _descriptor(problem.hidden, tiles.rows, tiles.hidden), _descriptor(problem.weight, tiles.columns, tiles.hidden),
        torch.where(problem.owned, problem.local_targets, -1), lse, entropy,
        upstream, upstream if grads.entropy is None else grads.entropy.float().contiguous(), out,
        rows, len(problem.weight), problem.hidden.shape[1], columns.start, width,
        problem.inverse_temperature * LOG2_E, problem.inverse_temperature,
        **tiles.blocks(), ENTROPY=grads.entropy is not None, UPCAST=_upcasts(problem.hidden),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _launch(rows: int, tile_rows: int, bytes_per_row: int, device: torch.device) -> tuple[int, int]:
    """Row programs and splits of the segments: the fewest rounds, then the fewest splits whose rows fit the L2 cache.

    The rows that are worked on together are read again for every tile of columns; the columns, once per round.
    """
    processors, cache_bytes = INTERPRETED_PROGRAMS, 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, cache_bytes = properties.multi_processor_count, properties.L2_cache_size // 2
    row_tiles = triton.cdiv(rows, tile_rows)
    choices = []
    for splits in (1, 2, 3, 4, 6, 12):
        programs = min(row_tiles, processors // splits)
        if programs:
            rounds = triton.cdiv(row_tiles, programs) * SEGMENTS // splits
            overflow = max(0, programs * tile_rows * bytes_per_row - cache_bytes)
            choices.append((rounds, overflow, splits, programs))
    _, _, splits, programs = min(choices)
    return programs, splits


def _descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(tensor.contiguous(), [rows, columns])


def _upcasts(tensor: Tensor) -> bool:
    return not tensor.is_cuda and tensor.dtype == torch.bfloat16
