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

from iokernels.ops.block_sparse_attention.arguments import keys, one_of
from iokernels.ops.block_sparse_attention.index import KEY_BLOCKS, BlockIndex
from iokernels.ops.hip_attention.options import query_blocks
from iokernels.runtime.contracts import Contract, Spec
from iokernels.runtime.contracts.plain import untraced_value, whole


def select_window(
    q: Tensor, k: Tensor, *, sink: int = 256, window: int = 1024, block_q: int = 64, block_k: int = 8
) -> BlockIndex:
    """The first ``sink`` and the latest ``window`` keys alone: empty lists, one for all heads of a sequence."""
    return _listless(_WINDOW, q, k, 0, sink, window, block_q, block_k)


def select_dense(q: Tensor, k: Tensor, *, block_q: int = 64, block_k: int = 8) -> BlockIndex:
    """All keys, without naming them: counts of -1."""
    return _listless(_DENSE, q, k, -1, 0, 0, block_q, block_k)


_WINDOW, _DENSE = (
    Contract(name, q=Spec("B Hq Nq D"), k=Spec("B Hkv Nk D")) for name in ("select_window", "select_dense")
)


def _listless(
    contract: Contract, q: Tensor, k: Tensor, count: int, sink: Any, window: Any, block_q: Any, block_k: Any
) -> BlockIndex:
    where = contract.operator
    contract.check(q=q, k=k)
    sink, window = keys(where, "sink", sink), keys(where, "window", window)
    block_q, block_k = whole(where, "block_q", block_q, least=1), one_of(where, "block_k", block_k, KEY_BLOCKS)
    shape = (q.shape[0], 1, max(query_blocks(q.shape[2], block_q), 1))
    counts = torch.full(shape, count, dtype=torch.int32, device=q.device)
    ids = torch.zeros((*shape, 1), dtype=torch.int32, device=q.device)
    lengths = map(untraced_value, (q.shape[2], k.shape[2]))
    return BlockIndex(ids, counts, block_q, block_k, sink, window, *lengths)


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
    for name, index in (("first", first), ("second", second)):
        if not isinstance(index, BlockIndex):
            raise TypeError(f"mix_heads: {name} is {type(index).__name__}; it must be a BlockIndex")
        if index.device != chosen.device:
            raise ValueError(f"mix_heads: {name} is on {index.device}; it must be on {chosen.device}, as chosen is")
    batch = {index.indices.shape[0] for index in (first, second)}
    if len(batch) > 1:
        raise ValueError(f"mix_heads: second has lists for {second.indices.shape[0]} sequences and first for "
                         f"{first.indices.shape[0]}; they must be equal")  # fmt: skip
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
    most = torch.iinfo(torch.int32).max  # as good as any longer sink or window
    ours, theirs = (
        x if isinstance(x, Tensor) else torch.full_like(chosen, min(x, most), dtype=torch.int32)
        for x in (first, second)
    )
    return torch.where(chosen, ours, theirs)
