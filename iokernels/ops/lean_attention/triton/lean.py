"""LeanAttention in Triton (Sanovar et al., 2024, arXiv:2405.10480, section 4): equal shares of all keys.

The tiles of BLOCK_N keys of all items (:mod:`.triton_walk`) form one line: items of a sequence after those of the one
before, key head by key head. Its length T is known on the device only. Of P blocks the first ``T mod P`` take
``T div P + 1`` consecutive tiles and the others one less, so that no block has more than one tile more than another,
whatever batch, heads and lengths are; a block finds its first sequence by a prefix sum over the lengths, 256 at a time.

A share is cut into segments where an item ends. A segment that is a whole item writes its result. Otherwise its (m, l,
acc) go to the workspace, in one of the block's two slots (only its first and its last segment can be parts), and the
block counts itself in at the item. Which blocks take part follows from T and P; the last to arrive merges their
partials in the order of the blocks. So nobody waits for anybody, the order of summation does not depend on who is
late, and the counter is back at zero when the item is done.

FLOPs: 2 (D + Dv) for each query row and key that is seen. Bytes: keys and values once (for every BLOCK_M rows of a
group), q once a segment, out and lse once, 4 (Dv + 2) a row for each of at most 2 P partials, written and read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_partials import NATURAL, merge_slots, store_partial

from .walk import Numbers, finish, first_key, first_tile, keys_of, length_of, load_queries, row_of, tiles_of, walk

SEQUENCES = tl.constexpr(256)
"""Lengths that a block adds up at once."""


@triton.jit
def _tiles_of_many(seqlens_ptr, first, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of an item of each of the SEQUENCES from ``first`` on; 0 past the batch."""
    sequences = first + tl.arange(0, SEQUENCES)
    inside = sequences < numbers.batch
    lengths = tl.load(seqlens_ptr + sequences, mask=inside, other=0)
    lengths = tl.minimum(tl.maximum(lengths, 0), numbers.capacity)
    return tl.where(inside, tiles_of(lengths, numbers, FEATURES, BLOCK_N), 0)


