"""``append_kv`` in Triton: one kernel turns, scales, rounds and writes keys and values.

A thread block owns BLOCK_N new rows of one key head of one sequence. It reads them once, finds the place of each row
(the position in a dense cache, or the entry of the page table), and writes them once. A key that is turned (rotary
embedding; :class:`.options.Append` has the formula) is read as its two halves of pairs and the elements past
them, so that no element is read twice.

FLOPs: a few an element. Bytes: k_new and v_new once, the written rows of the caches once; cos and sin once for each key
head; 4 for the length of each thread block and for each page that it touches; 4 written for each row that has its own
scales, for k and for v. Nothing else of the caches is read or written.

Rounding to float8_e4m3fn and int8 is done on integers, so that it needs no hardware of its own and is the same on every
GPU: to nearest, ties to even. Lengths, sizes and strides of no dimension but the innermost are compiled in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from iokernels.ops.shared.caches import as_bytes
from iokernels.ops.shared.triton_tiles import View, at_head, view
from iokernels.runtime.device import guard

from .options import SMALLEST, TOP, Append, room


class Pair(NamedTuple):
    """Of keys and values: new rows [B, Hkv, Nnew, D or Dv]; caches [B, Hkv, N, ...] or [pages, Hkv, page, ...], float8
    as bytes; or the scales of every key, float32 in the shape of the caches without D, or None."""

    k: View
    v: View


class Places(NamedTuple):
    """Where new rows go: int32 tensors, of which all but the first may be absent."""

    cache_seqlens_ptr: Any  # [B]
    new_seqlens_ptr: Any  # [B]
    positions_ptr: Any  # [B]
    block_table_ptr: Any  # [B, most pages]
    stride_page: Any  # of the table, from one page to the next


class Angles(NamedTuple):
    """The rotary table: cos and sin [P, HALF], or None."""

    cos_ptr: Any
    sin_ptr: Any
    cos_row: Any
    cos_column: Any
    sin_row: Any
    sin_column: Any


class Heads(NamedTuple):
    """The scales of heads, float32 [Hkv], or None."""

    k_ptr: Any
    v_ptr: Any


class Sizes(NamedTuple):
    """What the kernel is compiled for."""

    TOP: float  # the largest number of a quantised cache, else 0
    HALF: int  # pairs that are turned
    INTERLEAVED: bool
    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_HALF: int
    BLOCK_REST: int
    BLOCK_V: int
    BLOCK_N: int


LEAST = tl.constexpr(SMALLEST)


@triton.jit
def _offsets(stride, rows, columns):
    """Of elements of rows that lie anywhere, from the address of their head: 64-bit."""
    return rows.to(tl.int64)[:, None] * stride.n + columns.to(tl.int64)[None, :] * stride.d


@triton.jit
def _float8_bits(x):
    """The bits of the float8_e4m3fn nearest to x, ties to even, saturating; NaN stays NaN."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Of 23 bits of mantissa 3 stay; a carry goes into the exponent, as it should. Its bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 numbers are multiples of 2^-9. Adding 2^23 rounds to a whole one, which stands in the low bits.
    subnormal = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(size < 0.015625, subnormal, normal)
    return (sign | tl.where(x != x, 0x7F, code)).to(tl.uint8)


