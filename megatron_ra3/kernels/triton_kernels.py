"""Triton kernels for Hopper: the fused forward over vocabulary tiles, its gradient's blocks, and passes over rows.

A pass of log-probs is one kernel to quantise the hidden states (in FP8), one over the tiles, one to finish its rows.

Forward: a program keeps a tile of rows and walks the tiles of a vocabulary segment, the running maximum and sum in
registers, so nothing is written per logit, there are no atomics, and a row's result depends neither on how many rows
there are nor on where it stands. Logits are in units of log 2 and already divided by the temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING: tl.constexpr = tl.constexpr(-1e30)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
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
        nats = LN_2 * logprob + tl.load(entropy + row, mask=inside, other=0.0)[:, None]
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
def _to_e4m3(x):
    """To the nearest number of e4m3, ties to even, at most 448; NaN stays. What is cast is already rounded: exact."""
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # of a step of 2^-9 each, as numbers near 1.5 * 2^14 are
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal).to(tl.float8e4nv)


@triton.jit
def quantize_kernel(
    x, moments, directions, values, scales, rows, hidden,
    RANK: tl.constexpr, SPREAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Fill values [rows, hidden + 2 RANK] in e4m3 and scales [rows] with what `fp8.quantize_hidden` says of x."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    own_row = x + row[:, None].to(tl.int64) * hidden
    own_values = values + row[:, None].to(tl.int64) * (hidden + 2 * RANK)
    largest = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        exact = tl.load(own_row + place, mask=inside[:, None] & (place < hidden), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(exact), 1))
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full((BLOCK_ROWS,), 448.0, tl.float32)))
    own = tl.zeros((BLOCK_ROWS,), tl.float32)
    square = tl.zeros((BLOCK_ROWS,), tl.float32)
    projected = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
    of_rounded = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        there = inside[:, None] & (place < hidden)
        loaded = tl.load(own_row + place, mask=there, other=0.0)
        exact = loaded.to(tl.float32)
        value = _to_e4m3(tl.div_rn(exact, tl.broadcast_to(scale[:, None], (BLOCK_ROWS, BLOCK_HIDDEN))))
        tl.store(own_values + place, value, mask=there)
        rounded = value.to(tl.float32)
        weighted = rounded * tl.load(moments + place, mask=place < hidden, other=0.0)
        own += tl.sum(exact * weighted, 1)
        square += tl.sum(rounded * weighted, 1)
        along = place[:, None] * RANK + tl.arange(0, RANK)
        direction = tl.load(directions + along, mask=(place < hidden)[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            direction = direction.to(tl.float32)
            projected = tl.dot(exact, direction, projected, input_precision="ieee")
            of_rounded = tl.dot(rounded, direction, of_rounded, input_precision="ieee")
        else:
            projected = tl.dot(loaded, direction, projected)
            of_rounded = tl.dot(rounded.to(tl.bfloat16), direction, of_rounded)
    scale = tl.where(square == 0.0, scale, own / tl.where(square == 0.0, 1.0, square))
    tl.store(scales + row, scale, mask=inside)
    lost = projected - scale[:, None] * of_rounded
    place = hidden + tl.arange(0, RANK)
    tl.store(own_values + place, _to_e4m3(lost * SPREAD / scale[:, None]), mask=inside[:, None])
    tl.store(own_values + RANK + place, _to_e4m3(projected / (SPREAD * scale[:, None])), mask=inside[:, None])


@triton.jit
def _best(
    row, rows, groups, maxima, columns_of_maxima, target, CANDIDATES: tl.constexpr, GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """The largest of a row's maxima: [PLACES] logits, and their columns; in place 0 nothing, and the target."""
    group, place = tl.arange(0, GROUPS), tl.arange(0, PLACES)
    there = maxima + group.to(tl.int64) * rows + row
    left = tl.load(there, mask=group < groups, other=NOTHING)
    columns = tl.load(columns_of_maxima + group.to(tl.int64) * rows + row, mask=group < groups, other=0)
    rough = tl.full((PLACES,), NOTHING, tl.float32)
    chosen = tl.zeros((PLACES,), tl.int32) + tl.maximum(target, 0).to(tl.int32)
    for number in tl.static_range(1, CANDIDATES + 1):
        best, at = tl.max(left, 0), tl.argmax(left, 0)
        rough = tl.where(place == number, best, rough)
        chosen = tl.where(place == number, tl.sum(tl.where(group == at, columns, 0), 0), chosen)
        left = tl.where(group == at, NOTHING, left)
    return rough, chosen


