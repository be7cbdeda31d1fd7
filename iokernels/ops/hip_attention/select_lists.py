"""Lists that need no search: everything, nothing but sink and window, and a choice between two indexes head by head.

StreamingLLM (Xiao et al., 2024, arXiv:2309.17453) is :func:`select_window`. DuoAttention (Xiao et al., 2024,
arXiv:2410.10819), whose retrieval heads attend to everything and whose others stream, is::

    mix_heads(is_retrieval, select_dense(q, k), select_window(q, k, sink=128, window=1024))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_index import BlockIndex
from .select_options import query_blocks


def select_window(
    q: Tensor, k: Tensor, *, sink: int = 256, window: int = 1024, block_q: int = 64, block_k: int = 8
) -> BlockIndex:
    """The first ``sink`` and the latest ``window`` keys alone: empty lists, one for all heads of a sequence."""
    return _listless(q, k, 0, sink, window, block_q, block_k)


def select_dense(q: Tensor, k: Tensor, *, block_q: int = 64, block_k: int = 8) -> BlockIndex:
    """All keys, without naming them: counts of -1."""
    return _listless(q, k, -1, 0, 0, block_q, block_k)


def _listless(q: Tensor, k: Tensor, count: int, sink: int, window: int, block_q: int, block_k: int) -> BlockIndex:
    shape = (q.shape[0], 1, query_blocks(q.shape[2], block_q))
    counts = torch.full(shape, count, dtype=torch.int32, device=q.device)
    ids = torch.zeros((*shape, 1), dtype=torch.int32, device=q.device)
    return BlockIndex(ids, counts, block_q, block_k, sink, window, q.shape[2], k.shape[2])


def mix_heads(chosen: Tensor, first: BlockIndex, second: BlockIndex) -> BlockIndex:
    """``first`` for the heads where ``chosen`` is True, ``second`` for the others.

    Args:
        chosen: bool ``[Hm]``: one for each key head, or for each query head, on the device of the lists.
        first, second: indexes of the same queries, keys and block sizes, with lists for one head or for Hm.

    Returns:
        A :class:`BlockIndex` for Hm heads, whose sink and window are tensors, one entry a head. Nothing waits for the
        device.

    Raises:
        TypeError: ``chosen`` is not a bool tensor of one dimension.
        ValueError: the indexes do not go together, or have lists for another number of heads.
    """
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.dim() != 1:
        raise TypeError("mix_heads: chosen must be a bool tensor of 1 dimension, one entry a head")
    for name in ("block_q", "block_k", "q_len", "kv_len"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ValueError(f"mix_heads: first has {name} {ours} and second {theirs}; they must be equal")
    heads = chosen.shape[0]
    for name, index in (("first", first), ("second", second)):
        if index.indices.shape[1] not in (1, heads):
            raise ValueError(
                f"mix_heads: {name} has lists for {index.indices.shape[1]} heads; it must be 1 or {heads}, as chosen"
            )
    slots = max(first.indices.shape[3], second.indices.shape[3])
    ours, theirs = (F.pad(index.indices, (0, slots - index.indices.shape[3])) for index in (first, second))
    of_list = chosen[:, None, None]
    return BlockIndex(
        torch.where(of_list, ours, theirs),
        torch.where(chosen[:, None], first.counts, second.counts),
        first.block_q,
        first.block_k,
        _per_head(chosen, first.sink, second.sink),
        _per_head(chosen, first.window, second.window),
        first.q_len,
        first.kv_len,
    )


def _per_head(chosen: Tensor, first: Any, second: Any) -> Tensor:
    ours, theirs = (
        x if isinstance(x, Tensor) else torch.full_like(chosen, x, dtype=torch.int32) for x in (first, second)
    )
    return torch.where(chosen, ours, theirs)
