"""Depthwise convolution with 9 to 128 taps in Triton: products with block-Toeplitz matrices.

The rows of a channel are cut into lines of Q rows, Q a power of two and at least W - 1 (Ku et al., 2025,
arXiv:2503.01868, section 3). With u the extended input from the first row that a tile sees, line c of the output is

    out[c, r] = sum_v u[c Q + v] T[v, r],    T[v, r] = weight[v - r] for 0 <= v - r < W,    0 <= v < 2 Q

so the lines of a tile are one product of a matrix of overlapping rows of u with a matrix that the filter fills by
diagonals, taken BLOCK_V rows of T at a time. The gradient of x is the same with the filter reversed; a gradient
through silu first runs the product as forward does and multiplies dout by the slope (float32 in memory). That of the
filter is the sum along diagonals of E = D^T U, with D the lines of the gradient, and U the rows of u beside them.

FLOPs: 4 Q an output, on matrix units, instead of 2 W. Bytes that blocks request: x twice, out once, and 2 W a tile and
channel for T. A block walks over BLOCK_H channels one by one: where channels are neighbours in memory they lie in the
same sectors, and the first brings them into L1.

float32 is multiplied as three tf32 products, which keeps 21 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, view_of

from .tiles import VARYING, rows_of, silu_slope, tile_of


class Pass(NamedTuple):
    """Which of the products a launch computes."""

    SLOPE: bool  # times dout and the slope of the activation, instead of the activation
    DFINAL: bool  # a gradient of the final state is added to the last rows
    FLIP: bool  # the filter is reversed: the gradient of x
    ROW_BASE: int  # the first row of a block: 0, or -(W - 1) for the state's gradient


class Sizes(NamedTuple):
    """What a product is compiled for."""

    WIDTH: int  # taps
    LINES: int
    Q: int  # rows of a line
    BLOCK_V: int
    BLOCK_H: int
    BLOCK_S: int  # sequences, rounded up
    WIDE: bool  # offsets inside a tile need 64 bits
    SINGLE: bool  # multiply in float32
    PRECISION: str


class DweightSizes(NamedTuple):
    """What the kernel of the filter's gradient is compiled for."""

    WIDTH: int
    LINES: int
    BLOCK_C: int
    Q: int
    LAGS: int
    BLOCK_W: int
    BLOCK_H: int
    BLOCK_S: int
    WIDE: bool
    SINGLE: bool
    PRECISION: str


@triton.jit
def _extended(x, state, local, row, length, WIDTH: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr):
    """Rows of one channel with its state before them, in the shape of ``local`` (from where x begins) and ``row``."""
    steps = local.to(tl.int64) * x.n if WIDE else local * x.n
    rows = tl.load(x.ptr + steps, mask=(row >= 0) & (row < length), other=0.0)
    if STATE:
        kept = row + (WIDTH - 1)
        before = (row < 0) & (kept >= 0)
        past = tl.load(state.ptr + kept * state.n, mask=before, other=0.0)
        return tl.where(before, past, rows)
    else:
        return rows


