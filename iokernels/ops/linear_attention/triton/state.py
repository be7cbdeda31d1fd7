"""What lets several blocks share a sequence: the states of its segments, and the scan that joins them.

    local_p = sum_j exp(b_end - b_j) f(k_j) w_j^T    over the rows of segment p        (``state`` kernels)
    start_0 = the initial state,  start_{p+1} = exp(L_p) start_p + local_p             (``scan`` kernels)

with L_p the sum of a segment's log decays: sequence parallelism (LASP-2, Sun et al., 2025, arXiv:2502.07563) inside one
GPU. Going back the same of ``s exp(b_i) f(q_i) dN_i^T`` gives the gradient of the state behind every segment. A walk
(:mod:`.walk`) then starts from its segment's own state.

FLOPs: 2 N F W a head. Bytes: k once for each slice of V, v once, and each state of a segment, float32, four times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import whole
from iokernels.ops.shared.triton_tiles import at_head, at_row, load_tile, tile_offsets

from .chunks import (
    VARYING,
    Counts,
    chunk_decay,
    head_decay,
    load_column,
    ones,
    segment_of,
    square_rows,
    squares,
    state_weights,
)


@triton.jit
def segment_state(
    y_view, z_view, column, decay, states, totals_ptr, offsets, counts, scale,
    FEATURES: tl.constexpr, REVERSE: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """The state of one segment alone, BLOCK_Z columns of it, and the sum of its log2 decays. Going back ``column`` is
    dden."""
    Y_WIDTH: tl.constexpr = SIZES.K_WIDTH
    Z_WIDTH: tl.constexpr = SIZES.V_WIDTH
    BLOCK_Y: tl.constexpr = SIZES.BLOCK_K
    BLOCK_Z: tl.constexpr = SIZES.BLOCK_V
    BLOCK_C: tl.constexpr = SIZES.BLOCK_C
    SLICES: tl.constexpr = (Z_WIDTH + BLOCK_Z - 1) // BLOCK_Z
    COLUMNS: tl.constexpr = SLICES * BLOCK_Z
    slice_z = tl.program_id(0) % SLICES
    head = tl.program_id(0) // SLICES % counts.heads
    segment = tl.program_id(0) // SLICES // counts.heads
    _sequence, batch, start, length, _is_last = segment_of(segment, offsets, counts, FEATURES)
    offs_c, offs_y = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_Y)
    offs_z = slice_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    y_head = at_head(y_view.ptr, y_view, batch, head // counts.group, start)
    z_head = at_head(z_view.ptr, z_view, batch, head, start)
    y_offsets = tile_offsets(y_view, offs_c, offs_y, SIZES.WIDE)
    z_offsets = tile_offsets(z_view, offs_c, offs_z, SIZES.WIDE)
    decay_head, head_decayed = head_decay(decay, batch, head, start, FEATURES)

    state, z_sum = tl.zeros([BLOCK_Y, BLOCK_Z], tl.float32), tl.zeros([BLOCK_Y], tl.float32)
    if FEATURES.taylor:
        constant, constant_sum = tl.zeros([BLOCK_Z], tl.float32), 0.0
        square = tl.zeros([BLOCK_Y * BLOCK_Y, BLOCK_Z], tl.float32)
        square_sum = tl.zeros([BLOCK_Y * BLOCK_Y], tl.float32)
    all_decay = 0.0
    chunks = tl.cdiv(length, BLOCK_C)
    for step in tl.range(0, chunks):
        first = step * BLOCK_C
        if REVERSE:
            first = (chunks - 1 - step) * BLOCK_C
        rows = first + offs_c
        y = load_tile(at_row(y_head, y_view, first), y_offsets, rows, offs_y, length, Y_WIDTH, BLOCK_Y, True)
        z = load_tile(at_row(z_head, z_view, first), z_offsets, rows, offs_z, length, Z_WIDTH, COLUMNS, True)
        sums = chunk_decay(decay_head, head_decayed, decay.n, first, length, BLOCK_C, FEATURES)
        _seen, kept = state_weights(sums, REVERSE)
        decayed = whole(sums)
        all_decay += sums.whole_high + sums.whole_low
        linear = kept
        if REVERSE:
            linear = kept * scale
        wide = z.to(tl.float32)
        state = tl.dot(
            tl.trans(y), (wide * linear[:, None]).to(z.dtype), state * decayed, input_precision=SIZES.PRECISION
        )  # fmt: skip
        if FEATURES.taylor:
            quadratic = linear
            if REVERSE:
                quadratic = linear * (0.5 * scale)
            y_square = squares(y, BLOCK_C, BLOCK_Y)
            constant = constant * decayed + tl.sum(wide * kept[:, None], 0)
            square = tl.dot(
                tl.trans(y_square),
                (wide * quadratic[:, None]).to(z.dtype),
                square * decayed,
                input_precision=SIZES.PRECISION,
            )
        if FEATURES.normalize:
            z_column = ones(rows, length)
            if REVERSE:
                z_column = load_column(column, batch, head, start, rows, length)
            z_sum = z_sum * decayed + tl.sum(y.to(tl.float32) * (linear * z_column)[:, None], 0)
            if FEATURES.taylor:
                constant_sum = constant_sum * decayed + tl.sum(kept * z_column, 0)
                square_sum = square_sum * decayed + tl.sum(y_square.to(tl.float32) * (quadratic * z_column)[:, None], 0)

    place = at_head(states.ptr, states, segment, head, 0)
    columns, first_slice = offs_z[None, :] < Z_WIDTH, slice_z == 0
    beside = place + Z_WIDTH * states.d
    if FEATURES.taylor:
        at = place + offs_z * states.d
        tl.store(at, constant, mask=offs_z < Z_WIDTH)
        offs_s = tl.arange(0, BLOCK_Y * BLOCK_Y)
        pairs, _exchanged = square_rows(offs_s, Y_WIDTH, BLOCK_Y)
        real = pairs <= Y_WIDTH + Y_WIDTH * Y_WIDTH
        at = place + pairs[:, None] * states.n + offs_z[None, :] * states.d
        tl.store(at, square, mask=real[:, None] & columns)
        if FEATURES.normalize:
            tl.store(beside, constant_sum, mask=first_slice)
            tl.store(beside + pairs * states.n, square_sum, mask=real & first_slice)
        place += states.n
        beside += states.n
    at = place + offs_y[:, None] * states.n + offs_z[None, :] * states.d
    tl.store(at, state, mask=(offs_y[:, None] < Y_WIDTH) & columns)
    if FEATURES.normalize:
        tl.store(beside + offs_y * states.n, z_sum, mask=(offs_y < Y_WIDTH) & first_slice)
    if FEATURES.decay > 0:
        tl.store(totals_ptr + tl.cast(segment, tl.int64) * counts.heads + head, all_decay, mask=first_slice)


@triton.jit(do_not_specialize=VARYING)
def linear_attention_fwd_state_kernel(
    inputs,
    offsets,
    states,  # float32 [P, H, F, W]
    totals_ptr,  # float32 [P, H]: log2; not written without decay
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
    segment_rows,
    search_steps,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """What every segment adds to the state."""
    counts = Counts(heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps)
    segment_state(
        inputs.k, inputs.v, None, inputs.decay, states, totals_ptr, offsets, counts, 1.0, FEATURES, False, SIZES
    )


@triton.jit(do_not_specialize=VARYING)
def linear_attention_bwd_state_kernel(
    inputs,
    offsets,
    dout,  # [B, H, N, V]
    dden,  # float32 [B, H, N] or none
    states,  # float32 [P, H, F, W]
    totals_ptr,  # float32 [P, H]: log2; not written without decay
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
    segment_rows,
    search_steps,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """What every segment adds to the gradient of the state before it."""
    counts = Counts(heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps)
    segment_state(inputs.q, dout, dden, inputs.decay, states, totals_ptr, offsets, counts, scale, FEATURES, True, SIZES)


@triton.jit
def scan(
    states_ptr, totals_ptr, first_ptr, last_ptr, segments_ptr, heads, segments, per_sequence, size,
    FEATURES: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace each segment's own state by the one that its walk starts from: BLOCK elements of one head's."""
    tiles = tl.cdiv(size, BLOCK)
    offsets = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // tiles // heads
    mask = offsets < size
    if FEATURES.varlen:
        start = tl.minimum(tl.load(segments_ptr + sequence), segments)
        stop = tl.minimum(tl.load(segments_ptr + sequence + 1), segments)
    else:
        start = sequence * per_sequence
        stop = start + per_sequence
    whole = (tl.cast(sequence, tl.int64) * heads + head) * size + offsets
    carried = tl.zeros([BLOCK], tl.float32)
    if FEATURES.has_state:
        carried = tl.load(first_ptr + whole, mask=mask, other=0.0)
    for step in tl.range(0, stop - start):
        segment = start + step
        if REVERSE:
            segment = stop - 1 - step
        place = tl.cast(segment, tl.int64) * heads + head
        own = tl.load(states_ptr + place * size + offsets, mask=mask, other=0.0)
        tl.store(states_ptr + place * size + offsets, carried, mask=mask)
        if FEATURES.decay > 0:
            carried = carried * tl.exp2(tl.load(totals_ptr + place)) + own
        else:
            carried = carried + own
    if FEATURES.writes_state:
        tl.store(last_ptr + whole, carried, mask=mask)


