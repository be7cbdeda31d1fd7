"""The running sum of the log decays in a chunk, from which every weight of this room's Triton kernels is made.

Weights are ``2 ** (b_i - b_j)`` with b the sum in base 2, because ``exp2`` is the instruction that the hardware has.
b is summed in float64 and kept as two float32 numbers, ``high + low``: after a strong decay in the chunk b is large,
and its float32 rounding would be a relative error of every later weight. Differences are never positive, but for the
last bits of ``low``.

Log decays are clamped to [LEAST_LOG_DECAY, 0] first: minus infinity is a reset, and no difference of infinities is
formed. Cost: one scan of C float64 numbers a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.decays import LEAST_LOG_DECAY
from iokernels.ops.shared.triton_tiles import LOG2E

LEAST = tl.constexpr(LEAST_LOG_DECAY)


class Sums(NamedTuple):
    """The sums at every row of a chunk, float32 [C] twice, and the chunk's total; rows past the end repeat the last."""

    high: Any
    low: Any
    whole_high: Any
    whole_low: Any


@triton.jit
def clamped(log_decay):
    """float32 numbers in [LEAST, 0]. What is not a number stays so, and shows in the results."""
    keep: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(log_decay.to(tl.float32), LEAST, propagate_nan=keep), 0.0, propagate_nan=keep)


@triton.jit
def no_sums(BLOCK_C: tl.constexpr):
    """Without decay."""
    return Sums(tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), 0.0, 0.0)


@triton.jit
def sums_of(log_decay, BLOCK_C: tl.constexpr):
    """Of a clamped log decay a row, [C]; rows past the end have 0."""
    exact = tl.cumsum(log_decay.to(tl.float64), 0) * LOG2E
    high = exact.to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    last = tl.arange(0, BLOCK_C) == BLOCK_C - 1
    return Sums(high, low, tl.sum(tl.where(last, high, 0.0), 0), tl.sum(tl.where(last, low, 0.0), 0))


@triton.jit
def sums_of_one(log_decay, rows, BLOCK_C: tl.constexpr):
    """Of one clamped log decay for all ``rows`` rows of the chunk."""
    each = log_decay.to(tl.float64) * LOG2E
    exact = each * tl.minimum(tl.arange(0, BLOCK_C) + 1, rows).to(tl.float64)
    high = exact.to(tl.float32)
    total = each * rows.to(tl.float64)
    whole_high = total.to(tl.float32)
    return Sums(
        high,
        (exact - high.to(tl.float64)).to(tl.float32),
        whole_high,
        (total - whole_high.to(tl.float64)).to(tl.float32),
    )


@triton.jit
def from_start(sums):
    """exp(b): what is left in each row of the state before the chunk."""
    return tl.exp2(sums.high + sums.low)


@triton.jit
def to_end(sums):
    """exp(b_C - b): what is left at the end of what each row writes."""
    return tl.exp2((sums.whole_high - sums.high) + (sums.whole_low - sums.low))


@triton.jit
def whole(sums):
    """exp(b_C)."""
    return tl.exp2(sums.whole_high + sums.whole_low)


@triton.jit
def log2_between(sums, TRANSPOSED: tl.constexpr):
    """(b_i - b_j) log2(e) as [i, j], or as [j, i]: only where i is not before j is it the log of a weight."""
    if TRANSPOSED:
        return (sums.high[None, :] - sums.high[:, None]) + (sums.low[None, :] - sums.low[:, None])
    else:
        return (sums.high[:, None] - sums.high[None, :]) + (sums.low[:, None] - sums.low[None, :])