@triton.jit
def _product_rows(
    inputs, given, out, channels, seqlen, out_len, total, sequences, tiles, channel_blocks, left,
    FEATURES: tl.constexpr, PASS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """LINES * Q rows of BLOCK_H channels of one product, and what comes after it."""
    pid = tl.program_id(0)
    first_channel = (pid % channel_blocks) * SIZES.BLOCK_H
    if PASS.ROW_BASE < 0:
        sequence = pid // channel_blocks
        start, length = rows_of(inputs.cu_seqlens_ptr, sequence, seqlen, total, FEATURES.varlen)
        first_row = PASS.ROW_BASE
    else:
        sequence, start, length, first_row = tile_of(
            inputs.cu_seqlens_ptr, pid // channel_blocks, tiles, seqlen, total, sequences, FEATURES.varlen,
            SIZES.LINES * SIZES.Q, SIZES.BLOCK_S,
        )  # fmt: skip
    out_length = length if FEATURES.varlen else out_len
    if PASS.ROW_BASE < 0 or first_row < out_length:
        batch = 0 if FEATURES.varlen else sequence
        offs_c, offs_v, offs_r = tl.arange(0, SIZES.LINES), tl.arange(0, SIZES.BLOCK_V), tl.arange(0, SIZES.Q)
        out_local = offs_c[:, None] * SIZES.Q + offs_r[None, :]
        out_row = first_row + out_local
        if PASS.ROW_BASE < 0:
            stored = out_row < 0
        else:
            stored = out_row < out_length
        for channel in range(first_channel, tl.minimum(first_channel + SIZES.BLOCK_H, channels)):
            x = view_of(inputs.x, batch, channel, start + first_row)
            state = view_of(inputs.state, sequence, channel, 0) if FEATURES.state else inputs.state
            taps = inputs.weight_ptr + tl.cast(channel, tl.int64) * SIZES.WIDTH
            acc = tl.full([SIZES.LINES, SIZES.Q], 0.0, tl.float32)
            for first in tl.range(0, 2 * SIZES.Q, SIZES.BLOCK_V, num_stages=1):
                local = offs_c[:, None] * SIZES.Q + offs_v[None, :] + (first - left)
                rows = _extended(x, state, local, first_row + local, length, SIZES.WIDTH, FEATURES.state, SIZES.WIDE)
                tap = offs_v[:, None] + first - offs_r[None, :]
                inside = (tap >= 0) & (tap < SIZES.WIDTH)
                tap = SIZES.WIDTH - 1 - tap if PASS.FLIP else tap
                weight = tl.load(taps + tap, mask=inside, other=0.0)
                if SIZES.SINGLE:
                    acc = tl.dot(rows.to(tl.float32), weight.to(tl.float32), acc, input_precision=SIZES.PRECISION)
                else:
                    acc = tl.dot(rows, weight, acc)
            if FEATURES.bias:
                acc += tl.load(inputs.bias_ptr + channel).to(tl.float32)
            if PASS.SLOPE:
                dout_base = at_head(given.dout.ptr, given.dout, batch, channel, start + first_row)
                steps = out_local.to(tl.int64) * given.dout.n if SIZES.WIDE else out_local * given.dout.n
                acc = silu_slope(acc) * tl.load(dout_base + steps, mask=stored, other=0.0).to(tl.float32)
            elif FEATURES.silu:
                acc = acc * tl.sigmoid(acc)
            if PASS.DFINAL:
                kept = out_row - (out_length - (SIZES.WIDTH - 1))
                last = (kept >= 0) & (out_row < out_length)
                dfinal_base = at_head(given.dfinal.ptr, given.dfinal, sequence, channel, 0)
                acc += tl.load(dfinal_base + kept * given.dfinal.n, mask=last, other=0.0).to(tl.float32)
            if PASS.ROW_BASE < 0:
                out_base = at_head(out.ptr, out, sequence, channel, 0)
            else:
                out_base = at_head(out.ptr, out, batch, channel, start + first_row)
            steps = out_local.to(tl.int64) * out.n if SIZES.WIDE else out_local * out.n
            tl.store(out_base + steps, acc.to(out.ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=(*VARYING, "left"))
def short_conv_wide_fwd_kernel(
    inputs,
    given,
    out,  # [B, H, M], or with ROW_BASE < 0 the rows before the first, [S, H, W - 1]
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    left,
    FEATURES: tl.constexpr,
    PASS: tl.constexpr,
    SIZES: tl.constexpr,
):
    """LINES * Q rows of BLOCK_H channels of the output."""
    _product_rows(
        inputs, given, out, channels, seqlen, out_len, total, sequences, tiles, channel_blocks, left,
        FEATURES, PASS, SIZES,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*VARYING, "left"))
def short_conv_wide_bwd_kernel(
    inputs, given, out, channels, seqlen, out_len, total, sequences, tiles, channel_blocks, left,
    FEATURES: tl.constexpr, PASS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """The same in the backward pass, under a name of its own: the gradient of the sums, of x or of the state."""
    _product_rows(
        inputs, given, out, channels, seqlen, out_len, total, sequences, tiles, channel_blocks, left,
        FEATURES, PASS, SIZES,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*VARYING, "left"))
def short_conv_wide_dweight_kernel(
    dsum,  # [B, H, M], the gradient before the activation
    inputs,
    sums_ptr,  # float32 [slots, W + 1, H]
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    left,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """What LINES * Q rows of BLOCK_H channels add to dweight and dbias."""
    pid = tl.program_id(0)
    slot = pid // channel_blocks
    first_channel = (pid % channel_blocks) * SIZES.BLOCK_H
    sequence, start, length, first_row = tile_of(
        inputs.cu_seqlens_ptr, slot, tiles, seqlen, total, sequences, FEATURES.varlen,
        SIZES.LINES * SIZES.Q, SIZES.BLOCK_S,
    )  # fmt: skip
    out_length = length if FEATURES.varlen else out_len
    batch = 0 if FEATURES.varlen else sequence
    offs_c, offs_r, offs_v, offs_w = (
        tl.arange(0, SIZES.BLOCK_C),
        tl.arange(0, SIZES.Q),
        tl.arange(0, SIZES.LAGS),
        tl.arange(0, SIZES.BLOCK_W),
    )
    d_local = offs_c[None, :] * SIZES.Q + offs_r[:, None]
    x_local = offs_c[:, None] * SIZES.Q + offs_v[None, :] - left
    # No lag from Q + W - 1 on reaches a tap.
    reached = offs_v[None, :] < SIZES.Q + SIZES.WIDTH - 1
    diagonal = tl.minimum(offs_r[:, None] + offs_w[None, :], SIZES.LAGS - 1)
    for channel in range(first_channel, tl.minimum(first_channel + SIZES.BLOCK_H, channels)):
        dsum_base = at_head(dsum.ptr, dsum, batch, channel, start + first_row)
        x = view_of(inputs.x, batch, channel, start + first_row)
        state = view_of(inputs.state, sequence, channel, 0) if FEATURES.state else inputs.state
        products = tl.full([SIZES.Q, SIZES.LAGS], 0.0, tl.float32)
        total_d = tl.full([SIZES.Q], 0.0, tl.float32)
        for first in tl.range(0, SIZES.LINES * SIZES.Q, SIZES.BLOCK_C * SIZES.Q, num_stages=1):
            steps = (first + d_local).to(tl.int64) * dsum.n if SIZES.WIDE else (first + d_local) * dsum.n
            d = tl.load(dsum_base + steps, mask=first_row + first + d_local < out_length, other=0.0)
            local = first + x_local
            row = tl.where(reached, first_row + local, length)
            rows = _extended(x, state, local, row, length, SIZES.WIDTH, FEATURES.state, SIZES.WIDE)
            if SIZES.SINGLE:
                products = tl.dot(d.to(tl.float32), rows.to(tl.float32), products, input_precision=SIZES.PRECISION)
            else:
                products = tl.dot(d, rows, products)
            total_d += tl.sum(d.to(tl.float32), 1)
        taps = tl.sum(tl.gather(products, diagonal, 1), 0)
        sums = sums_ptr + tl.cast(slot, tl.int64) * (SIZES.WIDTH + 1) * channels + channel
        tl.store(sums + offs_w * channels, taps, mask=offs_w < SIZES.WIDTH)
        tl.store(sums + SIZES.WIDTH * channels, tl.sum(total_d, 0))
