"""The backward pass of recurrent networks in Triton, all steps in one kernel, from the last to the first.

    dvalues, dstates = cell'(values, states before and after, dstates)        dh = dh' + sum_g R_g^T ds_g

where dh' is what the cell itself passes on. Blocks are those of the forward pass: BLOCK_B sequences of one head, R on
chip; what the next step reads is fetched while this one runs. Nothing but dstates runs through time, so the gradients
of R and b wait until the loop is over, when all ds_g are there: ``dR_g = sum_t ds_g h^T`` is one product of length B N
(in :mod:`.launch`).

FLOPs: 2 G D^2 a step, head and sequence. Bytes: R once for every block; values, the S - 1 states after h (and h where
the cell reads it), dout and the gradients of the gates once, and once more those of the recurrent parts that are apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import (
    at_tile,
    choose,
    load_lengths,
    load_matrices,
    load_states,
    load_step,
    rows_if,
    store_states,
    store_step,
    tile_offsets,
)


@triton.jit
def _fetch(
    values_ptr, stride_values, values_offsets, dout_ptr, stride_dout, dout_offsets, out_ptr, stride_out, out_offsets,
    history_ptr, stride_history, history_offsets, alive, earlier, step,
    VALUES: tl.constexpr, READS_H: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """All that one step reads: its values, dout, h of the step before where the cell looks at it, the other states of
    the step before."""
    tiles = load_step(values_ptr, stride_values, values_offsets, alive, step, VALUES)
    tiles = tiles + load_step(dout_ptr, stride_dout, dout_offsets, alive, step, 1)
    tiles = tiles + load_step(out_ptr, stride_out, out_offsets, earlier, step - 1, READS_H)
    return tiles + load_step(history_ptr, stride_history, history_offsets, earlier, step - 1, OTHERS)


@triton.jit(do_not_specialize=["batch", "heads", "length", "clip"])
def flash_rnn_bwd_kernel(
    recurrent_ptr,  # [G, H, D, D], out by in
    initial_ptr,  # float32 [S, B, H, D], contiguous, or None
    lengths_ptr,  # int32 [B], contiguous, or None
    out_ptr,  # [B, N, H, D]
    values_ptr,  # [B, N, A, H, D]
    history_ptr,  # float32 [B, N, S - 1, H, D] or None
    dout_ptr,  # [B, N, H, D]
    dstate_ptr,  # float32 [S, B, H, D], contiguous, or None
    dgates_ptr,  # [B, N, G, H, D]
    dapart_ptr,  # [B, N, APART, H, D] or None
    dinitial_ptr,  # float32 [S, B, H, D], contiguous, or None
    stride_recurrent,
    stride_out,
    stride_values,
    stride_history,
    stride_dout,
    stride_dgates,
    stride_dapart,
    batch,
    heads,
    length,
    clip,  # 0: none
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    APART: tl.constexpr,
    STATES: tl.constexpr,
    READS_H: tl.constexpr,
    CLIPS: tl.constexpr,
    CUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All steps of BLOCK_B sequences of one head."""
    JOINED: tl.constexpr = GATES - APART
    VALUES: tl.constexpr = GATES + APART
    OTHERS: tl.constexpr = STATES - 1
    head, first = tl.program_id(0) % heads, tl.program_id(0) // heads * BLOCK_B
    rows, columns = first + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    inside = (rows < batch)[:, None] & (columns < WIDTH)[None, :]
    if not CUTS:
        matrices = load_matrices(recurrent_ptr, stride_recurrent, head, GATES, False, WIDTH, BLOCK_D)
    # h first, where the cell looks at it.
    initial = load_states(initial_ptr, first, head, batch, heads, 1 - READS_H, STATES, WIDTH, BLOCK_B, BLOCK_D)
    dstates = load_states(dstate_ptr, first, head, batch, heads, 0, STATES, WIDTH, BLOCK_B, BLOCK_D)
    steps = length
    if lengths_ptr is not None:
        lengths = load_lengths(lengths_ptr, first, batch, length, BLOCK_B)
        steps = tl.max(lengths, 0)

    out = at_tile(out_ptr, stride_out, first, head)
    out_offsets = tile_offsets(stride_out, BLOCK_B, BLOCK_D, WIDE)
    dout = at_tile(dout_ptr, stride_dout, first, head)
    dout_offsets = tile_offsets(stride_dout, BLOCK_B, BLOCK_D, WIDE)
    values_tile = at_tile(values_ptr, stride_values, first, head)
    values_offsets = tile_offsets(stride_values, BLOCK_B, BLOCK_D, WIDE)
    dgates = at_tile(dgates_ptr, stride_dgates, first, head)
    dgates_offsets = tile_offsets(stride_dgates, BLOCK_B, BLOCK_D, WIDE)
    if dapart_ptr is not None:
        dapart = at_tile(dapart_ptr, stride_dapart, first, head)
        dapart_offsets = tile_offsets(stride_dapart, BLOCK_B, BLOCK_D, WIDE)

    history_tile, history_offsets = out, out_offsets
    if STATES > 1:
        history_tile = at_tile(history_ptr, stride_history, first, head)
        history_offsets = tile_offsets(stride_history, BLOCK_B, BLOCK_D, WIDE)
    # h stands first among the states; only what a cell reads of it is loaded.
    states = (dstates[0],) + load_step(
        history_tile, stride_history, history_offsets, inside & rows_if(steps > 0, rows, batch), steps - 1, OTHERS
    )  # fmt: skip
    alive, earlier = inside & rows_if(steps > 0, rows, batch), inside & rows_if(steps > 1, rows, batch)
    if lengths_ptr is not None:
        alive = alive & (steps - 1 < lengths)[:, None]
    coming = _fetch(
        values_tile, stride_values, values_offsets, dout, stride_dout, dout_offsets, out, stride_out, out_offsets,
        history_tile, stride_history, history_offsets, alive, earlier, steps - 1, VALUES, READS_H, OTHERS,
    )  # fmt: skip
    for back in tl.range(0, steps):
        step = steps - 1 - back
        fetched = coming
        written = alive
        alive, earlier = inside & rows_if(step > 0, rows, batch), inside & rows_if(step > 1, rows, batch)
        if lengths_ptr is not None:
            alive = alive & (step - 1 < lengths)[:, None]
            valid = (step < lengths)[:, None]
        coming = _fetch(
            values_tile, stride_values, values_offsets, dout, stride_dout, dout_offsets, out, stride_out, out_offsets,
            history_tile, stride_history, history_offsets, alive, earlier, step - 1, VALUES, READS_H, OTHERS,
        )  # fmt: skip
        values = ()
        for a in tl.static_range(VALUES):
            values = values + (fetched[a].to(tl.float32),)
        # The states before the first step come from elsewhere.
        previous = (dstates[0],)
        if READS_H:
            previous = (tl.where(step > 0, fetched[VALUES + 1].to(tl.float32), initial[0]),)
        for s in tl.static_range(OTHERS):
            before_s = fetched[VALUES + 1 + READS_H + s]
            previous = previous + (tl.where(step > 0, before_s, initial[READS_H + s]),)

        after = (dstates[0] + fetched[VALUES].to(tl.float32),)
        for s in tl.static_range(1, STATES):
            after = after + (dstates[s],)
        dvalues, before = CELL(values, previous, states, after)
        dh = before[0]
        if not CUTS:
            through = tl.zeros_like(dh)
            for g in tl.static_range(GATES):
                ds = dvalues[g].to(recurrent_ptr.dtype.element_ty)
                through = tl.dot(ds, matrices[g], through, input_precision=PRECISION)
            if CLIPS:
                through = tl.minimum(tl.maximum(through, -clip), clip)
            dh += through
        found = (dh,)
        for s in tl.static_range(1, STATES):
            found = found + (before[s],)
        if lengths_ptr is not None:
            found = choose(valid, found, dstates, STATES)
        dstates = found
        states = previous
        for g in tl.static_range(JOINED):
            store_step(dgates, stride_dgates, dgates_offsets, written, step, g, dvalues[g])
        for a in tl.static_range(APART):
            store_step(dgates, stride_dgates, dgates_offsets, written, step, JOINED + a, dvalues[GATES + a])
            store_step(dapart, stride_dapart, dapart_offsets, written, step, a, dvalues[JOINED + a])
    if dinitial_ptr is not None:
        store_states(dinitial_ptr, dstates, first, head, batch, heads, STATES, WIDTH, BLOCK_B, BLOCK_D)
