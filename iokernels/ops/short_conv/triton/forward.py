"""Short depthwise convolution forward in Triton, and what a sequence leaves behind.

A thread block owns BLOCK_N rows of BLOCK_H channels and adds up W shifted tiles of x, float32:

    out[m] = act(bias + sum_w weight[w] x[m + w - left])

The shifted tiles overlap, so all but the first come from L1. The tile is [rows, channels] whatever the layout: the
compiler gives its threads the dimension of stride 1, and the configuration makes the tile long there.

FLOPs: 2 W an output. Bytes that blocks request: W x (a row of x for each tap), out once; DRAM serves x once, and the
W - 1 rows between two tiles twice.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, view_of

from .tiles import VARYING, channel_offsets, load_extended, rows_of, tile_of


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    WIDTH: int  # taps
    LEFT: int  # rows before a row that its taps reach
    BLOCK_N: int
    BLOCK_H: int
    BLOCK_S: int  # sequences, rounded up
    WIDE: bool  # offsets inside a tile need 64 bits


@triton.jit(do_not_specialize=VARYING)
def short_conv_fwd_kernel(
    inputs,
    out,  # [B, H, M]
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """out of BLOCK_N rows of BLOCK_H channels."""
    WIDTH: tl.constexpr = SIZES.WIDTH
    pid = tl.program_id(0)
    first_channel = (pid % channel_blocks) * SIZES.BLOCK_H
    sequence, start, length, first_row = tile_of(
        inputs.cu_seqlens_ptr, pid // channel_blocks, tiles, seqlen, total, sequences, FEATURES.varlen,
        SIZES.BLOCK_N, SIZES.BLOCK_S,
    )  # fmt: skip
    out_length = length if FEATURES.varlen else out_len
    if first_row < out_length:
        batch = 0 if FEATURES.varlen else sequence
        offs_n, offs_h = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_H)
        mask_h = first_channel + offs_h < channels
        row = first_row + offs_n
        x = view_of(inputs.x, batch, first_channel, start + first_row)
        state = view_of(inputs.state, sequence, first_channel, 0) if FEATURES.state else inputs.state
        taps = inputs.weight_ptr + (first_channel + offs_h) * WIDTH
        acc = tl.full([SIZES.BLOCK_N, SIZES.BLOCK_H], 0.0, tl.float32)
        if FEATURES.bias:
            bias = tl.load(inputs.bias_ptr + first_channel + offs_h, mask=mask_h, other=0.0).to(tl.float32)
            acc += bias[None, :]
        for w in tl.static_range(WIDTH):
            tap = tl.load(taps + w, mask=mask_h, other=0.0).to(tl.float32)
            rows = load_extended(
                x, state, offs_n + (w - SIZES.LEFT), row + (w - SIZES.LEFT), length, offs_h, mask_h,
                WIDTH, FEATURES.state and w < SIZES.LEFT, SIZES.WIDE,
            )  # fmt: skip
            acc += tap[None, :] * rows.to(tl.float32)
        if FEATURES.silu:
            acc = acc * tl.sigmoid(acc)
        out_base = at_head(out.ptr, out, batch, first_channel, start + first_row)
        mask = (row < out_length)[:, None] & mask_h[None, :]
        tl.store(out_base + channel_offsets(out, offs_n, offs_h, SIZES.WIDE), acc.to(out.ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=VARYING)
def short_conv_state_kernel(
    inputs,
    final,  # [S, H, W - 1]
    channels,
    seqlen,
    total,
    channel_blocks,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,  # BLOCK_N holds the W - 1 rows
):
    """The last W - 1 rows of one sequence; a shorter sequence keeps some of its initial state."""
    pid = tl.program_id(0)
    first_channel = (pid % channel_blocks) * SIZES.BLOCK_H
    sequence = pid // channel_blocks
    start, length = rows_of(inputs.cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    offs_r, offs_h = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_H)
    mask_h = first_channel + offs_h < channels
    kept = SIZES.WIDTH - 1
    first_row = length - kept
    x = view_of(inputs.x, batch, first_channel, start + first_row)
    state = view_of(inputs.state, sequence, first_channel, 0) if FEATURES.state else inputs.state
    row = tl.where(offs_r < kept, first_row + offs_r, -SIZES.WIDTH)  # rows of neither x nor the state
    rows = load_extended(x, state, offs_r, row, length, offs_h, mask_h, SIZES.WIDTH, FEATURES.state, SIZES.WIDE)
    final_base = at_head(final.ptr, final, sequence, first_channel, 0)
    mask = (offs_r < kept)[:, None] & mask_h[None, :]
    tl.store(final_base + channel_offsets(final, offs_r, offs_h, SIZES.WIDE), rows, mask)
