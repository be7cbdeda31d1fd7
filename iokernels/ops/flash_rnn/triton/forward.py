"""The forward pass of recurrent networks in Triton, all steps in one kernel (FlashRNN, Pöppel et al., 2024,
arXiv:2412.07752, section 3).

    s_g = R_g h + b_g        states = cell(x, s, states)        for every step

A thread block takes BLOCK_B sequences of one head through time. The head's matrices R_g stay on chip all the while, as
do the states; no block waits for another, since heads do not mix. The inputs of the next step are fetched while the
product of this one runs.

FLOPs: 2 G D^2 a step, head and sequence. Bytes: R and b once for every block; gates and h once; and where a gradient
will be taken A values and S - 1 states a unit and step. A step waits for the one before, so the time is N times the
latency of a product, a few exponentials and the exchange of h between warps, as long as there is an SM for each block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import (
    at_tile,
    choose,
    join,
    load_biases,
    load_lengths,
    load_matrices,
    load_states,
    load_step,
    rows_if,
    store_states,
    store_step,
    tile_offsets,
)


@triton.jit(do_not_specialize=["batch", "heads", "length"])
def flash_rnn_fwd_kernel(
    gates_ptr,  # [B, N, G, H, D]
    recurrent_ptr,  # [G, H, D, D], out by in
    bias_ptr,  # [G, H, D], contiguous, or None
    initial_ptr,  # float32 [S, B, H, D], contiguous, or None
    lengths_ptr,  # int32 [B], contiguous, or None
    out_ptr,  # [B, N, H, D]
    state_ptr,  # float32 [S, B, H, D], contiguous
    values_ptr,  # [B, N, A, H, D] or None
    history_ptr,  # float32 [B, N, S - 1, H, D] or None
    stride_gates,
    stride_recurrent,
    stride_out,
    stride_values,
    stride_history,
    batch,
    heads,
    length,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    APART: tl.constexpr,
    STATES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All steps of BLOCK_B sequences of one head."""
    head, first = tl.program_id(0) % heads, tl.program_id(0) // heads * BLOCK_B
    rows, columns = first + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    inside = (rows < batch)[:, None] & (columns < WIDTH)[None, :]
    matrices = load_matrices(recurrent_ptr, stride_recurrent, head, GATES, True, WIDTH, BLOCK_D)
    biases = load_biases(bias_ptr, head, heads, GATES, WIDTH, BLOCK_D)
    states = load_states(initial_ptr, first, head, batch, heads, 0, STATES, WIDTH, BLOCK_B, BLOCK_D)
    steps = length
    if lengths_ptr is not None:
        lengths = load_lengths(lengths_ptr, first, batch, length, BLOCK_B)
        steps = tl.max(lengths, 0)

    gates = at_tile(gates_ptr, stride_gates, first, head)
    out = at_tile(out_ptr, stride_out, first, head)
    gates_offsets = tile_offsets(stride_gates, BLOCK_B, BLOCK_D, WIDE)
    out_offsets = tile_offsets(stride_out, BLOCK_B, BLOCK_D, WIDE)
    if values_ptr is not None:
        values_tile = at_tile(values_ptr, stride_values, first, head)
        values_offsets = tile_offsets(stride_values, BLOCK_B, BLOCK_D, WIDE)
    if history_ptr is not None:
        history_tile = at_tile(history_ptr, stride_history, first, head)
        history_offsets = tile_offsets(stride_history, BLOCK_B, BLOCK_D, WIDE)

    coming = load_step(gates, stride_gates, gates_offsets, inside & rows_if(steps > 0, rows, batch), 0, GATES)
    for step in tl.range(0, steps):
        x = coming
        more = inside & rows_if(step + 1 < steps, rows, batch)
        coming = load_step(gates, stride_gates, gates_offsets, more, step + 1, GATES)
        h = states[0].to(recurrent_ptr.dtype.element_ty)
        values = join(x, biases, matrices, h, GATES, APART, PRECISION)
        following = CELL(values, states)
        written = inside
        if lengths_ptr is not None:
            valid = (step < lengths)[:, None]
            following = choose(valid, following, states, STATES)
            written = inside & valid
        states = following
        store_step(out, stride_out, out_offsets, written, step, 0, states[0])
        if values_ptr is not None:
            for a in tl.static_range(GATES + APART):
                store_step(values_tile, stride_values, values_offsets, inside, step, a, values[a])
        if history_ptr is not None:
            for s in tl.static_range(1, STATES):
                store_step(history_tile, stride_history, history_offsets, inside, step, s - 1, states[s])
    store_states(state_ptr, states, first, head, batch, heads, STATES, WIDTH, BLOCK_B, BLOCK_D)
