"""The first step of the backward pass with the normaliser: from the gradient of out to those of num and den.

    out = num / den        dN = dout / den        dden = -(dN . out)        both 0 where den is 0

Bytes: dout and out read, dN written, 8 of den and dden a token and head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.triton_tiles import at_head, load_tile, store_tile, tile_offsets


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
