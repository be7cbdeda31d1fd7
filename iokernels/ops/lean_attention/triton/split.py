"""Fixed parts of every item, and a second kernel that combines them (FlashDecoding): what ``lean`` is compared
with, and what it leaves to others.

Every item (:mod:`.walk`) is cut at multiples of ``part_tiles`` tiles, which the host chooses without knowing the
lengths, and there is a block for every part that the longest sequence could have. Where lengths differ, blocks of the
short ones have nothing to do. In return a row's bits depend on its own keys and on ``part_tiles`` alone: the schedule
of batch invariance. An item of one part is finished by its block, and the second kernel passes it over.

The keys of a prefix that all sequences share go through the first kernel as one item for every BLOCK_M rows of the
whole batch (``all_sequences``), so that they are read once for all of them.

FLOPs and bytes are those of ``lean``, with a partial for each part of an item that has several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_partials import NATURAL, merge_slots, store_partial

from .walk import VARYING, Numbers, finish, first_key, first_tile, length_of, load_queries, row_of, tiles_of, walk

PARTS = ("prefix", "part_tiles", "most_parts")
"""What these kernels have beside :data:`.walk.VARYING`."""


@triton.jit
def _item(item, numbers, FEATURES: tl.constexpr):
    """The (sequence, key head, row tile) of an item. Those of a prefix belong to no one sequence."""
    lanes = numbers.kv_heads * numbers.row_tiles
    lane = item % lanes
    sequence = item // lanes
    if FEATURES.all_sequences:
        sequence = sequence * 0
    return sequence, lane // numbers.row_tiles, lane % numbers.row_tiles


@triton.jit
def _extent(
    seqlens_ptr, sequence, numbers, prefix, part_tiles, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Length, first tile and number of tiles of an item, and the number of its parts."""
    if FEATURES.all_sequences:
        # Each row has a window of its own; the kernel masks, and walks over all.
        length, start = prefix, 0
        tiles = tl.maximum((prefix + BLOCK_N - 1) // BLOCK_N, 1)
    else:
        length = length_of(seqlens_ptr, sequence, numbers)
        start = first_tile(length, numbers, FEATURES, BLOCK_N)
        tiles = tiles_of(length, numbers, FEATURES, BLOCK_N)
    return length, start, tiles, (tiles + part_tiles - 1) // part_tiles


@triton.jit(do_not_specialize=(*VARYING, *PARTS))
def lean_attention_split_kernel(
    inputs,
    results,  # with a workspace of a slot for each part
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
    prefix,  # keys before those of every sequence
    part_tiles,
    most_parts,
    scales,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Block ``program_id(0)`` is part ``id % most_parts`` of item ``id // most_parts``."""
    numbers = Numbers(
        batch, rows, group, kv_heads, row_tiles, capacity, pages, window_left, window_right,
        scales.qk_scale, scales.softcap,
    )  # fmt: skip
    item, part = tl.program_id(0) // most_parts, tl.program_id(0) % most_parts
    sequence, kv_head, row_tile = _item(item, numbers, FEATURES)
    length, start, tiles, parts = _extent(
        inputs.seqlens_ptr, sequence, numbers, prefix, part_tiles, FEATURES, SIZES.BLOCK_N
    )
    if part < parts:
        own = row_of(sequence, kv_head, row_tile, numbers, FEATURES, SIZES.BLOCK_M)
        position = length - rows + own.positions
        low = first_key(length, numbers, FEATURES)
        if FEATURES.all_sequences:
            # A position is counted from the prefix's first key, and each row's sequence has its own length.
            is_row = tl.arange(0, SIZES.BLOCK_M) < own.used
            lengths = tl.load(inputs.seqlens_ptr + own.sequences, mask=is_row, other=0)
            position = prefix + tl.minimum(tl.maximum(lengths, 0), capacity) - rows + own.positions
            # Of the prefix too only what some row sees is read: all but what is behind the window of the first one.
            if FEATURES.left:
                low = tl.min(tl.where(is_row, position, 2**30)) - window_left
        q = load_queries(inputs.q, own, SIZES)
        first = start + part * part_tiles
        last = tl.minimum(first + part_tiles, start + tiles)
        m_i, l_i, acc = walk(
            q, position, first * SIZES.BLOCK_N, low, tl.minimum(last * SIZES.BLOCK_N, length),
            inputs, stride_table, sequence, kv_head, numbers, FEATURES, SIZES,
        )  # fmt: skip
        if parts == 1:
            finish(m_i, l_i, acc, own, inputs.sinks_ptr, results, FEATURES, SIZES)
        else:
            slot = tl.program_id(0)
            store_partial(
                results.partial_ptr, slot, m_i, l_i, acc, own.used, SIZES.VALUE_DIM, SIZES.BLOCK_V, SIZES.BLOCK_M
            )


@triton.jit(do_not_specialize=(*VARYING, *PARTS))
def lean_attention_combine_kernel(
    seqlens_ptr,  # int32 [B]
    sinks_ptr,  # [Hq] or None
    results,
    batch,
    rows,
    group,
    kv_heads,
    row_tiles,
    capacity,
    window_left,
    window_right,
    prefix,
    part_tiles,
    most_parts,
    FEATURES: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Block ``program_id(0)`` merges the parts of an item, where there are several."""
    numbers = Numbers(batch, rows, group, kv_heads, row_tiles, capacity, 0, window_left, window_right, 0.0, 0.0)
    item = tl.program_id(0)
    sequence, kv_head, row_tile = _item(item, numbers, FEATURES)
    _, _, _, parts = _extent(seqlens_ptr, sequence, numbers, prefix, part_tiles, FEATURES, SIZES.BLOCK_N)
    if parts > 1:
        own = row_of(sequence, kv_head, row_tile, numbers, FEATURES, SIZES.BLOCK_M)
        slot = tl.cast(item, tl.int64) * most_parts
        m_i, l_i, acc = merge_slots(
            results.partial_ptr, slot, slot + 1, 1, parts, own.used,
            SIZES.VALUE_DIM, SIZES.BLOCK_V, SIZES.BLOCK_M, NATURAL,
        )  # fmt: skip
        finish(m_i, l_i, acc, own, sinks_ptr, results, FEATURES, SIZES)
