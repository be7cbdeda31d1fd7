"""What the decode kernels share: one segment of keys folded into a partial result, and partial results merged.

A block owns an *item*: BLOCK_M rows that read the same keys, namely the Nq newest positions of the query heads of one
key head. Row ``r = g * Nq + i`` is position i of the group's head g, so keys and values are read once for the whole
group. What has been seen of the keys is summed up in float32 by (m, l, acc), and two such sums over different keys
merge into that of both (:mod:`iokernels.ops.shared.triton_partials`).

Scores and m are natural logarithms here: a finite score stays finite, which its product with log2 e need not, so that
log2 e multiplies differences alone. At the end out = acc / l and lse = m + ln l. A sink is a sum of one logit without a
value; a common prefix is a sum that was finished before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_partials import NATURAL, merged
from iokernels.ops.shared.triton_tiles import LN2, LOG2E, load_tile, tanh, tile_offsets

NO_CODE = tl.constexpr(0)
INT8 = tl.constexpr(1)
E4M3 = tl.constexpr(2)

UNSCALED = tl.constexpr(0)
BY_HEAD = tl.constexpr(1)
BY_KEY = tl.constexpr(2)


class Features(NamedTuple):
    """What a kernel is compiled for."""

    page: int  # keys in a page; 0: the caches are dense
    left: bool  # the window is bounded on the left
    right: bool  # and on the right; causal is this with window_right = 0
    softcap: bool
    sinks: bool
    code: int  # of the caches: NO_CODE, INT8 or E4M3
    k_scale: int  # UNSCALED, BY_HEAD or BY_KEY
    v_scale: int
    after_prefix: bool  # the result of a common prefix is merged in at the end


class Numbers(NamedTuple):
    """Numbers that every block needs. ``qk_scale`` is the scale, over the softcap where there is one."""

    batch: Any
    rows: Any  # Nq
    group: Any  # query heads of a key head
    kv_heads: Any
    row_tiles: Any  # of an item's sequence and key head
    capacity: Any  # keys that a sequence can have
    pages: Any  # of the caches, where there are pages
    qk_scale: Any
    softcap: Any
    window_left: Any
    window_right: Any


@triton.jit
def length_of(seqlens_ptr, sequence, numbers):
    """Keys of a sequence, within the capacity whatever the tensor says."""
    return tl.minimum(tl.maximum(tl.load(seqlens_ptr + sequence), 0), numbers.capacity)


@triton.jit
def first_key(length, numbers, FEATURES: tl.constexpr):
    """The first key that any row of a sequence sees."""
    if FEATURES.left:
        return tl.maximum(length - numbers.rows - numbers.window_left, 0)
    else:
        return length * 0


@triton.jit
def first_tile(length, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first tile of keys that any row of a sequence sees."""
    return first_key(length, numbers, FEATURES) // BLOCK_N


