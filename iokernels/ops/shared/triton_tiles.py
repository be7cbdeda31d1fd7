"""Tiles of ``[B, H, N, D]`` tensors in Triton: where they lie, how they are loaded and stored.

Every room's kernels take strides and use these; the functions at the end serve the launchers. A tile's address is
split: the 64-bit address of a block's first row (:func:`at_head`, :func:`at_row`), and offsets inside the tile, 32-bit
unless the launcher found that they are too few (:func:`is_wide`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Strides(NamedTuple):
    """Element strides of a ``[B, H, N, D]`` tensor; 0 where a dimension of a bias or mask broadcasts."""

    b: Any
    h: Any
    n: Any
    d: Any


class View(NamedTuple):
    """A tensor ``[B, H, N, D]`` as a kernel takes it: its pointer (None where there is no tensor) and element strides,
    0 where a dimension broadcasts."""

    ptr: Any
    b: Any
    h: Any
    n: Any
    d: Any


@triton.jit
def locate(cu_seqlens_ptr, sequence, seqlen, total, VARLEN: tl.constexpr):
    """First row and length of a sequence.

    Packed: ``seqlen`` is the longest length and ``total`` the number of packed rows; whatever the offsets say, the
    result lies inside the tensor. Dense: row 0 and ``seqlen``.
    """
    if VARLEN:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), total)
        stop = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), total)
        return start, tl.minimum(tl.maximum(stop - start, 0), seqlen)
    else:
        return 0, seqlen


@triton.jit
def at_head(ptr, strides, batch, head, row):
    """Address of a sequence's first row in one head. Products are 64-bit: a tensor may pass 2^31 elements."""
    batch, head, row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(row, tl.int64)
    return ptr + batch * strides.b + head * strides.h + row * strides.n


@triton.jit
def view_of(x, batch, head, row):
    """The view ``x`` from a row of one head of one sequence on."""
    return View(at_head(x.ptr, x, batch, head, row), x.b, x.h, x.n, x.d)


@triton.jit
def at_row(ptr, strides, row):
    """``ptr`` moved on by ``row`` rows."""
    return ptr + tl.cast(row, tl.int64) * strides.n


@triton.jit
def tile_offsets(strides, rows, columns, WIDE: tl.constexpr):
    """Offsets of a tile from its first row's address; 64-bit only where the launcher found that 32 are too few."""
    if WIDE:
        return rows.to(tl.int64)[:, None] * strides.n + columns.to(tl.int64)[None, :] * strides.d
    else:
        return rows[:, None] * strides.n + columns[None, :] * strides.d


@triton.jit
def load_tile(ptr, offsets, rows, columns, seqlen, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Load ``[rows, columns]``, with zeros past the sequence or past the head's WIDTH, which BLOCK rounds up."""
    if MASK_ROWS and BLOCK > WIDTH:
        return tl.load(ptr + offsets, mask=(rows[:, None] < seqlen) & (columns[None, :] < WIDTH), other=0.0)
    elif MASK_ROWS:
        return tl.load(ptr + offsets, mask=rows[:, None] < seqlen, other=0.0)
    elif BLOCK > WIDTH:
        return tl.load(ptr + offsets, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(ptr + offsets)


@triton.jit
def store_tile(ptr, offsets, tile, rows, columns, seqlen, WIDTH: tl.constexpr):
    """Store the part of a tile that lies inside the sequence and the head's width."""
    tl.store(ptr + offsets, tile, mask=(rows[:, None] < seqlen) & (columns[None, :] < WIDTH))


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32 accuracy: a polynomial near 0, where the other form cancels."""
    square = x * x
    series = 0.020639088 - 0.0057049887 * square
    series = -0.053739715 + square * series
    series = 0.13331442 + square * series
    series = -0.33333282 + square * series
    near = x + x * square * series
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|) <= 1: cannot overflow
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


def strides(x: Tensor | None) -> Strides:
    """Element strides of ``[B, H, N, D]`` or its first dimensions; a size of 1 gets 0, so that it broadcasts."""
    steps = [] if x is None else [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return Strides(*steps, *[0] * (4 - len(steps)))


def view(x: Tensor | None) -> View:
    """``[B, H, N, D]``, or its first dimensions, as a kernel takes it; a size of 1 gets a stride of 0."""
    return View(x, *strides(x))


def padded(width: int) -> int:
    """The tile width that holds a head of ``width``: a power of two, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(width))


def is_wide(rows: int, *tensors: Tensor) -> bool:
    """Whether an offset inside a tile of ``rows`` rows can pass 2^31 elements."""
    return any((rows - 1) * abs(x.stride(2)) + (x.shape[3] - 1) * abs(x.stride(3)) >= 2**31 for x in tensors)
