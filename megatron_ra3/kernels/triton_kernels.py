"""Triton kernels for Hopper: the fused forward over vocabulary tiles, its gradient's blocks, and passes over rows.

Forward: a program keeps a tile of rows and walks the tiles of a vocabulary segment, the running maximum and sum in
registers, so nothing is written per logit, there are no atomics, and a row's result depends neither on how many rows
there are nor on where it stands. Logits are in units of log 2 and already divided by the temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING: tl.constexpr = tl.constexpr(-1e30)
COLUMN_BITS: tl.constexpr = tl.constexpr(255)
"""A logit's low mantissa bits, in which fp8 logits carry their column within a tile of 256: the maximum then brings its
column along. It moves a logit by 2^-15 of itself, far below e4m3's rounding, and the sum adds the moved one."""


@triton.jit
def _logits(
    x_desc, w_desc, row_start, column_start, hidden,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of x · w.T, [BLOCK_ROWS, BLOCK_COLUMNS] in fp32."""
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for k in range(0, hidden, BLOCK_HIDDEN):
        x = x_desc.load([row_start, k])
        w = w_desc.load([column_start, k])
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            product = tl.dot(x.to(tl.float32), w.to(tl.float32).T, product, input_precision="ieee")
        else:
            product = tl.dot(x, w.T, product)
    return product


@triton.jit
def forward_kernel(
    x_desc, w_desc, row_scale, tile_scale, targets, sums, maxima, columns_of_maxima,
    rows, vocab, hidden, factor, row_programs, segment_tiles,
    SPLITS: tl.constexpr, SEGMENTS: tl.constexpr, GROUP_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    FP8: tl.constexpr, RESCORED: tl.constexpr, ENTROPY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of every (segment, row), and for RESCORED the largest logit of every (group, row) with its column.

    sums [SEGMENTS, 3, rows]: maximum, sum and weighted sum as `partials` has them, in log2 units.
    maxima, columns_of_maxima [groups, rows]; a group is GROUP_TILES tiles, a segment a whole number of groups.
    """
    program = tl.program_id(0)
    for row_tile in range(program // SPLITS, tl.cdiv(rows, BLOCK_ROWS), row_programs):
        row_start = row_tile * BLOCK_ROWS
        row = row_start + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        scale = tl.full((BLOCK_ROWS,), factor, tl.float32)
        if FP8:
            scale = scale * tl.load(row_scale + row, mask=inside, other=0.0)
        target = tl.load(targets + row, mask=inside, other=-1)
        for segment in range(program % SPLITS, SEGMENTS, SPLITS):
            top = tl.full((BLOCK_ROWS,), NOTHING, tl.float32)
            total = tl.zeros((BLOCK_ROWS,), tl.float32)
            weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
            best = tl.full((BLOCK_ROWS,), NOTHING, tl.float32)
            best_column = tl.zeros((BLOCK_ROWS,), tl.int32)
            last = tl.minimum((segment + 1) * segment_tiles, tl.cdiv(vocab, BLOCK_COLUMNS))
            for tile in range(segment * segment_tiles, last):
                start = tile * BLOCK_COLUMNS
                column = start + tl.arange(0, BLOCK_COLUMNS)
                z = _logits(x_desc, w_desc, row_start, start, hidden, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_HIDDEN, UPCAST)
                if FP8:
                    z = z * (scale * tl.load(tile_scale + tile))[:, None]
                else:
                    z = z * scale[:, None]
                if RESCORED:
                    bits = z.to(tl.int32, bitcast=True)
                    bits = (bits & ~COLUMN_BITS) | tl.arange(0, BLOCK_COLUMNS)[None, :]
                    z = bits.to(tl.float32, bitcast=True)
                    z = tl.where(column[None, :] == target[:, None], NOTHING, z)
                if start + BLOCK_COLUMNS > vocab:
                    z = tl.where(column[None, :] < vocab, z, NOTHING)
                tile_top = tl.max(z, 1)
                new_top = tl.maximum(top, tile_top)
                likelihood = tl.exp2(z - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                if ENTROPY:
                    weighted = (weighted + (top - new_top) * total) * shrink
                    weighted += tl.sum(likelihood * (z - new_top[:, None]), 1)
                total = total * shrink + tl.sum(likelihood, 1)
                top = new_top
                if RESCORED:
                    better = tile_top > best
                    place = start + (tile_top.to(tl.int32, bitcast=True) & COLUMN_BITS)
                    best_column = tl.where(better, place, best_column)
                    best = tl.where(better, tile_top, best)
                    if (tile + 1) % GROUP_TILES == 0 or tile + 1 == last:
                        group = tile // GROUP_TILES
                        tl.store(maxima + group * rows + row, best, mask=inside)
                        tl.store(columns_of_maxima + group * rows + row, best_column, mask=inside)
                        best = tl.full((BLOCK_ROWS,), NOTHING, tl.float32)
                        best_column = tl.zeros((BLOCK_ROWS,), tl.int32)
            place_of = sums + segment * 3 * rows + row
            tl.store(place_of, top, mask=inside)
            tl.store(place_of + rows, total, mask=inside)
            tl.store(place_of + 2 * rows, weighted, mask=inside)


@triton.jit
def gradient_kernel(
    x_desc, w_desc, targets, lse, entropy, grad_logprob, grad_entropy, out,
    rows, vocab, hidden, first_column, out_columns, factor, inverse_temperature,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    ENTROPY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits [rows, out_columns] for the columns from `first_column`; 0 beyond `vocab`.

    `lse` in log2 units, `entropy` in nats. The target's p - 1 is taken in fp32, before any rounding.
    """
    row_start, column_start = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLUMNS
    row = row_start + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    here = column_start + tl.arange(0, BLOCK_COLUMNS)
    column = first_column + here
    z = factor * _logits(
        x_desc, w_desc, row_start, first_column + column_start, hidden, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_HIDDEN, UPCAST
    )
    logprob = z - tl.load(lse + row, mask=inside, other=0.0)[:, None]
    likelihood = tl.exp2(logprob)
    upstream = tl.load(grad_logprob + row, mask=inside, other=0.0)
    is_target = column[None, :] == tl.load(targets + row, mask=inside, other=-1)[:, None]
    grad = upstream[:, None] * (tl.where(is_target, 1.0, 0.0) - likelihood)
    if ENTROPY:
        nats = 0.6931471805599453 * logprob + tl.load(entropy + row, mask=inside, other=0.0)[:, None]
        grad -= tl.load(grad_entropy + row, mask=inside, other=0.0)[:, None] * likelihood * nats
    grad = tl.where(column[None, :] < vocab, grad * inverse_temperature, 0.0)
    place = out + row[:, None].to(tl.int64) * out_columns + here[None, :]
    tl.store(place, grad.to(out.dtype.element_ty), mask=inside[:, None] & (here < out_columns)[None, :])


@triton.jit
def row_sums_kernel(
    logits, targets, sums, target_logits, rows, vocab, stride, factor, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Fill sums [2, rows], maximum and sum of exp2 of logits [rows, vocab] · factor, and target_logits [rows].

    One program per row; a target of -1 leaves 0.
    """
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * stride
    top = tl.full((BLOCK_COLUMNS,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(0, vocab, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = column < vocab
        z = tl.where(inside, tl.load(start_of_row + column, mask=inside, other=0.0) * factor, NOTHING)
        new_top = tl.maximum(top, z)
        total = total * tl.exp2(top - new_top) + tl.where(inside, tl.exp2(z - new_top), 0.0)
        top = new_top
    row_top = tl.max(top, 0)
    tl.store(sums + row, row_top)
    tl.store(sums + rows + row, tl.sum(total * tl.exp2(top - row_top), 0))
    target = tl.load(targets + row)
    tl.store(target_logits + row, tl.load(start_of_row + target, mask=target >= 0, other=0.0) * factor)


@triton.jit
def cross_entropy_gradient_kernel(
    logits, targets, lse, weights, out, vocab, stride, out_stride, factor, inverse_temperature,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fill out [rows, vocab] with weight (p - 1{target}) / T, p = exp2(logit · factor - lse); a program per block."""
    row, start = tl.program_id(0), tl.program_id(1) * BLOCK_COLUMNS
    column = start + tl.arange(0, BLOCK_COLUMNS)
    inside = column < vocab
    row_wide = row.to(tl.int64)
    z = tl.load(logits + row_wide * stride + column, mask=inside, other=0.0) * factor
    likelihood = tl.exp2(z - tl.load(lse + row))
    grad = tl.load(weights + row) * (likelihood - tl.where(column == tl.load(targets + row), 1.0, 0.0))
    grad = (grad * inverse_temperature).to(out.dtype.element_ty)
    tl.store(out + row_wide * out_stride + column, grad, mask=inside)


@triton.jit
def gather_dot_kernel(
    x, w, columns, out, hidden, PER_ROW: tl.constexpr, BLOCK_HIDDEN: tl.constexpr
):  # fmt: skip
    """Fill out [rows, PER_ROW] with x[row] · w[columns[row, k]], in fp32; one program per number."""
    row, k = tl.program_id(0), tl.program_id(1)
    column = tl.load(columns + row * PER_ROW + k).to(tl.int64)
    total = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        inside = place < hidden
        left = tl.load(x + row.to(tl.int64) * hidden + place, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(w + column * hidden + place, mask=inside, other=0.0).to(tl.float32)
        total += left * right
    tl.store(out + row * PER_ROW + k, tl.sum(total, 0))


@triton.jit
def projections_kernel(
    x, rounded, moments, own, square, hidden, BLOCK_HIDDEN: tl.constexpr
):  # fmt: skip
    """Fill own and square [rows] with sum_h m_h x_h x^_h and sum_h m_h x^_h^2; one program per row."""
    row = tl.program_id(0)
    crossed = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    squared = tl.zeros((BLOCK_HIDDEN,), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        inside = place < hidden
        there = row.to(tl.int64) * hidden + place
        left = tl.load(x + there, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(rounded + there, mask=inside, other=0.0).to(tl.float32)
        weighted = right * tl.load(moments + place, mask=inside, other=0.0)
        crossed += left * weighted
        squared += right * weighted
    tl.store(own + row, tl.sum(crossed, 0))
    tl.store(square + row, tl.sum(squared, 0))
