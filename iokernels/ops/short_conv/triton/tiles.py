"""Where the tiles of short convolutions lie: which rows of which sequence a program owns, and rows with their context.

Rows are counted from the start of their sequence; those before 0 are the state (or zeros) and those past the end zeros.
A tile's base is the 64-bit address of its first row, and offsets inside it are 32-bit unless the launcher says WIDE.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from iokernels.ops.shared.triton_tiles import View, locate


class ShortFeatures(NamedTuple):
    """What a call uses; each combination is a compilation."""

    varlen: bool
    state: bool  # an initial state
    silu: bool
    bias: bool


class Inputs(NamedTuple):
    """What the kernels read."""

    x: View  # [B, H, N]
    state: View  # [S, H, W - 1] or None
    weight_ptr: Any  # [H, W], contiguous
    bias_ptr: Any  # [H] or None
    cu_seqlens_ptr: Any  # int32 [S + 1] or None


class Gradients(NamedTuple):
    """The gradients that a backward pass begins with."""

    dout: View  # [B, H, M] or None
    dfinal: View  # [S, H, W - 1] or None


VARYING = ("channels", "seqlen", "out_len", "total", "sequences", "tiles", "channel_blocks")
"""Integers that vary between calls: one compiled kernel serves all of them."""


@triton.jit
def tile_of(cu_seqlens_ptr, slot, tiles, seqlen, total, sequences, VARLEN: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_S: tl.constexpr):  # fmt: skip
    """(sequence, packed row it starts at, its length, first row of the tile) of one slot of the grid.

    Dense: ``tiles`` slots a sequence. Packed: sequence s, which starts at row c, takes the slots from c // BLOCK_N + s:
    at least as many as it has tiles, without anybody knowing lengths on the host. A slot too many starts past the end.
    """
    if VARLEN:
        offs_s = tl.arange(0, BLOCK_S)
        starts = tl.load(cu_seqlens_ptr + offs_s, mask=offs_s < sequences, other=2**30)
        first_slots = tl.maximum(starts, 0) // BLOCK_N + offs_s
        before = (first_slots <= slot) & (offs_s < sequences)
        sequence = tl.maximum(tl.sum(before.to(tl.int32), 0) - 1, 0)
        start, length = locate(cu_seqlens_ptr, sequence, total, total, True)
        return sequence, start, length, tl.maximum(slot - start // BLOCK_N - sequence, 0) * BLOCK_N
    else:
        return slot // tiles, 0, seqlen, (slot % tiles) * BLOCK_N


@triton.jit
def rows_of(cu_seqlens_ptr, sequence, seqlen, total, VARLEN: tl.constexpr):
    """(packed row a sequence starts at, its length)."""
    if VARLEN:
        return locate(cu_seqlens_ptr, sequence, total, total, True)
    else:
        return 0, seqlen


@triton.jit
def channel_offsets(strides, rows, channels, WIDE: tl.constexpr):
    """Offsets of a tile [rows, channels] of a ``[B, H, N]`` tensor."""
    if WIDE:
        return rows.to(tl.int64)[:, None] * strides.n + channels.to(tl.int64)[None, :] * strides.h
    else:
        return rows[:, None] * strides.n + channels[None, :] * strides.h


@triton.jit
def load_rows(x, local, row, length, channels, mask_h, WIDE: tl.constexpr):
    """A tile of x: ``local`` are rows from where the view begins, ``row`` the same from the start of the sequence."""
    mask = (row >= 0)[:, None] & (row < length)[:, None] & mask_h[None, :]
    return tl.load(x.ptr + channel_offsets(x, local, channels, WIDE), mask=mask, other=0.0)


@triton.jit
def load_extended(
    x, state, local, row, length, channels, mask_h, WIDTH: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr
):
    """As :func:`load_rows`, with the WIDTH - 1 rows of the state before the first."""
    rows = load_rows(x, local, row, length, channels, mask_h, WIDE)
    if STATE:
        kept = row + (WIDTH - 1)
        before = (row < 0)[:, None] & (kept >= 0)[:, None] & mask_h[None, :]
        past = tl.load(state.ptr + channel_offsets(state, kept, channels, WIDE), mask=before, other=0.0)
        return tl.where(before, past, rows)
    else:
        return rows


@triton.jit
def silu_slope(x):
    """The derivative of silu."""
    share = tl.sigmoid(x)
    return share * (1.0 + x * (1.0 - share))


def is_wide(rows: int, channels: int, *tensors: Tensor | None) -> bool:
    """Whether an offset inside a tile of so many rows and channels can pass 2^31 elements."""
    return any(x is not None and rows * abs(x.stride(2)) + channels * abs(x.stride(1)) >= 2**31 for x in tensors)
