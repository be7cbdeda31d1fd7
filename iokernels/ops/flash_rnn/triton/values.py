"""The values of all steps at once, for a backward pass that did not keep them: ``x + R h + b``, h being known.

Unlike the forward pass, this is parallel over time. A thread block takes BLOCK_M rows, a row being one step of one
sequence, of one head, and all gates of them one after the other.

FLOPs: 2 G D^2 a step, head and sequence. Bytes: gates and values once, h once, and R and b once for every block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import join, load_biases, load_matrices


@triton.jit
def row_offsets(strides, sequences, steps, head, columns):
    """64-bit offsets of rows of a ``[B, N, X, H, D]`` tensor."""
    rows = sequences.to(tl.int64) * strides.b + steps.to(tl.int64) * strides.n + tl.cast(head, tl.int64) * strides.h
    return rows[:, None] + columns[None, :] * strides.d


@triton.jit(do_not_specialize=["batch", "heads", "length"])
def flash_rnn_values_kernel(
    gates_ptr,  # [B, N, G, H, D]
    recurrent_ptr,  # [G, H, D, D], out by in
    bias_ptr,  # [G, H, D], contiguous, or None
    initial_ptr,  # float32 [S, B, H, D], contiguous, or None
    out_ptr,  # [B, N, H, D]
    values_ptr,  # [B, N, A, H, D]
    stride_gates,
    stride_recurrent,
    stride_out,
    stride_values,
    batch,
    heads,
    length,
    GATES: tl.constexpr,
    APART: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The values of BLOCK_M rows of one head."""
    head, block = tl.program_id(0) % heads, tl.program_id(0) // heads
    # Sequences inside steps, as the values lie.
    rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    steps, sequences = rows // batch, rows % batch
    columns = tl.arange(0, BLOCK_D)
    inside = (steps < length)[:, None] & (columns < WIDTH)[None, :]
    first = (steps == 0)[:, None]

    kind: tl.constexpr = recurrent_ptr.dtype.element_ty
    h = tl.load(out_ptr + row_offsets(stride_out, sequences, steps - 1, head, columns), mask=inside & ~first, other=0.0)
    if initial_ptr is not None:
        at = (sequences * heads + head) * WIDTH
        h0 = tl.load(initial_ptr + at[:, None] + columns[None, :], mask=inside & first, other=0.0)
        h = tl.where(first, h0.to(kind), h)
    matrices = load_matrices(recurrent_ptr, stride_recurrent, head, GATES, True, WIDTH, BLOCK_D)
    biases = load_biases(bias_ptr, head, heads, GATES, WIDTH, BLOCK_D)
    gates = gates_ptr + row_offsets(stride_gates, sequences, steps, head, columns)
    x = ()
    for g in tl.static_range(GATES):
        x = x + (tl.load(gates + g * tl.cast(stride_gates.x, tl.int64), mask=inside, other=0.0),)
    values = join(x, biases, matrices, h, GATES, APART, PRECISION)
    at = values_ptr + row_offsets(stride_values, sequences, steps, head, columns)
    for a in tl.static_range(GATES + APART):
        tl.store(at + a * tl.cast(stride_values.x, tl.int64), values[a].to(values_ptr.dtype.element_ty), mask=inside)
