"""Short depthwise convolution forward in Triton, and what a sequence leaves behind.

A thread block owns BLOCK_N rows of BLOCK_H channels and adds up W shifted tiles of x, float32:

    out[m] = act(bias + sum_w weight[w] x[m + w - left])

The shifted tiles overlap, so all but the first come from L1. The tile is [rows, channels] whatever the layout: the
compiler gives its threads the dimension of stride 1, and the configuration makes the tile long there.

FLOPs: 2 W an output. Bytes that blocks request: W x (a row of x for each tap), out once; DRAM serves x once, and the
W - 1 rows between two tiles twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head

from .tiles import channel_offsets, load_extended, rows_of, tile_of


@triton.jit(do_not_specialize=["channels", "seqlen", "out_len", "total", "sequences", "tiles", "channel_blocks"])
def short_conv_fwd_kernel(
    x_ptr,  # [B, H, N]
    weight_ptr,  # [H, W], contiguous
    bias_ptr,  # [H] or None
    state_ptr,  # [S, H, W - 1] or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    out_ptr,  # [B, H, M]
    stride_x,
    stride_state,
    stride_out,
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out of BLOCK_N rows of BLOCK_H channels."""
    pid = tl.program_id(0)
    first_channel = (pid % channel_blocks) * BLOCK_H
    sequence, start, length, first_row = tile_of(
        cu_seqlens_ptr, pid // channel_blocks, tiles, seqlen, total, sequences, FEATURES.varlen, BLOCK_N, BLOCK_S
    )
    out_length = length if FEATURES.varlen else out_len
    if first_row < out_length:
        batch = 0 if FEATURES.varlen else sequence
        offs_n, offs_h = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
        mask_h = first_channel + offs_h < channels
        row = first_row + offs_n
        base = at_head(x_ptr, stride_x, batch, first_channel, start + first_row)
        state_base = at_head(state_ptr, stride_state, sequence, first_channel, 0) if FEATURES.state else state_ptr
        taps = weight_ptr + (first_channel + offs_h) * WIDTH
        acc = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        if FEATURES.bias:
            bias = tl.load(bias_ptr + first_channel + offs_h, mask=mask_h, other=0.0).to(tl.float32)
            acc += bias[None, :]
        for w in tl.static_range(WIDTH):
            tap = tl.load(taps + w, mask=mask_h, other=0.0).to(tl.float32)
            x = load_extended(
                base, stride_x, state_base, stride_state, offs_n + (w - LEFT), row + (w - LEFT), length,
                offs_h, mask_h, WIDTH, FEATURES.state and w < LEFT, WIDE,
            )  # fmt: skip
            acc += tap[None, :] * x.to(tl.float32)
        if FEATURES.silu:
            acc = acc * tl.sigmoid(acc)
        out_base = at_head(out_ptr, stride_out, batch, first_channel, start + first_row)
        mask = (row < out_length)[:, None] & mask_h[None, :]
        tl.store(out_base + channel_offsets(stride_out, offs_n, offs_h, WIDE), acc.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["channels", "seqlen", "total", "channel_blocks"])
def short_conv_state_kernel(
    x_ptr,  # [B, H, N]
    state_ptr,  # [S, H, W - 1] or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    final_ptr,  # [S, H, W - 1]
    stride_x,
    stride_state,
    stride_final,
    channels,
    seqlen,
    total,
    channel_blocks,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The last W - 1 rows of one sequence; a shorter sequence keeps some of its initial state."""
    pid = tl.program_id(0)
    first_channel = (pid % channel_blocks) * BLOCK_H
    sequence = pid // channel_blocks
    start, length = rows_of(cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
    batch = 0 if FEATURES.varlen else sequence
    offs_r, offs_h = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    mask_h = first_channel + offs_h < channels
    first_row = length - (WIDTH - 1)
    base = at_head(x_ptr, stride_x, batch, first_channel, start + first_row)
    state_base = at_head(state_ptr, stride_state, sequence, first_channel, 0) if FEATURES.state else state_ptr
    row = tl.where(offs_r < WIDTH - 1, first_row + offs_r, -WIDTH)  # rows of neither x nor the state
    rows = load_extended(
        base, stride_x, state_base, stride_state, offs_r, row, length, offs_h, mask_h, WIDTH, FEATURES.state, WIDE
    )
    final_base = at_head(final_ptr, stride_final, sequence, first_channel, 0)
    mask = (offs_r < WIDTH - 1)[:, None] & mask_h[None, :]
    tl.store(final_base + channel_offsets(stride_final, offs_r, offs_h, WIDE), rows, mask)
