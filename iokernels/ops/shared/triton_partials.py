"""Partial results of attention over some of the keys: how two are merged, and where they wait for each other.

What has been seen of the keys is summed up in float32 by (m, l, acc), for each row

    m = max_j s_j        l = sum_j 2^(s_j - m)        acc = sum_j 2^(s_j - m) v_j        (s in base 2)

and two such sums over different keys merge into that of both, in whatever order they were made:

    m = max(m1, m2)      l = 2^(m1 - m) l1 + 2^(m2 - m) l2      acc = 2^(m1 - m) acc1 + 2^(m2 - m) acc2

A kernel whose scores and m are natural logarithms has e in place of 2 there, and names the unit NATURAL.

At the end out = acc / l and lse = ln 2 (m + log2 l), or m + ln l. No keys at all are m = -inf, l = 0, acc = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

BINARY = tl.constexpr(1.0)
NATURAL = tl.constexpr(1.4426950408889634)
"""The unit of m and of scores, in base 2."""


@triton.jit
def merged(m1, l1, acc1, m2, l2, acc2, UNIT: tl.constexpr):
    """The sum over two sets of keys."""
    m = tl.maximum(m1, m2)
    finite = tl.where(m == float("-inf"), 0.0, m)
    a1, a2 = tl.exp2((m1 - finite) * UNIT), tl.exp2((m2 - finite) * UNIT)
    return m, l1 * a1 + l2 * a2, acc1 * a1[:, None] + acc2 * a2[:, None]


@triton.jit
def store_partial(
    partial_ptr, slot, m_i, l_i, acc, used, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write (m, l, acc) to a slot of the workspace: float32 [slots, BLOCK_M, 2 + VALUE_DIM], m and l before acc."""
    offs_m, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    rows = partial_ptr + tl.cast(slot, tl.int64) * (BLOCK_M * (VALUE_DIM + 2)) + offs_m * (VALUE_DIM + 2)
    mask_m = offs_m < used
    tl.store(rows, m_i, mask=mask_m)
    tl.store(rows + 1, l_i, mask=mask_m)
    tl.store(rows[:, None] + 2 + offs_v[None, :], acc, mask=mask_m[:, None] & (offs_v[None, :] < VALUE_DIM))


@triton.jit
def load_partial(partial_ptr, slot, used, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr):
    """Read what :func:`store_partial` wrote, past the L1 cache, which other blocks do not write to."""
    offs_m, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    rows = partial_ptr + tl.cast(slot, tl.int64) * (BLOCK_M * (VALUE_DIM + 2)) + offs_m * (VALUE_DIM + 2)
    mask_m = offs_m < used
    m_i = tl.load(rows, mask=mask_m, other=float("-inf"), cache_modifier=".cg")
    l_i = tl.load(rows + 1, mask=mask_m, other=0.0, cache_modifier=".cg")
    mask = mask_m[:, None] & (offs_v[None, :] < VALUE_DIM)
    acc = tl.load(rows[:, None] + 2 + offs_v[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    return m_i, l_i, acc


@triton.jit
def merge_slots(
    partial_ptr, first_slot, next_slot, step, count, used,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr = BINARY,
):  # fmt: skip
    """The sum of ``count`` partials, always in the same order: ``first_slot``, then ``next_slot`` in steps."""
    m_i, l_i, acc = load_partial(partial_ptr, first_slot, used, VALUE_DIM, BLOCK_V, BLOCK_M)
    # Unrolled, so that the loads of several partials are on their way at once.
    for other in tl.range(0, count - 1, loop_unroll_factor=4):
        m2, l2, acc2 = load_partial(partial_ptr, next_slot + other * step, used, VALUE_DIM, BLOCK_V, BLOCK_M)
        m_i, l_i, acc = merged(m_i, l_i, acc, m2, l2, acc2, UNIT)
    return m_i, l_i, acc
