"""Choosing the best chunks in Triton: top-k, sort and count in one kernel, without a sort.

A thread block owns one list: it holds the N scores of its candidates, finds the value t of the K-th best bit by bit
(32 counts of how many are at least as high), keeps what is above t and as many of those at t as there is room for, from
the first, and writes them where a running count says. Candidates come in ascending order, so the list ascends; each
comes once, so it is unique; -inf is never kept, so the count is right. Equal scores: the lower chunk comes first.

Where all heads share a list, a candidate's score is the best that any head gives it.

Bytes: 4 for each score of each head, 4 for each number of the list that the candidates divide; written: at most 4 K,
and 4 for the count.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "lists", "blocks", "candidates", "slots", "most"])
def hip_attention_best_kernel(
    scores_ptr,  # float32 [B, heads, Mq, candidates]
    parents_ptr,  # int32 [B, lists, Mq, slots]: what the candidates are parts of; anything where not LISTED
    ids_ptr,  # int32 [B, lists, Mq, most]
    counts_ptr,  # int32 [B, lists, Mq]
    heads,  # scored heads
    lists,  # 1 where they share a list, else heads
    blocks,
    candidates,
    slots,
    most,
    LISTED: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,  # candidates, rounded up to a power of two
):
    """The best ``most`` candidates of one list."""
    one = tl.cast(tl.program_id(0), tl.int64)
    block, batch_list = one % blocks, one // blocks
    shared = heads // lists
    first_head = batch_list * shared
    slot = tl.arange(0, BLOCK)
    inside = slot < candidates
    score = tl.full([BLOCK], float("-inf"), tl.float32)
    for member in range(shared):
        row = (first_head + member) * blocks + block
        score = tl.maximum(score, tl.load(scores_ptr + row * candidates + slot, mask=inside, other=float("-inf")))
    exists = score > float("-inf")

    # Order-preserving integers: of a negative float, the bits below the sign count downwards. 0 stands for -inf.
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)
    order = tl.where(exists, order, 0)
    threshold = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 1 << 31, tl.uint32)
    for _step in range(32):
        higher = threshold | bit
        enough = tl.sum((order >= higher).to(tl.int32), 0) >= most
        threshold = tl.where(enough, higher, threshold)
        bit = bit >> 1
    above = exists & (order > threshold)
    level = exists & (order == threshold)
    room = most - tl.sum(above.to(tl.int32), 0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))

    number = slot
    if LISTED:
        parent = tl.load(parents_ptr + one * slots + slot // RATIO, mask=inside, other=0)
        number = parent * RATIO + slot % RATIO
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(ids_ptr + one * most + place, number, mask=kept)
    tl.store(counts_ptr + one, tl.sum(kept.to(tl.int32), 0))
