"""One row of a causal short convolution in Triton: generation.

A thread block owns BLOCK_H channels of one sequence: it reads their W - 1 past inputs and the new one, sums, and writes
the past back moved on by one. FLOPs: 2 W an output. Bytes: the state twice, the filter, x and out once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head


@triton.jit(do_not_specialize=["channels", "channel_blocks"])
def short_conv_step_kernel(
    x_ptr,  # [B, H]
    weight_ptr,  # [H, W], contiguous
    state_ptr,  # [S, H, W - 1], written
    bias_ptr,  # [H] or None
    indices_ptr,  # int32 [B] or None: rows of the state
    out_ptr,  # [B, H]
    stride_x,
    stride_state,
    stride_out,
    channels,
    channel_blocks,
    BIAS: tl.constexpr,
    INDICES: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out of BLOCK_H channels of one sequence."""
    pid = tl.program_id(0)
    sequence, first_channel = pid // channel_blocks, (pid % channel_blocks) * BLOCK_H
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = first_channel + offs_h < channels
    slot = tl.load(indices_ptr + sequence) if INDICES else sequence
    used = slot >= 0
    mask = mask_h & used
    acc = tl.zeros([BLOCK_H], tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + first_channel + offs_h, mask=mask, other=0.0).to(tl.float32)
    taps = weight_ptr + (first_channel + offs_h) * WIDTH
    base = at_head(state_ptr, stride_state, tl.maximum(slot, 0), first_channel, 0) + offs_h * stride_state.h
    x = tl.load(at_head(x_ptr, stride_x, sequence, first_channel, 0) + offs_h * stride_x.h, mask=mask, other=0.0)
    past = ()
    for w in tl.static_range(WIDTH - 1):
        row = tl.load(base + w * stride_state.n, mask=mask, other=0.0)
        acc += tl.load(taps + w, mask=mask, other=0.0).to(tl.float32) * row.to(tl.float32)
        past += (row,)
    acc += tl.load(taps + (WIDTH - 1), mask=mask, other=0.0).to(tl.float32) * x.to(tl.float32)
    past += (x,)
    # Every thread has read before any writes where another has read.
    tl.debug_barrier()
    for w in tl.static_range(WIDTH - 1):
        tl.store(base + w * stride_state.n, past[w + 1], mask=mask)
    if SILU:
        acc = acc * tl.sigmoid(acc)
    out = tl.where(used, acc, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(at_head(out_ptr, stride_out, sequence, first_channel, 0) + offs_h * stride_out.h, out, mask=mask_h)
