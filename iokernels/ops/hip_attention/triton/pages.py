"""Upper bounds of the logits of a page of keys in Triton (Quest, Tang et al., 2024, arXiv:2406.10774, section 3).

For a page with the column-wise least and largest keys ``kmin`` and ``kmax``, and every key k of it,

    q . k <= sum_d max(q_d kmin_d, q_d kmax_d) = max(q, 0) . kmax + min(q, 0) . kmin

:func:`hip_attention_bounds_kernel` makes kmin and kmax: a thread block owns BLOCK_P pages of a head and reads their
keys once. :func:`hip_attention_pages_kernel` scores pages for one block of queries and one searched head: two matrix
products with BLOCK_C pages, and the largest bound over the rows for which the page counts.

Bytes that blocks request: K once and two rows a page for the bounds. For the scores, of 2 D elements a page that may
be selected from once for each block of queries, that is 2 / page of K, and the rows of q once for every BLOCK_C pages;
4 bytes of score a page. A block of pages that may not be selected from reads nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head

from .rows import block_rows, load_keys, load_rows


@triton.jit(do_not_specialize=["heads", "kv_len", "pages", "first_page"])
def hip_attention_bounds_kernel(
    k_ptr,  # [B, Hkv, N, D]
    kmin_ptr,  # [B, Hkv, pages, D]
    kmax_ptr,
    stride_k,
    stride_min,
    stride_max,
    heads,
    kv_len,
    pages,
    first_page,  # those before it are left as they are
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """kmin and kmax of BLOCK_P pages of one head."""
    tiles = tl.cdiv(pages - first_page, BLOCK_P)
    tile, batch_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = batch_head // heads, batch_head % heads
    page = first_page + tile * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_D)
    k_head = at_head(k_ptr, stride_k, batch, head, 0)
    least = tl.full([BLOCK_P, BLOCK_D], float("inf"), tl.float32)
    most = tl.full([BLOCK_P, BLOCK_D], float("-inf"), tl.float32)
    for row in range(PAGE):
        number = page * PAGE + row
        inside = number < kv_len
        keys = load_keys(k_head, stride_k, number, inside, HEAD_DIM, BLOCK_D).to(tl.float32)
        # A page with what is not a number has no bounds; the hardware's own maximum would pass over it.
        lower = tl.minimum(least, keys, propagate_nan=tl.PropagateNan.ALL)
        higher = tl.maximum(most, keys, propagate_nan=tl.PropagateNan.ALL)
        least = tl.where(inside[:, None], lower, least)
        most = tl.where(inside[:, None], higher, most)
    mask = (page < pages)[:, None] & (columns[None, :] < HEAD_DIM)
    offsets = page.to(tl.int64)[:, None]
    low = at_head(kmin_ptr, stride_min, batch, head, 0) + offsets * stride_min.n + columns[None, :] * stride_min.d
    high = at_head(kmax_ptr, stride_max, batch, head, 0) + offsets * stride_max.n + columns[None, :] * stride_max.d
    tl.store(low, least.to(kmin_ptr.dtype.element_ty), mask=mask)
    tl.store(high, most.to(kmax_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "heads", "group", "kv_group", "blocks", "block_q", "means", "q_len", "kv_len", "pages", "sink", "window"
    ]
)  # fmt: skip
def hip_attention_pages_kernel(
    q_ptr,  # [B, Hq, Nq, D]
    kmin_ptr,  # [B, Hkv, all pages, D]
    kmax_ptr,
    scores_ptr,  # float32 [B, heads, Mq, pages]
    stride_q,
    stride_min,
    stride_max,
    heads,
    group,
    kv_group,
    blocks,
    block_q,
    means,
    q_len,
    kv_len,
    pages,
    sink,
    window,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scores of BLOCK_C pages, -inf of those that may not be selected."""
    tiles = tl.cdiv(pages, BLOCK_C)
    tile = tl.program_id(0) % tiles
    row_list = tl.program_id(0) // tiles
    block, batch_head = row_list % blocks, row_list // blocks
    batch, head = batch_head // heads, batch_head % heads
    rows, end = block_rows(head, group, block, block_q, means, q_len, kv_len, window, CAUSAL)
    page = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    first = page * PAGE
    alive = (first < end) & (first + PAGE > sink) & (page < pages)
    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    if tl.max(alive.to(tl.int32), 0) > 0:
        low_head = at_head(kmin_ptr, stride_min, batch, head // kv_group, 0)
        high_head = at_head(kmax_ptr, stride_max, batch, head // kv_group, 0)
        low = load_keys(low_head, stride_min, page, alive, HEAD_DIM, BLOCK_D)
        high = load_keys(high_head, stride_max, page, alive, HEAD_DIM, BLOCK_D)
        for row_tile in range(tl.cdiv(group * means, BLOCK_R)):
            q, limits = load_rows(q_ptr, stride_q, batch, rows, row_tile, CAUSAL, 1, HEAD_DIM, BLOCK_D, BLOCK_R)
            zero = tl.zeros_like(q)
            bound = tl.dot(tl.where(q > 0, q, zero), tl.trans(high), input_precision=PRECISION)
            bound = tl.dot(tl.where(q > 0, zero, q), tl.trans(low), bound, input_precision=PRECISION)
            bound = tl.where(first[None, :] <= limits[:, None], bound, float("-inf"))
            best = tl.maximum(best, tl.max(bound, 0))
    score = tl.where(alive, best, float("-inf"))
    tl.store(scores_ptr + tl.cast(row_list, tl.int64) * pages + page, score, mask=page < pages)
