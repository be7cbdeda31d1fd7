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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import (
    LN2,
    LOG2E,
    View,
    at_head,
    at_row,
    load_tile,
    store_tile,
    tile_offsets,
    view_of,
)

from .scores import (
    VARYING,
    ScoreNumbers,
    exponential,
    head_scores,
    keep_mask,
    key_range,
    place_k,
    place_q,
    row_block,
    tile_scores,
)


class Results(NamedTuple):
    """What the kernel writes."""

    out: View  # [B, Hq, Nq, Dv]
    lse: View  # float32 [B, Hq, Nq], natural log
    tail_ptr: Any  # like lse, or None


class Softmax(NamedTuple):
    """The running state of BLOCK_M rows, float32."""

    acc: Any  # [BLOCK_M, BLOCK_V]
    m_i: Any  # [BLOCK_M]
    l_i: Any  # [BLOCK_M]


@triton.jit
def _walk_keys(
    state, q, start, stop, first_row, k_head, v_head, numbers, head,
    FEATURES: tl.constexpr, SIZES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys from ``start`` to ``stop`` into the running state."""
    acc, m_i, l_i = state
    offs_m = first_row + tl.arange(0, SIZES.BLOCK_M)
    offs_n, offs_d, offs_v = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_D), tl.arange(0, SIZES.BLOCK_V)
    k_offsets = tile_offsets(k_head, offs_n, offs_d, SIZES.WIDE)
    v_offsets = tile_offsets(v_head, offs_n, offs_v, SIZES.WIDE)
    for first_key in tl.range(start, stop, SIZES.BLOCK_N):
        keys = first_key + offs_n
        k_block = at_row(k_head.ptr, k_head, first_key)
        k = load_tile(k_block, k_offsets, keys, offs_d, numbers.seqlen_k, SIZES.HEAD_DIM, SIZES.BLOCK_D, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=SIZES.PRECISION)  # [BLOCK_M, BLOCK_N]
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
            threshold = numbers.dropout_threshold
            kept = keep_mask(head, threshold, first_row, first_key, SIZES.BLOCK_M, SIZES.BLOCK_N, False)
            p = tl.where(kept, p, 0.0)
        v_block = at_row(v_head.ptr, v_head, first_key)
        v = load_tile(v_block, v_offsets, keys, offs_v, numbers.seqlen_k, SIZES.VALUE_DIM, SIZES.BLOCK_V, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=SIZES.PRECISION)
    return Softmax(acc, m_i, l_i)


@triton.jit(do_not_specialize=VARYING)
def flash_attention_fwd_kernel(
    inputs,
    results,
    extras,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    window_left,
    window_right,
    dropout_threshold,
    scales,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """out and lse of BLOCK_M rows of one head."""
    sequence, head, first_row = row_block(seqlen_q, heads, FEATURES, SIZES.BLOCK_M)
    start_q, length_q = place_q(inputs, sequence, seqlen_q, total_q, FEATURES)
    start_k, length_k = place_k(inputs, sequence, seqlen_k, total_k, FEATURES)
    if first_row < length_q:
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(
            length_q, length_k, window_left, window_right, dropout_threshold,
            scales.qk_scale, scales.softcap, scales.dropout_scale,
        )  # fmt: skip
        scoring = head_scores(extras, sequence, head, heads, FEATURES)
        k_head = view_of(inputs.k, batch, head // group, start_k)
        v_head = view_of(inputs.v, batch, head // group, start_k)

        local_m, offs_d, offs_v = tl.arange(0, SIZES.BLOCK_M), tl.arange(0, SIZES.BLOCK_D), tl.arange(0, SIZES.BLOCK_V)
        offs_m = first_row + local_m
        q_block = at_head(inputs.q.ptr, inputs.q, batch, head, start_q + first_row)
        q_offsets = tile_offsets(inputs.q, local_m, offs_d, SIZES.WIDE)
        q = load_tile(q_block, q_offsets, offs_m, offs_d, length_q, SIZES.HEAD_DIM, SIZES.BLOCK_D, True)

        m_i = tl.full([SIZES.BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.full([SIZES.BLOCK_M], 0.0, tl.float32)
        if FEATURES.sinks:
            # A sink is one more logit, of a key without a value.
            unit = 1.0 if FEATURES.natural else LOG2E
            m_i = tl.full([SIZES.BLOCK_M], 0.0, tl.float32) + tl.load(extras.sinks_ptr + head).to(tl.float32) * unit
            l_i += 1.0
        state = Softmax(tl.full([SIZES.BLOCK_M, SIZES.BLOCK_V], 0.0, tl.float32), m_i, l_i)

        last_row = tl.minimum(first_row + SIZES.BLOCK_M, length_q) - 1
        start, full_start, full_stop, stop = key_range(first_row, last_row, numbers, FEATURES, SIZES.BLOCK_N)
        state = _walk_keys(
            state, q, full_start, full_stop, first_row, k_head, v_head, numbers, scoring, FEATURES, SIZES, False
        )
        if FEATURES.left:
            state = _walk_keys(
                state, q, start, full_start, first_row, k_head, v_head, numbers, scoring, FEATURES, SIZES, True
            )
        state = _walk_keys(
            state, q, full_stop, stop, first_row, k_head, v_head, numbers, scoring, FEATURES, SIZES, True
        )
        acc, m_i, l_i = state

        # A row without a key has l = 0 (or only its sink) and acc = 0.
        denominator = tl.where(l_i == 0.0, 1.0, l_i)
        lse_row = at_head(0, results.lse, batch, head, start_q + first_row)
        if FEATURES.natural:
            above = tl.log2(denominator) * LN2
            lse = tl.where(l_i == 0.0, float("-inf"), m_i + above)
            tail = tl.where(lse == float("-inf"), 0.0, (m_i - lse) + above)
            tl.store(results.tail_ptr + lse_row + local_m, tail, mask=offs_m < length_q)
        else:
            lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(denominator)) * LN2)
        tl.store(results.lse.ptr + lse_row + local_m, lse, mask=offs_m < length_q)
        if FEATURES.dropout:
            acc = acc * scales.dropout_scale
        out = (acc / denominator[:, None]).to(results.out.ptr.dtype.element_ty)
        out_block = at_head(results.out.ptr, results.out, batch, head, start_q + first_row)
        out_offsets = tile_offsets(results.out, local_m, offs_v, SIZES.WIDE)
        store_tile(out_block, out_offsets, out, offs_m, offs_v, length_q, SIZES.VALUE_DIM)