@triton.jit
def finish_kernel(
    x, w, row_scale, tile_scale, targets, sums, maxima, columns_of_maxima, out,
    rows, hidden, groups, factor,
    SEGMENTS: tl.constexpr, PARTS: tl.constexpr, CANDIDATES: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr,
    TILE: tl.constexpr, FP8: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Fill out [4, rows], partials in nats, from the sums of segments; with CANDIDATES as `fp8` rescores them.

    The target's logit is x · w, times the scales for FP8, where x and w are what the sums were made of. One program
    per row. In fp64, where a rough logit may exceed all exact ones by hundreds of nats.
    """
    row = tl.program_id(0)
    segment = tl.arange(0, PARTS)
    part = sums + segment * 3 * rows + row
    tops = tl.load(part, mask=segment < SEGMENTS, other=NOTHING)
    totals = tl.load(part + rows, mask=segment < SEGMENTS, other=0.0)
    weights = tl.load(part + 2 * rows, mask=segment < SEGMENTS, other=0.0)
    top = tl.max(tops, 0)
    shift = tops - top
    shrink = tl.exp2(shift)
    total = tl.sum(totals * shrink, 0)
    weighted = tl.sum((weights + shift * totals) * shrink, 0)

    target = tl.load(targets + row)
    place = tl.arange(0, PLACES)
    if CANDIDATES:
        rough, column = _best(row, rows, groups, maxima, columns_of_maxima, target, CANDIDATES, GROUPS, PLACES)
    else:
        rough, column = tl.full((PLACES,), NOTHING, tl.float32), tl.zeros((PLACES,), tl.int32) + tl.maximum(target, 0)
    product = tl.zeros((PLACES, BLOCK_HIDDEN), tl.float32)
    start_of_column = w + column[:, None].to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_HIDDEN):
        channel = start + tl.arange(0, BLOCK_HIDDEN)
        inside = channel < hidden
        left = tl.load(x + row.to(tl.int64) * hidden + channel, mask=inside, other=0.0).to(tl.float32)
        there = inside[None, :] & (place <= CANDIDATES)[:, None]
        product += left[None, :] * tl.load(start_of_column + channel, mask=there, other=0.0).to(tl.float32)
    exact = tl.sum(product, 1) * factor
    if FP8:
        exact = exact * (tl.load(row_scale + row) * tl.load(tile_scale + tl.maximum(target, 0) // TILE))
    exact_target = tl.where(target >= 0, tl.sum(tl.where(place == 0, exact, 0.0), 0), 0.0)

    if CANDIDATES:
        counts = (rough > 0.5 * NOTHING) | ((place == 0) & (target >= 0))
        entering = tl.where(counts, exact, NOTHING).to(tl.float64)
        leaving = rough.to(tl.float64)
        new_top = tl.max(entering, 0)
        moved = top.to(tl.float64) - new_top
        weighted_wide = (weighted + moved * total) * tl.exp2(moved)
        total_wide = total * tl.exp2(moved)
        leaving -= new_top
        entering -= new_top
        gone = tl.where(counts & (place > 0), tl.exp2(leaving), 0.0)
        come = tl.exp2(entering)
        total_wide = tl.maximum(total_wide - tl.sum(gone, 0), 0.0) + tl.sum(come, 0)
        weighted_wide += tl.sum(come * entering, 0) - tl.sum(gone * leaving, 0)
        log_total = tl.log2(total_wide)
        top = (new_top + log_total).to(tl.float32)
        weighted = (weighted_wide / total_wide - log_total).to(tl.float32)
        total = 1.0
    if not ENTROPY:
        weighted = 0.0
    tl.store(out + row, top * LN_2)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, weighted * LN_2)
    tl.store(out + 3 * rows + row, exact_target * LN_2)