@triton.jit
def _int8(x):
    """The nearest whole number from -127 to 127, ties to even: adding 1.5 * 2^23 rounds to one, in the low bits."""
    bounded = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return ((bounded + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _store(ptr, x, mask, TOP: tl.constexpr):
    """Round float32 numbers to the dtype of the cache, which TOP tells where it is quantised, and store them."""
    if TOP == 448.0:
        tl.store(ptr, _float8_bits(x), mask=mask)
    elif TOP == 127.0:
        tl.store(ptr, _int8(x), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _divided(x, scale):
    """Rows by their scales, rounded as a division is."""
    return tl.math.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))


@triton.jit
def _scales(head_ptr, key, head, place, slot, written, largest, TOP: tl.constexpr, BLOCK_N: tl.constexpr):
    """What each row is divided by: its head's scale, or its own, which is stored; 1 without either."""
    scale = tl.full([BLOCK_N], 1.0, tl.float32)
    if head_ptr is not None:
        scale = scale * tl.load(head_ptr + head)
    elif key.ptr is not None:
        scale = tl.math.div_rn(tl.maximum(largest, LEAST), tl.full([BLOCK_N], TOP, tl.float32))
        rows = place.to(tl.int64) * key.b + slot.to(tl.int64) * key.n
        tl.store(key.ptr + tl.cast(head, tl.int64) * key.h + rows, scale, mask=written)
    return scale


@triton.jit(do_not_specialize=["heads", "blocks", "rows_new", "room", "page", "pages", "stride_table", "rows_cos"])
def append_kv_kernel(
    new,
    caches,
    key_scales,
    places,
    angles,
    head_scales,
    heads,
    blocks,  # of rows in a sequence
    rows_new,
    room,  # the capacity of a sequence
    page,
    pages,
    stride_table,  # from one sequence to the next
    rows_cos,
    SIZES: tl.constexpr,
):
    """BLOCK_N rows of one key head of one sequence."""
    pid = tl.program_id(0)
    sequence = pid // (heads * blocks)
    head = (pid // blocks) % heads
    rows = (pid % blocks) * SIZES.BLOCK_N + tl.arange(0, SIZES.BLOCK_N)
    held = tl.load(places.cache_seqlens_ptr + sequence)
    count = rows_new
    if places.new_seqlens_ptr is not None:
        count = tl.minimum(tl.load(places.new_seqlens_ptr + sequence), rows_new)
    slot = tl.maximum(held, 0) + rows
    written = (rows < count) & (slot >= 0) & (slot < room)
    place = tl.full([SIZES.BLOCK_N], 0, tl.int32) + sequence
    if places.block_table_ptr is not None:
        entry = slot // page
        table = places.block_table_ptr + tl.cast(sequence, tl.int64) * stride_table
        place = tl.load(table + entry.to(tl.int64) * places.stride_page, mask=written, other=-1)
        written = written & (place >= 0) & (place < pages)
        slot = slot - entry * page
    k_new = at_head(new.k.ptr, new.k, sequence, head, 0)
    v_new = at_head(new.v.ptr, new.v, sequence, head, 0)
    k_rows = at_head(caches.k.ptr, caches.k, 0, head, 0) + (place.to(tl.int64) * caches.k.b)[:, None]
    v_rows = at_head(caches.v.ptr, caches.v, 0, head, 0) + (place.to(tl.int64) * caches.v.b)[:, None]

    # Keys: the two halves of the pairs that are turned, and the rest. A half of width 0 is left out.
    largest = tl.full([SIZES.BLOCK_N], 0.0, tl.float32)
    if SIZES.HALF > 0:
        offs_j = tl.arange(0, SIZES.BLOCK_HALF)
        offs_a = 2 * offs_j if SIZES.INTERLEAVED else offs_j
        offs_b = offs_a + 1 if SIZES.INTERLEAVED else offs_j + SIZES.HALF
        mask_j = written[:, None] & (offs_j[None, :] < SIZES.HALF)
        a = tl.load(k_new + _offsets(new.k, rows, offs_a), mask=mask_j, other=0.0).to(tl.float32)
        b = tl.load(k_new + _offsets(new.k, rows, offs_b), mask=mask_j, other=0.0).to(tl.float32)
        first = held
        if places.positions_ptr is not None:
            first = tl.load(places.positions_ptr + sequence)
        angle = tl.minimum(tl.maximum(first + rows, 0), rows_cos - 1).to(tl.int64)[:, None]
        cos = angles.cos_ptr + angle * angles.cos_row + offs_j[None, :] * angles.cos_column
        sin = angles.sin_ptr + angle * angles.sin_row + offs_j[None, :] * angles.sin_column
        c = tl.load(cos, mask=mask_j, other=0.0).to(tl.float32)
        s = tl.load(sin, mask=mask_j, other=0.0).to(tl.float32)
        turned_a, turned_b = a * c - b * s, b * c + a * s
        largest = tl.maximum(tl.max(tl.abs(turned_a), 1), tl.max(tl.abs(turned_b), 1))
    if 2 * SIZES.HALF < SIZES.HEAD_DIM:
        offs_d = 2 * SIZES.HALF + tl.arange(0, SIZES.BLOCK_REST)
        mask_d = written[:, None] & (offs_d[None, :] < SIZES.HEAD_DIM)
        rest = tl.load(k_new + _offsets(new.k, rows, offs_d), mask=mask_d, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
    scale = _scales(head_scales.k_ptr, key_scales.k, head, place, slot, written, largest, SIZES.TOP, SIZES.BLOCK_N)
    if SIZES.HALF > 0:
        _store(k_rows + _offsets(caches.k, slot, offs_a), _divided(turned_a, scale), mask_j, SIZES.TOP)
        _store(k_rows + _offsets(caches.k, slot, offs_b), _divided(turned_b, scale), mask_j, SIZES.TOP)
    if 2 * SIZES.HALF < SIZES.HEAD_DIM:
        _store(k_rows + _offsets(caches.k, slot, offs_d), _divided(rest, scale), mask_d, SIZES.TOP)

    offs_v = tl.arange(0, SIZES.BLOCK_V)
    mask_v = written[:, None] & (offs_v[None, :] < SIZES.VALUE_DIM)
    v = tl.load(v_new + _offsets(new.v, rows, offs_v), mask=mask_v, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), 1)
    scale = _scales(head_scales.v_ptr, key_scales.v, head, place, slot, written, largest, SIZES.TOP, SIZES.BLOCK_N)
    _store(v_rows + _offsets(caches.v, slot, offs_v), _divided(v, scale), mask_v, SIZES.TOP)


def block_rows(rows_new: int) -> int:
    """Rows of a thread block: one in decoding, where there is no other; else a few, which share angles and pages."""
    return 1 if rows_new == 1 else 16


def append(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, options: Append) -> None:
    """Write as :class:`Append` defines it."""
    batch, heads, rows, head_dim = k_new.shape
    most, value_dim = room(k_cache, options.block_table), v_new.shape[3]
    block_n = block_rows(rows)
    blocks = triton.cdiv(rows, block_n)
    if batch * heads * blocks * most == 0:
        return
    table, cos, sin = options.block_table, options.cos, options.sin
    half = 0 if cos is None else cos.shape[1]
    # Vectors of a few elements, which the kernel indexes without strides.
    seqlens, counts, first, k_scale, v_scale = (
        None if x is None else x.contiguous()
        for x in (options.cache_seqlens, options.new_seqlens, options.positions, options.k_scale, options.v_scale)
    )
    sizes = Sizes(
        TOP=TOP.get(k_cache.dtype, 0.0), HALF=half, INTERLEAVED=options.interleaved, HEAD_DIM=head_dim,
        VALUE_DIM=value_dim, BLOCK_HALF=triton.next_power_of_2(max(half, 1)),
        BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)), BLOCK_V=triton.next_power_of_2(value_dim),
        BLOCK_N=block_n,
    )  # fmt: skip
    step, stride_page = _matrix(table)
    with guard(k_new.device):
        append_kv_kernel[(batch * heads * blocks,)](
            Pair(view(k_new), view(v_new)),
            Pair(view(as_bytes(k_cache)), view(as_bytes(v_cache))),
            Pair(view(options.k_key_scale), view(options.v_key_scale)),
            Places(seqlens, counts, first, table, stride_page),
            Angles(cos, sin, *_matrix(cos), *_matrix(sin)),
            Heads(k_scale, v_scale),
            heads,
            blocks,
            rows,
            min(most, 2**31 - 1),
            k_cache.shape[2],
            k_cache.shape[0],
            step,
            0 if cos is None else cos.shape[0],
            SIZES=sizes,
            num_warps=1 if block_n == 1 else 4,
        )


def _matrix(x: Tensor | None) -> tuple[int, int]:
    """The strides of a matrix."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
