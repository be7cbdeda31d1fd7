"""The Taylor map in the walk over keys: dq and dk. With x, y and z as in :mod:`.walk`, and m what is derived by:

    out_i = s sum_{j <= i} exp(b_i - b_j) (x_i . y_j) (1 + t) z_j    with t = s m_i . z_j

    dq: x, y, z, m = dO, v, k, q             dk: x, y, z, m = v, dO, q, k reversed

The sums that the walk carries are those of :mod:`.taylor`, transposed: y_j, y_j z_j^T and y_j (z_j (x) z_j)^T.
The product of x with the last, [C, K^2], is contracted with m in registers. A block owns BLOCK_Y columns of x and y,
over which out is a sum: with more than one slice, each writes its share, and the launcher adds them.

A state in memory may have been given by a caller, so its products k_a k_c are read both ways round and halved.

FLOPs: 2 N (C (V + 2 K) + 2 V (K + K^2)) a head. Bytes: those of the walk without the map, and m once for each slice.
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
def taylor_keys(
    x_view, y_view, z_view, m_view, out_view, column, decay, offsets, initial, gradient, counts, scale,
    FEATURES: tl.constexpr, REVERSE: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """One segment, head and slice of columns of x and y. ``column`` is dden; the other side's column is ones."""
    Y_WIDTH: tl.constexpr = SIZES.V_WIDTH
    Z_WIDTH: tl.constexpr = SIZES.K_WIDTH
    BLOCK_Y: tl.constexpr = SIZES.BLOCK_V
    BLOCK_Z: tl.constexpr = SIZES.BLOCK_K
    BLOCK_C: tl.constexpr = SIZES.BLOCK_C
    SLICES: tl.constexpr = (Y_WIDTH + BLOCK_Y - 1) // BLOCK_Y
    COLUMNS: tl.constexpr = SLICES * BLOCK_Y
    ROWS: tl.constexpr = 1 + Z_WIDTH + Z_WIDTH * Z_WIDTH
    SQUARES: tl.constexpr = BLOCK_Z * BLOCK_Z
    slice_y = tl.program_id(0) % SLICES
    head = tl.program_id(0) // SLICES % counts.heads
    segment = tl.program_id(0) // SLICES // counts.heads
    sequence, batch, start, length, is_last = segment_of(segment, offsets, counts, FEATURES)
    offs_c, offs_z = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_Z)
    offs_y = slice_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x_head = at_head(x_view.ptr, x_view, batch, head, start)
    y_head = at_head(y_view.ptr, y_view, batch, head, start)
    z_head = at_head(z_view.ptr, z_view, batch, head // counts.group, start)
    m_head = at_head(m_view.ptr, m_view, batch, head // counts.group, start)
    share = gradient.share
    shares = tl.cast(slice_y, tl.int64) * share.d
    out_head = at_head(out_view.ptr, out_view, batch, head, start) + shares * Z_WIDTH
    x_offsets = tile_offsets(x_view, offs_c, offs_y, SIZES.WIDE)
    y_offsets = tile_offsets(y_view, offs_c, offs_y, SIZES.WIDE)
    z_offsets = tile_offsets(z_view, offs_c, offs_z, SIZES.WIDE)
    m_offsets = tile_offsets(m_view, offs_c, offs_z, SIZES.WIDE)
    out_offsets = tile_offsets(out_view, offs_c, offs_z, SIZES.WIDE)
    decay_head, head_decayed = head_decay(decay, batch, head, start, FEATURES)
    if FEATURES.split:
        outer = segment
    else:
        outer = sequence

    keys = tl.where(offs_z < Z_WIDTH, 1 + offs_z, ROWS)
    pairs_of_keys, exchanged = square_rows(tl.arange(0, SQUARES), Z_WIDTH, BLOCK_Z)
    constant, a_constant = tl.zeros([BLOCK_Y], tl.float32), 0.0
    a_linear, a_square = tl.zeros([BLOCK_Z], tl.float32), tl.zeros([SQUARES], tl.float32)
    linear = load_state(initial, outer, head, offs_y, keys, Y_WIDTH, ROWS, BLOCK_Y, BLOCK_Z, FEATURES)
    square = load_state(initial, outer, head, offs_y, pairs_of_keys, Y_WIDTH, ROWS, BLOCK_Y, SQUARES, FEATURES)
    carried = 0.0
    if FEATURES.has_state:
        line = at_head(initial.ptr, initial, outer, head, 0)
        constant = load_line(line, initial.n, offs_y, Y_WIDTH, BLOCK_Y, FEATURES)
        beside = line + Y_WIDTH * initial.n
        if FEATURES.normalize:
            a_constant = tl.load(beside)
            a_linear = load_line(beside, initial.d, keys, ROWS, BLOCK_Z, FEATURES)
            a_square = load_line(beside, initial.d, pairs_of_keys, ROWS, SQUARES, FEATURES)
        if FEATURES.decay_gradient and REVERSE:
            # What reaches past this segment: the gradient of the state behind it, times that state.
            final = gradient.final
            end = at_head(final.ptr, final, sequence, head, 0)
            if FEATURES.split:  # noqa: SIM102 - the first is known to the compiler, the second is not
                if not is_last:
                    end = at_head(gradient.before_ptr, final, segment + 1, head, 0)
            columns = end + offs_y[:, None] * final.n
            mask = offs_y[:, None] < Y_WIDTH
            behind = tl.load(columns + keys[None, :] * final.d, mask=mask & (keys[None, :] < ROWS), other=0.0)
            carried = tl.sum(tl.sum(linear * behind, 1), 0)
            mask = mask & (pairs_of_keys[None, :] < ROWS)
            behind = tl.load(columns + pairs_of_keys[None, :] * final.d, mask=mask, other=0.0)
            carried += tl.sum(tl.sum(square * behind, 1), 0)
            behind = load_line(end, final.n, offs_y, Y_WIDTH, BLOCK_Y, FEATURES)
            carried += tl.sum(constant * behind, 0)
            if FEATURES.normalize:
                end += Y_WIDTH * final.n
                past = tl.load(end) * a_constant
                past += tl.sum(load_line(end, final.d, keys, ROWS, BLOCK_Z, FEATURES) * a_linear, 0)
                past += tl.sum(load_line(end, final.d, pairs_of_keys, ROWS, SQUARES, FEATURES) * a_square, 0)
                carried += tl.where(slice_y == 0, past, 0.0)
        other = load_state(initial, outer, head, offs_y, exchanged, Y_WIDTH, ROWS, BLOCK_Y, SQUARES, FEATURES)
        square = 0.5 * (square + other)
        if FEATURES.normalize:
            a_square = 0.5 * (a_square + load_line(beside, initial.d, exchanged, ROWS, SQUARES, FEATURES))

    # On which side the scale of the linear and of the quadratic term stands.
    m_one, m_two, y_one, y_two = scale, 0.5 * scale * scale, 1.0, 1.0
    if REVERSE:
        m_one, m_two, y_one, y_two = 1.0, 1.0, scale, 0.5 * scale * scale
    chunks = tl.cdiv(length, BLOCK_C)
    for step in tl.range(0, chunks):
        first = step * BLOCK_C
        if REVERSE:
            first = (chunks - 1 - step) * BLOCK_C
        rows = first + offs_c
        x = load_tile(at_row(x_head, x_view, first), x_offsets, rows, offs_y, length, Y_WIDTH, COLUMNS, True)
        y = load_tile(at_row(y_head, y_view, first), y_offsets, rows, offs_y, length, Y_WIDTH, COLUMNS, True)
        z = load_tile(at_row(z_head, z_view, first), z_offsets, rows, offs_z, length, Z_WIDTH, BLOCK_Z, True)
        m = load_tile(at_row(m_head, m_view, first), m_offsets, rows, offs_z, length, Z_WIDTH, BLOCK_Z, True)
        sums = chunk_decay(decay_head, head_decayed, decay.n, first, length, BLOCK_C, FEATURES)
        seen, kept = state_weights(sums, REVERSE)
        decayed = whole(sums)

        scores = tl.dot(x, tl.trans(y), input_precision=SIZES.PRECISION)
        by_one = tl.dot(x, linear.to(x.dtype), input_precision=SIZES.PRECISION)
        by_two = tl.dot(x, square.to(x.dtype), input_precision=SIZES.PRECISION)
        if FEATURES.normalize:
            # The normaliser's column belongs to the first slice.
            if REVERSE:
                x_column, y_column = ones(rows, length), load_column(column, batch, head, start, rows, length)
            else:
                x_column, y_column = load_column(column, batch, head, start, rows, length), ones(rows, length)
            x_column = tl.where(slice_y == 0, x_column, 0.0)
            scores += x_column[:, None] * y_column[None, :]
            by_one += x_column[:, None] * a_linear[None, :]
            by_two += x_column[:, None] * a_square[None, :]
        m_wide = m.to(tl.float32)
        by_two = tl.sum(tl.reshape(by_two, (BLOCK_C, BLOCK_Z, BLOCK_Z)) * m_wide[:, :, None], 1)
        t = tl.dot(m, tl.trans(z), input_precision=SIZES.PRECISION) * scale
        pairs = weigh_pairs(scores, sums, REVERSE, FEATURES.decay_gradient, BLOCK_C, FEATURES)
        out = (by_one * m_one + by_two * (2.0 * m_two)) * seen[:, None]
        out += scale * tl.dot((pairs * (1.0 + t)).to(z.dtype), z, input_precision=SIZES.PRECISION)
        if FEATURES.decay_gradient:
            crossed = tl.sum(x.to(tl.float32) * constant[None, :], 1)
            crossed += tl.sum(m_wide * (by_one * m_one + by_two * m_two), 1)
            if FEATURES.normalize:
                crossed += x_column * a_constant
            crossed = crossed * seen + tl.sum(pairs * (1.0 + t + 0.5 * t * t), 1)
            itself = tl.where(offs_c[:, None] == offs_c[None, :], scores * (1.0 + t) * scale, 0.0)
            out += tl.sum(itself, 1)[:, None] * z.to(tl.float32)
            place = at_head(share.ptr, share, batch, head, start) + rows + shares
            if REVERSE:
                r_head = at_head(gradient.r_ptr, share, batch, head, start)
                mine = (rows < length) & (slice_y == 0)
                difference = tl.load(r_head + rows, mask=mine, other=0.0) - crossed
                tl.store(place, carried + tl.cumsum(difference, 0, reverse=True), mask=rows < length)
                carried += tl.sum(difference, 0)
            else:
                tl.store(place, crossed, mask=rows < length)
        store_tile(
            at_row(out_head, out_view, first), out_offsets, out.to(out_view.ptr.dtype.element_ty), rows, offs_z, length,
            Z_WIDTH,
        )  # fmt: skip
        z_square = squares(z, BLOCK_C, BLOCK_Z)
        wide = y.to(tl.float32) * kept[:, None]
        constant = constant * decayed + tl.sum(wide, 0)
        linear = tl.dot(tl.trans((wide * y_one).to(y.dtype)), z, linear * decayed, input_precision=SIZES.PRECISION)
        square = tl.dot(
            tl.trans((wide * y_two).to(y.dtype)), z_square, square * decayed, input_precision=SIZES.PRECISION
        )
        if FEATURES.normalize:
            weight = kept * y_column
            a_constant = a_constant * decayed + tl.sum(weight, 0)
            a_linear = a_linear * decayed + tl.sum(z.to(tl.float32) * (weight * y_one)[:, None], 0)
            a_square = a_square * decayed + tl.sum(z_square.to(tl.float32) * (weight * y_two)[:, None], 0)
