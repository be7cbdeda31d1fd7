"""One stage of hierarchical selection in Triton: the search for the best key of every chunk (InfiniteHiP, Lee et al.,
2025, arXiv:2502.08910, section 3).

A thread block owns BLOCK_C chunks of CHUNK keys for one block of queries and one searched head. Each chunk keeps an
interval [l, r), at first the part of it that may be selected from, and halves it log2 CHUNK times:

    c = (l + r) // 2    a = (l + c) // 2    b = (c + r) // 2
    s_a = max over rows of q . k_a          s_b likewise, a key counting only for rows whose limit it is within
    s = max(s, s_a, s_b)                    [l, r) = [l, c) if s_a > s_b else [c, r)

and s is its score. The chunks do not wait for one another; only choosing among them (``best``) does.

FLOPs: 4 R D log2 CHUNK a chunk, for R rows (means of neighbouring queries of a group's heads). Bytes that blocks
request: 2 D log2 CHUNK elements of K for each chunk that is not empty, of the CHUNK D that it has; the rows of q once
for every BLOCK_C chunks (once in every step where they take several tiles); of a list, one number for
each of its parts; 4 bytes of score a chunk. A block whose chunks are all empty reads nothing but their numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head

from .rows import block_rows, load_keys, load_rows


@triton.jit(
    do_not_specialize=[
        "heads", "group", "kv_group", "blocks", "block_q", "means", "q_len", "kv_len", "chunks", "slots", "lists",
        "sink", "window",
    ]
)  # fmt: skip
def hip_attention_stage_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    k_ptr,  # [B, Hkv, N, D]
    ids_ptr,  # int32 [B, lists, Mq, slots], the stage before; anything where not LISTED
    counts_ptr,  # int32 [B, lists, Mq]
    scores_ptr,  # float32 [B, heads, Mq, chunks]
    stride_q,
    stride_k,
    heads,  # searched heads
    group,  # query heads to a searched head
    kv_group,  # searched heads to a key head
    blocks,  # Mq
    block_q,
    means,
    q_len,
    kv_len,
    chunks,
    slots,
    lists,
    sink,
    window,
    LISTED: tl.constexpr,
    RATIO: tl.constexpr,  # chunks that one of the stage before is divided into
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,  # log2 CHUNK
    STRIDE_Q: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scores of BLOCK_C chunks, -inf of those that are empty."""
    tiles = tl.cdiv(chunks, BLOCK_C)
    tile = tl.program_id(0) % tiles
    row_list = tl.program_id(0) // tiles
    block, batch_head = row_list % blocks, row_list // blocks
    batch, head = batch_head // heads, batch_head % heads
    rows, end = block_rows(head, group, block, block_q, means, q_len, kv_len, window, CAUSAL)

    slot = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = slot < chunks
    number = slot
    if LISTED:
        one = tl.cast((batch * lists + tl.minimum(head, lists - 1)) * blocks + block, tl.int64)
        exists = exists & (slot // RATIO < tl.load(counts_ptr + one))
        parent = tl.load(ids_ptr + one * slots + slot // RATIO, mask=exists, other=0)
        number = parent * RATIO + slot % RATIO
    left = tl.maximum(number * CHUNK, sink)
    right = tl.minimum((number + 1) * CHUNK, end)
    alive = exists & (left < right)

    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    if tl.max(alive.to(tl.int32), 0) > 0:
        k_head = at_head(k_ptr, stride_k, batch, head // kv_group, 0)
        if ROW_TILES == 1:
            q, limits = load_rows(q_ptr, stride_q, batch, rows, 0, CAUSAL, STRIDE_Q, HEAD_DIM, BLOCK_D, BLOCK_R)
        for _step in range(STEPS):
            centre = (left + right) // 2
            low, high = (left + centre) // 2, (centre + right) // 2
            k_low = load_keys(k_head, stride_k, low, alive, HEAD_DIM, BLOCK_D)
            k_high = load_keys(k_head, stride_k, high, alive, HEAD_DIM, BLOCK_D)
            first = tl.full([BLOCK_C], float("-inf"), tl.float32)
            second = tl.full([BLOCK_C], float("-inf"), tl.float32)
            for row_tile in range(ROW_TILES):
                if ROW_TILES > 1:
                    q, limits = load_rows(
                        q_ptr, stride_q, batch, rows, row_tile, CAUSAL, STRIDE_Q, HEAD_DIM, BLOCK_D, BLOCK_R
                    )  # fmt: skip
                logits = tl.dot(q, tl.trans(k_low), input_precision=PRECISION)
                logits = tl.where(low[None, :] <= limits[:, None], logits, float("-inf"))
                first = tl.maximum(first, tl.max(logits, 0))
                logits = tl.dot(q, tl.trans(k_high), input_precision=PRECISION)
                logits = tl.where(high[None, :] <= limits[:, None], logits, float("-inf"))
                second = tl.maximum(second, tl.max(logits, 0))
            best = tl.maximum(best, tl.maximum(first, second))
            # Where one key is left, both halves are that key, and the second one is the interval again.
            lower = first > second
            right = tl.where(lower, centre, right)
            left = tl.where(lower, left, centre)
    score = tl.where(alive, best, float("-inf"))
    tl.store(scores_ptr + tl.cast(row_list, tl.int64) * chunks + slot, score, mask=slot < chunks)
