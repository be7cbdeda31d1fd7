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
from iokernels.ops.shared.triton_tiles import LN2, LOG2E, View, load_tile, tanh, tile_offsets

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
    all_sequences: bool  # an item's rows are those of a key head of the whole batch: the readers of a prefix


class Inputs(NamedTuple):
    """What the kernels read; of a common prefix, k and v are [1, Hkv, P, D or Dv]."""

    q: View  # [B, Hq, Nq, D]
    k: View  # [B, Hkv, N, D] or [pages, Hkv, page, D]
    v: View  # likewise, Dv
    k_scale: View  # float32, a factor of each head or of each key, or None
    v_scale: View
    seqlens_ptr: Any  # int32 [B]
    table_ptr: Any  # int32 [B, most pages] or None
    sinks_ptr: Any  # [Hq] or None


class Results(NamedTuple):
    """What they write, and the result of a common prefix that is merged in."""

    out: View  # [B, Hq, Nq, Dv]; of a prefix float32
    lse: View  # float32 [B, Hq, Nq]
    prefix_out: View  # float32 [B, Hq, Nq, Dv] or None
    prefix_lse_ptr: Any  # float32, in the order of lse, or None
    partial_ptr: Any  # float32 [slots, BLOCK_M, 2 + Dv]; any where no item is cut


class Scales(NamedTuple):
    """``qk_scale`` is the scale, over the softcap where there is one."""

    qk_scale: Any
    softcap: Any


class Sizes(NamedTuple):
    """Tile shapes, as a kernel is compiled for them."""

    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_M: int
    BLOCK_N: int
    WIDE: bool  # offsets inside a tile need 64 bits
    PRECISION: str
    LEAST: int  # tiles of the smallest share
    MOST_PARTS: int  # into which an item is cut, about


VARYING = (
    "batch", "rows", "group", "kv_heads", "row_tiles", "capacity", "pages", "window_left", "window_right",
    "stride_table",
)  # fmt: skip
"""Integers that vary between calls: one compiled kernel serves all of them."""


class Numbers(NamedTuple):
    """Numbers that every block needs."""

    batch: Any
    rows: Any  # Nq
    group: Any  # query heads of a key head
    kv_heads: Any
    row_tiles: Any  # of an item's sequence and key head
    capacity: Any  # keys that a sequence can have
    pages: Any  # of the caches, where there are pages
    window_left: Any
    window_right: Any
    qk_scale: Any
    softcap: Any


class Rows(NamedTuple):
    """What each of an item's BLOCK_M rows is, and how many of them there are."""

    sequences: Any
    heads: Any
    positions: Any  # of Nq
    used: Any


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
def keys_of(inputs, stride_table, sequence, head, FEATURES: tl.constexpr):
    """The pointers of k, v, their factors and the page table, moved to one key head of one sequence: of all pages,
    where there are pages."""
    # Zeros stand for what is absent: a function cannot return None among other values.
    sequence, head = tl.cast(sequence, tl.int64), tl.cast(head, tl.int64)
    at = sequence
    pages = 0
    if FEATURES.page > 0:
        at = sequence * 0
        pages = inputs.table_ptr + sequence * stride_table
    k_scale, v_scale = 0, 0
    if FEATURES.k_scale == BY_HEAD:
        k_scale = inputs.k_scale.ptr + head
    if FEATURES.k_scale == BY_KEY:
        k_scale = inputs.k_scale.ptr + at * inputs.k_scale.b + head * inputs.k_scale.h
    if FEATURES.v_scale == BY_HEAD:
        v_scale = inputs.v_scale.ptr + head
    if FEATURES.v_scale == BY_KEY:
        v_scale = inputs.v_scale.ptr + at * inputs.v_scale.b + head * inputs.v_scale.h
    k_head = inputs.k.ptr + at * inputs.k.b + head * inputs.k.h
    v_head = inputs.v.ptr + at * inputs.v.b + head * inputs.v.h
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
    rows_read = keys
    if FEATURES.left:
        rows_read = tl.where(keys < low, stop, keys)
    if FEATURES.page > 0:
        rows = page.to(tl.int64) * stride.b + (keys % FEATURES.page).to(tl.int64) * stride.n
        offsets = rows[:, None] + columns.to(tl.int64)[None, :] * stride.d
        return load_tile(ptr, offsets, rows_read, columns, stop, WIDTH, BLOCK, True)
    else:
        start = ptr + tl.cast(first, tl.int64) * stride.n
        offsets = tile_offsets(stride, keys - first, columns, WIDE)
        return load_tile(start, offsets, rows_read, columns, stop, WIDTH, BLOCK, True)


