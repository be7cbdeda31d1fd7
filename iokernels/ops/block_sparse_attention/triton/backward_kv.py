"""Kernel 2 of the backward pass: dk and dv. The maths and the accounts of both are in ``backward_q``; the lists
are those of :mod:`iokernels.ops.block_sparse_attention.index.transposed`.

A thread block owns BLOCK_N keys of one key head and walks over the rows of all its query heads, in four parts,

    the list        rows of the query blocks that list a key block of the tile
    dense rows      rows whose lists have every key
    the sink        for keys of the sink, every other row
    the window      rows from the first key's position to ``window`` behind the last key's

where a pair of a row and a key counts in the part in which the forward pass counted it. It is one flat loop of steps of
BLOCK_M rows: with a loop for each part the accumulators would spill. Tiles lie as [keys, rows], so that no result of a
matrix product has to be transposed before the next one. Key tiles start with the first keys: those of the sink, which
have the longest walks.

Bytes that blocks request: k, v, dk and dv once; of each tile of keys q, dO, lse and delta of the rows it walks over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head, load_tile, store_tile, tile_offsets

from .backward_q import base_2
from .keys import row_offsets


class RowWalk(NamedTuple):
    """The parts of a walk over rows, in slots (rows of heads) and steps."""

    start: Any  # of the entries
    list_slots: Any
    list_steps: Any
    dense_slots: Any
    dense_steps: Any
    sink_row: Any
    sink_slots: Any
    sink_steps: Any
    window_row: Any
    window_slots: Any
    steps: Any


@triton.jit
def _largest(ptr, value, first, count, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The largest sink or window of a key head's lists."""
    if PER_HEAD:
        offs = tl.arange(0, BLOCK)
        return tl.maximum(tl.max(tl.load(ptr + first + offs, mask=offs < count, other=0), 0), 0)
    else:
        return value


