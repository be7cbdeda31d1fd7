"""Fixed parts of every item, and a second kernel that combines them (FlashDecoding): what ``lean`` is compared
with, and what it leaves to others.

Every item (:mod:`.triton_walk`) is cut at multiples of ``part_tiles`` tiles, which the host chooses without knowing the
lengths, and there is a block for every part that the longest sequence could have. Where lengths differ, blocks of the
short ones have nothing to do. In return a row's bits depend on its own keys and on ``part_tiles`` alone: the schedule
of batch invariance. An item of one part is finished by its block, and the second kernel passes it over.

The keys of a prefix that all sequences share go through the first kernel as one item for every BLOCK_M rows of the
whole batch (ALL_SEQUENCES), so that they are read once for all of them.

FLOPs and bytes are those of ``lean``, with a partial for each part of an item that has several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_partials import NATURAL, merge_slots, store_partial

from .walk import Numbers, finish, first_key, first_tile, keys_of, length_of, load_queries, row_of, tiles_of, walk


@triton.jit
def _item(item, numbers, ALL_SEQUENCES: tl.constexpr):
    """The (sequence, key head, row tile) of an item. Those of a prefix belong to no one sequence."""
    lanes = numbers.kv_heads * numbers.row_tiles
    lane = item % lanes
    sequence = item // lanes
    if ALL_SEQUENCES:
        sequence = sequence * 0
    return sequence, lane // numbers.row_tiles, lane % numbers.row_tiles


@triton.jit
def _extent(
    seqlens_ptr, sequence, numbers, prefix, part_tiles, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr,
    ALL_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Length, first tile and number of tiles of an item, and the number of its parts."""
    if ALL_SEQUENCES:
        # Each row has a window of its own; the kernel masks, and walks over all.
        length, start = prefix, 0
        tiles = tl.maximum((prefix + BLOCK_N - 1) // BLOCK_N, 1)
    else:
        length = length_of(seqlens_ptr, sequence, numbers)
        start = first_tile(length, numbers, FEATURES, BLOCK_N)
        tiles = tiles_of(length, numbers, FEATURES, BLOCK_N)
    return length, start, tiles, (tiles + part_tiles - 1) // part_tiles


@triton.jit(
    do_not_specialize=["batch", "rows", "group", "kv_heads", "row_tiles", "capacity", "pages", "window_left",
                       "window_right", "qk_scale", "softcap", "stride_table", "prefix", "part_tiles", "most_parts"]
)  # fmt: skip
def lean_attention_split_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, N, D] or [pages, Hkv, page, D]; of a prefix [1, Hkv, P, D]
    v_ptr,  # the same with Dv
    out_ptr,  # [B, Hq, Nq, Dv]; of a prefix float32
    lse_ptr,  # float32 [B, Hq, Nq]
    seqlens_ptr,  # int32 [B]
    table_ptr,  # int32 [B, most pages] or None
    sinks_ptr,  # [Hq] or None
    k_scale_ptr,  # float32, or None
    v_scale_ptr,  # float32, or None
    prefix_out_ptr,  # float32 [B, Hq, Nq, Dv] or None
    prefix_lse_ptr,  # float32 [B, Hq, Nq] or None
    partial_ptr,  # float32 [items * most_parts, BLOCK_M, 2 + Dv]; any where there is one part
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
    prefix,  # keys before those of every sequence
    part_tiles,
    most_parts,
    FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALL_SEQUENCES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Block ``program_id(0)`` is part ``id % most_parts`` of item ``id // most_parts``."""
    numbers = Numbers(
        batch, rows, group, kv_heads, row_tiles, capacity, pages, qk_scale, softcap, window_left, window_right
    )
    item, part = tl.program_id(0) // most_parts, tl.program_id(0) % most_parts
    sequence, kv_head, row_tile = _item(item, numbers, ALL_SEQUENCES)
    length, start, tiles, parts = _extent(
        seqlens_ptr, sequence, numbers, prefix, part_tiles, FEATURES, BLOCK_N, ALL_SEQUENCES
    )
    if part < parts:
        sequences, heads, offs_row, used = row_of(sequence, kv_head, row_tile, numbers, BLOCK_M, ALL_SEQUENCES)
        position = length - rows + offs_row
        low = first_key(length, numbers, FEATURES)
        if ALL_SEQUENCES:
            # A position is counted from the prefix's first key, and each row's sequence has its own length.
            is_row = tl.arange(0, BLOCK_M) < used
            own = tl.load(seqlens_ptr + sequences, mask=is_row, other=0)
            position = prefix + tl.minimum(tl.maximum(own, 0), capacity) - rows + offs_row
            # Of the prefix too only what some row sees is read: all but what is behind the window of the first one.
            if FEATURES.left:
                low = tl.min(tl.where(is_row, position, 2**30)) - window_left
        q = load_queries(q_ptr, stride_q, sequences, heads, offs_row, used, HEAD_DIM, BLOCK_D, BLOCK_M)
        k_head, v_head, k_factor, v_factor, table = keys_of(
            k_ptr, stride_k, v_ptr, stride_v, k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale,
            table_ptr, stride_table, sequence, kv_head, FEATURES,
        )  # fmt: skip
        first = start + part * part_tiles
        last = tl.minimum(first + part_tiles, start + tiles)
        m_i, l_i, acc = walk(
            q, position, first * BLOCK_N, low, tl.minimum(last * BLOCK_N, length),
            k_head, v_head, k_factor, v_factor, table, stride_k, stride_v, stride_k_scale, stride_v_scale, numbers,
            FEATURES, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, WIDE, PRECISION,
        )  # fmt: skip
        if parts == 1:
            finish(
                m_i, l_i, acc, sequences, heads, offs_row, used, out_ptr, lse_ptr, sinks_ptr,
                prefix_out_ptr, prefix_lse_ptr, stride_out, stride_lse, stride_prefix,
                FEATURES, VALUE_DIM, BLOCK_V, BLOCK_M, ALL_SEQUENCES,
            )  # fmt: skip
        else:
            store_partial(partial_ptr, tl.program_id(0), m_i, l_i, acc, used, VALUE_DIM, BLOCK_V, BLOCK_M)


