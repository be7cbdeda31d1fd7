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

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import whole
from iokernels.ops.shared.triton_tiles import at_head, at_row, load_tile, store_tile, tile_offsets

from .chunks import chunk_decay, head_decay, load_line, load_state, segment_of, state_weights, weigh_pairs


@triton.jit
def walk(
    x_ptr, y_ptr, z_ptr, out_ptr,
    xa_ptr, ya_ptr, za_ptr,  # float32 [B, H, N] or None for ones
    below_ptr,  # float32 [B, H, N]: den, by which the forward pass divides; None otherwise
    decay_ptr, state_ptr, last_ptr, cu_seqlens_ptr, segments_ptr,
    u_ptr, partner_ptr, end_ptr, final_ptr, crossing_ptr,  # of the gradient of decays, see below
    stride_x, stride_y, stride_z, stride_out, stride_rows, stride_decay, stride_state, stride_last,
    stride_u, stride_end, stride_crossing,
    heads, x_group, y_group, z_group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
    FEATURES: tl.constexpr, REVERSE: tl.constexpr, CONTRACTS: tl.constexpr, DIVIDES: tl.constexpr,
    Y_WIDTH: tl.constexpr, Z_WIDTH: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment, head and slice of columns. CONTRACTS: the normaliser's column stands beside x and y, not z.

    With ``FEATURES.crossing`` u is what out is a gradient of. Forward, ``crossing_ptr`` [slices, B, H, N] receives r;
    reversed, ``partner_ptr`` holds the r of all slices, ``final_ptr`` the state behind every sequence, ``end_ptr``
    (split) the state before every segment, and ``crossing_ptr`` receives this slice's share of the gradient of every
    log decay.
    """
    SLICES: tl.constexpr = (Z_WIDTH + BLOCK_Z - 1) // BLOCK_Z
    COLUMNS: tl.constexpr = SLICES * BLOCK_Z
    slice_z = tl.program_id(0) % SLICES
    head = tl.program_id(0) // SLICES % heads
    segment = tl.program_id(0) // SLICES // heads
    sequence, batch, start, length, is_last = segment_of(
        segment, cu_seqlens_ptr, segments_ptr, sequences, seqlen, per_sequence, segment_rows, search_steps, FEATURES
    )
    offs_c, offs_y = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_Y)
    offs_z = slice_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    x_head = at_head(x_ptr, stride_x, batch, head // x_group, start)
    y_head = at_head(y_ptr, stride_y, batch, head // y_group, start)
    z_head = at_head(z_ptr, stride_z, batch, head // z_group, start)
    out_head = at_head(out_ptr, stride_out, batch, head, start)
    x_offsets, y_offsets = tile_offsets(stride_x, offs_c, offs_y, WIDE), tile_offsets(stride_y, offs_c, offs_y, WIDE)
    z_offsets, out_offsets = (
        tile_offsets(stride_z, offs_c, offs_z, WIDE),
        tile_offsets(stride_out, offs_c, offs_z, WIDE),
    )
    decay_head, decay = head_decay(decay_ptr, stride_decay, batch, head, start, FEATURES)
    if FEATURES.split:
        outer = segment
    else:
        outer = sequence
    state = load_state(
        state_ptr, stride_state, outer, head, offs_y, offs_z, Y_WIDTH, Z_WIDTH, BLOCK_Y, BLOCK_Z, FEATURES
    )
    y_sum = tl.zeros([BLOCK_Z], tl.float32)
    z_sum = tl.zeros([BLOCK_Y], tl.float32)
    if FEATURES.normalize and FEATURES.has_state:
        line = at_head(state_ptr, stride_state, outer, head, 0)
        if CONTRACTS:
            y_sum = load_line(line + Y_WIDTH * stride_state.n, stride_state.d, offs_z, Z_WIDTH, BLOCK_Z, FEATURES)
        else:
            z_sum = load_line(line + Z_WIDTH * stride_state.d, stride_state.n, offs_y, Y_WIDTH, BLOCK_Y, FEATURES)
    carried = 0.0
    if FEATURES.crossing and REVERSE and FEATURES.has_state:
        # What reaches past this segment: the gradient of the state behind it, times that state.
        end = at_head(final_ptr, stride_end, sequence, head, 0)
        if FEATURES.split:  # noqa: SIM102 - the first is known to the compiler, the second is not
            if not is_last:
                end = at_head(end_ptr, stride_end, segment + 1, head, 0)
        inside = (offs_y[:, None] < Y_WIDTH) & (offs_z[None, :] < Z_WIDTH)
        behind = tl.load(end + offs_y[:, None] * stride_end.n + offs_z[None, :] * stride_end.d, mask=inside, other=0.0)
        carried = tl.sum(tl.sum(state * behind, 1), 0)
        if FEATURES.normalize:
            behind = load_line(end + Y_WIDTH * stride_end.n, stride_end.d, offs_z, Z_WIDTH, BLOCK_Z, FEATURES)
            carried += tl.sum(y_sum * behind, 0)

    chunks = tl.cdiv(length, BLOCK_C)
    for step in tl.range(0, chunks):
        first = step * BLOCK_C
        if REVERSE:
            first = (chunks - 1 - step) * BLOCK_C
        rows = first + offs_c
        x = load_tile(at_row(x_head, stride_x, first), x_offsets, rows, offs_y, length, Y_WIDTH, BLOCK_Y, True)
        y = load_tile(at_row(y_head, stride_y, first), y_offsets, rows, offs_y, length, Y_WIDTH, BLOCK_Y, True)
        z = load_tile(at_row(z_head, stride_z, first), z_offsets, rows, offs_z, length, Z_WIDTH, COLUMNS, True)
        sums = chunk_decay(decay_head, decay, stride_decay.n, first, length, BLOCK_C, FEATURES)
        seen, kept = state_weights(sums, REVERSE)

        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        from_state = tl.dot(x, state.to(x.dtype), input_precision=PRECISION)
        if FEATURES.normalize and CONTRACTS:
            xa = load_beside(xa_ptr, stride_rows, batch, head, start, rows, length, BLOCK_C)
            ya = load_beside(ya_ptr, stride_rows, batch, head, start, rows, length, BLOCK_C)
            scores += xa[:, None] * ya[None, :]
            from_state += xa[:, None] * y_sum[None, :]
        if not REVERSE:
            from_state = from_state * scale
        if FEATURES.decay > 0:
            from_state = from_state * seen[:, None]
        pairs = weigh_pairs(scores, sums, REVERSE, FEATURES.crossing, BLOCK_C, FEATURES)
        # Scaled after the product, so that from_state cannot become its accumulator: Triton would lay that out as the
        # head of a chain of products, in twice the registers.
        out = tl.dot(pairs.to(z.dtype), z, input_precision=PRECISION) * scale + from_state
        if FEATURES.crossing:
            u = load_tile(
                at_row(at_head(u_ptr, stride_u, batch, head // z_group, start), stride_u, first),
                tile_offsets(stride_u, offs_c, offs_z, WIDE), rows, offs_z, length, Z_WIDTH, COLUMNS, True,
            )  # fmt: skip
            crossed = tl.sum(out * u.to(tl.float32), 1)
            itself = tl.sum(tl.where(offs_c[:, None] == offs_c[None, :], scores * scale, 0.0), 1)
            out += itself[:, None] * z.to(tl.float32)
            place = at_head(crossing_ptr, stride_crossing, batch, head, start) + rows
            place += tl.cast(slice_z, tl.int64) * stride_crossing.d
            if REVERSE:
                partner = at_head(partner_ptr, stride_rows, batch, head, start)
                mine = (rows < length) & (slice_z == 0)
                difference = tl.load(partner + rows, mask=mine, other=0.0) - crossed
                tl.store(place, carried + tl.cumsum(difference, 0, reverse=True), mask=rows < length)
                carried += tl.sum(difference, 0)
            else:
                tl.store(place, crossed, mask=rows < length)
        weight = kept
        if REVERSE:
            weight = kept * scale
        if FEATURES.normalize and not CONTRACTS:
            za = load_beside(za_ptr, stride_rows, batch, head, start, rows, length, BLOCK_C)
            y_wide = y.to(tl.float32)
            if DIVIDES:
                below = tl.sum(x.to(tl.float32) * z_sum[None, :], 1) * seen + tl.sum(pairs * za[None, :], 1)
                below = below * scale
                out = out * tl.where(below == 0.0, 0.0, 1.0 / below)[:, None]
                place = at_head(below_ptr, stride_rows, batch, head, start)
                tl.store(place + rows, below, mask=(rows < length) & (slice_z == 0))
            z_sum = z_sum * whole(sums) + tl.sum(y_wide * (weight * za)[:, None], 0)
        if FEATURES.normalize and CONTRACTS:
            y_sum = y_sum * whole(sums) + tl.sum(z.to(tl.float32) * (weight * ya)[:, None], 0)
        store_tile(
            at_row(out_head, stride_out, first), out_offsets, out.to(out_ptr.dtype.element_ty), rows, offs_z, length,
            Z_WIDTH,
        )  # fmt: skip
        if FEATURES.decay > 0:
            state = state * whole(sums)
        if FEATURES.decay > 0 or REVERSE:
            z = (z.to(tl.float32) * weight[:, None]).to(z.dtype)
        state = tl.dot(tl.trans(y), z, state, input_precision=PRECISION)

    if FEATURES.writes_state:
        last = at_head(last_ptr, stride_last, sequence, head, 0)
        inside = (offs_y[:, None] < Y_WIDTH) & (offs_z[None, :] < Z_WIDTH)
        tl.store(last + offs_y[:, None] * stride_last.n + offs_z[None, :] * stride_last.d, state, mask=inside)
        if FEATURES.normalize:
            mine = (offs_y < Y_WIDTH) & (slice_z == 0)
            tl.store(last + offs_y * stride_last.n + Z_WIDTH * stride_last.d, z_sum, mask=mine)


@triton.jit
def load_beside(ptr, strides, batch, head, start, rows, length, BLOCK: tl.constexpr):
    """The normaliser's column of these rows: ones where ``ptr`` is None, 0 past the end."""
    if ptr is None:
        return tl.where(rows < length, 1.0, 0.0)
    else:
        return tl.load(at_head(ptr, strides, batch, head, start) + rows, mask=rows < length, other=0.0)
