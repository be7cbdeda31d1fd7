"""The gated delta rule backward in Triton: gradients of q, k, beta and the decays, every chunk at once.

From the state H before a chunk and the gradient D of the state after it, n and r (:mod:`.triton_delta_bwd`), with
G = exp(b_i - b_j) for i >= j:

    dP = scale do n^T G                 dA = -tril(r n^T, -1) G            e = exp(b) r H^T
    dq = scale exp(b) do H^T + dP K
    dk = exp(b_C - b) n D^T + dP^T Q + beta (dA K - e) + dA^T (beta K)
    dbeta = rowsum(r v) + k . (dA K - e)
    db = q . dq - k . (exp(b_C - b) n D^T + dP^T Q) + beta k . (dA K - e) - k . dA^T (beta K)

and the gradient of the log decays is the sum of db over the rest of the chunk, plus that of b_C, sum k . exp(b_C - b) n
D^T + exp(b_C) <H, D> (derived from arXiv:2412.06464, section 3.3; :mod:`.portable_delta_chunks`).

A thread block owns one chunk, one head and BLOCK_K columns of q and k, and sums over v in blocks of BLOCK_V, one loop.
Terms that are sums over K come out in parts, one for each block of columns. Transposed products are formed from their
transposed operands, and rounded like the others: what cancels between their sums in db is then alike to the bit.

FLOPs a row and head: 6 K V + C (8 V + 8 K), the 8 C V once for each block of columns. Bytes: q, k, dq, dk once, K V / C
elements of H and of D once a row; do, n, r, v and the rows' numbers once for each block of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_sums import from_start, to_end, whole
from iokernels.ops.shared.triton_tiles import at_head, load_tile, store_tile, tile_offsets

from .chunks import between, chunk_at, load_rows, load_sums


@triton.jit(do_not_specialize=["heads", "group", "seqlen", "rows_of_all", "scale"])
def gated_delta_rule_bwd_grads_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    dout_ptr,  # [B, H, N, V]
    beta_ptr,  # [B, H, N]
    decay_ptr,  # [B, H, N] or None
    written_ptr,  # [B, H, N, V]
    right_ptr,  # [B, H, N, V]
    states_ptr,  # [P, H, K, V]
    dstates_ptr,  # [P, H, K, V]
    dq_ptr,  # [B, H, N, K]
    dk_ptr,  # [B, H, N, K]
    dbeta_ptr,  # float32 [K / BLOCK_K, B, H, N]
    ddecay_ptr,  # float32 [K / BLOCK_K, B, H, N] or None
    table_ptr,  # int32 [P, 2] or None
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_beta,
    stride_decay,
    stride_written,
    stride_right,
    stride_states,
    stride_dstates,
    stride_dq,
    stride_dk,
    heads,
    group,
    seqlen,
    rows_of_all,  # N of the tensors
    batch_rows,  # int64 B * H * N
    scale,
    FEATURES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and dk of BLOCK_K columns of one chunk of one head, and their part of dbeta and of the decays' gradient."""
    parts: tl.constexpr = (KEY_DIM + BLOCK_K - 1) // BLOCK_K
    part = tl.program_id(0) % parts
    index_head = tl.program_id(0) // parts
    index, head = index_head // heads, index_head % heads
    batch, first_row, rows = chunk_at(table_ptr, index, seqlen, FEATURES.varlen, BLOCK_C)
    if rows > 0:
        local = tl.arange(0, BLOCK_C)
        columns = part * BLOCK_K + tl.arange(0, BLOCK_K)
        beta = load_rows(beta_ptr, stride_beta, batch, head, first_row, rows, BLOCK_C)
        sums = load_sums(decay_ptr, stride_decay, batch, head, first_row, rows, FEATURES.decay, BLOCK_C)
        v_block = at_head(v_ptr, stride_v, batch, head, first_row)
        dout_block = at_head(dout_ptr, stride_dout, batch, head, first_row)
        written_block = at_head(written_ptr, stride_written, batch, head, first_row)
        right_block = at_head(right_ptr, stride_right, batch, head, first_row)
        states = at_head(states_ptr, stride_states, index, head, 0)
        dstates = at_head(dstates_ptr, stride_dstates, index, head, 0)

        dscores = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        dscores_t = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        dsystem = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        dsystem_t = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        dq = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        held = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        dk = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        dbeta = tl.zeros([BLOCK_C], tl.float32)
        dlast = 0.0
        for first_column in tl.range(0, VALUE_DIM, BLOCK_V):
            offs_v = first_column + tl.arange(0, BLOCK_V)
            v = load_tile(
                v_block, tile_offsets(stride_v, local, offs_v, WIDE), local, offs_v, rows, VALUE_DIM, PADDED_V, True
            )
            dout = load_tile(
                dout_block, tile_offsets(stride_dout, local, offs_v, WIDE), local, offs_v, rows, VALUE_DIM, PADDED_V,
                True,
            )  # fmt: skip
            written = load_tile(
                written_block, tile_offsets(stride_written, local, offs_v, WIDE), local, offs_v, rows, VALUE_DIM,
                PADDED_V, True,
            )  # fmt: skip
            right = load_tile(
                right_block, tile_offsets(stride_right, local, offs_v, WIDE), local, offs_v, rows, VALUE_DIM, PADDED_V,
                True,
            )  # fmt: skip
            state = load_tile(
                states, tile_offsets(stride_states, columns, offs_v, False), columns, offs_v, KEY_DIM, VALUE_DIM,
                PADDED_V, PADDED_K > KEY_DIM,
            )  # fmt: skip
            dstate = load_tile(
                dstates, tile_offsets(stride_dstates, columns, offs_v, False), columns, offs_v, KEY_DIM, VALUE_DIM,
                PADDED_V, PADDED_K > KEY_DIM,
            )  # fmt: skip
            dscores = tl.dot(dout, tl.trans(written), dscores, input_precision=PRECISION)
            dscores_t = tl.dot(written, tl.trans(dout), dscores_t, input_precision=PRECISION)
            dsystem = tl.dot(right, tl.trans(written), dsystem, input_precision=PRECISION)
            dsystem_t = tl.dot(written, tl.trans(right), dsystem_t, input_precision=PRECISION)
            dq = tl.dot(dout, tl.trans(state), dq, input_precision=PRECISION)
            held = tl.dot(right, tl.trans(state), held, input_precision=PRECISION)
            dk = tl.dot(written, tl.trans(dstate), dk, input_precision=PRECISION)
            dbeta += tl.sum(right.to(tl.float32) * v.to(tl.float32), 1)
            dlast += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))

        q_block = at_head(q_ptr, stride_q, batch, head // group, first_row)
        q = load_tile(
            q_block, tile_offsets(stride_q, local, columns, WIDE), local, columns, rows, KEY_DIM, PADDED_K, True
        )
        k_block = at_head(k_ptr, stride_k, batch, head // group, first_row)
        k = load_tile(
            k_block, tile_offsets(stride_k, local, columns, WIDE), local, columns, rows, KEY_DIM, PADDED_K, True
        )
        decayed = from_start(sums)[:, None]
        weights, weights_t = between(sums, False, BLOCK_C), between(sums, True, BLOCK_C)
        dq = tl.dot((dscores * weights * scale).to(k.dtype), k, dq * decayed * scale, input_precision=PRECISION)
        dk *= to_end(sums)[:, None]
        keys = k.to(tl.float32)
        dlast = dlast * whole(sums) + tl.sum(keys * dk)
        dk = tl.dot((dscores_t * weights_t * scale).to(k.dtype), q, dk, input_precision=PRECISION)
        db = tl.sum(q.to(tl.float32) * dq - keys * dk, 1)
        dsystem = tl.where(local[:, None] > local[None, :], -dsystem * weights, 0.0)
        dsystem_t = tl.where(local[:, None] < local[None, :], -dsystem_t * weights_t * beta[None, :], 0.0)
        own = tl.dot(dsystem.to(k.dtype), k, -held * decayed, input_precision=PRECISION)
        others = tl.dot(dsystem_t.to(k.dtype), k, input_precision=PRECISION)
        along_own = tl.sum(keys * own, 1)
        db += beta * along_own - tl.sum(keys * others, 1)
        dk += beta[:, None] * own + others
        if part > 0:
            dbeta = dbeta * 0.0  # rowsum(r v) belongs to the first part
        dbeta += along_own

        dq_block = at_head(dq_ptr, stride_dq, batch, head, first_row)
        store_tile(
            dq_block, tile_offsets(stride_dq, local, columns, WIDE), dq.to(dq_ptr.dtype.element_ty), local, columns,
            rows, KEY_DIM,
        )  # fmt: skip
        dk_block = at_head(dk_ptr, stride_dk, batch, head, first_row)
        store_tile(
            dk_block, tile_offsets(stride_dk, local, columns, WIDE), dk.to(dk_ptr.dtype.element_ty), local, columns,
            rows, KEY_DIM,
        )  # fmt: skip
        batch_head = tl.cast(batch, tl.int64) * heads + head
        at = tl.cast(part, tl.int64) * batch_rows + batch_head * rows_of_all + first_row + local
        tl.store(dbeta_ptr + at, dbeta, mask=local < rows)
        if FEATURES.decay:
            tl.store(ddecay_ptr + at, tl.cumsum(db, 0, reverse=True) + dlast, mask=local < rows)
