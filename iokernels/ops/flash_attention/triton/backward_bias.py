"""The gradient of an additive bias, without ever holding dS.

dbias is dS = P (dP - delta) summed over the dimensions along which the bias was broadcast (see ``backward_q``). A block
owns one BLOCK_M x BLOCK_N tile of the bias's own shape and visits everything that tile was added to: all sequences
where the bias has one batch, all heads where it has one head, all row (key) blocks where it has one row (key). So
memory is that of the bias, nothing is atomic, and the sum is always taken in the same order.

FLOPs: 2 Nq Nk (D + Dv) a head. Bytes that blocks request at a visit: q, dO, lse and delta of BLOCK_M rows, k and v of
BLOCK_N keys, bias and mask of the tile; dbias is written once. Tiles that a window hides are visited too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, at_row, load_tile, tile_offsets, view_of

from .backward_q import load_statistics, weights
from .scores import VARYING, ScoreNumbers, head_scores, keep_mask, place_k, place_q, tile_scores


class One(NamedTuple):
    """Along which dimensions the bias is broadcast."""

    SEQUENCE: bool
    HEAD: bool
    ROW: bool
    KEY: bool


@triton.jit(do_not_specialize=(*VARYING, "sequences"))
def flash_attention_bwd_dbias_kernel(
    inputs,
    given,
    dbias,  # [B|1, Hq|1, Nq|1, Nk|1]
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
    sequences,
    scales,
    ONE: tl.constexpr,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """dbias of one tile: key tiles within row tiles within heads within sequences, of the bias's own shape."""
    row_blocks, key_blocks = tl.cdiv(seqlen_q, SIZES.BLOCK_M), tl.cdiv(seqlen_k, SIZES.BLOCK_N)
    row_tiles = 1 if ONE.ROW else row_blocks
    key_tiles = 1 if ONE.KEY else key_blocks
    bias_heads = 1 if ONE.HEAD else heads
    pid = tl.program_id(0)
    pid_n, pid = pid % key_tiles, pid // key_tiles
    pid_m, pid = pid % row_tiles, pid // row_tiles
    pid_h, pid_b = pid % bias_heads, pid // bias_heads

    acc = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_N], 0.0, tl.float32)
    for sequence in range(0 if ONE.SEQUENCE else pid_b, sequences if ONE.SEQUENCE else pid_b + 1):
        start_q, length_q = place_q(inputs, sequence, seqlen_q, total_q, FEATURES)
        start_k, length_k = place_k(inputs, sequence, seqlen_k, total_k, FEATURES)
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(
            length_q, length_k, window_left, window_right, dropout_threshold,
            scales.qk_scale, scales.softcap, scales.dropout_scale,
        )  # fmt: skip
        for head in range(0 if ONE.HEAD else pid_h, heads if ONE.HEAD else pid_h + 1):
            scoring = head_scores(extras, sequence, head, heads, FEATURES)
            q_head, dout_head = view_of(inputs.q, batch, head, start_q), view_of(given.dout, batch, head, start_q)
            first = at_head(0, given.lse, batch, head, start_q)
            k_head = view_of(inputs.k, batch, head // group, start_k)
            v_head = view_of(inputs.v, batch, head // group, start_k)
            for block_m in range(0 if ONE.ROW else pid_m, row_blocks if ONE.ROW else pid_m + 1):
                for block_n in range(0 if ONE.KEY else pid_n, key_blocks if ONE.KEY else pid_n + 1):
                    acc += _tile_gradient(
                        q_head, k_head, v_head, dout_head, given, first,
                        block_m * SIZES.BLOCK_M, block_n * SIZES.BLOCK_N, numbers, scoring, FEATURES, SIZES,
                    )  # fmt: skip

    rows, keys = (
        pid_m * SIZES.BLOCK_M + tl.arange(0, SIZES.BLOCK_M),
        pid_n * SIZES.BLOCK_N + tl.arange(0, SIZES.BLOCK_N),
    )
    if ONE.ROW:
        acc = tl.sum(acc, 0)[None, :]
        rows = tl.arange(0, 1)
    if ONE.KEY:
        acc = tl.sum(acc, 1)[:, None]
        keys = tl.arange(0, 1)
    inside = (rows < (1 if ONE.ROW else seqlen_q))[:, None] & (keys < (1 if ONE.KEY else seqlen_k))[None, :]
    tile = rows.to(tl.int64)[:, None] * dbias.n + keys.to(tl.int64)[None, :] * dbias.d
    dbias_head = at_head(dbias.ptr, dbias, pid_b, pid_h, 0)
    tl.store(dbias_head + tile, acc.to(dbias.ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_gradient(
    q_head, k_head, v_head, dout_head, given, first, first_row, first_key, numbers, head,
    FEATURES: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """dS of one tile of one head, whose statistics begin at element ``first``, before the factor of a softcap: a bias
    is added after the cap."""
    local_m, local_n = tl.arange(0, SIZES.BLOCK_M), tl.arange(0, SIZES.BLOCK_N)
    offs_d, offs_v = tl.arange(0, SIZES.BLOCK_D), tl.arange(0, SIZES.BLOCK_V)
    rows, keys = first_row + local_m, first_key + local_n
    q_block, q_offsets = at_row(q_head.ptr, q_head, first_row), tile_offsets(q_head, local_m, offs_d, SIZES.WIDE)
    dout_block = at_row(dout_head.ptr, dout_head, first_row)
    dout_offsets = tile_offsets(dout_head, local_m, offs_v, SIZES.WIDE)
    k_block, k_offsets = at_row(k_head.ptr, k_head, first_key), tile_offsets(k_head, local_n, offs_d, SIZES.WIDE)
    v_block, v_offsets = at_row(v_head.ptr, v_head, first_key), tile_offsets(v_head, local_n, offs_v, SIZES.WIDE)
    q = load_tile(q_block, q_offsets, rows, offs_d, numbers.seqlen_q, SIZES.HEAD_DIM, SIZES.BLOCK_D, True)
    k = load_tile(k_block, k_offsets, keys, offs_d, numbers.seqlen_k, SIZES.HEAD_DIM, SIZES.BLOCK_D, True)
    qk = tl.dot(q, tl.trans(k), input_precision=SIZES.PRECISION)  # [BLOCK_M, BLOCK_N], and so are the others
    scores, _ = tile_scores(qk, rows[:, None], keys[None, :], numbers, head, FEATURES, True)
    lse, tail, delta = load_statistics(given, first + first_row, local_m, rows, numbers.seqlen_q, FEATURES)
    p = weights(scores, lse[:, None], tail[:, None], numbers, FEATURES)
    dout = load_tile(dout_block, dout_offsets, rows, offs_v, numbers.seqlen_q, SIZES.VALUE_DIM, SIZES.BLOCK_V, True)
    v = load_tile(v_block, v_offsets, keys, offs_v, numbers.seqlen_k, SIZES.VALUE_DIM, SIZES.BLOCK_V, True)
    dp = tl.dot(dout, tl.trans(v), input_precision=SIZES.PRECISION)
    if FEATURES.dropout:
        kept = keep_mask(head, numbers.dropout_threshold, first_row, first_key, SIZES.BLOCK_M, SIZES.BLOCK_N, False)
        dp = tl.where(kept, dp * numbers.dropout_scale, 0.0)
    return p * (dp - delta[:, None])