@triton.jit(
    do_not_specialize=["batch", "rows", "group", "kv_heads", "row_tiles", "capacity", "window_left", "window_right",
                       "prefix", "part_tiles", "most_parts"]
)  # fmt: skip
def lean_attention_combine_kernel(
    out_ptr,  # [B, Hq, Nq, Dv]; of a prefix float32
    lse_ptr,  # float32 [B, Hq, Nq]
    seqlens_ptr,  # int32 [B]
    sinks_ptr,  # [Hq] or None
    prefix_out_ptr,  # float32 [B, Hq, Nq, Dv] or None
    prefix_lse_ptr,  # float32 [B, Hq, Nq] or None
    partial_ptr,  # float32 [items * most_parts, BLOCK_M, 2 + Dv]
    stride_out,
    stride_lse,
    stride_prefix,
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
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALL_SEQUENCES: tl.constexpr,
):
    """Block ``program_id(0)`` merges the parts of an item, where there are several."""
    numbers = Numbers(batch, rows, group, kv_heads, row_tiles, capacity, 0, 0.0, 0.0, window_left, window_right)
    item = tl.program_id(0)
    sequence, kv_head, row_tile = _item(item, numbers, ALL_SEQUENCES)
    _, _, _, parts = _extent(seqlens_ptr, sequence, numbers, prefix, part_tiles, FEATURES, BLOCK_N, ALL_SEQUENCES)
    if parts > 1:
        sequences, heads, offs_row, used = row_of(sequence, kv_head, row_tile, numbers, BLOCK_M, ALL_SEQUENCES)
        slot = tl.cast(item, tl.int64) * most_parts
        m_i, l_i, acc = merge_slots(partial_ptr, slot, slot + 1, 1, parts, used, VALUE_DIM, BLOCK_V, BLOCK_M, NATURAL)
        finish(
            m_i, l_i, acc, sequences, heads, offs_row, used, out_ptr, lse_ptr, sinks_ptr,
            prefix_out_ptr, prefix_lse_ptr, stride_out, stride_lse, stride_prefix,
            FEATURES, VALUE_DIM, BLOCK_V, BLOCK_M, ALL_SEQUENCES,
        )  # fmt: skip
