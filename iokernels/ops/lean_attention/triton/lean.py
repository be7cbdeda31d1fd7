"""LeanAttention in Triton (Sanovar et al., 2024, arXiv:2405.10480, section 4): equal shares of all keys.

The tiles of BLOCK_N keys of all items (:mod:`.walk`) form one line: items of a sequence after those of the one
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

from .walk import VARYING, Numbers, finish, first_key, first_tile, length_of, load_queries, row_of, tiles_of, walk

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
def _line(seqlens_ptr, numbers, FEATURES: tl.constexpr, SIZES: tl.constexpr):
    """How long the line is, and how many blocks share it: each gets LEAST tiles at least, and no item is cut into more
    than about MOST_PARTS."""
    total = 0
    longest = 0
    for first in range(0, numbers.batch, SEQUENCES):
        tiles = _tiles_of_many(seqlens_ptr, first, numbers, FEATURES, SIZES.BLOCK_N)
        total += tl.sum(tiles)
        longest = tl.maximum(longest, tl.max(tiles))
    total = total * numbers.kv_heads * numbers.row_tiles
    share = tl.maximum((longest + SIZES.MOST_PARTS - 1) // SIZES.MOST_PARTS, SIZES.LEAST)
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


@triton.jit(do_not_specialize=VARYING)
def lean_attention_kernel(
    inputs,
    results,  # with a workspace of two slots a block
    arrivals_ptr,  # int32 [items], all 0 before and after
    batch,
    rows,
    group,
    kv_heads,
    row_tiles,
    capacity,
    pages,
    window_left,
    window_right,
    stride_table,
    scales,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Block ``program_id(0)`` takes its share of the line of tiles."""
    numbers = Numbers(
        batch, rows, group, kv_heads, row_tiles, capacity, pages, window_left, window_right,
        scales.qk_scale, scales.softcap,
    )  # fmt: skip
    seqlens_ptr = inputs.seqlens_ptr
    lanes = kv_heads * row_tiles
    block = tl.program_id(0)
    total, parts = _line(seqlens_ptr, numbers, FEATURES, SIZES)
    if block < parts:
        start = _share_start(block, total, parts)
        stop = _share_start(block + 1, total, parts)
        sequence, before = _sequence_at(start, seqlens_ptr, numbers, FEATURES, SIZES.BLOCK_N)
        tile = start
        while tile < stop:
            length = length_of(seqlens_ptr, sequence, numbers)
            tiles = tiles_of(length, numbers, FEATURES, SIZES.BLOCK_N)
            lane = (tile - before) // tiles
            item_start = before + lane * tiles
            item_stop = item_start + tiles
            segment_stop = tl.minimum(item_stop, stop)
            kv_head = lane // row_tiles

            own = row_of(sequence, kv_head, lane % row_tiles, numbers, FEATURES, SIZES.BLOCK_M)
            q = load_queries(inputs.q, own, SIZES)
            shift = first_tile(length, numbers, FEATURES, SIZES.BLOCK_N) - item_start
            first_read, low = (tile + shift) * SIZES.BLOCK_N, first_key(length, numbers, FEATURES)
            stop_read = tl.minimum((segment_stop + shift) * SIZES.BLOCK_N, length)
            m_i, l_i, acc = walk(
                q, length - rows + own.positions, first_read, low, stop_read, inputs, stride_table, sequence, kv_head,
                numbers, FEATURES, SIZES,
            )  # fmt: skip

            complete = segment_stop - tile == tiles
            if not complete:
                slot = 2 * block + (tile > start).to(tl.int32)
                store_partial(
                    results.partial_ptr, slot, m_i, l_i, acc, own.used, SIZES.VALUE_DIM, SIZES.BLOCK_V, SIZES.BLOCK_M
                )
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
                        results.partial_ptr, 2 * first + inside, 2 * first + 2, 2, count, own.used,
                        SIZES.VALUE_DIM, SIZES.BLOCK_V, SIZES.BLOCK_M, NATURAL,
                    )  # fmt: skip
            if complete:
                finish(m_i, l_i, acc, own, inputs.sinks_ptr, results, FEATURES, SIZES)
            if segment_stop == before + tiles * lanes:
                before = segment_stop
                sequence += 1
            tile = segment_stop