@triton.jit
def tiles_of(length, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles an item of a sequence walks over. Without keys it is one, of which nothing is read, so that every
    item has a block that writes its result."""
    stop = (length + BLOCK_N - 1) // BLOCK_N
    return tl.maximum(stop - first_tile(length, numbers, FEATURES, BLOCK_N), 1)


@triton.jit
def keys_of(
    k_ptr, stride_k, v_ptr, stride_v, k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale, table_ptr, stride_table,
    sequence, head, FEATURES: tl.constexpr,
):  # fmt: skip
    """Move the pointers to one key head of one sequence: of all pages, where there are pages."""
    # Zeros stand for what is absent: a function cannot return None among other values.
    sequence, head = tl.cast(sequence, tl.int64), tl.cast(head, tl.int64)
    at = sequence
    pages = 0
    if FEATURES.page > 0:
        at = sequence * 0
        pages = table_ptr + sequence * stride_table
    k_scale, v_scale = 0, 0
    if FEATURES.k_scale == BY_HEAD:
        k_scale = k_scale_ptr + head
    if FEATURES.k_scale == BY_KEY:
        k_scale = k_scale_ptr + at * stride_k_scale.b + head * stride_k_scale.h
    if FEATURES.v_scale == BY_HEAD:
        v_scale = v_scale_ptr + head
    if FEATURES.v_scale == BY_KEY:
        v_scale = v_scale_ptr + at * stride_v_scale.b + head * stride_v_scale.h
    k_head = k_ptr + at * stride_k.b + head * stride_k.h
    v_head = v_ptr + at * stride_v.b + head * stride_v.h
    return k_head, v_head, k_scale, v_scale, pages


@triton.jit
def decoded(tile, dtype: tl.constexpr, FEATURES: tl.constexpr):
    """A tile of a cache as numbers of ``dtype``, exactly.

    An e4m3 byte ``s eeee mmm`` is half the bits of the float16 ``s 0eeee mmm0000000``, whose exponent counts from 15
    and not from 7: 2^8 makes up for it. Its two NaNs become 480.
    """
    if FEATURES.code == E4M3:
        bits = tile.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)
    elif FEATURES.code == INT8:
        return tile.to(dtype)
    else:
        return tile


@triton.jit
def load_keys(
    ptr, stride, page, first, keys, low, stop, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """Rows of a cache: from ``first`` on, or of the pages ``page``. Nothing before ``low`` or from ``stop`` on is
    read, and zeros stand there: a weight of 0 does not undo a NaN."""
    there = keys
    if FEATURES.left:
        there = tl.where(keys < low, stop, keys)
    if FEATURES.page > 0:
        rows = page.to(tl.int64) * stride.b + (keys % FEATURES.page).to(tl.int64) * stride.n
        offsets = rows[:, None] + columns.to(tl.int64)[None, :] * stride.d
        return load_tile(ptr, offsets, there, columns, stop, WIDTH, BLOCK, True)
    else:
        start = ptr + tl.cast(first, tl.int64) * stride.n
        offsets = tile_offsets(stride, keys - first, columns, WIDE)
        return load_tile(start, offsets, there, columns, stop, WIDTH, BLOCK, True)


@triton.jit
def load_factors(ptr, stride, page, keys, low, stop, FEATURES: tl.constexpr):
    """The scale of each key."""
    there = keys < stop
    if FEATURES.left:
        there = there & (keys >= low)
    if FEATURES.page > 0:
        offsets = page.to(tl.int64) * stride.b + (keys % FEATURES.page).to(tl.int64) * stride.n
    else:
        offsets = keys.to(tl.int64) * stride.n
    return tl.load(ptr + offsets, mask=there, other=0.0)


@triton.jit
def walk(
    q, position, start, low, stop, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pages_ptr,
    stride_k, stride_v, stride_k_scale, stride_v_scale, numbers,
    FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(m, l, acc) of the rows ``q [BLOCK_M, BLOCK_D]``, which stand at ``position``, over the keys ``[start, stop)``.

    ``start`` is a multiple of BLOCK_N; no row sees a key before ``low``, and none is read there. Pointers are those of
    one key head (:func:`keys_of`).
    """
    offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    qk_scale = numbers.qk_scale
    if FEATURES.k_scale == BY_HEAD:
        qk_scale = qk_scale * tl.load(k_scale_ptr)
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + offs_n
        page = keys
        if FEATURES.page > 0:
            there = keys < stop
            if FEATURES.left:
                there = there & (keys >= low)
            # No number in the table leads out of the cache.
            page = tl.load(pages_ptr + keys // FEATURES.page, mask=there, other=0)
            page = tl.minimum(tl.maximum(page, 0), numbers.pages - 1)
        k = load_keys(k_ptr, stride_k, page, first, keys, low, stop, offs_d, HEAD_DIM, BLOCK_D, WIDE, FEATURES)
        scores = tl.dot(q, tl.trans(decoded(k, q.dtype, FEATURES)), input_precision=PRECISION) * qk_scale
        if FEATURES.k_scale == BY_KEY:
            scores *= load_factors(k_scale_ptr, stride_k_scale, page, keys, low, stop, FEATURES)[None, :]
        if FEATURES.softcap:
            scores = tanh(scores) * numbers.softcap
        seen = (keys < stop)[None, :]
        if FEATURES.left:
            seen = seen & (keys[None, :] >= position[:, None] - numbers.window_left)
        if FEATURES.right:
            seen = seen & (keys[None, :] <= position[:, None] + numbers.window_right)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        # A row that has seen no key yet subtracts 0, because -inf - (-inf) is NaN.
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((scores - m_finite[:, None]) * LOG2E)
        alpha = tl.exp2((m_i - m_finite) * LOG2E)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        v = decoded(
            load_keys(v_ptr, stride_v, page, first, keys, low, stop, offs_v, VALUE_DIM, BLOCK_V, WIDE, FEATURES),
            q.dtype, FEATURES,
        )  # fmt: skip
        if FEATURES.v_scale == BY_KEY:
            # Not into p, whose small weights would leave the range of float16.
            factors = load_factors(v_scale_ptr, stride_v_scale, page, keys, low, stop, FEATURES)
            v = (v.to(tl.float32) * factors[:, None]).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    if FEATURES.v_scale == BY_HEAD:
        acc = acc * tl.load(v_scale_ptr)
    return m_i, l_i, acc


@triton.jit
def row_of(sequence, kv_head, row_tile, numbers, BLOCK_M: tl.constexpr, ALL_SEQUENCES: tl.constexpr):
    """Which (sequence, query head, position) each of an item's rows is, and how many of the BLOCK_M there are.

    ALL_SEQUENCES: the rows of a key head of the whole batch, one sequence after the other: the readers of a prefix.
    """
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    own = numbers.group * numbers.rows
    count = own
    of_sequence = row * 0 + sequence
    if ALL_SEQUENCES:
        count = own * numbers.batch
        of_sequence = row // own
        row = row % own
    head = kv_head * numbers.group + row // numbers.rows
    used = tl.minimum(count - row_tile * BLOCK_M, BLOCK_M)
    return of_sequence, head, row % numbers.rows, used


@triton.jit
def row_offsets(strides, sequences, heads, rows):
    """Offsets of the rows of a ``[B, H, N, ...]`` tensor."""
    return (
        sequences.to(tl.int64) * strides.b + heads.to(tl.int64) * strides.h + rows.to(tl.int64) * strides.n
    )  # fmt: skip


@triton.jit
def load_queries(q_ptr, stride_q, sequences, heads, rows, used, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_M: tl.constexpr):  # fmt: skip
    """The rows of an item, [BLOCK_M, BLOCK_D]; zeros past ``used``."""
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offsets = row_offsets(stride_q, sequences, heads, rows)[:, None] + offs_d.to(tl.int64)[None, :] * stride_q.d
    return load_tile(q_ptr, offsets, offs_m, offs_d, used, HEAD_DIM, BLOCK_D, True)


@triton.jit
def finish(
    m_i, l_i, acc, sequences, heads, rows, used, out_ptr, lse_ptr, sinks_ptr, prefix_out_ptr, prefix_lse_ptr,
    stride_out, stride_lse, stride_prefix,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    ALL_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Write out and lse of an item from the sum over its keys, the prefix and the sink.

    The result of a prefix itself (ALL_SEQUENCES) stays in float32, and the sink waits.
    """
    offs_m, offs_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    mask_m = offs_m < used
    mask = mask_m[:, None] & (offs_v[None, :] < VALUE_DIM)
    if FEATURES.after_prefix and not ALL_SEQUENCES:
        # A finished result is a sum whose l is 1 and whose m is its lse; nothing at all where that is -inf.
        statistics = prefix_lse_ptr + row_offsets(stride_lse, sequences, heads, rows)
        m_p = tl.load(statistics, mask=mask_m, other=float("-inf"))
        before = row_offsets(stride_prefix, sequences, heads, rows)[:, None] + offs_v[None, :]
        acc_p = tl.load(prefix_out_ptr + before, mask=mask, other=0.0)
        m_i, l_i, acc = merged(m_i, l_i, acc, m_p, tl.where(m_p == float("-inf"), 0.0, 1.0), acc_p, NATURAL)
    if FEATURES.sinks and not ALL_SEQUENCES:
        sink = tl.load(sinks_ptr + heads, mask=mask_m, other=float("-inf")).to(tl.float32)
        m_i, l_i, acc = merged(m_i, l_i, acc, sink, tl.where(sink == float("-inf"), 0.0, 1.0), acc * 0.0, NATURAL)
    denominator = tl.where(l_i == 0.0, 1.0, l_i)
    lse = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(denominator) * LN2)
    tl.store(lse_ptr + row_offsets(stride_lse, sequences, heads, rows), lse, mask=mask_m)
    out = (acc / denominator[:, None]).to(out_ptr.dtype.element_ty)
    offsets = row_offsets(stride_out, sequences, heads, rows)[:, None] + offs_v.to(tl.int64)[None, :] * stride_out.d
    tl.store(out_ptr + offsets, out, mask=mask)
