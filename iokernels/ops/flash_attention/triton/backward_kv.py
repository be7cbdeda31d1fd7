"""Kernel 3 of the backward pass: dk and dv. The maths and the accounts of all three are in ``backward_q``."""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile, locate, store_tile, tile_offsets

from .backward_q import load_statistics, weights
from .scores import ScoreNumbers, head_scores, keep_mask, row_range, tile_scores, visible


@triton.jit(
    do_not_specialize=[
        "heads", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "dropout_threshold",
    ]
)  # fmt: skip
def flash_attention_bwd_dkv_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D]
    v_ptr,  # [B, Hkv, Nk, Dv]
    dout_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq]
    tail_ptr,  # like lse, or None
    delta_ptr,  # float32 [B, Hq, Nq]
    dk_ptr,  # [B, Hkv, Nk, D]
    dv_ptr,  # [B, Hkv, Nk, Dv]
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
    stride_dk,
    stride_dv,
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
    """dk and dv of BLOCK_N keys of one key head: key blocks within key heads within sequences. When causal, the first
    keys are seen by the most rows, so the natural order already starts with the longest blocks.

    One loop runs through the rows of every query head of the group, and masks a tile by a branch: with a nest of loops,
    or a loop for each part, the compiler keeps so much alive that the accumulators spill.
    """
    key_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    first_key = tl.program_id(0) % key_blocks * BLOCK_N
    sequence_head = tl.program_id(0) // key_blocks
    sequence, kv_head = sequence_head // (heads // group), sequence_head % (heads // group)

    start_q, length_q = locate(cu_seqlens_q_ptr, sequence, seqlen_q, total_q, FEATURES.varlen)
    start_k, length_k = locate(cu_seqlens_k_ptr, sequence, seqlen_k, total_k, FEATURES.varlen)
    if first_key < length_k:
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(length_q, length_k, qk_scale, softcap, window_left, window_right, dropout_threshold)

        local_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        keys = first_key + local_n
        k_block = at_head(k_ptr, stride_k, batch, kv_head, start_k + first_key)
        k_offsets = tile_offsets(stride_k, local_n, offs_d, WIDE)
        k = load_tile(k_block, k_offsets, keys, offs_d, length_k, HEAD_DIM, BLOCK_D, True)
        v_block = at_head(v_ptr, stride_v, batch, kv_head, start_k + first_key)
        v_offsets = tile_offsets(stride_v, local_n, offs_v, WIDE)
        v = load_tile(v_block, v_offsets, keys, offs_v, length_k, VALUE_DIM, BLOCK_V, True)

        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        last_key = tl.minimum(first_key + BLOCK_N, length_k) - 1
        start, full_start, full_stop, stop = row_range(first_key, last_key, numbers, FEATURES, BLOCK_M)
        local_m = tl.arange(0, BLOCK_M)
        q_offsets = tile_offsets(stride_q, local_m, offs_d, WIDE)
        dout_offsets = tile_offsets(stride_dout, local_m, offs_v, WIDE)
        steps = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
        for step in tl.range(0, group * steps):
            head = kv_head * group + step // steps
            first_row = start + step % steps * BLOCK_M
            rows = first_row + local_m
            q_block = at_head(q_ptr, stride_q, batch, head, start_q + first_row)
            q = load_tile(q_block, q_offsets, rows, offs_d, length_q, HEAD_DIM, BLOCK_D, True)
            dout_block = at_head(dout_ptr, stride_dout, batch, head, start_q + first_row)
            dout = load_tile(dout_block, dout_offsets, rows, offs_v, length_q, VALUE_DIM, BLOCK_V, True)
            first = at_head(0, stride_lse, batch, head, start_q + first_row)
            lse, tail, delta = load_statistics(lse_ptr, tail_ptr, delta_ptr, first, local_m, rows, length_q, FEATURES)
            scoring = head_scores(
                bias_ptr, stride_bias, mask_ptr, stride_mask, alibi_ptr, stride_alibi, seed_ptr,
                sequence, head, heads, FEATURES,
            )  # fmt: skip
            kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores, slope = tile_scores(kq, rows[None, :], keys[:, None], numbers, scoring, FEATURES, False)
            if FEATURES.left or FEATURES.right:  # noqa: SIM102 - the first is known to the compiler, the second is not
                if (first_row < full_start) | (first_row >= full_stop):
                    shown = visible(rows[None, :], keys[:, None], numbers, FEATURES)
                    scores = tl.where(shown, scores, float("-inf"))
            p = weights(scores, lse[None, :], tail[None, :], numbers, FEATURES)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            p_dropped = p
            if FEATURES.dropout:
                kept = keep_mask(scoring, dropout_threshold, first_row, first_key, BLOCK_M, BLOCK_N, True)
                p_dropped = tl.where(kept, p * dropout_scale, 0.0)
                dp = tl.where(kept, dp * dropout_scale, 0.0)
            dv = tl.dot(p_dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            if FEATURES.softcap:
                ds = ds * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        dk_block = at_head(dk_ptr, stride_dk, batch, kv_head, start_k + first_key)
        dk_offsets = tile_offsets(stride_dk, local_n, offs_d, WIDE)
        store_tile(dk_block, dk_offsets, (dk * scale).to(dk_ptr.dtype.element_ty), keys, offs_d, length_k, HEAD_DIM)
        dv_block = at_head(dv_ptr, stride_dv, batch, kv_head, start_k + first_key)
        dv_offsets = tile_offsets(stride_dv, local_n, offs_v, WIDE)
        store_tile(dv_block, dv_offsets, dv.to(dv_ptr.dtype.element_ty), keys, offs_v, length_k, VALUE_DIM)