@triton.jit
def load_factors(ptr, stride, page, keys, low, stop, FEATURES: tl.constexpr):
    """The scale of each key."""
    mask_n = keys < stop
    if FEATURES.left:
        mask_n = mask_n & (keys >= low)
    if FEATURES.page > 0:
        offsets = page.to(tl.int64) * stride.b + (keys % FEATURES.page).to(tl.int64) * stride.n
    else:
        offsets = keys.to(tl.int64) * stride.n
    return tl.load(ptr + offsets, mask=mask_n, other=0.0)


@triton.jit
def walk(
    q, position, start, low, stop, inputs, stride_table, sequence, kv_head, numbers,
    FEATURES: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """(m, l, acc) of the rows ``q [BLOCK_M, BLOCK_D]``, which stand at ``position``, over the keys ``[start, stop)`` of
    one key head of one sequence.

    ``start`` is a multiple of BLOCK_N; no row sees a key before ``low``, and none is read there.
    """
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pages_ptr = keys_of(inputs, stride_table, sequence, kv_head, FEATURES)
    # Inside a loop, strides of 1 stay known only in a tuple that is no part of another.
    stride_k, stride_v, stride_k_scale, stride_v_scale = inputs.k, inputs.v, inputs.k_scale, inputs.v_scale
    offs_n, offs_d, offs_v = tl.arange(0, SIZES.BLOCK_N), tl.arange(0, SIZES.BLOCK_D), tl.arange(0, SIZES.BLOCK_V)
    m_i = tl.full([SIZES.BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.full([SIZES.BLOCK_M], 0.0, tl.float32)
    acc = tl.full([SIZES.BLOCK_M, SIZES.BLOCK_V], 0.0, tl.float32)
    qk_scale = numbers.qk_scale
    if FEATURES.k_scale == BY_HEAD:
        qk_scale = qk_scale * tl.load(k_scale_ptr)
    for first in tl.range(start, stop, SIZES.BLOCK_N):
        keys = first + offs_n
        page = keys
        if FEATURES.page > 0:
            mask_n = keys < stop
            if FEATURES.left:
                mask_n = mask_n & (keys >= low)
            # No number in the table leads out of the cache.
            page = tl.load(pages_ptr + keys // FEATURES.page, mask=mask_n, other=0)
            page = tl.minimum(tl.maximum(page, 0), numbers.pages - 1)
        k = load_keys(
            k_ptr, stride_k, page, first, keys, low, stop, offs_d, SIZES.HEAD_DIM, SIZES.BLOCK_D, SIZES.WIDE, FEATURES
        )
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(q, tl.trans(decoded(k, q.dtype, FEATURES)), input_precision=SIZES.PRECISION) * qk_scale
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
        v = load_keys(
            v_ptr, stride_v, page, first, keys, low, stop, offs_v, SIZES.VALUE_DIM, SIZES.BLOCK_V, SIZES.WIDE, FEATURES
        )
        v = decoded(v, q.dtype, FEATURES)
        if FEATURES.v_scale == BY_KEY:
            # Not into p, whose small weights would leave the range of float16.
            factors = load_factors(v_scale_ptr, stride_v_scale, page, keys, low, stop, FEATURES)
            v = (v.to(tl.float32) * factors[:, None]).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=SIZES.PRECISION)
    if FEATURES.v_scale == BY_HEAD:
        acc = acc * tl.load(v_scale_ptr)
    return m_i, l_i, acc


@triton.jit
def row_of(sequence, kv_head, row_tile, numbers, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of an item. Those of all sequences follow one another."""
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    own = numbers.group * numbers.rows
    count = own
    of_sequence = row * 0 + sequence
    if FEATURES.all_sequences:
        count = own * numbers.batch
        of_sequence = row // own
        row = row % own
    head = kv_head * numbers.group + row // numbers.rows
    used = tl.minimum(count - row_tile * BLOCK_M, BLOCK_M)
    return Rows(of_sequence, head, row % numbers.rows, used)


@triton.jit
def row_offsets(x, rows):
    """Offsets of the rows of a ``[B, H, N, ...]`` tensor."""
    of_sequence = rows.sequences.to(tl.int64) * x.b
    return of_sequence + rows.heads.to(tl.int64) * x.h + rows.positions.to(tl.int64) * x.n


@triton.jit
def load_queries(q, rows, SIZES: tl.constexpr):
    """The rows of an item, [BLOCK_M, BLOCK_D]; zeros past those that there are."""
    offs_m, offs_d = tl.arange(0, SIZES.BLOCK_M), tl.arange(0, SIZES.BLOCK_D)
    offsets = row_offsets(q, rows)[:, None] + offs_d.to(tl.int64)[None, :] * q.d
    return load_tile(q.ptr, offsets, offs_m, offs_d, rows.used, SIZES.HEAD_DIM, SIZES.BLOCK_D, True)


@triton.jit
def finish(m_i, l_i, acc, rows, sinks_ptr, results, FEATURES: tl.constexpr, SIZES: tl.constexpr):
    """Write out and lse of an item from the sum over its keys, the prefix and the sink.

    The result of a prefix itself stays in float32, and the sink waits.
    """
    out, lse_view, prefix_out = results.out, results.lse, results.prefix_out
    offs_m, offs_v = tl.arange(0, SIZES.BLOCK_M), tl.arange(0, SIZES.BLOCK_V)
    mask_m = offs_m < rows.used
    mask = mask_m[:, None] & (offs_v[None, :] < SIZES.VALUE_DIM)
    if FEATURES.after_prefix and not FEATURES.all_sequences:
        # A finished result is a sum whose l is 1 and whose m is its lse; nothing at all where that is -inf.
        statistics = results.prefix_lse_ptr + row_offsets(lse_view, rows)
        m_p = tl.load(statistics, mask=mask_m, other=float("-inf"))
        before = row_offsets(prefix_out, rows)[:, None] + offs_v[None, :]
        acc_p = tl.load(prefix_out.ptr + before, mask=mask, other=0.0)
        m_i, l_i, acc = merged(m_i, l_i, acc, m_p, tl.where(m_p == float("-inf"), 0.0, 1.0), acc_p, NATURAL)
    if FEATURES.sinks and not FEATURES.all_sequences:
        sink = tl.load(sinks_ptr + rows.heads, mask=mask_m, other=float("-inf")).to(tl.float32)
        m_i, l_i, acc = merged(m_i, l_i, acc, sink, tl.where(sink == float("-inf"), 0.0, 1.0), acc * 0.0, NATURAL)
    denominator = tl.where(l_i == 0.0, 1.0, l_i)
    lse = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(denominator) * LN2)
    tl.store(lse_view.ptr + row_offsets(lse_view, rows), lse, mask=mask_m)
    result = (acc / denominator[:, None]).to(out.ptr.dtype.element_ty)
    offsets = row_offsets(out, rows)[:, None] + offs_v.to(tl.int64)[None, :] * out.d
    tl.store(out.ptr + offsets, result, mask=mask)
