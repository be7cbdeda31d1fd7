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
    x,  # [B, H]
    weight_ptr,  # [H, W], contiguous
    state,  # [S, H, W - 1], written
    bias_ptr,  # [H] or None
    indices_ptr,  # int32 [B] or None: rows of the state
    out,  # [B, H]
    channels,
    channel_blocks,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out of BLOCK_H channels of one sequence."""
    pid = tl.program_id(0)
    sequence, first_channel = pid // channel_blocks, (pid % channel_blocks) * BLOCK_H
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = first_channel + offs_h < channels
    slot = sequence
    if indices_ptr is not None:
        slot = tl.load(indices_ptr + sequence)
    used = slot >= 0
    mask = mask_h & used
    acc = tl.zeros([BLOCK_H], tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_channel + offs_h, mask=mask, other=0.0).to(tl.float32)
    taps = weight_ptr + (first_channel + offs_h) * WIDTH
    base = at_head(state.ptr, state, tl.maximum(slot, 0), first_channel, 0) + offs_h * state.h
    newest = tl.load(at_head(x.ptr, x, sequence, first_channel, 0) + offs_h * x.h, mask=mask, other=0.0)
    past = ()
    for w in tl.static_range(WIDTH - 1):
        row = tl.load(base + w * state.n, mask=mask, other=0.0)
        acc += tl.load(taps + w, mask=mask, other=0.0).to(tl.float32) * row.to(tl.float32)
        past += (row,)
    acc += tl.load(taps + (WIDTH - 1), mask=mask, other=0.0).to(tl.float32) * newest.to(tl.float32)
    past += (newest,)
    # Every thread has read before any writes where another has read.
    tl.debug_barrier()
    for w in tl.static_range(WIDTH - 1):
        tl.store(base + w * state.n, past[w + 1], mask=mask)
    if SILU:
        acc = acc * tl.sigmoid(acc)
    result = tl.where(used, acc, 0.0).to(out.ptr.dtype.element_ty)
    tl.store(at_head(out.ptr, out, sequence, first_channel, 0) + offs_h * out.h, result, mask=mask_h)
