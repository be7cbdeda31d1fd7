"""FlashAttention-2 backward in Triton (Dao, 2023, arXiv:2307.08691, algorithm 2, as three kernels without atomics).

The scores are recomputed from q, k and the saved lse. With dO the gradient of out and P_ij = 2^(s_ij - lse_i log2 e)
(of natural scores exp(s_ij - lse_i - tail_i)):

    delta_i = dO_i . out_i - dlse_i                  (kernel 1: dlse is the gradient of lse, 0 where nobody uses it)
    dP_ij   = dO_i . v_j                             (dropped or scaled like P where there is dropout)
    dS_ij   = P_ij (dP_ij - delta_i) c'_ij           (c' = 1 - tanh^2 of the softcap, 1 without one)
    dq_i    = scale sum_j dS_ij k_j                  (kernel 2: a block owns rows and walks over keys)
    dk_j    = scale sum_i dS_ij q_i                  (kernel 3: a block owns keys of one key head and walks over
    dv_j    = sum_i P_ij dO_i                         the rows of every query head of its group)

Kernels 2 and 3 both recompute S and dP. That costs two more products than one kernel with atomic additions to dq would
(seven instead of five), and buys the same bits on every run. In kernel 3 tiles lie as [keys, queries], so that no
result of a matrix product has to be transposed before the next one.

FLOPs a head: 2 Nq Nk (2 D + Dv) in kernel 2, 2 Nq Nk (2 D + 2 Dv) in kernel 3. Bytes that blocks request: kernel 1 out,
dO and delta once; kernel 2 q, dO, lse, delta and dq once, k and v once for each of Nq / BLOCK_M blocks; kernel 3 k, v,
dk and dv once, q, dO, lse and delta once for each of Nk / BLOCK_N blocks. Kernel 3 is in ``backward_kv``, the
gradient of a bias in ``backward_bias``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import LOG2E, at_head, at_row, load_tile, locate, store_tile, tile_offsets

from .scores import ScoreNumbers, head_scores, keep_mask, key_range, row_block, tile_scores


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def flash_attention_bwd_delta_kernel(
    out_ptr,  # [B, Hq, Nq, Dv]
    dout_ptr,  # [B, Hq, Nq, Dv]
    dlse_ptr,  # [B, Hq, Nq] or None
    delta_ptr,  # float32 [B, Hq, Nq]
    stride_out,
    stride_dout,
    stride_dlse,
    stride_delta,
    heads,
    seqlen_q,
    HAS_DLSE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta. Packed sequences need no offsets here: every row is a row."""
    row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    first_row = tl.program_id(0) % row_blocks * BLOCK_M
    batch_head = tl.program_id(0) // row_blocks
    batch, head = batch_head // heads, batch_head % heads
    local_m, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    offs_m = first_row + local_m
    out_block = at_head(out_ptr, stride_out, batch, head, first_row)
    out = load_tile(
        out_block, tile_offsets(stride_out, local_m, offs_v, WIDE), offs_m, offs_v, seqlen_q, VALUE_DIM, BLOCK_V, True
    )
    dout_block = at_head(dout_ptr, stride_dout, batch, head, first_row)
    dout = load_tile(
        dout_block, tile_offsets(stride_dout, local_m, offs_v, WIDE), offs_m, offs_v, seqlen_q, VALUE_DIM, BLOCK_V, True
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_block = at_head(dlse_ptr, stride_dlse, batch, head, first_row)
        delta -= tl.load(dlse_block + local_m.to(tl.int64) * stride_dlse.n, mask=offs_m < seqlen_q, other=0.0)
    tl.store(at_head(delta_ptr, stride_delta, batch, head, first_row) + local_m, delta, mask=offs_m < seqlen_q)


@triton.jit
def load_statistics(lse_ptr, tail_ptr, delta_ptr, first, local_m, rows, seqlen_q, FEATURES: tl.constexpr):
    """lse in the unit of the scores, its tail in base 2 (0 where there is none) and delta of a block of rows, which
    begins at element ``first`` of each.

    A row that sees no key (lse = -inf), and a row past the end, get lse = inf: then 2^(s - lse) is 0 even for
    s = -inf, and nothing flows through them.
    """
    lse = tl.load(lse_ptr + first + local_m, mask=rows < seqlen_q, other=float("inf"))
    delta = tl.load(delta_ptr + first + local_m, mask=rows < seqlen_q, other=0.0)
    if FEATURES.natural:
        tail = tl.load(tail_ptr + first + local_m, mask=rows < seqlen_q, other=0.0) * LOG2E
    else:
        lse = lse * LOG2E
        tail = tl.zeros_like(lse)
    return tl.where(lse == float("-inf"), float("inf"), lse), tail, delta


@triton.jit
def weights(scores, lse, tail, numbers, FEATURES: tl.constexpr):
    """P. ``lse`` and ``tail``, as :func:`load_statistics` returns them, are broadcastable to the tile."""
    if FEATURES.fold_scale:
        return tl.exp2(scores * numbers.qk_scale - lse)
    elif FEATURES.natural:
        return tl.exp2((scores - lse) * LOG2E - tail)
    else:
        return tl.exp2(scores - lse)


@triton.jit
def _walk_keys(
    dq, q, dout, lse, tail, delta, start, stop, first_row,
    k_ptr, stride_k, v_ptr, stride_v, numbers, head, dropout_scale,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from ``start`` to ``stop`` to dq (still without the factor scale)."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k_offsets = tile_offsets(stride_k, offs_n, offs_d, WIDE)
    v_offsets = tile_offsets(stride_v, offs_n, offs_v, WIDE)
    for first_key in tl.range(start, stop, BLOCK_N):
        keys = first_key + offs_n
        k_block = at_row(k_ptr, stride_k, first_key)
        k = load_tile(k_block, k_offsets, keys, offs_d, numbers.seqlen_k, HEAD_DIM, BLOCK_D, MASKED)
        v_block = at_row(v_ptr, stride_v, first_key)
        v = load_tile(v_block, v_offsets, keys, offs_v, numbers.seqlen_k, VALUE_DIM, BLOCK_V, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, slope = tile_scores(qk, offs_m[:, None], keys[None, :], numbers, head, FEATURES, MASKED)
        p = weights(scores, lse[:, None], tail[:, None], numbers, FEATURES)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if FEATURES.dropout:
            kept = keep_mask(head, numbers.dropout_threshold, first_row, first_key, BLOCK_M, BLOCK_N, False)
            dp = tl.where(kept, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if FEATURES.softcap:
            ds = ds * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=[
        "heads", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "dropout_threshold",
    ]
)  # fmt: skip
def flash_attention_bwd_dq_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D]
    v_ptr,  # [B, Hkv, Nk, Dv]
    dout_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq]
    tail_ptr,  # like lse, or None
    delta_ptr,  # float32 [B, Hq, Nq]
    dq_ptr,  # [B, Hq, Nq, D]
    cu_seqlens_q_ptr,  # int32 [S + 1] or None
    cu_seqlens_k_ptr,  # int32 [S + 1] or None
    bias_ptr,  # [B|1, Hq|1, Nq|1, Nk|1] or None
    mask_ptr,  # bytes, like bias
    alibi_ptr,  # float32 [B|1, Hq] or None
    seed_ptr,  # int64 [1] or None
    stride_bias,
    stride_mask,
    stride_alibi,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_lse,  # of delta too
    stride_dq,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    scale,
    qk_scale,
    softcap,
    window_left,
    window_right,
    dropout_threshold,
    dropout_scale,
    FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of BLOCK_M rows of one head. The grid is that of the forward kernel."""
    sequence, head, first_row = row_block(seqlen_q, heads, FEATURES, BLOCK_M)
    start_q, length_q = locate(cu_seqlens_q_ptr, sequence, seqlen_q, total_q, FEATURES.varlen)
    start_k, length_k = locate(cu_seqlens_k_ptr, sequence, seqlen_k, total_k, FEATURES.varlen)
    if first_row < length_q:
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(length_q, length_k, qk_scale, softcap, window_left, window_right, dropout_threshold)
        scoring = head_scores(
            bias_ptr, stride_bias, mask_ptr, stride_mask, alibi_ptr, stride_alibi, seed_ptr,
            sequence, head, heads, FEATURES,
        )  # fmt: skip
        k_head = at_head(k_ptr, stride_k, batch, head // group, start_k)
        v_head = at_head(v_ptr, stride_v, batch, head // group, start_k)

        local_m, offs_d, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        offs_m = first_row + local_m
        q_block = at_head(q_ptr, stride_q, batch, head, start_q + first_row)
        q_offsets = tile_offsets(stride_q, local_m, offs_d, WIDE)
        q = load_tile(q_block, q_offsets, offs_m, offs_d, length_q, HEAD_DIM, BLOCK_D, True)
        dout_block = at_head(dout_ptr, stride_dout, batch, head, start_q + first_row)
        dout_offsets = tile_offsets(stride_dout, local_m, offs_v, WIDE)
        dout = load_tile(dout_block, dout_offsets, offs_m, offs_v, length_q, VALUE_DIM, BLOCK_V, True)
        first = at_head(0, stride_lse, batch, head, start_q + first_row)
        lse, tail, delta = load_statistics(lse_ptr, tail_ptr, delta_ptr, first, local_m, offs_m, length_q, FEATURES)

        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
        start, full_start, full_stop, stop = key_range(first_row, last_row, numbers, FEATURES, BLOCK_N)
        dq = _walk_keys(
            dq, q, dout, lse, tail, delta, full_start, full_stop, first_row,
            k_head, stride_k, v_head, stride_v, numbers, scoring, dropout_scale,
            FEATURES, False, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
        )  # fmt: skip
        if FEATURES.left:
            dq = _walk_keys(
                dq, q, dout, lse, tail, delta, start, full_start, first_row,
                k_head, stride_k, v_head, stride_v, numbers, scoring, dropout_scale,
                FEATURES, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
            )  # fmt: skip
        dq = _walk_keys(
            dq, q, dout, lse, tail, delta, full_stop, stop, first_row,
            k_head, stride_k, v_head, stride_v, numbers, scoring, dropout_scale,
            FEATURES, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
        )  # fmt: skip
        dq_block = at_head(dq_ptr, stride_dq, batch, head, start_q + first_row)
        dq_offsets = tile_offsets(stride_dq, local_m, offs_d, WIDE)
        store_tile(dq_block, dq_offsets, (dq * scale).to(dq_ptr.dtype.element_ty), offs_m, offs_d, length_q, HEAD_DIM)
