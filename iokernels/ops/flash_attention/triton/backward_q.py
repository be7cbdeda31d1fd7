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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import (
    LOG2E,
    View,
    at_head,
    at_row,
    load_tile,
    store_tile,
    tile_offsets,
    view_of,
)

from .scores import VARYING, ScoreNumbers, head_scores, keep_mask, key_range, place_k, place_q, row_block, tile_scores


class Given(NamedTuple):
    """What the backward kernels read beside the inputs."""

    dout: View  # [B, Hq, Nq, Dv]
    lse: View  # float32 [B, Hq, Nq]
    tail_ptr: Any  # like lse, or None
    delta_ptr: Any  # like lse


class Rows(NamedTuple):
    """What is known of BLOCK_M rows before their keys are walked over."""

    q: Any  # [BLOCK_M, BLOCK_D]
    dout: Any  # [BLOCK_M, BLOCK_V]
    lse: Any  # [BLOCK_M], and so are the others
    tail: Any
    delta: Any


@triton.jit(do_not_specialize=["heads", "seqlen_q"])
def flash_attention_bwd_delta_kernel(
    out,  # [B, Hq, Nq, Dv]
    dout,  # [B, Hq, Nq, Dv]
    dlse,  # [B, Hq, Nq] or None
    delta,  # float32 [B, Hq, Nq]
    heads,
    seqlen_q,
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
    out_block, out_offsets = at_head(out.ptr, out, batch, head, first_row), tile_offsets(out, local_m, offs_v, WIDE)
    out_tile = load_tile(out_block, out_offsets, offs_m, offs_v, seqlen_q, VALUE_DIM, BLOCK_V, True)
    dout_block = at_head(dout.ptr, dout, batch, head, first_row)
    dout_offsets = tile_offsets(dout, local_m, offs_v, WIDE)
    dout_tile = load_tile(dout_block, dout_offsets, offs_m, offs_v, seqlen_q, VALUE_DIM, BLOCK_V, True)
    product = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse.ptr is not None:
        dlse_block = at_head(dlse.ptr, dlse, batch, head, first_row)
        product -= tl.load(dlse_block + local_m.to(tl.int64) * dlse.n, mask=offs_m < seqlen_q, other=0.0)
    tl.store(at_head(delta.ptr, delta, batch, head, first_row) + local_m, product, mask=offs_m < seqlen_q)


@triton.jit
def load_statistics(given, first, local_m, rows, seqlen_q, FEATURES: tl.constexpr):
    """lse in the unit of the scores, its tail in base 2 (0 where there is none) and delta of a block of rows, which
    begins at element ``first`` of each.

    A row that sees no key (lse = -inf), and a row past the end, get lse = inf: then 2^(s - lse) is 0 even for
    s = -inf, and nothing flows through them.
    """
    lse = tl.load(given.lse.ptr + first + local_m, mask=rows < seqlen_q, other=float("inf"))
    delta = tl.load(given.delta_ptr + first + local_m, mask=rows < seqlen_q, other=0.0)
    if FEATURES.natural:
        tail = tl.load(given.tail_ptr + first + local_m, mask=rows < seqlen_q, other=0.0) * LOG2E
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
    dq, own, start, stop, first_row, k_head, v_head, numbers, head,
    FEATURES: tl.constexpr, SIZES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys from ``start`` to ``stop`` to dq (still without the factor scale)."""
    q, dout, lse, tail, delta = own
    offs_m = first_row + tl.arange(0, SIZES.BLOCK_M)
    offs_n, offs_d, offs_v = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_D), tl.arange(0, SIZES.BLOCK_V)
    k_offsets = tile_offsets(k_head, offs_n, offs_d, SIZES.WIDE)
    v_offsets = tile_offsets(v_head, offs_n, offs_v, SIZES.WIDE)
    for first_key in tl.range(start, stop, SIZES.BLOCK_N):
        keys = first_key + offs_n
        k_block = at_row(k_head.ptr, k_head, first_key)
        k = load_tile(k_block, k_offsets, keys, offs_d, numbers.seqlen_k, SIZES.HEAD_DIM, SIZES.BLOCK_D, MASKED)
        v_block = at_row(v_head.ptr, v_head, first_key)
        v = load_tile(v_block, v_offsets, keys, offs_v, numbers.seqlen_k, SIZES.VALUE_DIM, SIZES.BLOCK_V, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=SIZES.PRECISION)  # [BLOCK_M, BLOCK_N], and so are the others
        scores, slope = tile_scores(qk, offs_m[:, None], keys[None, :], numbers, head, FEATURES, MASKED)
        p = weights(scores, lse[:, None], tail[:, None], numbers, FEATURES)
        dp = tl.dot(dout, tl.trans(v), input_precision=SIZES.PRECISION)
        if FEATURES.dropout:
            threshold = numbers.dropout_threshold
            kept = keep_mask(head, threshold, first_row, first_key, SIZES.BLOCK_M, SIZES.BLOCK_N, False)
            dp = tl.where(kept, dp * numbers.dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if FEATURES.softcap:
            ds = ds * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=SIZES.PRECISION)
    return dq


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_dq_kernel(
    inputs,
    given,
    dq,  # [B, Hq, Nq, D]
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
    """dq of BLOCK_M rows of one head. The grid is that of the forward kernel."""
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
        dout_block = at_head(given.dout.ptr, given.dout, batch, head, start_q + first_row)
        dout_offsets = tile_offsets(given.dout, local_m, offs_v, SIZES.WIDE)
        dout = load_tile(dout_block, dout_offsets, offs_m, offs_v, length_q, SIZES.VALUE_DIM, SIZES.BLOCK_V, True)
        first = at_head(0, given.lse, batch, head, start_q + first_row)
        lse, tail, delta = load_statistics(given, first, local_m, offs_m, length_q, FEATURES)
        own = Rows(q, dout, lse, tail, delta)

        acc = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_D], 0.0, tl.float32)
        last_row = tl.minimum(first_row + SIZES.BLOCK_M, length_q) - 1
        start, full_start, full_stop, stop = key_range(first_row, last_row, numbers, FEATURES, SIZES.BLOCK_N)
        acc = _walk_keys(
            acc, own, full_start, full_stop, first_row, k_head, v_head, numbers, scoring, FEATURES, SIZES, False
        )
        if FEATURES.left:
            acc = _walk_keys(
                acc, own, start, full_start, first_row, k_head, v_head, numbers, scoring, FEATURES, SIZES, True
            )
        acc = _walk_keys(acc, own, full_stop, stop, first_row, k_head, v_head, numbers, scoring, FEATURES, SIZES, True)
        dq_block = at_head(dq.ptr, dq, batch, head, start_q + first_row)
        dq_offsets = tile_offsets(dq, local_m, offs_d, SIZES.WIDE)
        result = (acc * scales.scale).to(dq.ptr.dtype.element_ty)
        store_tile(dq_block, dq_offsets, result, offs_m, offs_d, length_q, SIZES.HEAD_DIM)
