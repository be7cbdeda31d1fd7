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

from typing import NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, view_of

from .tiles import VARYING, channel_offsets, load_extended, load_rows, rows_of, silu_slope, tile_of


class Wanted(NamedTuple):
    """What a launch computes, and from what."""

    ROWS: bool  # the gradient of rows: of x, or of the state
    SUMS: bool  # those of weight or bias
    DOUT: bool  # there is a gradient of out
    DFINAL: bool  # and of the final state
    ROW_BASE: int  # the first row of a block: 0 for x, -(W - 1) for the state


@triton.constexpr_function
def _is_read(s, rows, sums, silu, width, left):
    """Whether the tile shifted by ``s - (width - 1)`` rows takes part: all for rows through silu, else W of them."""
    own = -left <= s - (width - 1) < width - left
    return (silu and rows) or (own and (silu or sums))


@triton.jit(do_not_specialize=VARYING)
def short_conv_bwd_kernel(
    inputs,
    given,
    drows,  # [B, H, N], or with ROW_BASE < 0 the gradient of the state, [S, H, W - 1]
    sums_ptr,  # float32 [slots, W + 1, H] or None
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    FEATURES: tl.constexpr,
    WANTED: tl.constexpr,
    SIZES: tl.constexpr,
):
    """dx of BLOCK_N rows of BLOCK_H channels, and what they add to dweight and dbias."""
    WIDTH: tl.constexpr = SIZES.WIDTH
    pid = tl.program_id(0)
    slot = pid // channel_blocks
    first_channel = (pid % channel_blocks) * SIZES.BLOCK_H
    if WANTED.ROW_BASE < 0:
        sequence = slot
        start, length = rows_of(inputs.cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
        first_row = WANTED.ROW_BASE
    else:
        sequence, start, length, first_row = tile_of(
            inputs.cu_seqlens_ptr, slot, tiles, seqlen, total, sequences, FEATURES.varlen,
            SIZES.BLOCK_N, SIZES.BLOCK_S,
        )  # fmt: skip
    out_length = length if FEATURES.varlen else out_len
    batch = 0 if FEATURES.varlen else sequence
    offs_n, offs_h = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_H)
    mask_h = first_channel + offs_h < channels
    row = first_row + offs_n

    weights = ()
    for w in tl.static_range(WIDTH):
        tap = tl.load(inputs.weight_ptr + (first_channel + offs_h) * WIDTH + w, mask=mask_h, other=0.0)
        weights += (tap.to(tl.float32)[None, :],)
    bias = tl.full([SIZES.BLOCK_H], 0.0, tl.float32)
    if FEATURES.bias and FEATURES.silu:
        bias = tl.load(inputs.bias_ptr + first_channel + offs_h, mask=mask_h, other=0.0).to(tl.float32)

    # Tiles of x shifted by -(W - 1) ... W - 1 rows, of which sums alone, or a linear filter, need W.
    x = view_of(inputs.x, batch, first_channel, start + first_row)
    state = view_of(inputs.state, sequence, first_channel, 0) if FEATURES.state else inputs.state
    shifted = ()
    for s in tl.static_range(2 * WIDTH - 1):
        if WANTED.DOUT and _is_read(s, WANTED.ROWS, WANTED.SUMS, FEATURES.silu, WIDTH, SIZES.LEFT):
            # In a block of rows from 0 on, only rows further back can be of the state.
            by = s - WIDTH + 1
            rows = load_extended(
                x, state, offs_n + by, row + by, length, offs_h, mask_h, WIDTH,
                FEATURES.state and (WANTED.ROW_BASE < 0 or s < WIDTH - 1), SIZES.WIDE,
            )  # fmt: skip
            shifted += (rows,)
        else:
            shifted += (0.0,)

    gradient = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_H], 0.0, tl.float32)
    dout = view_of(given.dout, batch, first_channel, start + first_row) if WANTED.DOUT else given.dout
    for w in tl.static_range(WIDTH):
        if WANTED.DOUT and (WANTED.ROWS or (WANTED.SUMS and w == SIZES.LEFT)):
            by = SIZES.LEFT - w
            d = load_rows(dout, offs_n + by, row + by, out_length, offs_h, mask_h, SIZES.WIDE).to(tl.float32)
            if FEATURES.silu:
                pre = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_H], 0.0, tl.float32) + bias[None, :]
                for v in tl.static_range(WIDTH):
                    pre += weights[v] * shifted[v - w + WIDTH - 1].to(tl.float32)
                d *= silu_slope(pre)
            if WANTED.ROWS:
                gradient += weights[w] * d
            if WANTED.SUMS and w == SIZES.LEFT:
                # Line of the table: slot, then W taps and the bias, then channels.
                sums = sums_ptr + (tl.cast(slot, tl.int64) * (WIDTH + 1)) * channels + first_channel + offs_h
                for v in tl.static_range(WIDTH):
                    share = tl.sum(d * shifted[v - SIZES.LEFT + WIDTH - 1].to(tl.float32), 0)
                    tl.store(sums + v * channels, share, mask=mask_h)
                tl.store(sums + WIDTH * channels, tl.sum(d, 0), mask=mask_h)

    if WANTED.ROWS:
        if WANTED.DFINAL:
            dfinal = view_of(given.dfinal, sequence, first_channel, 0)
            kept = row - (length - (WIDTH - 1))
            of_state = tl.where(row < length, kept, -1)
            past = load_rows(dfinal, kept, of_state, WIDTH - 1, offs_h, mask_h, SIZES.WIDE)
            gradient += past.to(tl.float32)
        if WANTED.ROW_BASE < 0:
            drows_base = at_head(drows.ptr, drows, sequence, first_channel, 0)
            mask = (row < 0)[:, None] & mask_h[None, :]
        else:
            drows_base = at_head(drows.ptr, drows, batch, first_channel, start + first_row)
            mask = (row < length)[:, None] & mask_h[None, :]
        offsets = channel_offsets(drows, offs_n, offs_h, SIZES.WIDE)
        tl.store(drows_base + offsets, gradient.to(drows.ptr.dtype.element_ty), mask)
