"""Block-sparse attention forward in Triton: the online softmax of FlashAttention-2 over lists of key blocks.

A thread block owns BLOCK_M rows that share a list and walks over their keys (:mod:`.keys`) in steps of
BLOCK_N, keeping for each row the largest score m so far, the denominator l and the unnormalised output acc, in float32:

    m' = max(m, max_j s_j)    p_j = 2^(s_j - m')    l' = 2^(m - m') l + sum_j p_j    acc' = 2^(m - m') acc + p v

Where there are few items (decoding), the steps of each are divided among several thread blocks, whose partial results a
second kernel merges (:mod:`iokernels.ops.shared.triton_partials`). The number of steps is known on the device
alone, so every part takes an equal share of it and the host never waits.

FLOPs: 2 (D + Dv) for each pair of a row and a key that the walk meets. Bytes that blocks request: q, out and lse once;
of each tile of rows the list once, and k and v of its listed blocks, its sink and its window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_partials import merge_slots, store_partial
from iokernels.ops.shared.triton_tiles import LN2, at_head

from .keys import (
    Numbers,
    is_partial,
    key_head,
    key_rows,
    keys_of,
    load_keys,
    load_rows,
    pages_of,
    row_offsets,
    tile_of,
    visible,
    walk_of,
)

INTEGERS = ["packed", "packs", "group", "rows", "query_blocks", "row_tiles", "entries", "seqlen_q", "seqlen_k", "sink",
            "window", "stride_table", "parts"]  # fmt: skip


@triton.jit
def _finish(
    m_i, l_i, acc, tile, out_ptr, stride_out, lse_ptr, stride_lse,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write out and lse of a tile; a row without a key has l = 0 and acc = 0."""
    offs_v = tl.arange(0, BLOCK_V)
    mask_m = tile.offs_m < tile.used
    denominator = tl.where(l_i == 0.0, 1.0, l_i)
    lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(denominator)) * LN2)
    lse_rows = row_offsets(stride_lse, tile.heads, tile.rows, FEATURES)
    tl.store(at_head(lse_ptr, stride_lse, tile.batch, 0, 0) + lse_rows, lse, mask=mask_m)
    out = (acc / denominator[:, None]).to(out_ptr.dtype.element_ty)
    out_rows = row_offsets(stride_out, tile.heads, tile.rows, FEATURES)
    offsets = out_rows[:, None] + offs_v[None, :] * stride_out.d
    mask = mask_m[:, None] & (offs_v[None, :] < VALUE_DIM)
    tl.store(at_head(out_ptr, stride_out, tile.batch, 0, 0) + offsets, out, mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def block_sparse_fwd_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, Nk, D] or [pages, Hkv, page, D]
    v_ptr,  # the same with Dv
    out_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq], natural log
    indices_ptr,  # int32 [B, Hm, Mq, S]
    counts_ptr,  # int32 [B, Hm, Mq]
    sink_ptr,  # int32 [Hm] or None
    window_ptr,  # int32 [Hm] or None
    seqlens_ptr,  # int32 [B] or None
    table_ptr,  # int32 [B, most pages] or None
    partial_ptr,  # float32 [tiles * parts, BLOCK_M, 2 + Dv]; any where there is one part
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    stride_lse,
    stride_indices,
    stride_counts,
    stride_table,
    packed,
    packs,
    group,
    rows,
    query_blocks,
    row_tiles,
    entries,
    seqlen_q,
    seqlen_k,
    sink,
    window,
    parts,  # thread blocks that share a tile of rows
    qk_scale,  # scale * log2 e
    FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of BLOCK_M rows that share a list, or a part of the sum over their keys."""
    numbers = Numbers(
        packed, packs, group, rows, query_blocks, row_tiles, entries, seqlen_q, seqlen_k, sink, window
    )  # fmt: skip
    tile = tile_of(tl.program_id(0) // parts, seqlens_ptr, numbers, FEATURES, BLOCK_M)
    if tile.used > 0:
        walk = walk_of(tile, counts_ptr, stride_counts, sink_ptr, window_ptr, numbers, FEATURES, BLOCK_N)
        list_ptr = at_head(indices_ptr, stride_indices, tile.batch, tile.pack, tile.query_block)
        k_head = key_head(k_ptr, stride_k, tile.batch, tile.kv_head, FEATURES)
        v_head = key_head(v_ptr, stride_v, tile.batch, tile.kv_head, FEATURES)
        offs_n, offs_d, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        q = load_rows(q_ptr, stride_q, tile, offs_d, HEAD_DIM, BLOCK_D, FEATURES)
        position = tile.rows + (tile.length - seqlen_q)

        part = tl.program_id(0) % parts
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for step in tl.range(walk.steps * part // parts, walk.steps * (part + 1) // parts):
            keys, shown = keys_of(step, walk, list_ptr, stride_indices.d, offs_n, FEATURES, BLOCK_N)
            pages = pages_of(table_ptr, stride_table, tile.batch, keys, shown, FEATURES)
            k_rows = key_rows(stride_k, keys, pages, FEATURES)
            k = load_keys(k_head, stride_k, k_rows, shown, offs_d, HEAD_DIM, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
            if is_partial(step, walk, keys, shown, tile):
                seen = visible(step, walk, keys[None, :], shown[None, :], position[:, None], FEATURES)
                scores = tl.where(seen, scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            # A row that has seen no key yet subtracts 0, because -inf - (-inf) is NaN.
            m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(scores - m_finite[:, None])
            alpha = tl.exp2(m_i - m_finite)
            m_i = m_new
            l_i = l_i * alpha + tl.sum(p, 1)
            v_rows = key_rows(stride_v, keys, pages, FEATURES)
            v = load_keys(v_head, stride_v, v_rows, shown, offs_v, VALUE_DIM, BLOCK_V)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

        if parts == 1:
            _finish(m_i, l_i, acc, tile, out_ptr, stride_out, lse_ptr, stride_lse, FEATURES, VALUE_DIM, BLOCK_V)
        else:
            store_partial(partial_ptr, tl.program_id(0), m_i, l_i, acc, tile.used, VALUE_DIM, BLOCK_V, BLOCK_M)


@triton.jit(do_not_specialize=INTEGERS)
def block_sparse_combine_kernel(
    out_ptr,  # [B, Hq, Nq, Dv]
    lse_ptr,  # float32 [B, Hq, Nq]
    seqlens_ptr,  # int32 [B] or None
    partial_ptr,  # float32 [tiles * parts, BLOCK_M, 2 + Dv]
    stride_out,
    stride_lse,
    packed,
    packs,
    group,
    rows,
    query_blocks,
    row_tiles,
    entries,
    seqlen_q,
    seqlen_k,
    sink,
    window,
    parts,
    FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out and lse of BLOCK_M rows from the parts of the sum over their keys."""
    numbers = Numbers(
        packed, packs, group, rows, query_blocks, row_tiles, entries, seqlen_q, seqlen_k, sink, window
    )  # fmt: skip
    tile = tile_of(tl.program_id(0), seqlens_ptr, numbers, FEATURES, BLOCK_M)
    if tile.used > 0:
        slot = tl.cast(tl.program_id(0), tl.int64) * parts
        m_i, l_i, acc = merge_slots(partial_ptr, slot, slot + 1, 1, parts, tile.used, VALUE_DIM, BLOCK_V, BLOCK_M)
        _finish(m_i, l_i, acc, tile, out_ptr, stride_out, lse_ptr, stride_lse, FEATURES, VALUE_DIM, BLOCK_V)
