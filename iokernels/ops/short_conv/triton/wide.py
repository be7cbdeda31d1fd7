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

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head

from .tiles import rows_of, silu_slope, tile_of


@triton.jit
def _extended(base, stride, state_base, stride_state, local, row, length, WIDTH: tl.constexpr, STATE: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """Rows of one channel with its state before them, in the shape of ``local`` (from the base) and ``row``."""
    steps = local.to(tl.int64) * stride.n if WIDE else local * stride.n
    x = tl.load(base + steps, mask=(row >= 0) & (row < length), other=0.0)
    if STATE:
        kept = row + (WIDTH - 1)
        before = (row < 0) & (kept >= 0)
        state = tl.load(state_base + kept * stride_state.n, mask=before, other=0.0)
        return tl.where(before, state, x)
    else:
        return x


@triton.jit
def _product_rows(
    x_ptr, weight_ptr, bias_ptr, state_ptr, dout_ptr, dfinal_ptr, cu_seqlens_ptr, out_ptr, stride_x, stride_state,
    stride_dout, stride_dfinal, stride_out, channels, in_len, out_len, total, sequences, tiles, channel_blocks, left,
    FEATURES: tl.constexpr, SLOPE: tl.constexpr, DFINAL: tl.constexpr, FLIP: tl.constexpr, ROW_BASE: tl.constexpr,
    WIDTH: tl.constexpr, LINES: tl.constexpr, Q: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, WIDE: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LINES * Q rows of BLOCK_H channels of one product, and what comes after it."""
    pid = tl.program_id(0)
    first_channel = (pid % channel_blocks) * BLOCK_H
    if ROW_BASE < 0:
        sequence = pid // channel_blocks
        start, length = rows_of(cu_seqlens_ptr, sequence, in_len, total, FEATURES.varlen)
        first_row = ROW_BASE
    else:
        sequence, start, length, first_row = tile_of(
            cu_seqlens_ptr, pid // channel_blocks, tiles, in_len, total, sequences, FEATURES.varlen, LINES * Q, BLOCK_S
        )
    out_length = length if FEATURES.varlen else out_len
    if ROW_BASE < 0 or first_row < out_length:
        batch = 0 if FEATURES.varlen else sequence
        offs_c, offs_v, offs_r = tl.arange(0, LINES), tl.arange(0, BLOCK_V), tl.arange(0, Q)
        out_local = offs_c[:, None] * Q + offs_r[None, :]
        out_row = first_row + out_local
        if ROW_BASE < 0:
            stored = out_row < 0
        else:
            stored = out_row < out_length
        for channel in range(first_channel, tl.minimum(first_channel + BLOCK_H, channels)):
            base = at_head(x_ptr, stride_x, batch, channel, start + first_row)
            state_base = at_head(state_ptr, stride_state, sequence, channel, 0) if FEATURES.state else state_ptr
            taps = weight_ptr + tl.cast(channel, tl.int64) * WIDTH
            acc = tl.zeros([LINES, Q], tl.float32)
            for first in tl.range(0, 2 * Q, BLOCK_V, num_stages=1):
                local = offs_c[:, None] * Q + offs_v[None, :] + (first - left)
                x = _extended(base, stride_x, state_base, stride_state, local, first_row + local, length,
                              WIDTH, FEATURES.state, WIDE)  # fmt: skip
                tap = offs_v[:, None] + first - offs_r[None, :]
                inside = (tap >= 0) & (tap < WIDTH)
                tap = WIDTH - 1 - tap if FLIP else tap
                weight = tl.load(taps + tap, mask=inside, other=0.0)
                if SINGLE:
                    acc = tl.dot(x.to(tl.float32), weight.to(tl.float32), acc, input_precision=PRECISION)
                else:
                    acc = tl.dot(x, weight, acc)
            if FEATURES.bias:
                acc += tl.load(bias_ptr + channel).to(tl.float32)
            if SLOPE:
                dout_base = at_head(dout_ptr, stride_dout, batch, channel, start + first_row)
                steps = out_local.to(tl.int64) * stride_dout.n if WIDE else out_local * stride_dout.n
                acc = silu_slope(acc) * tl.load(dout_base + steps, mask=stored, other=0.0).to(tl.float32)
            elif FEATURES.silu:
                acc = acc * tl.sigmoid(acc)
            if DFINAL:
                kept = out_row - (out_length - (WIDTH - 1))
                last = (kept >= 0) & (out_row < out_length)
                dfinal_base = at_head(dfinal_ptr, stride_dfinal, sequence, channel, 0)
                acc += tl.load(dfinal_base + kept * stride_dfinal.n, mask=last, other=0.0).to(tl.float32)
            if ROW_BASE < 0:
                out_base = at_head(out_ptr, stride_out, sequence, channel, 0)
            else:
                out_base = at_head(out_ptr, stride_out, batch, channel, start + first_row)
            steps = out_local.to(tl.int64) * stride_out.n if WIDE else out_local * stride_out.n
            tl.store(out_base + steps, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(
    do_not_specialize=["channels", "in_len", "out_len", "total", "sequences", "tiles", "channel_blocks", "left"]
)
def short_conv_wide_fwd_kernel(
    x_ptr,  # [B, H, N], the input; backward, a gradient
    weight_ptr,  # [H, W], contiguous
    bias_ptr,  # [H] or None
    state_ptr,  # [S, H, W - 1] or None
    dout_ptr,  # [B, H, M] or None: times the slope of the activation, instead of the activation
    dfinal_ptr,  # [S, H, W - 1] or None: added to the last rows
    cu_seqlens_ptr,  # int32 [S + 1] or None
    out_ptr,  # [B, H, M], or with ROW_BASE < 0 the rows before the first, [S, H, W - 1]
    stride_x,
    stride_state,
    stride_dout,
    stride_dfinal,
    stride_out,
    channels,
    in_len,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    left,
    FEATURES: tl.constexpr,
    SLOPE: tl.constexpr,
    DFINAL: tl.constexpr,
    FLIP: tl.constexpr,
    ROW_BASE: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
    SINGLE: tl.constexpr,  # multiply in float32
    PRECISION: tl.constexpr,
):
    """LINES * Q rows of BLOCK_H channels of the output."""
    _product_rows(
        x_ptr, weight_ptr, bias_ptr, state_ptr, dout_ptr, dfinal_ptr, cu_seqlens_ptr, out_ptr, stride_x,
        stride_state, stride_dout, stride_dfinal, stride_out, channels, in_len, out_len, total, sequences, tiles,
        channel_blocks, left, FEATURES, SLOPE, DFINAL, FLIP, ROW_BASE, WIDTH, LINES, Q, BLOCK_V, BLOCK_H, BLOCK_S,
        WIDE, SINGLE, PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["channels", "in_len", "out_len", "total", "sequences", "tiles", "channel_blocks", "left"]
)
def short_conv_wide_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, dout_ptr, dfinal_ptr, cu_seqlens_ptr, out_ptr, stride_x, stride_state,
    stride_dout, stride_dfinal, stride_out, channels, in_len, out_len, total, sequences, tiles, channel_blocks, left,
    FEATURES: tl.constexpr, SLOPE: tl.constexpr, DFINAL: tl.constexpr, FLIP: tl.constexpr, ROW_BASE: tl.constexpr,
    WIDTH: tl.constexpr, LINES: tl.constexpr, Q: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, WIDE: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same in the backward pass, under a name of its own: the gradient of the sums, of x or of the state."""
    _product_rows(
        x_ptr, weight_ptr, bias_ptr, state_ptr, dout_ptr, dfinal_ptr, cu_seqlens_ptr, out_ptr, stride_x,
        stride_state, stride_dout, stride_dfinal, stride_out, channels, in_len, out_len, total, sequences, tiles,
        channel_blocks, left, FEATURES, SLOPE, DFINAL, FLIP, ROW_BASE, WIDTH, LINES, Q, BLOCK_V, BLOCK_H, BLOCK_S,
        WIDE, SINGLE, PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["channels", "seqlen", "out_len", "total", "sequences", "tiles", "channel_blocks", "left"]
)
def short_conv_wide_dweight_kernel(
    dsum_ptr,  # [B, H, M], the gradient before the activation
    x_ptr,  # [B, H, N]
    state_ptr,  # [S, H, W - 1] or None
    cu_seqlens_ptr,  # int32 [S + 1] or None
    sums_ptr,  # float32 [slots, W + 1, H]
    stride_dsum,
    stride_x,
    stride_state,
    channels,
    seqlen,
    out_len,
    total,
    sequences,
    tiles,
    channel_blocks,
    left,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    Q: tl.constexpr,
    LAGS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What LINES * Q rows of BLOCK_H channels add to dweight and dbias."""
    pid = tl.program_id(0)
    slot = pid // channel_blocks
    first_channel = (pid % channel_blocks) * BLOCK_H
    sequence, start, length, first_row = tile_of(
        cu_seqlens_ptr, slot, tiles, seqlen, total, sequences, FEATURES.varlen, LINES * Q, BLOCK_S
    )
    out_length = length if FEATURES.varlen else out_len
    batch = 0 if FEATURES.varlen else sequence
    offs_c, offs_r, offs_v, offs_w = tl.arange(0, BLOCK_C), tl.arange(0, Q), tl.arange(0, LAGS), tl.arange(0, BLOCK_W)
    d_local = offs_c[None, :] * Q + offs_r[:, None]
    x_local = offs_c[:, None] * Q + offs_v[None, :] - left
    # No lag from Q + W - 1 on reaches a tap.
    reached = offs_v[None, :] < Q + WIDTH - 1
    diagonal = tl.minimum(offs_r[:, None] + offs_w[None, :], LAGS - 1)
    for channel in range(first_channel, tl.minimum(first_channel + BLOCK_H, channels)):
        dsum_base = at_head(dsum_ptr, stride_dsum, batch, channel, start + first_row)
        base = at_head(x_ptr, stride_x, batch, channel, start + first_row)
        state_base = at_head(state_ptr, stride_state, sequence, channel, 0) if FEATURES.state else state_ptr
        products = tl.zeros([Q, LAGS], tl.float32)
        total_d = tl.zeros([Q], tl.float32)
        for first in tl.range(0, LINES * Q, BLOCK_C * Q, num_stages=1):
            steps = (first + d_local).to(tl.int64) * stride_dsum.n if WIDE else (first + d_local) * stride_dsum.n
            d = tl.load(dsum_base + steps, mask=first_row + first + d_local < out_length, other=0.0)
            local = first + x_local
            row = tl.where(reached, first_row + local, length)
            x = _extended(base, stride_x, state_base, stride_state, local, row, length, WIDTH, FEATURES.state, WIDE)
            if SINGLE:
                products = tl.dot(d.to(tl.float32), x.to(tl.float32), products, input_precision=PRECISION)
            else:
                products = tl.dot(d, x, products)
            total_d += tl.sum(d.to(tl.float32), 1)
        taps = tl.sum(tl.gather(products, diagonal, 1), 0)
        sums = sums_ptr + tl.cast(slot, tl.int64) * (WIDTH + 1) * channels + channel
        tl.store(sums + offs_w * channels, taps, mask=offs_w < WIDTH)
        tl.store(sums + WIDTH * channels, tl.sum(total_d, 0))
