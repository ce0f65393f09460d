"""Launches the Triton kernels and finishes what they leave: merged segments, exact targets, gradient GEMMs.

Written for Triton 3.6 and later on sm_90. Under Triton's interpreter the same code runs on CPU tensors, in fp32 where
the interpreter is wrong about bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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
    finish_kernel,
    forward_kernel,
    gradient_kernel,
    quantize_kernel,
    row_sums_kernel,
)
from megatron_ra3.kernels.tuning import Tiles, tuning

if TYPE_CHECKING:
    from megatron_ra3.kernels.fp8 import HeadCache
    from megatron_ra3.kernels.problem import Precision

LOG2_E = 1.4426950408889634
SEGMENTS = 12
"""Parts of the vocabulary with sums of their own: fixed, so that a row's result does not depend on the launch."""
INTERPRETED_PROGRAMS = 2
COLUMNS_AT_ONCE = 4096
"""Columns that a pass over rows of logits holds at a time."""
QUANTIZE_BLOCK = (64, 64)
"""Rows and channels that a program quantises at a time."""
FINISH_CHANNELS = 256
"""Channels at a time of the products that finish a row."""


class TritonBackend:
    """`reference` and `fp8` with the sums done by `triton_kernels`."""

    def forward(self, problem: Problem, precision: Precision, cache: HeadCache | None) -> Tensor:
        """Partials [4, N] of this shard."""
        if precision == "bf16":
            operands = Operands(problem.hidden, problem.weight)
            return _finished(problem, operands, _sums(problem, operands, tuning().bf16, rescored=False))
        head = quantized_head(problem, cache)
        hidden = quantize_hidden(problem.hidden, head)
        rough = Operands(hidden.values, head.weight.values, hidden.scales, head.weight.scales)
        rescored = precision == "fp8_rescored"
        sums = _sums(problem, rough, tuning().fp8, rescored=rescored)
        return _finished(problem, Operands(problem.hidden, problem.weight) if rescored else rough, sums)

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


class Operands(NamedTuple):
    """x [N, K] and w [V, K]; of e4m3 with the scales of x's rows [N] and w's tiles."""

    x: Tensor
    w: Tensor
    row_scales: Tensor | None = None
    tile_scales: Tensor | None = None


class Sums(NamedTuple):
    """What `forward_kernel` leaves: sums [SEGMENTS, 3, N], group maxima and their columns [groups, N], in log2 units.

    No groups unless they are to be rescored. `targets` [N] are -1 where another shard owns them.
    """

    sums: Tensor
    maxima: Tensor
    columns: Tensor
    targets: Tensor


def quantize_hidden(hidden: Tensor, head: fp8.Head) -> fp8.Quantized:
    """`fp8.quantize_hidden` in one kernel; a row's result does not depend on how many rows there are."""
    (rows, width), rank = hidden.shape, head.directions.shape[1]
    values = torch.empty(rows, width + 2 * rank, dtype=torch.float8_e4m3fn, device=hidden.device)
    scales = torch.empty(rows, device=hidden.device)
    block_rows, block_hidden = QUANTIZE_BLOCK
    quantize_kernel[(triton.cdiv(rows, block_rows),)](
        hidden.contiguous(), head.moments, head.directions, values, scales, rows, width,
        RANK=rank, SPREAD=fp8.SPREAD, BLOCK_ROWS=block_rows, BLOCK_HIDDEN=block_hidden, UPCAST=_upcasts(hidden),
    )  # fmt: skip
    return fp8.Quantized(values, scales, 1)


def _sums(problem: Problem, operands: Operands, tiles: Tiles, *, rescored: bool) -> Sums:
    rows, vocab = len(problem.hidden), len(problem.weight)
    x, w, row_scales, tile_scales = operands
    quantized = row_scales is not None
    assert not quantized or tiles.columns == fp8.TILE
    group_tiles = fp8.group_columns(vocab) // fp8.TILE if rescored else 1
    groups = triton.cdiv(vocab, fp8.group_columns(vocab)) if rescored else 0
    found = Sums(
        torch.empty(SEGMENTS, 3, rows, device=x.device),
        torch.empty(groups, rows, device=x.device),
        torch.empty(groups, rows, dtype=torch.int32, device=x.device),
        torch.where(problem.owned, problem.local_targets, -1),
    )
    row_programs, splits = _launch(rows, tiles.rows, x.shape[1] * x.element_size(), x.device)
    forward_kernel[(row_programs * splits,)](
        _descriptor(x, tiles.rows, tiles.hidden), _descriptor(w, tiles.columns, tiles.hidden),
        row_scales if quantized else x, tile_scales if quantized else w,
        found.targets, found.sums, found.maxima, found.columns,
        rows, vocab, x.shape[1], problem.inverse_temperature * LOG2_E, row_programs,
        segment_tiles(vocab, tiles, group_tiles),
        SPLITS=splits, SEGMENTS=SEGMENTS, GROUP_TILES=group_tiles, **tiles.blocks(),
        FP8=quantized, RESCORED=rescored, ENTROPY=problem.with_entropy, UPCAST=_upcasts(x),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return found


def _finished(problem: Problem, operands: Operands, sums: Sums) -> Tensor:
    """Partials [4, N] from sums and the target's logit, and with group maxima the candidates', of the operands."""
    x, w, row_scales, tile_scales = operands
    quantized, groups = row_scales is not None, len(sums.maxima)
    candidates = fp8.CANDIDATES if groups else 0
    out = torch.empty(4, len(x), device=x.device)
    finish_kernel[(len(x),)](
        x.contiguous(), w.contiguous(), row_scales if quantized else x, tile_scales if quantized else w,
        sums.targets, sums.sums, sums.maxima, sums.columns, out,
        len(x), x.shape[1], groups, problem.inverse_temperature * LOG2_E,
        SEGMENTS=SEGMENTS, PARTS=triton.next_power_of_2(SEGMENTS), CANDIDATES=candidates,
        GROUPS=triton.next_power_of_2(max(groups, 1)), PLACES=triton.next_power_of_2(1 + candidates),
        TILE=fp8.TILE, FP8=quantized, ENTROPY=problem.with_entropy, BLOCK_HIDDEN=FINISH_CHANNELS,
    )  # fmt: skip
    return out


def segment_tiles(vocab: int, tiles: Tiles, group_tiles: int) -> int:
    """Tiles of a segment: a whole number of groups, and SEGMENTS of them hold the vocabulary."""
    groups = triton.cdiv(triton.cdiv(vocab, tiles.columns), group_tiles)
    return int(triton.cdiv(groups, SEGMENTS) * group_tiles)


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
