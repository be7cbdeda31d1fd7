"""The walk that is the forward pass and all of the backward pass of linear attention in Triton.

With any three sequences of rows x, y, z the walk makes

    out_i = s sum_{j <= i} exp(b_i - b_j) (x_i . y_j) z_j            forward in time
    out_j = s sum_{i >= j} exp(b_i - b_j) (x_j . y_i) z_i            with REVERSE

and four choices of them are the operator and its gradients (Qin et al., 2024, arXiv:2401.04658, equations 9 to 13):

    out: x, y, z = q, k, v              dq: dO, v, k
    dv:  x, y, z = k, q, dO reversed    dk: v, dO, q reversed

A block owns BLOCK_Z columns of z and out in one head of one segment, keeps the state ``sum_j exp(b - b_j) y_j z_j^T``,
[Y, BLOCK_Z] float32, in registers, and walks chunks of BLOCK_C rows: pairs inside a chunk by the masked product of x
and y, all others through the state. Every exponent is at most 0.

The state is without the scale going forward; going back it is the gradient of that one, so the scale goes into it. A
column of ones beside v, with its gradient dden beside dO, makes the normaliser: as ``x_i . y_j + xa_i ya_j`` where it
is contracted, and as a sum beside the state where it is a column of z.

Gradient of decays: with r_i = q_i . dq_i and c_j = k_j . dk_j, both without the pair of a token and itself, which no
decay touches, ``dg_t = sum_{i >= t} (r_i - c_i) + E`` inside a segment, where E is the product of the state behind the
segment and its gradient. Both are computed from the same rounded pairs, so that their errors cancel in the sum.

FLOPs: 2 N (C Y + C Z + 2 Y Z) a head and slice. Bytes that blocks request: x and y once for each slice of z, z and out
once; for K = V = d in bfloat16 and one slice that is 8 d a token and head. The states of segments, float32, once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import whole
from iokernels.ops.shared.triton_tiles import View, at_head, at_row, load_tile, store_tile, tile_offsets

from .chunks import (
    chunk_decay,
    head_decay,
    load_column,
    load_line,
    load_state,
    ones,
    segment_of,
    state_weights,
    weigh_pairs,
)


class DecayGradient(NamedTuple):
    """What the gradient of decays takes where it is wanted."""

    r_ptr: Any  # float32 [B, H, N]: going back, the r of all slices
    before_ptr: Any  # float32 [P, H, F, W]: going back and split, the state before every segment
    final: View  # float32 [S, H, F, W]: going back, the state behind every sequence; its strides are those of both
    share: View  # float32 [slices, B, H, N]: receives r, or a slice's share of dg; ``d`` is from one to the next


@triton.jit
def walk(
    x_view, y_view, z_view, out_view, column, decay, offsets, initial, last, u_view, gradient, counts, scale,
    FEATURES: tl.constexpr, REVERSE: tl.constexpr, CONTRACTS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """One segment, head and slice of columns. CONTRACTS: the normaliser's column stands beside x and y, not z.

    ``column`` [B, H, N], float32, is the normaliser's: den, which the forward pass writes, or dden, which the backward
    pass reads. The column of the other side is ones. Where decays want a gradient, ``u_view`` is what out is a gradient
    of.
    """
    Y_WIDTH: tl.constexpr = SIZES.V_WIDTH if CONTRACTS else SIZES.K_WIDTH
    Z_WIDTH: tl.constexpr = SIZES.K_WIDTH if CONTRACTS else SIZES.V_WIDTH
    BLOCK_Y: tl.constexpr = SIZES.BLOCK_V if CONTRACTS else SIZES.BLOCK_K
    BLOCK_Z: tl.constexpr = SIZES.BLOCK_K if CONTRACTS else SIZES.BLOCK_V
    BLOCK_C: tl.constexpr = SIZES.BLOCK_C
    SLICES: tl.constexpr = (Z_WIDTH + BLOCK_Z - 1) // BLOCK_Z
    COLUMNS: tl.constexpr = SLICES * BLOCK_Z
    slice_z = tl.program_id(0) % SLICES
    head = tl.program_id(0) // SLICES % counts.heads
    segment = tl.program_id(0) // SLICES // counts.heads
    sequence, batch, start, length, is_last = segment_of(segment, offsets, counts, FEATURES)
    offs_c, offs_y = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_Y)
    offs_z = slice_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    # A head of q or k serves a group of those of v and out.
    if CONTRACTS:
        y_head_index, z_head_index = head, head // counts.group
    else:
        y_head_index, z_head_index = head // counts.group, head
    x_head = at_head(x_view.ptr, x_view, batch, y_head_index, start)
    y_head = at_head(y_view.ptr, y_view, batch, y_head_index, start)
    z_head = at_head(z_view.ptr, z_view, batch, z_head_index, start)
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
    state = load_state(initial, outer, head, offs_y, offs_z, Y_WIDTH, Z_WIDTH, BLOCK_Y, BLOCK_Z, FEATURES)
    y_sum = tl.zeros([BLOCK_Z], tl.float32)
    z_sum = tl.zeros([BLOCK_Y], tl.float32)
    if FEATURES.normalize and FEATURES.has_state:
        line = at_head(initial.ptr, initial, outer, head, 0)
        if CONTRACTS:
            y_sum = load_line(line + Y_WIDTH * initial.n, initial.d, offs_z, Z_WIDTH, BLOCK_Z, FEATURES)
        else:
            z_sum = load_line(line + Z_WIDTH * initial.d, initial.n, offs_y, Y_WIDTH, BLOCK_Y, FEATURES)
    carried = 0.0
    if FEATURES.decay_gradient:
        share = gradient.share
    if FEATURES.decay_gradient and REVERSE and FEATURES.has_state:
        # What reaches past this segment: the gradient of the state behind it, times that state.
        final = gradient.final
        end = at_head(final.ptr, final, sequence, head, 0)
        if FEATURES.split:  # noqa: SIM102 - the first is known to the compiler, the second is not
            if not is_last:
                end = at_head(gradient.before_ptr, final, segment + 1, head, 0)
        inside = (offs_y[:, None] < Y_WIDTH) & (offs_z[None, :] < Z_WIDTH)
        behind = tl.load(end + offs_y[:, None] * final.n + offs_z[None, :] * final.d, mask=inside, other=0.0)
        carried = tl.sum(tl.sum(state * behind, 1), 0)
        if FEATURES.normalize:
            behind = load_line(end + Y_WIDTH * final.n, final.d, offs_z, Z_WIDTH, BLOCK_Z, FEATURES)
            carried += tl.sum(y_sum * behind, 0)

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

        scores = tl.dot(x, tl.trans(y), input_precision=SIZES.PRECISION)
        from_state = tl.dot(x, state.to(x.dtype), input_precision=SIZES.PRECISION)
        if FEATURES.normalize and CONTRACTS:
            if REVERSE:
                x_column, y_column = ones(rows, length), load_column(column, batch, head, start, rows, length)
            else:
                x_column, y_column = load_column(column, batch, head, start, rows, length), ones(rows, length)
            scores += x_column[:, None] * y_column[None, :]
            from_state += x_column[:, None] * y_sum[None, :]
        if not REVERSE:
            from_state = from_state * scale
        if FEATURES.decay > 0:
            from_state = from_state * seen[:, None]
        pairs = weigh_pairs(scores, sums, REVERSE, FEATURES.decay_gradient, BLOCK_C, FEATURES)
        # Scaled after the product, so that from_state cannot become its accumulator: Triton would lay that out as the
        # head of a chain of products, in twice the registers.
        out = tl.dot(pairs.to(z.dtype), z, input_precision=SIZES.PRECISION) * scale + from_state
        if FEATURES.decay_gradient:
            u = load_tile(
                at_row(at_head(u_view.ptr, u_view, batch, z_head_index, start), u_view, first),
                tile_offsets(u_view, offs_c, offs_z, SIZES.WIDE), rows, offs_z, length, Z_WIDTH, COLUMNS, True,
            )  # fmt: skip
            crossed = tl.sum(out * u.to(tl.float32), 1)
            itself = tl.sum(tl.where(offs_c[:, None] == offs_c[None, :], scores * scale, 0.0), 1)
            out += itself[:, None] * z.to(tl.float32)
            place = at_head(share.ptr, share, batch, head, start) + rows
            place += tl.cast(slice_z, tl.int64) * share.d
            if REVERSE:
                r_head = at_head(gradient.r_ptr, share, batch, head, start)
                mine = (rows < length) & (slice_z == 0)
                difference = tl.load(r_head + rows, mask=mine, other=0.0) - crossed
                tl.store(place, carried + tl.cumsum(difference, 0, reverse=True), mask=rows < length)
                carried += tl.sum(difference, 0)
            else:
                tl.store(place, crossed, mask=rows < length)
        weight = kept
        if REVERSE:
            weight = kept * scale
        if FEATURES.normalize and not CONTRACTS:
            z_column = ones(rows, length)
            if REVERSE:
                z_column = load_column(column, batch, head, start, rows, length)
            y_wide = y.to(tl.float32)
            if not REVERSE:
                denominator = tl.sum(x.to(tl.float32) * z_sum[None, :], 1) * seen + tl.sum(pairs * z_column[None, :], 1)
                denominator = denominator * scale
                out = out * tl.where(denominator == 0.0, 0.0, 1.0 / denominator)[:, None]
                place = at_head(column.ptr, column, batch, head, start)
                tl.store(place + rows, denominator, mask=(rows < length) & (slice_z == 0))
            z_sum = z_sum * whole(sums) + tl.sum(y_wide * (weight * z_column)[:, None], 0)
        if FEATURES.normalize and CONTRACTS:
            y_sum = y_sum * whole(sums) + tl.sum(z.to(tl.float32) * (weight * y_column)[:, None], 0)
        store_tile(
            at_row(out_head, out_view, first), out_offsets, out.to(out_view.ptr.dtype.element_ty), rows, offs_z, length,
            Z_WIDTH,
        )  # fmt: skip
        if FEATURES.decay > 0:
            state = state * whole(sums)
        if FEATURES.decay > 0 or REVERSE:
            z = (z.to(tl.float32) * weight[:, None]).to(z.dtype)
        state = tl.dot(tl.trans(y), z, state, input_precision=SIZES.PRECISION)

    if FEATURES.writes_state:
        last_head = at_head(last.ptr, last, sequence, head, 0)
        inside = (offs_y[:, None] < Y_WIDTH) & (offs_z[None, :] < Z_WIDTH)
        tl.store(last_head + offs_y[:, None] * last.n + offs_z[None, :] * last.d, state, mask=inside)
        if FEATURES.normalize:
            mine = (offs_y < Y_WIDTH) & (slice_z == 0)
            tl.store(last_head + offs_y * last.n + Z_WIDTH * last.d, z_sum, mask=mine)
