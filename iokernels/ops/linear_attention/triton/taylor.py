"""The Taylor map of BASED (Arora et al., 2024, arXiv:2402.18668, section 5) in the walk over values: out and dv.

    out_i = sum_{j <= i} exp(b_i - b_j) (1 + t + t^2 / 2) z_j    with t = s x_i . y_j

A block owns BLOCK_Z columns of z and out in one head of one segment and holds three sums in registers, of z_j, of
y_j z_j^T and of (y_j (x) y_j) z_j^T. Pairs inside a chunk go through the polynomial of x y^T, so that nothing is
expanded for them; all others through the sums, for which the products of two columns of x and y are made in registers.
No tensor of K^2 features is in memory but the states of segments.

The roles, and what stands in memory for the normaliser, are those of :mod:`.walk`. Going forward the sums are
without the scale; going back they are the gradients of those, with s and s^2 / 2 in them.

FLOPs: 2 N (C (K + V) + 2 V (K + K^2)) a head. Bytes: those of the walk without the map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import whole
from iokernels.ops.shared.triton_tiles import at_head, at_row, load_tile, store_tile, tile_offsets

from .chunks import (
    chunk_decay,
    head_decay,
    load_column,
    load_line,
    load_state,
    ones,
    segment_of,
    square_rows,
    squares,
    state_weights,
    weigh_pairs,
)


@triton.jit
def taylor_walk(
    x_view, y_view, z_view, out_view, column, decay, offsets, initial, last, counts, scale,
    FEATURES: tl.constexpr, REVERSE: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """One segment, head and slice of columns of z. ``column`` is the normaliser's, see :func:`.walk.walk`."""
    Y_WIDTH: tl.constexpr = SIZES.K_WIDTH
    Z_WIDTH: tl.constexpr = SIZES.V_WIDTH
    BLOCK_Y: tl.constexpr = SIZES.BLOCK_K
    BLOCK_Z: tl.constexpr = SIZES.BLOCK_V
    BLOCK_C: tl.constexpr = SIZES.BLOCK_C
    SLICES: tl.constexpr = (Z_WIDTH + BLOCK_Z - 1) // BLOCK_Z
    COLUMNS: tl.constexpr = SLICES * BLOCK_Z
    ROWS: tl.constexpr = 1 + Y_WIDTH + Y_WIDTH * Y_WIDTH
    SQUARES: tl.constexpr = BLOCK_Y * BLOCK_Y
    slice_z = tl.program_id(0) % SLICES
    head = tl.program_id(0) // SLICES % counts.heads
    segment = tl.program_id(0) // SLICES // counts.heads
    sequence, batch, start, length, _is_last = segment_of(segment, offsets, counts, FEATURES)
    offs_c, offs_y = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_Y)
    offs_z = slice_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    x_head = at_head(x_view.ptr, x_view, batch, head // counts.group, start)
    y_head = at_head(y_view.ptr, y_view, batch, head // counts.group, start)
    z_head = at_head(z_view.ptr, z_view, batch, head, start)
    out_head = at_head(out_view.ptr, out_view, batch, head, start)
    x_offsets = tile_offsets(x_view, offs_c, offs_y, SIZES.WIDE)
    y_offsets = tile_offsets(y_view, offs_c, offs_y, SIZES.WIDE)
    z_offsets = tile_offsets(z_view, offs_c, offs_z, SIZES.WIDE)
    out_offsets = tile_offsets(out_view, offs_c, offs_z, SIZES.WIDE)
    decay_head, head_decayed = head_decay(decay, batch, head, start, FEATURES)
    if FEATURES.split:
        outer = segment
    else:
        outer = sequence

    keys = tl.where(offs_y < Y_WIDTH, 1 + offs_y, ROWS)
    pairs_of_keys, _exchanged = square_rows(tl.arange(0, SQUARES), Y_WIDTH, BLOCK_Y)
    constant, z_constant = tl.zeros([BLOCK_Z], tl.float32), 0.0
    z_linear, z_square = tl.zeros([BLOCK_Y], tl.float32), tl.zeros([SQUARES], tl.float32)
    linear = load_state(initial, outer, head, keys, offs_z, ROWS, Z_WIDTH, BLOCK_Y, BLOCK_Z, FEATURES)
    square = load_state(initial, outer, head, pairs_of_keys, offs_z, ROWS, Z_WIDTH, SQUARES, BLOCK_Z, FEATURES)
    if FEATURES.has_state:
        line = at_head(initial.ptr, initial, outer, head, 0)
        constant = load_line(line, initial.d, offs_z, Z_WIDTH, BLOCK_Z, FEATURES)
        if FEATURES.normalize:
            line += Z_WIDTH * initial.d
            z_constant = tl.load(line)
            z_linear = load_line(line, initial.n, keys, ROWS, BLOCK_Y, FEATURES)
            z_square = load_line(line, initial.n, pairs_of_keys, ROWS, SQUARES, FEATURES)

    # On which side the scale of the linear and of the quadratic term stands.
    x_one, x_two, y_one, y_two = scale, 0.5 * scale * scale, 1.0, 1.0
    if REVERSE:
        x_one, x_two, y_one, y_two = 1.0, 1.0, scale, 0.5 * scale * scale
    chunks = tl.cdiv(length, BLOCK_C)
    for step in tl.range(0, chunks):
        first = step * BLOCK_C
        if REVERSE:
            first = (chunks - 1 - step) * BLOCK_C
        rows = first + offs_c
        x = load_tile(at_row(x_head, x_view, first), x_offsets, rows, offs_y, length, Y_WIDTH, BLOCK_Y, True)
        y = load_tile(at_row(y_head, y_view, first), y_offsets, rows, offs_y, length, Y_WIDTH, BLOCK_Y, True)
        z = load_tile(at_row(z_head, z_view, first), z_offsets, rows, offs_z, length, Z_WIDTH, COLUMNS, True)
        sums = chunk_decay(decay_head, head_decayed, decay.n, first, length, BLOCK_C, FEATURES)
        seen, kept = state_weights(sums, REVERSE)
        decayed = whole(sums)

        t = tl.dot(x, tl.trans(y), input_precision=SIZES.PRECISION) * scale
        pairs = weigh_pairs(1.0 + t + 0.5 * t * t, sums, REVERSE, False, BLOCK_C, FEATURES)
        x_square, y_square = squares(x, BLOCK_C, BLOCK_Y), squares(y, BLOCK_C, BLOCK_Y)
        out = tl.dot(x, linear.to(x.dtype), input_precision=SIZES.PRECISION) * x_one + constant[None, :]
        out += tl.dot(x_square, square.to(x.dtype), input_precision=SIZES.PRECISION) * x_two
        out = tl.dot(pairs.to(z.dtype), z, out * seen[:, None], input_precision=SIZES.PRECISION)
        if FEATURES.normalize:
            z_column = ones(rows, length)
            if REVERSE:
                z_column = load_column(column, batch, head, start, rows, length)
            if not REVERSE:
                denominator = z_constant + x_one * tl.sum(x.to(tl.float32) * z_linear[None, :], 1)
                denominator += x_two * tl.sum(x_square.to(tl.float32) * z_square[None, :], 1)
                denominator = denominator * seen + tl.sum(pairs * z_column[None, :], 1)
                out = out * tl.where(denominator == 0.0, 0.0, 1.0 / denominator)[:, None]
                place = at_head(column.ptr, column, batch, head, start)
                tl.store(place + rows, denominator, mask=(rows < length) & (slice_z == 0))
            weight = kept * z_column
            z_constant = z_constant * decayed + tl.sum(weight, 0)
            z_linear = z_linear * decayed + tl.sum(y.to(tl.float32) * (weight * y_one)[:, None], 0)
            z_square = z_square * decayed + tl.sum(y_square.to(tl.float32) * (weight * y_two)[:, None], 0)
        store_tile(
            at_row(out_head, out_view, first), out_offsets, out.to(out_view.ptr.dtype.element_ty), rows, offs_z, length,
            Z_WIDTH,
        )  # fmt: skip
        wide = z.to(tl.float32) * kept[:, None]
        constant = constant * decayed + tl.sum(wide, 0)
        linear = tl.dot(tl.trans(y), (wide * y_one).to(z.dtype), linear * decayed, input_precision=SIZES.PRECISION)
        square = tl.dot(
            tl.trans(y_square), (wide * y_two).to(z.dtype), square * decayed, input_precision=SIZES.PRECISION
        )

    if FEATURES.writes_state:
        last_head = at_head(last.ptr, last, sequence, head, 0)
        columns = last_head + offs_z * last.d
        tl.store(columns, constant, mask=offs_z < Z_WIDTH)
        at = columns[None, :] + keys[:, None] * last.n
        tl.store(at, linear, mask=(keys[:, None] < ROWS) & (offs_z[None, :] < Z_WIDTH))
        at = columns[None, :] + pairs_of_keys[:, None] * last.n
        tl.store(at, square, mask=(pairs_of_keys[:, None] < ROWS) & (offs_z[None, :] < Z_WIDTH))
        if FEATURES.normalize:
            beside, mine = last_head + Z_WIDTH * last.d, slice_z == 0
            tl.store(beside, z_constant, mask=mine)
            tl.store(beside + keys * last.n, z_linear, mask=(keys < ROWS) & mine)
            tl.store(beside + pairs_of_keys * last.n, z_square, mask=(pairs_of_keys < ROWS) & mine)
