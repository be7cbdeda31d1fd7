"""The gated delta rule backward in Triton: the walk from the end, with the gradient of the state on chip.

A thread block owns one head of one sequence and BLOCK_V columns, keeps D, the gradient of the state, ``[K, BLOCK_V]``
in float32, and takes the chunks from the last to the first. With n and T as in :mod:`.forward`:

    dn = scale tril(Q K^T exp(b_i - b_j))^T do + exp(b_C - b) K D      r = T^T dn      dv = beta r
    D' = exp(b_C) D + scale (exp(b) Q)^T do - (beta exp(b) K)^T r

r is the gradient of the right side of the triangular system, from which :mod:`.grads` makes all others; it
and D at the end of each chunk are written. The transposed scores are formed as K Q^T, never by transposing a product.

FLOPs a row and head: 6 K V + C (2 K + 4 V). Bytes: do, dv and r once, K V / C elements of D written a row, q, k, beta,
log_decay and the inverse once for each block of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import from_start, to_end, whole
from iokernels.ops.shared.triton_tiles import at_head, load_tile, locate, store_tile, tile_offsets

from .chunks import VARYING, between, load_rows, load_sums
from .forward import block_of_columns, first_chunk, load_state, store_state


@triton.jit(do_not_specialize=VARYING)
def gated_delta_rule_bwd_walk_kernel(
    inputs,  # with dout [B, H, N, V] in the place of v
    dfinal,  # float32 [S, H, K, V] or None
    dv,  # [B, H, N, V]
    right,  # [B, H, N, V]
    dstates,  # [P, H, K, V]: the gradient of the state after each chunk
    dinitial,  # float32 [S, H, K, V]
    places,
    heads,
    group,
    seqlen,
    total,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """dv and r of BLOCK_V columns of one head of one sequence, and their part of D after every chunk."""
    sequence, head, columns = block_of_columns(heads, SIZES.VALUE_DIM, SIZES.BLOCK_V)
    start, length = locate(places.cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    chunk = first_chunk(places.chunk_starts_ptr, sequence, seqlen, FEATURES.varlen, SIZES.BLOCK_C)
    local, offs_k = tl.arange(0, SIZES.BLOCK_C), tl.arange(0, SIZES.BLOCK_K)
    q_offsets = tile_offsets(inputs.q, local, offs_k, SIZES.WIDE)
    k_offsets = tile_offsets(inputs.k, local, offs_k, SIZES.WIDE)
    dout_offsets = tile_offsets(inputs.v, local, columns, SIZES.WIDE)
    dv_offsets = tile_offsets(dv, local, columns, SIZES.WIDE)
    right_offsets = tile_offsets(right, local, columns, SIZES.WIDE)
    inverse_offsets = tile_offsets(inputs.inverse, local, local, False)

    gradient = load_state(dfinal, sequence, head, columns, FEATURES.state, SIZES)
    chunks = tl.cdiv(length, SIZES.BLOCK_C)
    for step in tl.range(0, chunks):
        number = chunks - 1 - step
        row, rows = start + number * SIZES.BLOCK_C, length - number * SIZES.BLOCK_C
        store_state(dstates, chunk + number, head, gradient, columns, SIZES)
        q_block = at_head(inputs.q.ptr, inputs.q, batch, head // group, row)
        q = load_tile(q_block, q_offsets, local, offs_k, rows, SIZES.KEY_DIM, SIZES.BLOCK_K, True)
        k_block = at_head(inputs.k.ptr, inputs.k, batch, head // group, row)
        k = load_tile(k_block, k_offsets, local, offs_k, rows, SIZES.KEY_DIM, SIZES.BLOCK_K, True)
        dout_block = at_head(inputs.v.ptr, inputs.v, batch, head, row)
        dout = load_tile(dout_block, dout_offsets, local, columns, rows, SIZES.VALUE_DIM, SIZES.PADDED_V, True)
        inverse_block = at_head(inputs.inverse.ptr, inputs.inverse, batch, head, row)
        inverse = load_tile(inverse_block, inverse_offsets, local, local, rows, SIZES.BLOCK_C, SIZES.BLOCK_C, True)
        beta = load_rows(inputs.beta.ptr, inputs.beta, batch, head, row, rows, SIZES.BLOCK_C)
        sums = load_sums(inputs.decay.ptr, inputs.decay, batch, head, row, rows, FEATURES.decay, SIZES.BLOCK_C)

        scores = tl.dot(k, tl.trans(q), input_precision=SIZES.PRECISION) * between(sums, True, SIZES.BLOCK_C) * scale
        scores = scores.to(k.dtype)  # now: half the registers
        dwritten = tl.dot(k, gradient.to(k.dtype), input_precision=SIZES.PRECISION) * to_end(sums)[:, None]
        dwritten = tl.dot(scores, dout, dwritten, input_precision=SIZES.PRECISION)
        solved = tl.dot(tl.trans(inverse), dwritten, dwritten, input_precision=SIZES.SOLVE_PRECISION)
        dv_rows = solved * beta[:, None]
        dv_block = at_head(dv.ptr, dv, batch, head, row)
        store_tile(dv_block, dv_offsets, dv_rows.to(dv.ptr.dtype.element_ty), local, columns, rows, SIZES.VALUE_DIM)
        right_block = at_head(right.ptr, right, batch, head, row)
        store_tile(right_block, right_offsets, solved.to(k.dtype), local, columns, rows, SIZES.VALUE_DIM)

        decayed = from_start(sums)[:, None]
        arriving = (dout.to(tl.float32) * decayed * scale).to(k.dtype)
        gradient = tl.dot(tl.trans(q), arriving, gradient * whole(sums), input_precision=SIZES.PRECISION)
        gradient = tl.dot(tl.trans(k), (-decayed * dv_rows).to(k.dtype), gradient, input_precision=SIZES.PRECISION)
    store_state(dinitial, sequence, head, gradient, columns, SIZES)
