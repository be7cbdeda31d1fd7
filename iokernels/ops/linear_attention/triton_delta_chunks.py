"""What the kernels of the gated delta rule share: where a chunk lies, and its decays.

Decays reach the exponential as differences of their running sum b, never positive. b is summed in float64 and kept as
two float32 numbers, ``high + low``: after a strong decay in the chunk b is large, and its float32 rounding would be a
relative error of every later weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.triton_tiles import LOG2E


class Features(NamedTuple):
    """What a kernel is compiled for."""

    varlen: bool
    decay: bool
    state: bool  # an initial state; in the backward pass, a gradient of the final one


class Sums(NamedTuple):
    """The running sum of the log decays in a chunk, as two float32 vectors [C] and the chunk's total."""

    high: Any
    low: Any
    whole_high: Any
    whole_low: Any


@triton.jit
def chunk_at(table_ptr, index, seqlen, VARLEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sequence, first row and number of rows of a chunk.

    Packed: from a table [P, 2] of first rows and counts, all in "sequence" 0, the only one of the tensors.
    """
    if VARLEN:
        return 0, tl.load(table_ptr + 2 * index), tl.load(table_ptr + 2 * index + 1)
    else:
        chunks = tl.cdiv(seqlen, BLOCK_C)
        first_row = index % chunks * BLOCK_C
        return index // chunks, first_row, tl.minimum(seqlen - first_row, BLOCK_C)


@triton.jit
def load_rows(ptr, strides, batch, head, first_row, rows, BLOCK_C: tl.constexpr):
    """A number a row, float32 [C], zeros past ``rows``: ``ptr [B, H, N]``."""
    batch, head, first_row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(first_row, tl.int64)
    local = tl.arange(0, BLOCK_C)
    at = ptr + batch * strides.b + head * strides.h + (first_row + local) * strides.n
    return tl.load(at, mask=local < rows, other=0.0).to(tl.float32)


@triton.jit
def load_sums(ptr, strides, batch, head, first_row, rows, DECAY: tl.constexpr, BLOCK_C: tl.constexpr):
    """The running sums of a chunk; rows past its end add nothing. Positive log decays count as 0."""
    local = tl.arange(0, BLOCK_C)
    if DECAY:
        decay = tl.minimum(load_rows(ptr, strides, batch, head, first_row, rows, BLOCK_C), 0.0)
        exact = tl.cumsum(decay.to(tl.float64), 0)
        high = exact.to(tl.float32)
        low = (exact - high.to(tl.float64)).to(tl.float32)
    else:
        high = tl.zeros([BLOCK_C], tl.float32)
        low = tl.zeros([BLOCK_C], tl.float32)
    last = local == BLOCK_C - 1
    return Sums(high, low, tl.sum(tl.where(last, high, 0.0), 0), tl.sum(tl.where(last, low, 0.0), 0))


@triton.jit
def from_start(sums):
    """exp(b): what is left in each row of the state before the chunk."""
    return tl.exp2((sums.high + sums.low) * LOG2E)


@triton.jit
def to_end(sums):
    """exp(b_C - b): what is left at the end of what each row writes."""
    return tl.exp2(((sums.whole_high - sums.high) + (sums.whole_low - sums.low)) * LOG2E)


@triton.jit
def whole(sums):
    """exp(b_C)."""
    return tl.exp2((sums.whole_high + sums.whole_low) * LOG2E)


@triton.jit
def between(sums, TRANSPOSED: tl.constexpr, BLOCK_C: tl.constexpr):
    """exp(b_i - b_j) for i >= j, and 0 elsewhere: as [i, j], or as [j, i]."""
    local = tl.arange(0, BLOCK_C)
    difference = (sums.high[:, None] - sums.high[None, :]) + (sums.low[:, None] - sums.low[None, :])
    if TRANSPOSED:
        exponent = tl.where(local[:, None] <= local[None, :], -difference, float("-inf"))
    else:
        exponent = tl.where(local[:, None] >= local[None, :], difference, float("-inf"))
    return tl.exp2(exponent * LOG2E)