@triton.jit
def _rows_of(
    step, walk, entries_ptr, listed_ptr, dense_ptr, packed, group, rows, query_blocks, offs_m,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows of a step: (head within the key head, row, exists, bits of the key blocks that its list names)."""
    after_list = step - walk.list_steps
    after_dense = after_list - walk.dense_steps
    after_sink = after_dense - walk.sink_steps
    by_entry = after_dense < 0
    slot = tl.where(after_list < 0, step, after_list) * BLOCK_M + offs_m
    # A step past a part has no slot in it.
    in_list = step * BLOCK_M + offs_m < walk.list_slots
    in_dense = (after_list * BLOCK_M + offs_m >= 0) & (after_list * BLOCK_M + offs_m < walk.dense_slots)
    own = packed * rows
    at = slot // own
    listed = tl.load(entries_ptr + walk.start + at, mask=in_list, other=0)
    bits = tl.load(listed_ptr + walk.start + at, mask=in_list, other=0)
    entry = tl.where(in_list, listed, tl.load(dense_ptr + at, mask=in_dense, other=0))
    in_block = slot % own
    entry_row = entry % query_blocks * rows + in_block // packed
    entry_head = entry // query_blocks * packed + in_block % packed

    in_window = after_sink >= 0
    slot = tl.where(in_window, after_sink, after_dense) * BLOCK_M + offs_m
    first = tl.where(in_window, walk.window_row, walk.sink_row)
    slots = tl.where(in_window, walk.window_slots, walk.sink_slots)
    row = tl.where(by_entry, entry_row, first + slot // group)
    head = tl.where(by_entry, entry_head, slot % group)
    exists = tl.where(by_entry, (in_list | in_dense).to(tl.int32), (slot < slots).to(tl.int32)) != 0
    return head, row, exists, bits


@triton.jit(
    do_not_specialize=["packed", "kv_heads", "group", "rows", "query_blocks", "lists", "entries", "seqlen_q",
                       "seqlen_k", "key_tiles", "spans", "sink", "window"]
)  # fmt: skip
def block_sparse_bwd_dkv_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D]
    v_ptr,  # [B, Hkv, Nk, Dv]
    dout_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq], natural log
    delta_ptr,  # float32 [B, Hq, Nq]
    dk_ptr,  # [B, Hkv, Nk, D]
    dv_ptr,  # [B, Hkv, Nk, Dv]
    starts_ptr,  # int32 [B, P, spans + 1]
    entries_ptr,  # int32 [B, P, entries]
    listed_ptr,  # int32 [B, P, entries]
    dense_ptr,  # int32 [B, P, lists * Mq]
    dense_counts_ptr,  # int32 [B, P]
    sink_ptr,  # int32 [Hm] or None
    window_ptr,  # int32 [Hm] or None
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_lse,  # of delta too
    stride_dk,
    stride_dv,
    packed,  # query heads that share a list
    kv_heads,
    group,  # query heads of a key head
    rows,  # of a query block
    query_blocks,
    lists,  # of a key head: group / packed
    seqlen_q,
    seqlen_k,
    key_tiles,
    spans,  # tiles of the transposed lists
    entries,  # room in the transposed lists of a key head
    sink,
    window,
    scale,
    qk_scale,  # scale * log2 e
    FEATURES: tl.constexpr,
    SHARED: tl.constexpr,  # one list for all heads
    SPAN: tl.constexpr,  # keys of a tile of the transposed lists: a multiple of BLOCK_N
    BLOCK_L: tl.constexpr,  # lists, rounded up
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one key head: key tiles within key heads within sequences."""
    first_key = tl.program_id(0) % key_tiles * BLOCK_N
    batch_head = tl.program_id(0) // key_tiles
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    # The first of the key head's sinks and windows.
    first_list = kv_head * lists
    if SHARED:  # one list for all heads
        first_list = kv_head * 0

    local_n, offs_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    keys = first_key + local_n
    last_key = tl.minimum(first_key + BLOCK_N, seqlen_k) - 1
    k_offsets = tile_offsets(stride_k, local_n, offs_d, FEATURES.wide)
    k_block = at_head(k_ptr, stride_k, batch, kv_head, first_key)
    k = load_tile(k_block, k_offsets, keys, offs_d, seqlen_k, HEAD_DIM, BLOCK_D, True)
    v_offsets = tile_offsets(stride_v, local_n, offs_v, FEATURES.wide)
    v_block = at_head(v_ptr, stride_v, batch, kv_head, first_key)
    v = load_tile(v_block, v_offsets, keys, offs_v, seqlen_k, VALUE_DIM, BLOCK_V, True)

    # The walk. A row's position is row + shift.
    shift = seqlen_k - seqlen_q
    # The transposed lists are contiguous: those of key heads within sequences, or one a sequence.
    owner = tl.cast(batch_head, tl.int64)
    if SHARED:
        owner = tl.cast(batch, tl.int64)
    starts = starts_ptr + owner * (spans + 1) + first_key // SPAN
    start = tl.load(starts)
    list_slots = (tl.load(starts + 1) - start) * (packed * rows)
    dense_slots = tl.load(dense_counts_ptr + owner) * (packed * rows)
    most_sink = _largest(sink_ptr, sink, first_list, lists, FEATURES.sink_heads, BLOCK_L)
    most_window = tl.minimum(_largest(window_ptr, window, first_list, lists, FEATURES.window_heads, BLOCK_L), 1 << 29)
    sink_row = 0
    if FEATURES.causal:
        sink_row = tl.maximum(first_key - shift, 0)
    sink_slots = tl.where(first_key < most_sink, tl.maximum(seqlen_q - sink_row, 0) * group, 0)
    window_row = tl.maximum(first_key - shift, 0)
    window_stop = tl.minimum(last_key + most_window - shift, seqlen_q)
    window_slots = tl.where(most_window > 0, tl.maximum(window_stop - window_row, 0) * group, 0)
    list_steps, dense_steps = tl.cdiv(list_slots, BLOCK_M), tl.cdiv(dense_slots, BLOCK_M)
    sink_steps = tl.cdiv(sink_slots, BLOCK_M)
    steps = list_steps + dense_steps + sink_steps + tl.cdiv(window_slots, BLOCK_M)
    walk = RowWalk(
        start, list_slots, list_steps, dense_slots, dense_steps, sink_row, sink_slots, sink_steps, window_row,
        window_slots, steps,
    )  # fmt: skip
    own_entries, own_listed = entries_ptr + owner * entries, listed_ptr + owner * entries
    own_dense = dense_ptr + owner * (lists * query_blocks)

    q_rows, dout_rows = at_head(q_ptr, stride_q, batch, 0, 0), at_head(dout_ptr, stride_dout, batch, 0, 0)
    lse_rows, delta_rows = at_head(lse_ptr, stride_lse, batch, 0, 0), at_head(delta_ptr, stride_lse, batch, 0, 0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for step in tl.range(0, walk.steps):
        local_head, row, exists, bits = _rows_of(
            step, walk, own_entries, own_listed, own_dense, packed, group, rows, query_blocks, offs_m, BLOCK_M
        )
        exists = exists & (row < seqlen_q)
        head = kv_head * group + local_head
        position = row + shift
        q_offsets = row_offsets(stride_q, head, row, FEATURES)
        q = load_tile(
            q_rows, q_offsets[:, None] + offs_d[None, :] * stride_q.d, tl.where(exists, 0, 1), offs_d, 1, HEAD_DIM,
            BLOCK_D, True,
        )  # fmt: skip
        dout_offsets = row_offsets(stride_dout, head, row, FEATURES)
        dout = load_tile(
            dout_rows, dout_offsets[:, None] + offs_v[None, :] * stride_dout.d, tl.where(exists, 0, 1), offs_v, 1,
            VALUE_DIM, BLOCK_V, True,
        )  # fmt: skip
        statistics = row_offsets(stride_lse, head, row, FEATURES)
        # A row that does not exist has lse = inf, and weighs nothing.
        lse_log2 = base_2(tl.load(lse_rows + statistics, mask=exists, other=float("-inf")))
        delta = tl.load(delta_rows + statistics, mask=exists, other=0.0)

        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale
        by_entry = step < list_steps + dense_steps
        in_list = step < list_steps
        # Whether a listed row sees all keys of the tile, and counts them here.
        earliest = tl.min(tl.where(exists, position, 1 << 30), 0)
        partial = (first_key < most_sink) | (last_key > earliest - most_window) | (step >= list_steps + dense_steps)
        if FEATURES.block_k < SPAN:
            unlisted = tl.max(tl.where(exists & (bits != (1 << (SPAN // FEATURES.block_k)) - 1), 1, 0), 0)
            partial = partial | (in_list & (unlisted != 0))
        if partial:
            own_sink, own_window = sink + row * 0, window + row * 0
            row_list = first_list + local_head // packed
            if FEATURES.sink_heads:
                own_sink = tl.maximum(tl.load(sink_ptr + row_list, mask=exists, other=0), 0)
            if FEATURES.window_heads:
                own_window = tl.maximum(tl.load(window_ptr + row_list, mask=exists, other=0), 0)
            own_window = tl.minimum(own_window, 1 << 29)
            in_sink = keys[:, None] < own_sink[None, :]
            in_window = (keys[:, None] <= position[None, :]) & (keys[:, None] > (position - own_window)[None, :])
            # The part in which a pair counts: 0 the list, 1 the sink, 2 the window.
            wanted = tl.where(by_entry, 0, tl.where(step < list_steps + dense_steps + sink_steps, 1, 2))
            shown = tl.where(in_sink, 1, tl.where(in_window, 2, 0)) == wanted
            if FEATURES.block_k < SPAN:
                listed = (bits[None, :] >> (keys % SPAN // FEATURES.block_k)[:, None]) & 1
                shown = shown & (tl.where(in_list, listed, 1) != 0)
            if FEATURES.causal:
                shown = shown & (keys[:, None] <= position[None, :])
            scores = tl.where(shown, scores, float("-inf"))
        p = tl.exp2(scores - lse_log2[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_offsets = tile_offsets(stride_dk, local_n, offs_d, FEATURES.wide)
    dk_block = at_head(dk_ptr, stride_dk, batch, kv_head, first_key)
    store_tile(dk_block, dk_offsets, (dk * scale).to(dk_ptr.dtype.element_ty), keys, offs_d, seqlen_k, HEAD_DIM)
    dv_offsets = tile_offsets(stride_dv, local_n, offs_v, FEATURES.wide)
    dv_block = at_head(dv_ptr, stride_dv, batch, kv_head, first_key)
    store_tile(dv_block, dv_offsets, dv.to(dv_ptr.dtype.element_ty), keys, offs_v, seqlen_k, VALUE_DIM)
