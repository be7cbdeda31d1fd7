"""The words that describe a call of block_sparse_attention, and the lists that it takes."""

from __future__ import annotations

from functools import lru_cache

import torch

from iokernels.ops.block_sparse_attention.index import KEY_BLOCKS, BlockIndex
from iokernels.testing.case.shape import Dimension, Shape, UsageError, Vocabulary

VOCABULARY = Vocabulary(
    "block_sparse_attention",
    (
        Dimension("b", 1, "sequences", always=True),
        Dimension("h", 32, "query heads", least=1, always=True),
        Dimension("hkv", "h", "key and value heads; divides h", least=1),
        Dimension("n", 16384, "queries of a sequence", always=True),
        Dimension("nk", "n", "keys of a sequence"),
        Dimension("d", 128, "width of q and k", least=1, always=True),
        Dimension("dv", "d", "width of v", least=1),
        Dimension("bq", 64, "rows of a query block: a multiple of 16 up to 128, or n at least"),
        Dimension("bk", 64, "keys of a key block: 8, 16, 32, 64 or 128"),
        Dimension("budget", 2048, "keys that a list shows, at most; rounded up to blocks", always=True),
        Dimension("sink", 128, "first keys that every row sees"),
        Dimension("window", 1024, "latest keys that a row sees"),
        Dimension("lists", 1, "0: one list for all heads; 1: one a key head; 2: one a query head", most=2),
        Dimension("ragged", 0, "1: lists of all lengths, from nothing to the budget", most=1),
        Dimension("dense", 0, "1: the last query block of the last list sees all keys", most=1),
        Dimension("causal", 1, "1: row i sees the keys up to i + nk - n", most=1),
        Dimension("lse", 0, "1: the log-sum-exp is returned, and a gradient flows into it", most=1),
        Dimension("bnhd", 0, "1: tensors stored as [b, n, h, d], passed as transposed views", most=1),
        Dimension("gain", 1.0, "factor of q: more makes the attention peaked"),
    ),
)

POISON = 2**30
"""What stands in the lists where nothing may be read."""


def list_heads(shape: Shape) -> int:
    """How many lists a query block has."""
    return (1, shape.hkv, shape.h)[shape.lists]


def query_blocks(shape: Shape) -> int:
    """How many query blocks there are."""
    return 1 if shape.bq >= shape.n else -(-shape.n // shape.bq)


@lru_cache(maxsize=8)
def index_of(shape: Shape, seed: int) -> BlockIndex:
    """Lists on the CPU: of the blocks that a query block may see, one at random out of each of equal strata.

    Raises:
        UsageError: heads, block sizes or lengths do not go together.
    """
    if shape.h % shape.hkv:
        raise UsageError(f"shape: hkv={shape.hkv} does not divide h={shape.h}")
    if shape.bk not in KEY_BLOCKS:
        raise UsageError(f"shape: bk={shape.bk} is none of {', '.join(map(str, KEY_BLOCKS))}")
    if shape.bq < shape.n and (shape.bq % 16 or not 16 <= shape.bq <= 128):
        raise UsageError(f"shape: bq={shape.bq} is neither a multiple of 16 up to 128 nor as long as n={shape.n}")
    generator = torch.Generator().manual_seed(seed)
    heads, blocks = list_heads(shape), query_blocks(shape)
    key_blocks = -(-shape.nk // shape.bk)
    room = min(-(-shape.budget // shape.bk), key_blocks)
    last = torch.arange(1, blocks + 1) * (shape.n if blocks == 1 else shape.bq)
    stop = last.clamp(max=shape.n) + shape.nk - shape.n if shape.causal else torch.full((blocks,), shape.nk)
    limit = (-(-stop // shape.bk)).clamp(0, key_blocks)[:, None]
    stratum = torch.arange(room)
    first, end = stratum * limit // max(room, 1), (stratum + 1) * limit // max(room, 1)
    draw = torch.rand((shape.b, heads, blocks, room), generator=generator)
    ids = first + (draw * (end - first)).long().clamp(max=(end - first - 1).clamp(min=0))
    # A sequence with fewer blocks than strata has strata of none: those that remain move to the front.
    ids = torch.where(end > first, ids, POISON).sort(-1).values
    counts = (end > first).sum(-1).expand(shape.b, heads, -1)
    if shape.ragged:
        counts = (torch.rand(counts.shape, generator=generator) * (counts + 1)).long()
    counts = counts.clone()
    if shape.dense and counts.numel():
        counts[:, -1, -1] = -1
    ids = torch.where(stratum < counts[..., None], ids, POISON)
    return BlockIndex(
        ids.to(torch.int32), counts.to(torch.int32), shape.bq, shape.bk, shape.sink, shape.window, shape.n, shape.nk
    )
