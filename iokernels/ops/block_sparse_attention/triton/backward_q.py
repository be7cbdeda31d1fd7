"""Block-sparse attention backward in Triton, two kernels without atomics, as FlashAttention-2 computes it.

With dO the gradient of out, P_ij = 2^(s_ij - lse_i log2 e) recomputed, over the pairs of a row and a key that see each
other:

    delta_i = dO_i . out_i - dlse_i                  (kernel 1; dlse is the gradient of lse, 0 where nobody uses it)
    dP_ij   = dO_i . v_j
    dS_ij   = P_ij (dP_ij - delta_i)
    dq_i    = scale sum_j dS_ij k_j                  (kernel 1: a block owns rows and walks over keys like the forward)
    dk_j    = scale sum_i dS_ij q_i                  (kernel 2, in ``backward_kv``: a block owns keys and walks
    dv_j    = sum_i P_ij dO_i                         over the rows that the transposed lists name)

FLOPs for each pair: 2 (2 D + Dv) in kernel 1, 2 (2 D + 2 Dv) in kernel 2. Bytes that blocks of kernel 1 request: q,
out, dO, lse, delta and dq once; of each tile of rows the list once, and k and v of its blocks, its sink and its window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import LOG2E, at_head

from .keys import (
    Numbers,
    is_partial,
    key_head,
    key_rows,
    keys_of,
    load_keys,
    load_rows,
    row_offsets,
    tile_of,
    visible,
    walk_of,
)


@triton.jit
def base_2(lse):
    """A log-sum-exp in base 2. That of a row without keys, -inf, becomes inf, so that 2^(s - lse) is 0 for any s."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit(
    do_not_specialize=["packed", "packs", "group", "rows", "query_blocks", "row_tiles", "entries", "seqlen_q",
                       "seqlen_k", "sink", "window"]
)  # fmt: skip
def block_sparse_bwd_dq_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D]
    v_ptr,  # [B, Hkv, Nk, Dv]
    out_ptr,  # [B, Hq, Nq, Dv]
    dout_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq], natural log
    dlse_ptr,  # float32 [B, Hq, Nq] or None
    delta_ptr,  # float32 [B, Hq, Nq], written
    dq_ptr,  # [B, Hq, Nq, D] or None
    indices_ptr,  # int32 [B, Hm, Mq, S]
    counts_ptr,  # int32 [B, Hm, Mq]
    sink_ptr,  # int32 [Hm] or None
    window_ptr,  # int32 [Hm] or None
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_dout,
    stride_lse,  # of delta too
    stride_dlse,
    stride_dq,
    stride_indices,
    stride_counts,
    packed,
    packs,
    group,
    rows,
    query_blocks,
    row_tiles,
    entries,
    seqlen_q,
    seqlen_k,
    sink,
    window,
    scale,
    qk_scale,  # scale * log2 e
    FEATURES: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    NEEDS_DQ: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and dq of BLOCK_M rows that share a list. The grid is that of the forward kernel, in one part."""
    numbers = Numbers(
        packed, packs, group, rows, query_blocks, row_tiles, entries, seqlen_q, seqlen_k, sink, window
    )  # fmt: skip
    tile = tile_of(tl.program_id(0), lse_ptr, numbers, FEATURES, BLOCK_M)
    if tile.used > 0:
        offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        mask_m = tile.offs_m < tile.used
        out = load_rows(out_ptr, stride_out, tile, offs_v, VALUE_DIM, BLOCK_V, FEATURES)
        dout = load_rows(dout_ptr, stride_dout, tile, offs_v, VALUE_DIM, BLOCK_V, FEATURES)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        statistics = row_offsets(stride_lse, tile.heads, tile.rows, FEATURES)
        if HAS_DLSE:
            dlse_rows = row_offsets(stride_dlse, tile.heads, tile.rows, FEATURES)
            delta -= tl.load(at_head(dlse_ptr, stride_dlse, tile.batch, 0, 0) + dlse_rows, mask=mask_m, other=0.0)
        tl.store(at_head(delta_ptr, stride_lse, tile.batch, 0, 0) + statistics, delta, mask=mask_m)

        if NEEDS_DQ:
            lse_rows = at_head(lse_ptr, stride_lse, tile.batch, 0, 0) + statistics
            lse_log2 = base_2(tl.load(lse_rows, mask=mask_m, other=float("-inf")))
            q = load_rows(q_ptr, stride_q, tile, offs_d, HEAD_DIM, BLOCK_D, FEATURES)
            position = tile.rows + (seqlen_k - seqlen_q)
            walk = walk_of(tile, counts_ptr, stride_counts, sink_ptr, window_ptr, numbers, FEATURES, BLOCK_N)
            list_ptr = at_head(indices_ptr, stride_indices, tile.batch, tile.pack, tile.query_block)
            k_head = key_head(k_ptr, stride_k, tile.batch, tile.kv_head, FEATURES)
            v_head = key_head(v_ptr, stride_v, tile.batch, tile.kv_head, FEATURES)
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for step in tl.range(0, walk.steps):
                keys, shown = keys_of(step, walk, list_ptr, stride_indices.d, offs_n, FEATURES, BLOCK_N)
                k_rows = key_rows(stride_k, keys, keys, FEATURES)
                k = load_keys(k_head, stride_k, k_rows, shown, offs_d, HEAD_DIM, BLOCK_D)
                v_rows = key_rows(stride_v, keys, keys, FEATURES)
                v = load_keys(v_head, stride_v, v_rows, shown, offs_v, VALUE_DIM, BLOCK_V)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
                if is_partial(step, walk, keys, shown, tile):
                    seen = visible(step, walk, keys[None, :], shown[None, :], position[:, None], FEATURES)
                    scores = tl.where(seen, scores, float("-inf"))
                p = tl.exp2(scores - lse_log2[:, None])
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            dq_rows = row_offsets(stride_dq, tile.heads, tile.rows, FEATURES)
            offsets = dq_rows[:, None] + offs_d[None, :] * stride_dq.d
            mask = mask_m[:, None] & (offs_d[None, :] < HEAD_DIM)
            gradient = (dq * scale).to(dq_ptr.dtype.element_ty)
            tl.store(at_head(dq_ptr, stride_dq, tile.batch, 0, 0) + offsets, gradient, mask=mask)
