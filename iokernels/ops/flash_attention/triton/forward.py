"""FlashAttention-2 forward in Triton (Dao, 2023, arXiv:2307.08691, algorithm 1).

A thread block owns BLOCK_M query rows of one head and walks over the keys in blocks of BLOCK_N, keeping for each row
the largest score m so far, the denominator l and the unnormalised output acc, all float32:

    m' = max(m, max_j s_j)    p_j = 2^(s_j - m')    l' = 2^(m - m') l + sum_j p_j    acc' = 2^(m - m') acc + p v

and at the end out = acc / l, lse = ln 2 (m + log2 l); of natural scores lse = m + ln l, and its tail, what rounding it
lost. The Nq x Nk scores never leave the chip.

FLOPs: 2 Nq Nk (D + Dv) a head, of what the window shows. Bytes that blocks request: q, out and lse (with a tail) once;
k and v once for each block of rows, Nq / BLOCK_M times, of what the window shows. Blocks of keys that every row sees
run first, without a mask; the edges of the window and the end of the keys follow with one. Causal grids start with the
longest rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import LN2, LOG2E, at_head, at_row, load_tile, locate, store_tile, tile_offsets

from .scores import ScoreNumbers, exponential, head_scores, keep_mask, key_range, row_block, tile_scores


@triton.jit
def _walk_keys(
    acc, m_i, l_i, q, start, stop, first_row,
    k_ptr, stride_k, v_ptr, stride_v, numbers, head,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys from ``start`` to ``stop`` into the running acc, m_i, l_i."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k_offsets = tile_offsets(stride_k, offs_n, offs_d, WIDE)
    v_offsets = tile_offsets(stride_v, offs_n, offs_v, WIDE)
    for first_key in tl.range(start, stop, BLOCK_N):
        keys = first_key + offs_n
        k_block = at_row(k_ptr, stride_k, first_key)
        k = load_tile(k_block, k_offsets, keys, offs_d, numbers.seqlen_k, HEAD_DIM, BLOCK_D, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = tile_scores(qk, offs_m[:, None], keys[None, :], numbers, head, FEATURES, MASKED)
        highest = tl.max(scores, 1)
        if FEATURES.fold_scale:
            # A positive scale keeps the order of q . k, so it waits for the subtraction: one multiply-add.
            highest = highest * numbers.qk_scale
        m_new = tl.maximum(m_i, highest)
        # A row that has seen no key yet subtracts 0, because -inf - (-inf) is NaN.
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        if FEATURES.fold_scale:
            p = tl.exp2(scores * numbers.qk_scale - m_finite[:, None])
        else:
            p = exponential(scores - m_finite[:, None], FEATURES)
        alpha = exponential(m_i - m_finite, FEATURES)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        if FEATURES.dropout:
            kept = keep_mask(head, numbers.dropout_threshold, first_row, first_key, BLOCK_M, BLOCK_N, False)
            p = tl.where(kept, p, 0.0)
        v_block = at_row(v_ptr, stride_v, first_key)
        v = load_tile(v_block, v_offsets, keys, offs_v, numbers.seqlen_k, VALUE_DIM, BLOCK_V, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(
    do_not_specialize=[
        "heads", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "dropout_threshold",
    ]
)  # fmt: skip
def flash_attention_fwd_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D]
    v_ptr,  # [B, Hkv, Nk, Dv]
    out_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq], natural log
    tail_ptr,  # like lse, or None
    cu_seqlens_q_ptr,  # int32 [S + 1] or None
    cu_seqlens_k_ptr,  # int32 [S + 1] or None
    sinks_ptr,  # [Hq] or None
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
    stride_out,
    stride_lse,
    heads,
    group,  # query heads to a key head
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    qk_scale,
    softcap,
    window_left,
    window_right,
    dropout_threshold,
    dropout_scale,  # 1 / (1 - p)
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
    """out and lse of BLOCK_M rows of one head."""
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

        offs_m = first_row + tl.arange(0, BLOCK_M)
        offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        local_m = tl.arange(0, BLOCK_M)
        q_block = at_head(q_ptr, stride_q, batch, head, start_q + first_row)
        q = load_tile(
            q_block, tile_offsets(stride_q, local_m, offs_d, WIDE), offs_m, offs_d, length_q, HEAD_DIM, BLOCK_D, True
        )

        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        if FEATURES.sinks:
            # A sink is one more logit, of a key without a value.
            unit = 1.0 if FEATURES.natural else LOG2E
            m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * unit
            l_i += 1.0
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

        last_row = tl.minimum(first_row + BLOCK_M, length_q) - 1
        start, full_start, full_stop, stop = key_range(first_row, last_row, numbers, FEATURES, BLOCK_N)
        acc, m_i, l_i = _walk_keys(
            acc, m_i, l_i, q, full_start, full_stop, first_row, k_head, stride_k, v_head, stride_v, numbers, scoring,
            FEATURES, False, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
        )  # fmt: skip
        if FEATURES.left:
            acc, m_i, l_i = _walk_keys(
                acc, m_i, l_i, q, start, full_start, first_row, k_head, stride_k, v_head, stride_v, numbers, scoring,
                FEATURES, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
            )  # fmt: skip
        acc, m_i, l_i = _walk_keys(
            acc, m_i, l_i, q, full_stop, stop, first_row, k_head, stride_k, v_head, stride_v, numbers, scoring,
            FEATURES, True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
        )  # fmt: skip

        # A row without a key has l = 0 (or only its sink) and acc = 0.
        denominator = tl.where(l_i == 0.0, 1.0, l_i)
        lse_block = at_head(lse_ptr, stride_lse, batch, head, start_q + first_row)
        if FEATURES.natural:
            above = tl.log2(denominator) * LN2
            lse = tl.where(l_i == 0.0, float("-inf"), m_i + above)
            tail = tl.where(lse == float("-inf"), 0.0, (m_i - lse) + above)
            tail_block = at_head(tail_ptr, stride_lse, batch, head, start_q + first_row)
            tl.store(tail_block + local_m, tail, mask=offs_m < length_q)
        else:
            lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(denominator)) * LN2)
        tl.store(lse_block + local_m, lse, mask=offs_m < length_q)
        if FEATURES.dropout:
            acc = acc * dropout_scale
        out = (acc / denominator[:, None]).to(out_ptr.dtype.element_ty)
        out_block = at_head(out_ptr, stride_out, batch, head, start_q + first_row)
        store_tile(out_block, tile_offsets(stride_out, local_m, offs_v, WIDE), out, offs_m, offs_v, length_q, VALUE_DIM)
