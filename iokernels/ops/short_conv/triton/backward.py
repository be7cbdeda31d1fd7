"""Short depthwise convolution backward in Triton: one kernel for the gradients of x, weight and bias, in one pass.

With d the gradient before the activation, ``d[m] = dout[m] act'(pre[m])``,

    dx[i] = sum_w weight[w] d[i + left - w]        dweight[w] = sum_m d[m] x[m + w - left]        dbias = sum_m d[m]

A thread block owns BLOCK_N rows of BLOCK_H channels. Its dx needs d of W - 1 rows around, and each of them W rows of x:
2 W - 1 shifted tiles of x and W of dout, held in registers, so nothing is written between the two and the sums before
the activation are computed again instead of stored. Every d counts once, in the block of its own row m, toward sums of
a block: they go to a float32 table with a line for each tile of rows, which is added up afterwards in a fixed order.

The same kernel gives the gradient of the initial state: the rows from -(W - 1) to -1 of each sequence (ROW_BASE).

FLOPs: 2 W (W + 2) an output with silu, 4 W without. Bytes that blocks request: dout W x, x (2 W - 1) x with silu (W x
without), dx once, and the table: 4 (W + 1) a tile and channel. DRAM serves x and dout once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head

from .tiles import channel_offsets, load_extended, load_rows, rows_of, silu_slope, tile_of


@triton.constexpr_function
def _is_read(s, rows, sums, silu, width, left):
    """Whether the tile shifted by ``s - (width - 1)`` rows takes part: all for rows through silu, else W of them."""
    own = -left <= s - (width - 1) < width - left
    return (silu and rows) or (own and (silu or sums))


@triton.jit(do_not_specialize=["channels", "seqlen", "out_len", "total", "sequences", "tiles", "channel_blocks"])
def short_conv_bwd_kernel(
    dout_ptr,  # [B, H, M] or None
    dfinal_ptr,  # [S, H, W - 1] or None
    x_ptr,  # [B, H, N]
    weight_ptr,  # [H, W], contiguous
    bias_ptr,  # [H] or None
    state_ptr,  # [S, H, W - 1] or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    drows_ptr,  # [B, H, N], or with ROW_BASE < 0 the gradient of the state, [S, H, W - 1]
    sums_ptr,  # float32 [slots, W + 1, H] or None
    stride_dout,
    stride_dfinal,
    stride_x,
    stride_state,
    stride_drows,
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,  # whether the gradient of the rows is wanted
    SUMS: tl.constexpr,  # whether those of weight or bias are
    DOUT: tl.constexpr,
    DFINAL: tl.constexpr,
    ROW_BASE: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx of BLOCK_N rows of BLOCK_H channels, and what they add to dweight and dbias."""
    pid = tl.program_id(0)
    slot = pid // channel_blocks
    first_channel = (pid % channel_blocks) * BLOCK_H
    if ROW_BASE < 0:
        sequence = slot
        start, length = rows_of(cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
        first_row = ROW_BASE
    else:
        sequence, start, length, first_row = tile_of(
            cu_seqlens_ptr, slot, tiles, seqlen, total, sequences, FEATURES.varlen, BLOCK_N, BLOCK_S
        )
    out_length = length if FEATURES.varlen else out_len
    batch = 0 if FEATURES.varlen else sequence
    offs_n, offs_h = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    mask_h = first_channel + offs_h < channels
    row = first_row + offs_n

    weights = ()
    for w in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + (first_channel + offs_h) * WIDTH + w, mask=mask_h, other=0.0)
        weights += (tap.to(tl.float32)[None, :],)
    bias = tl.zeros([BLOCK_H], tl.float32)
    if FEATURES.bias and FEATURES.silu:
        bias = tl.load(bias_ptr + first_channel + offs_h, mask=mask_h, other=0.0).to(tl.float32)

    # Tiles of x shifted by -(W - 1) ... W - 1 rows, of which sums alone, or a linear filter, need W.
    x_base = at_head(x_ptr, stride_x, batch, first_channel, start + first_row)
    state_base = at_head(state_ptr, stride_state, sequence, first_channel, 0) if FEATURES.state else state_ptr
    shifted = ()
    for s in tl.static_range(2 * WIDTH - 1):
        if DOUT and _is_read(s, ROWS, SUMS, FEATURES.silu, WIDTH, LEFT):
            # In a block of rows from 0 on, only rows further back can be of the state.
            x = load_extended(
                x_base, stride_x, state_base, stride_state, offs_n + (s - WIDTH + 1), row + (s - WIDTH + 1), length,
                offs_h, mask_h, WIDTH, FEATURES.state and (ROW_BASE < 0 or s < WIDTH - 1), WIDE,
            )  # fmt: skip
            shifted += (x,)
        else:
            shifted += (0.0,)

    drows = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dout_base = at_head(dout_ptr, stride_dout, batch, first_channel, start + first_row) if DOUT else dout_ptr
    for w in tl.static_range(WIDTH):
        if DOUT and (ROWS or (SUMS and w == LEFT)):
            d = load_rows(
                dout_base, stride_dout, offs_n + (LEFT - w), row + (LEFT - w), out_length, offs_h, mask_h, WIDE
            ).to(tl.float32)
            if FEATURES.silu:
                pre = tl.zeros([BLOCK_N, BLOCK_H], tl.float32) + bias[None, :]
                for v in tl.static_range(WIDTH):
                    pre += weights[v] * shifted[v - w + WIDTH - 1].to(tl.float32)
                d *= silu_slope(pre)
            if ROWS:
                drows += weights[w] * d
            if SUMS and w == LEFT:
                # Line of the table: slot, then W taps and the bias, then channels.
                sums = sums_ptr + (tl.cast(slot, tl.int64) * (WIDTH + 1)) * channels + first_channel + offs_h
                for v in tl.static_range(WIDTH):
                    share = tl.sum(d * shifted[v - LEFT + WIDTH - 1].to(tl.float32), 0)
                    tl.store(sums + v * channels, share, mask=mask_h)
                tl.store(sums + WIDTH * channels, tl.sum(d, 0), mask=mask_h)

    if ROWS:
        if DFINAL:
            dfinal_base = at_head(dfinal_ptr, stride_dfinal, sequence, first_channel, 0)
            kept = row - (length - (WIDTH - 1))
            drows += load_rows(
                dfinal_base, stride_dfinal, kept, tl.where(row < length, kept, -1), WIDTH - 1, offs_h, mask_h, WIDE
            ).to(tl.float32)
        if ROW_BASE < 0:
            drows_base = at_head(drows_ptr, stride_drows, sequence, first_channel, 0)
            mask = (row < 0)[:, None] & mask_h[None, :]
        else:
            drows_base = at_head(drows_ptr, stride_drows, batch, first_channel, start + first_row)
            mask = (row < length)[:, None] & mask_h[None, :]
        offsets = channel_offsets(stride_drows, offs_n, offs_h, WIDE)
        tl.store(drows_base + offsets, drows.to(drows_ptr.dtype.element_ty), mask)
