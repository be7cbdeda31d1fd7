"""What the kernels of this room share: the tiles of one step, the recurrent matrices, and who works on what.

A thread block has one head and BLOCK_B sequences. A tile is ``[BLOCK_B, BLOCK_D]``: sequences by units. Widths are
padded to a power of two with zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Steps(NamedTuple):
    """Element strides of a ``[B, N, X, H, D]`` tensor, X being gates or states; 0 for x where there is no such
    dimension."""

    b: Any
    n: Any
    x: Any
    h: Any
    d: Any


class Matrices(NamedTuple):
    """Element strides of the recurrent matrices ``[G, H, D, D]``."""

    g: Any
    h: Any
    o: Any
    i: Any


@triton.jit
def at_tile(ptr, strides, first, head):
    """Address of the first step of a block's first sequence. Products are 64-bit: a tensor may pass 2^31 elements."""
    return ptr + tl.cast(first, tl.int64) * strides.b + tl.cast(head, tl.int64) * strides.h


@triton.jit
def tile_offsets(strides, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a tile from the address of its first sequence; 64-bit only where the launcher found 32 too few."""
    rows, columns = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    if WIDE:
        return rows.to(tl.int64)[:, None] * strides.b + columns.to(tl.int64)[None, :] * strides.d
    else:
        return rows[:, None] * strides.b + columns[None, :] * strides.d


@triton.jit
def rows_if(condition, rows, batch):
    """The rows of sequences where a scalar condition holds, else none, as a column to mask with.

    A comparison of integers, because Triton 3.9's interpreter makes integers of a condition that it broadcasts.
    """
    return (rows < tl.where(condition, batch, 0))[:, None]


@triton.jit
def load_step(ptr, strides, offsets, mask, step, COUNT: tl.constexpr):
    """The first COUNT tiles of x at one step, in the tensor's dtype."""
    at = ptr + tl.cast(step, tl.int64) * strides.n
    tiles = ()
    for x in tl.static_range(COUNT):
        tiles = tiles + (tl.load(at + x * tl.cast(strides.x, tl.int64) + offsets, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_step(ptr, strides, offsets, mask, step, x, tile):
    """Store one tile of a step."""
    at = ptr + tl.cast(step, tl.int64) * strides.n + x * tl.cast(strides.x, tl.int64)
    tl.store(at + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_matrices(
    ptr, strides, head, COUNT: tl.constexpr, FORWARD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """R of every gate as the right side of a product: ``[in, out]`` forward, ``[out, in]`` backward."""
    left, right = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (left < WIDTH) & (right < WIDTH)
    offsets = left * strides.i + right * strides.o if FORWARD else left * strides.o + right * strides.i
    at = ptr + tl.cast(head, tl.int64) * strides.h
    tiles = ()
    for g in tl.static_range(COUNT):
        tiles = tiles + (tl.load(at + g * tl.cast(strides.g, tl.int64) + offsets, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_biases(ptr, head, heads, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The bias of every gate, ``[1, BLOCK_D]`` float32, of a contiguous ``[G, H, D]``; zeros without a pointer."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    tiles = ()
    for g in tl.static_range(COUNT):
        if ptr is None:
            tiles = tiles + (tl.zeros([1, BLOCK_D], tl.float32),)
        else:
            at = ptr + (g * heads + head) * WIDTH
            tiles = tiles + (tl.load(at + columns, mask=columns < WIDTH, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def join(x, biases, matrices, h, GATES: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr):
    """The values of a step, from its inputs and h, as :mod:`.cells` orders them."""
    values = ()
    for g in tl.static_range(GATES - APART):
        inputs = x[g].to(tl.float32) + biases[g]
        values = values + (tl.dot(h, matrices[g], inputs, input_precision=PRECISION),)
    for g in tl.static_range(GATES - APART, GATES):
        inputs = tl.zeros_like(x[g].to(tl.float32)) + biases[g]
        values = values + (tl.dot(h, matrices[g], inputs, input_precision=PRECISION),)
    for g in tl.static_range(GATES - APART, GATES):
        values = values + (x[g].to(tl.float32),)
    return values


@triton.jit
def load_states(
    ptr, first, head, batch, heads, FROM: tl.constexpr, STATES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """States FROM to STATES of a contiguous float32 ``[S, B, H, D]``; zeros without a pointer."""
    rows, columns = first + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    mask = (rows < batch)[:, None] & (columns < WIDTH)[None, :]
    tiles = ()
    for s in tl.static_range(FROM, STATES):
        if ptr is None:
            tiles = tiles + (tl.zeros([BLOCK_B, BLOCK_D], tl.float32),)
        else:
            row = (tl.cast(s, tl.int64) * batch + rows) * heads + head
            tiles = tiles + (tl.load(ptr + row[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_states(
    ptr, tiles, first, head, batch, heads, STATES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The reverse of :func:`load_states`."""
    rows, columns = first + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    mask = (rows < batch)[:, None] & (columns < WIDTH)[None, :]
    for s in tl.static_range(STATES):
        row = (tl.cast(s, tl.int64) * batch + rows) * heads + head
        tl.store(ptr + row[:, None] * WIDTH + columns[None, :], tiles[s], mask=mask)


@triton.jit
def choose(valid, new, old, COUNT: tl.constexpr):
    """``new`` in the rows that are valid, else ``old``, tile by tile."""
    tiles = ()
    for x in tl.static_range(COUNT):
        tiles = tiles + (tl.where(valid, new[x], old[x]),)
    return tiles


@triton.jit
def load_lengths(ptr, first, batch, length, BLOCK_B: tl.constexpr):
    """The steps of a block's sequences, between 0 and N whatever the tensor says; 0 in rows of no sequence."""
    rows = first + tl.arange(0, BLOCK_B)
    lengths = tl.load(ptr + rows, mask=rows < batch, other=0)
    return tl.minimum(tl.maximum(lengths, 0), length)
