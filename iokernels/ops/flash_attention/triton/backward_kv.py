"""Kernel 3 of the backward pass: dk and dv. The maths and the accounts of all three are in ``backward_q``."""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile, store_tile, tile_offsets

from .backward_q import load_statistics, weights
from .scores import VARYING, ScoreNumbers, head_scores, keep_mask, place_k, place_q, row_range, tile_scores, visible


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_dkv_kernel(
    inputs,
    given,
    dk,  # [B, Hkv, Nk, D]
    dv,  # [B, Hkv, Nk, Dv]
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
    """dk and dv of BLOCK_N keys of one key head: key blocks within key heads within sequences. When causal, the first
    keys are seen by the most rows, so the natural order already starts with the longest blocks.

    One loop runs through the rows of every query head of the group, and masks a tile by a branch: with a nest of loops,
    or a loop for each part, the compiler keeps so much alive that the accumulators spill.
    """
    key_blocks = tl.cdiv(seqlen_k, SIZES.BLOCK_N)
    first_key = tl.program_id(0) % key_blocks * SIZES.BLOCK_N
    sequence_head = tl.program_id(0) // key_blocks
    sequence, kv_head = sequence_head // (heads // group), sequence_head % (heads // group)

    start_q, length_q = place_q(inputs, sequence, seqlen_q, total_q, FEATURES)
    start_k, length_k = place_k(inputs, sequence, seqlen_k, total_k, FEATURES)
    if first_key < length_k:
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(
            length_q, length_k, window_left, window_right, dropout_threshold,
            scales.qk_scale, scales.softcap, scales.dropout_scale,
        )  # fmt: skip

        local_n, offs_d, offs_v = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_D), tl.arange(0, SIZES.BLOCK_V)
        keys = first_key + local_n
        k_block = at_head(inputs.k.ptr, inputs.k, batch, kv_head, start_k + first_key)
        k_offsets = tile_offsets(inputs.k, local_n, offs_d, SIZES.WIDE)
        k = load_tile(k_block, k_offsets, keys, offs_d, length_k, SIZES.HEAD_DIM, SIZES.BLOCK_D, True)
        v_block = at_head(inputs.v.ptr, inputs.v, batch, kv_head, start_k + first_key)
        v_offsets = tile_offsets(inputs.v, local_n, offs_v, SIZES.WIDE)
        v = load_tile(v_block, v_offsets, keys, offs_v, length_k, SIZES.VALUE_DIM, SIZES.BLOCK_V, True)

        acc_k = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_D], 0.0, tl.float32)
        acc_v = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_V], 0.0, tl.float32)
        last_key = tl.minimum(first_key + SIZES.BLOCK_N, length_k) - 1
        start, full_start, full_stop, stop = row_range(first_key, last_key, numbers, FEATURES, SIZES.BLOCK_M)
        local_m = tl.arange(0, SIZES.BLOCK_M)
        q_offsets = tile_offsets(inputs.q, local_m, offs_d, SIZES.WIDE)
        dout_offsets = tile_offsets(given.dout, local_m, offs_v, SIZES.WIDE)
        steps = tl.cdiv(tl.maximum(stop - start, 0), SIZES.BLOCK_M)
        for step in tl.range(0, group * steps):
            head = kv_head * group + step // steps
            first_row = start + step % steps * SIZES.BLOCK_M
            rows = first_row + local_m
            q_block = at_head(inputs.q.ptr, inputs.q, batch, head, start_q + first_row)
            q = load_tile(q_block, q_offsets, rows, offs_d, length_q, SIZES.HEAD_DIM, SIZES.BLOCK_D, True)
            dout_block = at_head(given.dout.ptr, given.dout, batch, head, start_q + first_row)
            dout = load_tile(dout_block, dout_offsets, rows, offs_v, length_q, SIZES.VALUE_DIM, SIZES.BLOCK_V, True)
            first = at_head(0, given.lse, batch, head, start_q + first_row)
            lse, tail, delta = load_statistics(given, first, local_m, rows, length_q, FEATURES)
            scoring = head_scores(extras, sequence, head, heads, FEATURES)
            kq = tl.dot(k, tl.trans(q), input_precision=SIZES.PRECISION)
            scores, slope = tile_scores(kq, rows[None, :], keys[:, None], numbers, scoring, FEATURES, False)
            if FEATURES.left or FEATURES.right:  # noqa: SIM102 - the first is known to the compiler, the second is not
                if (first_row < full_start) | (first_row >= full_stop):
                    shown = visible(rows[None, :], keys[:, None], numbers, FEATURES)
                    scores = tl.where(shown, scores, float("-inf"))
            p = weights(scores, lse[None, :], tail[None, :], numbers, FEATURES)
            dp = tl.dot(v, tl.trans(dout), input_precision=SIZES.PRECISION)
            p_dropped = p
            if FEATURES.dropout:
                kept = keep_mask(scoring, dropout_threshold, first_row, first_key, SIZES.BLOCK_M, SIZES.BLOCK_N, True)
                p_dropped = tl.where(kept, p * scales.dropout_scale, 0.0)
                dp = tl.where(kept, dp * scales.dropout_scale, 0.0)
            acc_v = tl.dot(p_dropped.to(dout.dtype), dout, acc_v, input_precision=SIZES.PRECISION)
            ds = p * (dp - delta[None, :])
            if FEATURES.softcap:
                ds = ds * slope
            acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=SIZES.PRECISION)
        dk_block = at_head(dk.ptr, dk, batch, kv_head, start_k + first_key)
        dk_offsets = tile_offsets(dk, local_n, offs_d, SIZES.WIDE)
        store_tile(
            dk_block,
            dk_offsets,
            (acc_k * scales.scale).to(dk.ptr.dtype.element_ty),
            keys,
            offs_d,
            length_k,
            SIZES.HEAD_DIM,
        )
        dv_block = at_head(dv.ptr, dv, batch, kv_head, start_k + first_key)
        dv_offsets = tile_offsets(dv, local_n, offs_v, SIZES.WIDE)
        store_tile(dv_block, dv_offsets, acc_v.to(dv.ptr.dtype.element_ty), keys, offs_v, length_k, SIZES.VALUE_DIM)
