"""What the selection kernels share: the query rows that a list is made for, as one tile.

The rows of all query heads that share a list are one matrix: with R means of STRIDE_Q neighbouring rows in a block,
row r of it belongs to member ``r // R`` of the group. Its limit is the last key that counts for any of its rows
(see ``stages``); a row that does not exist has the limit -1, before every key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import at_head


class Rows(NamedTuple):
    """The rows of one block of queries, of ``group`` heads from ``head``."""

    head: Any
    group: Any
    first: Any  # row of the sequence
    stop: Any  # one past the block's last row
    means: Any  # means of STRIDE_Q rows in the block
    shift: Any  # kv_len - q_len - window, or kv_len - 1 where not causal


@triton.jit
def block_rows(head, group, block, block_q, means, q_len, kv_len, window, CAUSAL: tl.constexpr):
    """The rows of a block, and one past the last key that it selects from."""
    first = block * block_q
    stop = tl.minimum(first + block_q, q_len)
    if CAUSAL:
        shift = kv_len - q_len - window
        end = tl.maximum(tl.minimum(stop + shift, kv_len), 0)
    else:
        shift = kv_len - 1
        end = kv_len + 0
    return Rows(head * group, group, first, stop, means, shift), end


@triton.jit
def load_rows(
    q_ptr, stride_q, batch, rows, tile,
    CAUSAL: tl.constexpr, STRIDE_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``(q [BLOCK_R, BLOCK_D], limits [BLOCK_R])`` of one tile of the rows."""
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    member, mean = row // rows.means, row % rows.means
    start = rows.first + mean * STRIDE_Q
    inside = (member < rows.group) & (start < rows.stop)
    after = tl.minimum(start + STRIDE_Q, rows.stop)
    columns = tl.arange(0, BLOCK_D)
    base = at_head(q_ptr, stride_q, batch, rows.head, rows.first)
    # A group's heads and a block's rows may lie further apart than 32 bits reach.
    offsets = member.to(tl.int64)[:, None] * stride_q.h + columns.to(tl.int64)[None, :] * stride_q.d
    if STRIDE_Q == 1:
        moved = offsets + (start - rows.first).to(tl.int64)[:, None] * stride_q.n
        q = tl.load(base + moved, mask=inside[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
    else:
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for step in tl.static_range(STRIDE_Q):
            mask = (inside & (start + step < after))[:, None] & (columns[None, :] < HEAD_DIM)
            moved = offsets + (start + step - rows.first).to(tl.int64)[:, None] * stride_q.n
            total += tl.load(base + moved, mask=mask, other=0.0).to(tl.float32)
        held = tl.maximum(after - start, 1).to(tl.float32)
        q = (total / held[:, None]).to(q_ptr.dtype.element_ty)
    if CAUSAL:
        limits = tl.where(inside, after - 1 + rows.shift, -1)
    else:
        limits = tl.where(inside, rows.shift, -1)
    return q, limits


@triton.jit
def load_keys(k_head, stride_k, numbers, wanted, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``numbers [C]`` of one head, zeros where not wanted: [C, BLOCK_D]. They lie anywhere: 64-bit offsets."""
    columns = tl.arange(0, BLOCK_D)
    offsets = numbers.to(tl.int64)[:, None] * stride_k.n + columns.to(tl.int64)[None, :] * stride_k.d
    return tl.load(k_head + offsets, mask=wanted[:, None] & (columns[None, :] < HEAD_DIM), other=0.0)
