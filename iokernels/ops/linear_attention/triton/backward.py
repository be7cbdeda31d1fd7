"""The backward kernels of linear attention: three walks.

Maths and accounts stand in :mod:`.triton_walk`, and with the Taylor map in :mod:`.triton_taylor` (dv) and
:mod:`.triton_taylor_keys` (dq, dk; both then have a share for each slice of V, [slices, B, H, N, K]).

dO stands for the gradient of the numerator. With the normaliser that is dout / den, and ``dden_ptr`` holds that of den:

    out = num / den        dN = dout / den        dden = -(dN . out)        both 0 where den is 0

The kernel that makes the two reads dout and out, and writes dN and 8 bytes of den and dden a token and head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile, store_tile, tile_offsets

from .taylor import taylor_walk
from .taylor_keys import taylor_keys
from .walk import walk


@triton.jit(do_not_specialize=["heads", "group", "sequences", "seqlen", "per_sequence", "segment_rows", "search_steps"])
def linear_attention_bwd_dq_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    dout_ptr,  # [B, H, N, V]
    dden_ptr,  # float32 [B, H, N] or None
    dq_ptr,  # [B, H, N, K]
    crossing_ptr,  # float32 [slices, B, H, N] or None: receives r
    decay_ptr,  # [1, H, 1], [B, H, N] or None
    state_ptr,  # float32 [S, H, K, W] before every sequence, or [P, H, K, W] before every segment, or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    segments_ptr,  # int32 [S + 1] or None
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_rows,  # of dden
    stride_dq,
    stride_crossing,
    stride_decay,
    stride_state,  # rows and columns exchanged: [.., W, K]
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
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
    """BLOCK_K columns of dq of one head of v and one segment, forward in time."""
    if FEATURES.taylor:
        taylor_keys(
            dout_ptr, v_ptr, k_ptr, q_ptr, dq_ptr, dden_ptr, None,
            decay_ptr, state_ptr, cu_seqlens_ptr, segments_ptr, None, None, None, crossing_ptr,
            stride_dout, stride_v, stride_k, stride_q, stride_dq, stride_rows, stride_decay, stride_state, stride_state,
            stride_crossing,
            heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, False, V_WIDTH, K_WIDTH, BLOCK_V, BLOCK_K, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
    else:
        walk(
            dout_ptr, v_ptr, k_ptr, dq_ptr, dden_ptr, None, None, None,
            decay_ptr, state_ptr, None, cu_seqlens_ptr, segments_ptr, q_ptr, None, None, None, crossing_ptr,
            stride_dout, stride_v, stride_k, stride_dq, stride_rows, stride_decay, stride_state, stride_state,
            stride_q, stride_state, stride_crossing,
            heads, 1, 1, group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, False, True, False, V_WIDTH, K_WIDTH, BLOCK_V, BLOCK_K, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "group", "sequences", "seqlen", "per_sequence", "segment_rows", "search_steps"])
def linear_attention_bwd_dk_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    v_ptr,  # [B, H, N, V]
    dout_ptr,  # [B, H, N, V]
    dden_ptr,  # float32 [B, H, N] or None
    dk_ptr,  # [B, H, N, K]
    r_ptr,  # float32 [B, H, N] or None
    crossing_ptr,  # float32 [slices, B, H, N] or None: receives shares of the gradient of decays
    decay_ptr,  # [1, H, 1], [B, H, N] or None
    dstate_ptr,  # float32 [S, H, K, W] behind every sequence, or [P, H, K, W] behind every segment, or None
    end_ptr,  # float32 [P, H, K, W] or None: the states before every segment
    final_ptr,  # float32 [S, H, K, W] or None: the states behind every sequence
    cu_seqlens_ptr,  # int32 [S + 1] or None
    segments_ptr,  # int32 [S + 1] or None
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_rows,  # of dden and r
    stride_dk,
    stride_crossing,
    stride_decay,
    stride_dstate,  # rows and columns exchanged: [.., W, K]
    stride_end,  # likewise
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
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
    """BLOCK_K columns of dk of one head of v and one segment, back in time."""
    if FEATURES.taylor:
        taylor_keys(
            v_ptr, dout_ptr, q_ptr, k_ptr, dk_ptr, None, dden_ptr,
            decay_ptr, dstate_ptr, cu_seqlens_ptr, segments_ptr, r_ptr, end_ptr, final_ptr, crossing_ptr,
            stride_v, stride_dout, stride_q, stride_k, stride_dk, stride_rows, stride_decay, stride_dstate, stride_end,
            stride_crossing,
            heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, True, V_WIDTH, K_WIDTH, BLOCK_V, BLOCK_K, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
    else:
        walk(
            v_ptr, dout_ptr, q_ptr, dk_ptr, None, dden_ptr, None, None,
            decay_ptr, dstate_ptr, None, cu_seqlens_ptr, segments_ptr, k_ptr, r_ptr, end_ptr, final_ptr, crossing_ptr,
            stride_v, stride_dout, stride_q, stride_dk, stride_rows, stride_decay, stride_dstate, stride_dstate,
            stride_k, stride_end, stride_crossing,
            heads, 1, 1, group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, True, True, False, V_WIDTH, K_WIDTH, BLOCK_V, BLOCK_K, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "group", "sequences", "seqlen", "per_sequence", "segment_rows", "search_steps"])
def linear_attention_bwd_dv_kernel(
    q_ptr,  # [B, Hk, N, K]
    k_ptr,  # [B, Hk, N, K]
    dout_ptr,  # [B, H, N, V]
    dden_ptr,  # float32 [B, H, N] or None
    dv_ptr,  # [B, H, N, V]
    decay_ptr,  # [1, H, 1], [B, H, N] or None
    dstate_ptr,  # float32 [S, H, K, W] behind every sequence, or [P, H, K, W] behind every segment, or None
    dinitial_ptr,  # float32 [S, H, K, W] or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    segments_ptr,  # int32 [S + 1] or None
    stride_q,
    stride_k,
    stride_dout,
    stride_rows,  # of dden
    stride_dv,
    stride_decay,
    stride_dstate,
    stride_dinitial,
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
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
    """BLOCK_V columns of dv, and of the gradient of the first state, of one head and one segment, back in time."""
    if FEATURES.taylor:
        taylor_walk(
            k_ptr, q_ptr, dout_ptr, dv_ptr, dden_ptr, None,
            decay_ptr, dstate_ptr, dinitial_ptr, cu_seqlens_ptr, segments_ptr,
            stride_k, stride_q, stride_dout, stride_dv, stride_rows, stride_decay, stride_dstate, stride_dinitial,
            heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, True, K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip
    else:
        walk(
            k_ptr, q_ptr, dout_ptr, dv_ptr, None, None, dden_ptr, None,
            decay_ptr, dstate_ptr, dinitial_ptr, cu_seqlens_ptr, segments_ptr, None, None, None, None, None,
            stride_k, stride_q, stride_dout, stride_dv, stride_rows, stride_decay, stride_dstate, stride_dinitial,
            stride_rows, stride_rows, stride_rows,
            heads, group, group, 1, sequences, seqlen, per_sequence, segment_rows, search_steps, scale,
            FEATURES, True, False, False, K_WIDTH, V_WIDTH, BLOCK_K, BLOCK_V, BLOCK_C, WIDE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "seqlen"])
def linear_attention_bwd_normalize_kernel(
    dout_ptr,  # [B, H, N, V]
    out_ptr,  # [B, H, N, V]
    denominator_ptr,  # float32 [B, H, N], contiguous
    dnum_ptr,  # [B, H, N, V]
    dden_ptr,  # float32 [B, H, N], contiguous
    stride_dout,
    stride_out,
    stride_dnum,
    heads,
    seqlen,
    V_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dN and dden of BLOCK_M rows of one head."""
    row_blocks = tl.cdiv(seqlen, BLOCK_M)
    first_row = tl.program_id(0) % row_blocks * BLOCK_M
    batch_head = tl.program_id(0) // row_blocks
    batch, head = batch_head // heads, batch_head % heads
    offs_m, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    rows = first_row + offs_m
    dout = load_tile(
        at_head(dout_ptr, stride_dout, batch, head, first_row), tile_offsets(stride_dout, offs_m, offs_v, WIDE),
        rows, offs_v, seqlen, V_WIDTH, BLOCK_V, True,
    ).to(tl.float32)  # fmt: skip
    out = load_tile(
        at_head(out_ptr, stride_out, batch, head, first_row), tile_offsets(stride_out, offs_m, offs_v, WIDE),
        rows, offs_v, seqlen, V_WIDTH, BLOCK_V, True,
    )  # fmt: skip
    place = tl.cast(batch_head, tl.int64) * seqlen + rows
    denominator = tl.load(denominator_ptr + place, mask=rows < seqlen, other=0.0)
    inverse = tl.where(denominator == 0.0, 0.0, 1.0 / denominator)
    # Of dN as it is rounded, so that dN . v + dden cancels as well as it does exactly.
    dnum = (dout * inverse[:, None]).to(dnum_ptr.dtype.element_ty)
    tl.store(dden_ptr + place, -tl.sum(dnum.to(tl.float32) * out.to(tl.float32), 1), mask=rows < seqlen)
    store_tile(
        at_head(dnum_ptr, stride_dnum, batch, head, first_row), tile_offsets(stride_dnum, offs_m, offs_v, WIDE),
        dnum, rows, offs_v, seqlen, V_WIDTH,
    )  # fmt: skip
