"""The forward kernel of linear attention: the walk over q, k and v.

Maths and accounts stand in :mod:`.triton_walk`, and with the Taylor map in :mod:`.triton_taylor`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .taylor import taylor_walk
from .walk import walk


@triton.jit(do_not_specialize=["heads", "group", "sequences", "seqlen", "per_sequence", "segment_rows", "search_steps"])
def linear_attention_fwd_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    out_ptr,  # [B, H, N, V]
    denominator_ptr,  # float32 [B, H, N] or None
    decay_ptr,  # [1, H, 1], [B, H, N] or None
    state_ptr,  # float32 [S, H, K, W] before every sequence, or [P, H, K, W] before every segment, or None
    last_ptr,  # float32 [S, H, K, W] or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    segments_ptr,  # int32 [S + 1] or None
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_rows,  # of the denominator
    stride_decay,
    stride_state,
    stride_last,
    heads,
    group,  # heads of v to one of q and k
    sequences,
    seqlen,
    per_sequence,  # segments
    segment_rows,
    search_steps,
    scale,
    FEATURES: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out, den and the last state of BLOCK_V columns of one head of one segment."""
    if FEATURES.taylor:
        taylor_walk(
            q_ptr, k_ptr, v_ptr, out_ptr, None, denominator_ptr,
            decay_ptr, state_ptr, last_ptr, cu_seqlens_ptr, segments_ptr,
            stride_q, stride_k, stride_v, stride_out, stride_rows, stride_decay, stride_state, stride_last,
            heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, False, K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
    else:
        walk(
            q_ptr, k_ptr, v_ptr, out_ptr, None, None, None, denominator_ptr,
            decay_ptr, state_ptr, last_ptr, cu_seqlens_ptr, segments_ptr, None, None, None, None, None,
            stride_q, stride_k, stride_v, stride_out, stride_rows, stride_decay, stride_state, stride_last,
            stride_rows, stride_rows, stride_rows,
            heads, group, group, 1, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, False, False, True, K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
