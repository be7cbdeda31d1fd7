"""The gradient of an additive bias, without ever holding dS.

dbias is dS = P (dP - delta) summed over the dimensions along which the bias was broadcast (see ``backward_q``). A block
owns one BLOCK_M x BLOCK_N tile of the bias's own shape and visits everything that tile was added to: all sequences
where the bias has one batch, all heads where it has one head, all row (key) blocks where it has one row (key). So
memory is that of the bias, nothing is atomic, and the sum is always taken in the same order.

FLOPs: 2 Nq Nk (D + Dv) a head. Bytes that blocks request at a visit: q, dO, lse and delta of BLOCK_M rows, k and v of
BLOCK_N keys, bias and mask of the tile; dbias is written once. Tiles that a window hides are visited too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, at_row, load_tile, locate, tile_offsets

from .backward_q import load_statistics, weights
from .scores import ScoreNumbers, head_scores, keep_mask, tile_scores


@triton.jit(
    do_not_specialize=[
        "sequences", "heads", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "window_left", "window_right",
        "dropout_threshold",
    ]
)  # fmt: skip
def flash_attention_bwd_dbias_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D]
    v_ptr,  # [B, Hkv, Nk, Dv]
    dout_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq]
    tail_ptr,  # like lse, or None
    delta_ptr,  # float32 [B, Hq, Nq]
    dbias_ptr,  # [B|1, Hq|1, Nq|1, Nk|1]
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
    stride_dbias,
    sequences,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    qk_scale,
    softcap,
    window_left,
    window_right,
    dropout_threshold,
    dropout_scale,
    ONE_SEQUENCE: tl.constexpr,  # the bias has one batch for all sequences
    ONE_HEAD: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_KEY: tl.constexpr,
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
    """dbias of one tile: key tiles within row tiles within heads within sequences, of the bias's own shape."""
    row_blocks, key_blocks = tl.cdiv(seqlen_q, BLOCK_M), tl.cdiv(seqlen_k, BLOCK_N)
    row_tiles = 1 if ONE_ROW else row_blocks
    key_tiles = 1 if ONE_KEY else key_blocks
    bias_heads = 1 if ONE_HEAD else heads
    pid = tl.program_id(0)
    pid_n, pid = pid % key_tiles, pid // key_tiles
    pid_m, pid = pid % row_tiles, pid // row_tiles
    pid_h, pid_b = pid % bias_heads, pid // bias_heads

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sequence in range(0 if ONE_SEQUENCE else pid_b, sequences if ONE_SEQUENCE else pid_b + 1):
        start_q, length_q = locate(cu_seqlens_q_ptr, sequence, seqlen_q, total_q, FEATURES.varlen)
        start_k, length_k = locate(cu_seqlens_k_ptr, sequence, seqlen_k, total_k, FEATURES.varlen)
        batch = 0 if FEATURES.varlen else sequence
        numbers = ScoreNumbers(length_q, length_k, qk_scale, softcap, window_left, window_right, dropout_threshold)
        for head in range(0 if ONE_HEAD else pid_h, heads if ONE_HEAD else pid_h + 1):
            scoring = head_scores(
                bias_ptr, stride_bias, mask_ptr, stride_mask, alibi_ptr, stride_alibi, seed_ptr,
                sequence, head, heads, FEATURES,
            )  # fmt: skip
            q_head = at_head(q_ptr, stride_q, batch, head, start_q)
            dout_head = at_head(dout_ptr, stride_dout, batch, head, start_q)
            first = at_head(0, stride_lse, batch, head, start_q)
            k_head = at_head(k_ptr, stride_k, batch, head // group, start_k)
            v_head = at_head(v_ptr, stride_v, batch, head // group, start_k)
            for block_m in range(0 if ONE_ROW else pid_m, row_blocks if ONE_ROW else pid_m + 1):
                for block_n in range(0 if ONE_KEY else pid_n, key_blocks if ONE_KEY else pid_n + 1):
                    acc += _tile_gradient(
                        q_head, stride_q, dout_head, stride_dout, lse_ptr, tail_ptr, delta_ptr, first, k_head, stride_k,
                        v_head, stride_v, numbers, scoring, dropout_scale, block_m * BLOCK_M, block_n * BLOCK_N,
                        FEATURES, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
                    )  # fmt: skip

    rows, keys = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        acc = tl.sum(acc, 0)[None, :]
        rows = tl.arange(0, 1)
    if ONE_KEY:
        acc = tl.sum(acc, 1)[:, None]
        keys = tl.arange(0, 1)
    inside = (rows < (1 if ONE_ROW else seqlen_q))[:, None] & (keys < (1 if ONE_KEY else seqlen_k))[None, :]
    tile = rows.to(tl.int64)[:, None] * stride_dbias.n + keys.to(tl.int64)[None, :] * stride_dbias.d
    dbias_head = at_head(dbias_ptr, stride_dbias, pid_b, pid_h, 0)
    tl.store(dbias_head + tile, acc.to(dbias_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_gradient(
    q_ptr, stride_q, dout_ptr, stride_dout, lse_ptr, tail_ptr, delta_ptr, first, k_ptr, stride_k, v_ptr, stride_v,
    numbers, head, dropout_scale, first_row, first_key,
    FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of one tile of one head, whose statistics begin at element ``first``, before the factor of a softcap: a bias
    is added after the cap."""
    local_m, local_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    rows, keys = first_row + local_m, first_key + local_n
    q_block, q_offsets = at_row(q_ptr, stride_q, first_row), tile_offsets(stride_q, local_m, offs_d, WIDE)
    dout_block, dout_offsets = (
        at_row(dout_ptr, stride_dout, first_row),
        tile_offsets(stride_dout, local_m, offs_v, WIDE),
    )
    k_block, k_offsets = at_row(k_ptr, stride_k, first_key), tile_offsets(stride_k, local_n, offs_d, WIDE)
    v_block, v_offsets = at_row(v_ptr, stride_v, first_key), tile_offsets(stride_v, local_n, offs_v, WIDE)
    q = load_tile(q_block, q_offsets, rows, offs_d, numbers.seqlen_q, HEAD_DIM, BLOCK_D, True)
    k = load_tile(k_block, k_offsets, keys, offs_d, numbers.seqlen_k, HEAD_DIM, BLOCK_D, True)
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores, _ = tile_scores(qk, rows[:, None], keys[None, :], numbers, head, FEATURES, True)
    lse, tail, delta = load_statistics(
        lse_ptr, tail_ptr, delta_ptr, first + first_row, local_m, rows, numbers.seqlen_q, FEATURES
    )
    p = weights(scores, lse[:, None], tail[:, None], numbers, FEATURES)
    dout = load_tile(dout_block, dout_offsets, rows, offs_v, numbers.seqlen_q, VALUE_DIM, BLOCK_V, True)
    v = load_tile(v_block, v_offsets, keys, offs_v, numbers.seqlen_k, VALUE_DIM, BLOCK_V, True)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if FEATURES.dropout:
        kept = keep_mask(head, numbers.dropout_threshold, first_row, first_key, BLOCK_M, BLOCK_N, False)
        dp = tl.where(kept, dp * dropout_scale, 0.0)
    return p * (dp - delta[:, None])