@triton.jit
def _line(
    seqlens_ptr, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr, LEAST: tl.constexpr, MOST_PARTS: tl.constexpr
):
    """How long the line is, and how many blocks share it: each gets LEAST tiles at least, and no item is cut into more
    than about MOST_PARTS."""
    total = 0
    longest = 0
    for first in range(0, numbers.batch, SEQUENCES):
        tiles = _tiles_of_many(seqlens_ptr, first, numbers, FEATURES, BLOCK_N)
        total += tl.sum(tiles)
        longest = tl.maximum(longest, tl.max(tiles))
    total = total * numbers.kv_heads * numbers.row_tiles
    share = tl.maximum((longest + MOST_PARTS - 1) // MOST_PARTS, LEAST)
    return total, tl.maximum(tl.minimum(tl.num_programs(0), total // share), 1)


@triton.jit
def _share_start(block, total, parts):
    """The first tile of a block's share."""
    return block * (total // parts) + tl.minimum(block, total % parts)


@triton.jit
def _owner(tile, total, parts):
    """Whose share a tile is in."""
    base, extra = total // parts, total % parts
    larger = extra * (base + 1)
    return tl.where(tile < larger, tile // (base + 1), extra + (tile - larger) // base)


@triton.jit
def _sequence_at(tile, seqlens_ptr, numbers, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sequence that a tile belongs to, and the first tile of that sequence."""
    lanes = numbers.kv_heads * numbers.row_tiles
    sequence = 0
    before = 0
    reached = 0
    for first in range(0, numbers.batch, SEQUENCES):
        tiles = _tiles_of_many(seqlens_ptr, first, numbers, FEATURES, BLOCK_N) * lanes
        passed = (reached + tl.cumsum(tiles, 0) <= tile) & (tiles > 0)
        sequence += tl.sum(passed.to(tl.int32))
        before += tl.sum(tl.where(passed, tiles, 0))
        reached += tl.sum(tiles)
    return sequence, before


@triton.jit(
    do_not_specialize=["batch", "rows", "group", "kv_heads", "row_tiles", "capacity", "pages", "window_left",
                       "window_right", "qk_scale", "softcap", "stride_table"]
)  # fmt: skip
def lean_attention_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, N, D] or [pages, Hkv, page, D]
    v_ptr,  # [B, Hkv, N, Dv] or [pages, Hkv, page, Dv]
    out_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq]
    seqlens_ptr,  # int32 [B]
    table_ptr,  # int32 [B, most pages] or None
    sinks_ptr,  # [Hq] or None
    k_scale_ptr,  # float32, or None
    v_scale_ptr,  # float32, or None
    prefix_out_ptr,  # float32 [B, Hq, Nq, Dv] or None
    prefix_lse_ptr,  # float32 [B, Hq, Nq] or None
    partial_ptr,  # float32 [2 * blocks, BLOCK_M, 2 + Dv]
    arrivals_ptr,  # int32 [items], all 0 before and after
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_lse,
    stride_k_scale,
    stride_v_scale,
    stride_prefix,
    stride_table,
    batch,
    rows,
    group,
    kv_heads,
    row_tiles,
    capacity,
    pages,
    qk_scale,
    softcap,
    window_left,
    window_right,
    FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Block ``program_id(0)`` takes its share of the line of tiles."""
    numbers = Numbers(
        batch, rows, group, kv_heads, row_tiles, capacity, pages, qk_scale, softcap, window_left, window_right
    )
    lanes = kv_heads * row_tiles
    block = tl.program_id(0)
    total, parts = _line(seqlens_ptr, numbers, FEATURES, BLOCK_N, LEAST, MOST_PARTS)
    if block < parts:
        start = _share_start(block, total, parts)
        stop = _share_start(block + 1, total, parts)
        sequence, before = _sequence_at(start, seqlens_ptr, numbers, FEATURES, BLOCK_N)
        tile = start
        while tile < stop:
            length = length_of(seqlens_ptr, sequence, numbers)
            tiles = tiles_of(length, numbers, FEATURES, BLOCK_N)
            lane = (tile - before) // tiles
            item_start = before + lane * tiles
            item_stop = item_start + tiles
            segment_stop = tl.minimum(item_stop, stop)
            kv_head = lane // row_tiles

            sequences, heads, offs_row, used = row_of(sequence, kv_head, lane % row_tiles, numbers, BLOCK_M, False)
            q = load_queries(q_ptr, stride_q, sequences, heads, offs_row, used, HEAD_DIM, BLOCK_D, BLOCK_M)
            k_head, v_head, k_factor, v_factor, table = keys_of(
                k_ptr, stride_k, v_ptr, stride_v, k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale,
                table_ptr, stride_table, sequence, kv_head, FEATURES,
            )  # fmt: skip
            shift = first_tile(length, numbers, FEATURES, BLOCK_N) - item_start
            m_i, l_i, acc = walk(
                q, length - rows + offs_row, (tile + shift) * BLOCK_N, first_key(length, numbers, FEATURES),
                tl.minimum((segment_stop + shift) * BLOCK_N, length),
                k_head, v_head, k_factor, v_factor, table, stride_k, stride_v, stride_k_scale, stride_v_scale, numbers,
                FEATURES, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
            )  # fmt: skip

            complete = segment_stop - tile == tiles
            if not complete:
                store_partial(
                    partial_ptr, 2 * block + (tile > start).to(tl.int32), m_i, l_i, acc, used,
                    VALUE_DIM, BLOCK_V, BLOCK_M,
                )  # fmt: skip
                # All threads have written before one of them says so; what it then reads, all may read.
                tl.debug_barrier()
                counter = arrivals_ptr + sequence * lanes + lane
                arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                first = _owner(item_start, total, parts)
                count = _owner(item_stop - 1, total, parts) - first + 1
                complete = arrived == count - 1
                if complete:
                    tl.store(counter, 0)
                    # The item begins inside the first block's share, in its last segment, or together with it.
                    inside = (_share_start(first, total, parts) < item_start).to(tl.int32)
                    m_i, l_i, acc = merge_slots(
                        partial_ptr, 2 * first + inside, 2 * first + 2, 2, count, used, VALUE_DIM, BLOCK_V, BLOCK_M,
                        NATURAL,
                    )  # fmt: skip
            if complete:
                finish(
                    m_i, l_i, acc, sequences, heads, offs_row, used, out_ptr, lse_ptr, sinks_ptr,
                    prefix_out_ptr, prefix_lse_ptr, stride_out, stride_lse, stride_prefix,
                    FEATURES, VALUE_DIM, BLOCK_V, BLOCK_M, False,
                )  # fmt: skip
            if segment_stop == before + tiles * lanes:
                before = segment_stop
                sequence += 1
            tile = segment_stop