@triton.jit(do_not_specialize=["heads", "segments", "per_sequence"])
def linear_attention_fwd_scan_kernel(
    states_ptr,  # float32 [P, H, F, W], in place
    totals_ptr,  # float32 [P, H]
    first_ptr,  # float32 [S, H, F, W] or None: the initial states
    last_ptr,  # float32 [S, H, F, W] or None: the final states
    segments_ptr,  # int32 [S + 1] or None
    heads,
    segments,  # P
    per_sequence,
    size,  # F * W
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The states before every segment."""
    scan(
        states_ptr, totals_ptr, first_ptr, last_ptr, segments_ptr, heads, segments, per_sequence, size,
        FEATURES, False, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "segments", "per_sequence"])
def linear_attention_bwd_scan_kernel(
    states_ptr,  # float32 [P, H, F, W], in place
    totals_ptr,  # float32 [P, H]
    first_ptr,  # float32 [S, H, F, W] or None: the gradients of the final states
    last_ptr,  # float32 [S, H, F, W] or None: those of the initial states
    segments_ptr,  # int32 [S + 1] or None
    heads,
    segments,  # P
    per_sequence,
    size,  # F * W
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the states behind every segment."""
    scan(
        states_ptr, totals_ptr, first_ptr, last_ptr, segments_ptr, heads, segments, per_sequence, size,
        FEATURES, True, BLOCK,
    )  # fmt: skip
