"""The backward kernels of linear attention: three walks.

Maths and accounts stand in :mod:`.walk`, and with the Taylor map in :mod:`.taylor` (dv) and
:mod:`.taylor_keys` (dq, dk; both then have a share for each slice of V, [slices, B, H, N, K]).

dO stands for the gradient of the numerator. With the normaliser that is dout / den, and ``dden`` holds that of den:

    out = num / den        dN = dout / den        dden = -(dN . out)        both 0 where den is 0

The kernel that makes the two reads dout and out, and writes dN and 8 bytes of den and dden a token and head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile, store_tile, tile_offsets

from .chunks import VARYING, Counts
from .taylor import taylor_walk
from .taylor_keys import taylor_keys
from .walk import walk


@triton.jit(do_not_specialize=VARYING)
def linear_attention_bwd_dq_kernel(
    inputs,
    offsets,
    dout,  # [B, H, N, V]
    dden,  # float32 [B, H, N] or none
    dq,  # [B, H, N, K]
    gradient,  # of decays
    initial,  # float32 [S, H, W, K] before every sequence, or [P, H, W, K] before every segment, or none
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
    segment_rows,
    search_steps,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """BLOCK_K columns of dq of one head of v and one segment, forward in time."""
    q, k, v, decay = inputs
    counts = Counts(heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps)
    if FEATURES.taylor:
        taylor_keys(dout, v, k, q, dq, dden, decay, offsets, initial, gradient, counts, scale, FEATURES, False, SIZES)
    else:
        walk(
            dout, v, k, dq, dden, decay, offsets, initial, None, q, gradient, counts, scale,
            FEATURES, False, True, SIZES,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def linear_attention_bwd_dk_kernel(
    inputs,
    offsets,
    dout,  # [B, H, N, V]
    dden,  # float32 [B, H, N] or none
    dk,  # [B, H, N, K]
    gradient,  # of decays
    dstate,  # float32 [S, H, W, K] behind every sequence, or [P, H, W, K] behind every segment, or none
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
    segment_rows,
    search_steps,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """BLOCK_K columns of dk of one head of v and one segment, back in time."""
    q, k, v, decay = inputs
    counts = Counts(heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps)
    if FEATURES.taylor:
        taylor_keys(v, dout, q, k, dk, dden, decay, offsets, dstate, gradient, counts, scale, FEATURES, True, SIZES)
    else:
        walk(
            v, dout, q, dk, dden, decay, offsets, dstate, None, k, gradient, counts, scale,
            FEATURES, True, True, SIZES,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def linear_attention_bwd_dv_kernel(
    inputs,
    offsets,
    dout,  # [B, H, N, V]
    dden,  # float32 [B, H, N] or none
    dv,  # [B, H, N, V]
    dstate,  # float32 [S, H, K, W] behind every sequence, or [P, H, K, W] behind every segment, or none
    dinitial,  # float32 [S, H, K, W] or none
    heads,
    group,
    sequences,
    seqlen,
    per_sequence,
    segment_rows,
    search_steps,
    scale,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """BLOCK_V columns of dv, and of the gradient of the first state, of one head and one segment, back in time."""
    q, k, _, decay = inputs
    counts = Counts(heads, group, sequences, seqlen, per_sequence, segment_rows, search_steps)
    if FEATURES.taylor:
        taylor_walk(k, q, dout, dv, dden, decay, offsets, dstate, dinitial, counts, scale, FEATURES, True, SIZES)
    else:
        walk(
            k, q, dout, dv, dden, decay, offsets, dstate, dinitial, None, None, counts, scale,
            FEATURES, True, False, SIZES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "seqlen"])
def linear_attention_bwd_normalize_kernel(
    dout,  # [B, H, N, V]
    out,  # [B, H, N, V]
    denominator_ptr,  # float32 [B, H, N], contiguous
    dnum,  # [B, H, N, V]
    dden_ptr,  # float32 [B, H, N], contiguous
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
    dout_block, dout_offsets = at_head(dout.ptr, dout, batch, head, first_row), tile_offsets(dout, offs_m, offs_v, WIDE)
    dout_tile = load_tile(dout_block, dout_offsets, rows, offs_v, seqlen, V_WIDTH, BLOCK_V, True).to(tl.float32)
    out_block, out_offsets = at_head(out.ptr, out, batch, head, first_row), tile_offsets(out, offs_m, offs_v, WIDE)
    out_tile = load_tile(out_block, out_offsets, rows, offs_v, seqlen, V_WIDTH, BLOCK_V, True)
    place = tl.cast(batch_head, tl.int64) * seqlen + rows
    denominator = tl.load(denominator_ptr + place, mask=rows < seqlen, other=0.0)
    inverse = tl.where(denominator == 0.0, 0.0, 1.0 / denominator)
    # Of dN as it is rounded, so that dN . v + dden cancels as well as it does exactly.
    dnum_tile = (dout_tile * inverse[:, None]).to(dnum.ptr.dtype.element_ty)
    tl.store(dden_ptr + place, -tl.sum(dnum_tile.to(tl.float32) * out_tile.to(tl.float32), 1), mask=rows < seqlen)
    dnum_block, dnum_offsets = at_head(dnum.ptr, dnum, batch, head, first_row), tile_offsets(dnum, offs_m, offs_v, WIDE)
    store_tile(dnum_block, dnum_offsets, dnum_tile, rows, offs_v, seqlen, V_WIDTH)
