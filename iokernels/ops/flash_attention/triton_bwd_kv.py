"""Kernel 3 of the backward pass: dk and dv. The maths and the accounts of all three are in ``triton_bwd``."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_bwd import load_statistics, weights
from .triton_scores import (
    ScoreNumbers,
    at_head,
    at_row,
    head_scores,
    keep_mask,
    load_tile,
    locate,
    row_range,
    store_tile,
    tile_offsets,
    tile_scores,
)


@triton.jit
def _walk_rows(
    dk, dv, k, v, start, stop, first_key,
    q_ptr, stride_q, dout_ptr, stride_dout, lse_ptr, delta_ptr, numbers, head, dropout_scale,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the rows from ``start`` to ``stop`` of one query head to dk (without the factor scale) and dv."""
    keys = first_key + tl.arange(0, BLOCK_N)
    local_m, offs_d, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_offsets = tile_offsets(stride_q, local_m, offs_d, WIDE)
    dout_offsets = tile_offsets(stride_dout, local_m, offs_v, WIDE)
    for first_row in tl.range(start, stop, BLOCK_M):
        rows = first_row + local_m
        q_block = at_row(q_ptr, stride_q, first_row)
        q = load_tile(q_block, q_offsets, rows, offs_d, numbers.seqlen_q, HEAD_DIM, BLOCK_D, MASKED)
        dout_block = at_row(dout_ptr, stride_dout, first_row)
        dout = load_tile(dout_block, dout_offsets, rows, offs_v, numbers.seqlen_q, VALUE_DIM, BLOCK_V, MASKED)
        lse_log2, delta = load_statistics(lse_ptr + first_row, delta_ptr + first_row, local_m, rows, numbers.seqlen_q)
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        scores, slope = tile_scores(kq, rows[None, :], keys[:, None], numbers, head, FEATURES, MASKED)
        p = weights(scores, lse_log2[None, :], numbers, FEATURES)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        p_dropped = p
        if FEATURES.dropout:
            kept = keep_mask(head, numbers.dropout_threshold, first_row, first_key, BLOCK_M, BLOCK_N, True)
            p_dropped = tl.where(kept, p * dropout_scale, 0.0)
            dp = tl.where(kept, dp * dropout_scale, 0.0)
        dv = tl.dot(p_dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if FEATURES.softcap:
            ds = ds * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


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
    delta_ptr,  # float32 [B, Hq, Nq]
    dk_ptr,  # [B, Hkv, Nk, D]
    dv_ptr,  # [B, Hkv, Nk, Dv]
    cu_seqlens_q_ptr,  # int32 [S + 1] or None
    cu_seqlens_k_ptr,  # int32 [S + 1] or None
    tensors,  # ScoreTensors
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
    softcap_log2,
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
    keys are seen by the most rows, so the natural order already starts with the longest blocks."""
    key_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    first_key = tl.program_id(0) % key_blocks * BLOCK_N
    sequence_head = tl.program_id(0) // key_blocks
    sequence, kv_head = sequence_head // (heads // group), sequence_head % (heads // group)

    start_q, length_q = locate(cu_seqlens_q_ptr, sequence, seqlen_q, total_q, FEATURES.varlen)
    start_k, length_k = locate(cu_seqlens_k_ptr, sequence, seqlen_k, total_k, FEATURES.varlen)
    if first_key < length_k:
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(length_q, length_k, qk_scale, softcap_log2, window_left, window_right, dropout_threshold)

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
        for member in range(group):
            head = kv_head * group + member
            scoring = head_scores(tensors, sequence, head, heads, FEATURES)
            q_head = at_head(q_ptr, stride_q, batch, head, start_q)
            dout_head = at_head(dout_ptr, stride_dout, batch, head, start_q)
            lse_head = at_head(lse_ptr, stride_lse, batch, head, start_q)
            delta_head = at_head(delta_ptr, stride_lse, batch, head, start_q)
            if FEATURES.right:
                dk, dv = _walk_rows(
                    dk, dv, k, v, start, full_start, first_key, q_head, stride_q, dout_head, stride_dout,
                    lse_head, delta_head, numbers, scoring, dropout_scale,
                    FEATURES, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
                )  # fmt: skip
            dk, dv = _walk_rows(
                dk, dv, k, v, full_start, full_stop, first_key, q_head, stride_q, dout_head, stride_dout,
                lse_head, delta_head, numbers, scoring, dropout_scale,
                FEATURES, False, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
            )  # fmt: skip
            dk, dv = _walk_rows(
                dk, dv, k, v, full_stop, stop, first_key, q_head, stride_q, dout_head, stride_dout,
                lse_head, delta_head, numbers, scoring, dropout_scale,
                FEATURES, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
            )  # fmt: skip
        dk_block = at_head(dk_ptr, stride_dk, batch, kv_head, start_k + first_key)
        dk_offsets = tile_offsets(stride_dk, local_n, offs_d, WIDE)
        store_tile(dk_block, dk_offsets, (dk * scale).to(dk_ptr.dtype.element_ty), keys, offs_d, length_k, HEAD_DIM)
        dv_block = at_head(dv_ptr, stride_dv, batch, kv_head, start_k + first_key)
        dv_offsets = tile_offsets(stride_dv, local_n, offs_v, WIDE)
        store_tile(dv_block, dv_offsets, dv.to(dv_ptr.dtype.element_ty), keys, offs_v, length_k, VALUE_DIM)
