"""The gated delta rule backward in Triton: the walk from the end, with the gradient of the state on chip.

A thread block owns one head of one sequence and BLOCK_V columns, keeps D, the gradient of the state, ``[K, BLOCK_V]``
in float32, and takes the chunks from the last to the first. With n and T as in :mod:`.triton_delta_fwd`:

    dn = scale tril(Q K^T exp(b_i - b_j))^T do + exp(b_C - b) K D      r = T^T dn      dv = beta r
    D' = exp(b_C) D + scale (exp(b) Q)^T do - (beta exp(b) K)^T r

r is the gradient of the right side of the triangular system, from which :mod:`.triton_delta_grads` makes all others; it
and D at the end of each chunk are written. The transposed scores are formed as K Q^T, never by transposing a product.

FLOPs a row and head: 6 K V + C (2 K + 4 V). Bytes: do, dv and r once, K V / C elements of D written a row, q, k, beta,
log_decay and the inverse once for each block of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import from_start, to_end, whole
from iokernels.ops.shared.triton_tiles import at_head, load_tile, locate, store_tile, tile_offsets

from .chunks import between, load_rows, load_sums
from .forward import block_of_columns, first_chunk, load_state, store_state


@triton.jit(do_not_specialize=["heads", "group", "seqlen", "total", "scale"])
def gated_delta_rule_bwd_walk_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    dout_ptr,  # [B, H, N, V]
    beta_ptr,  # [B, H, N]
    decay_ptr,  # [B, H, N] or None
    inverse_ptr,  # float32 [B, H, N, C]
    dfinal_ptr,  # float32 [S, H, K, V] or None
    dv_ptr,  # [B, H, N, V]
    right_ptr,  # [B, H, N, V]
    dstates_ptr,  # [P, H, K, V]: the gradient of the state after each chunk
    dinitial_ptr,  # float32 [S, H, K, V]
    cu_seqlens_ptr,  # int32 [S + 1] or None
    chunk_starts_ptr,  # int32 [S] or None
    stride_q,
    stride_k,
    stride_dout,
    stride_beta,
    stride_decay,
    stride_inverse,
    stride_dfinal,
    stride_dv,
    stride_right,
    stride_dstates,
    stride_dinitial,
    heads,
    group,
    seqlen,
    total,
    scale,
    FEATURES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
):
    """dv and r of BLOCK_V columns of one head of one sequence, and their part of D after every chunk."""
    sequence, head, columns = block_of_columns(heads, VALUE_DIM, BLOCK_V)
    start, length = locate(cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    chunk = first_chunk(chunk_starts_ptr, sequence, seqlen, FEATURES.varlen, BLOCK_C)
    local, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    q_offsets = tile_offsets(stride_q, local, offs_k, WIDE)
    k_offsets = tile_offsets(stride_k, local, offs_k, WIDE)
    dout_offsets = tile_offsets(stride_dout, local, columns, WIDE)
    dv_offsets = tile_offsets(stride_dv, local, columns, WIDE)
    right_offsets = tile_offsets(stride_right, local, columns, WIDE)
    inverse_offsets = tile_offsets(stride_inverse, local, local, False)

    gradient = load_state(
        dfinal_ptr, stride_dfinal, sequence, head, columns, FEATURES.state, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V
    )
    chunks = tl.cdiv(length, BLOCK_C)
    for step in tl.range(0, chunks):
        number = chunks - 1 - step
        row, rows = start + number * BLOCK_C, length - number * BLOCK_C
        store_state(dstates_ptr, stride_dstates, chunk + number, head, gradient, columns, KEY_DIM, VALUE_DIM, BLOCK_K)
        q_block = at_head(q_ptr, stride_q, batch, head // group, row)
        q = load_tile(q_block, q_offsets, local, offs_k, rows, KEY_DIM, BLOCK_K, True)
        k_block = at_head(k_ptr, stride_k, batch, head // group, row)
        k = load_tile(k_block, k_offsets, local, offs_k, rows, KEY_DIM, BLOCK_K, True)
        dout_block = at_head(dout_ptr, stride_dout, batch, head, row)
        dout = load_tile(dout_block, dout_offsets, local, columns, rows, VALUE_DIM, PADDED_V, True)
        inverse_block = at_head(inverse_ptr, stride_inverse, batch, head, row)
        inverse = load_tile(inverse_block, inverse_offsets, local, local, rows, BLOCK_C, BLOCK_C, True)
        beta = load_rows(beta_ptr, stride_beta, batch, head, row, rows, BLOCK_C)
        sums = load_sums(decay_ptr, stride_decay, batch, head, row, rows, FEATURES.decay, BLOCK_C)

        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * between(sums, True, BLOCK_C) * scale
        scores = scores.to(k.dtype)  # now: half the registers
        dwritten = tl.dot(k, gradient.to(k.dtype), input_precision=PRECISION) * to_end(sums)[:, None]
        dwritten = tl.dot(scores, dout, dwritten, input_precision=PRECISION)
        right = tl.dot(tl.trans(inverse), dwritten, dwritten, input_precision=SOLVE_PRECISION)
        dv = right * beta[:, None]
        dv_block = at_head(dv_ptr, stride_dv, batch, head, row)
        store_tile(dv_block, dv_offsets, dv.to(dv_ptr.dtype.element_ty), local, columns, rows, VALUE_DIM)
        right_block = at_head(right_ptr, stride_right, batch, head, row)
        store_tile(right_block, right_offsets, right.to(k.dtype), local, columns, rows, VALUE_DIM)

        decayed = from_start(sums)[:, None]
        arriving = (dout.to(tl.float32) * decayed * scale).to(k.dtype)
        gradient = tl.dot(tl.trans(q), arriving, gradient * whole(sums), input_precision=PRECISION)
        gradient = tl.dot(tl.trans(k), (-decayed * dv).to(k.dtype), gradient, input_precision=PRECISION)
    store_state(dinitial_ptr, stride_dinitial, sequence, head, gradient, columns, KEY_DIM, VALUE_DIM, BLOCK_K)
