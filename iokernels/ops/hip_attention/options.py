"""What the selectors agree on: the region that may be selected from, and one stage of the hierarchical search.

Query rows are taken in blocks of ``block_q``; all rows of a block share a list. With Nq rows, N keys and
``off = N - Nq``, row i stands at position ``i + off``. Keys before ``sink`` and the last ``window`` keys up to a row's
own position are attended to anyway, so a key j is worth selecting *for row i* if

    sink <= j <= limit_i        limit_i = i + off - window   (causal),   N - 1   (not causal)

and a block of rows selects from ``[sink, end)``, where ``end`` is one past the limit of its last row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.runtime.registration.schema import Size

HEADS = ("kv", "all", "query")
"""Who shares a list: the query heads of one key head, searched together; all heads (each key head is searched by
itself, and a chunk scores what its best head gives it); nobody."""


QUERY_BLOCKS = (16, 32, 64, 128)
"""How many query rows may share a list."""


class Region(NamedTuple):
    """From what, and for whom, a selector chooses."""

    heads: str = "kv"  # one of HEADS
    block_q: int = 64
    sink: Size = 256
    window: Size = 1024
    causal: bool = True


class HipStage(NamedTuple):
    """One stage of the hierarchical search, as a caller states it.

    Chunks of ``chunk`` keys (a power of two) compete for ``keep`` keys, which go on to the next stage; the last stage
    keeps the budget, and its chunk is the block of the list. Queries enter as means of ``stride_q`` neighbours.
    """

    chunk: int
    stride_q: int
    keep: int = 0  # not read of the last stage


STAGES = (HipStage(256, 4, 32768), HipStage(32, 4, 8192), HipStage(8, 1))
"""The published stages."""


class Stage(NamedTuple):
    """One stage of the search: what it divides, what it keeps.

    Chunks of ``chunk`` keys (a power of two, aligned to multiples of itself) each look for their best key in
    ``log2(chunk)`` halvings; the best ``slots`` chunks are listed. Queries enter as means of ``stride_q`` neighbours.
    """

    chunk: int
    stride_q: int
    slots: Size  # entries of the list it makes
    parent: int = 0  # chunk of the list it starts from; 0: it looks at all keys


def searched_heads(heads: str, q_heads: int, kv_heads: int) -> int:
    """How many heads are searched each by itself."""
    return q_heads if heads == "query" else kv_heads


def list_heads(heads: str, q_heads: int, kv_heads: int) -> int:
    """How many lists there are: the Hm of a BlockIndex."""
    return 1 if heads == "all" else searched_heads(heads, q_heads, kv_heads)


def query_blocks(rows: Any, block_q: int) -> Any:
    """Blocks of query rows."""
    return (rows + block_q - 1) // block_q


def block_end(block: int, q_len: int, kv_len: int, region: Region) -> int:
    """One past the last key that a block of query rows selects from."""
    if not region.causal:
        return kv_len
    last = min((block + 1) * region.block_q, q_len) - 1
    return max(min(last + kv_len - q_len - region.window + 1, kv_len), 0)


def most_chunks(q_len: Any, kv_len: Any, chunk: int, region: Region) -> Any:
    """Chunks up to the last that any row of a call selects from: at least 1."""
    end = kv_len - region.window if region.causal else kv_len
    return max((end + chunk - 1) // chunk, 1)


def candidates(q_len: Any, kv_len: Any, ids: Tensor | None, stage: Stage, region: Region) -> Any:
    """Chunks that a stage scores: all, or the parts of those listed."""
    if ids is None:
        return most_chunks(q_len, kv_len, stage.chunk, region)
    return ids.shape[3] * (stage.parent // stage.chunk)


def empty_lists(q: Tensor, kv_heads: int, slots: Any, region: Region) -> tuple[Tensor, Tensor]:
    """Uninitialised ``(ids int32 [B, Hm, Mq, slots], counts int32 [B, Hm, Mq])``."""
    shape = (q.shape[0], list_heads(region.heads, q.shape[1], kv_heads), query_blocks(q.shape[2], region.block_q))
    return q.new_empty((*shape, slots), dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)
