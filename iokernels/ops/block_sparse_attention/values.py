"""What the values of lists, lengths and page tables must be, checked where reading them costs no synchronisation.

On a GPU they are read by the kernels alone, which leave out blocks that do not exist and hold lengths within the
capacity. On a CPU a wrong value is named before anything is computed, on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.runtime.contracts import Contract
from iokernels.runtime.contracts.offsets import readable

from .options import Options

_CONTRACT = Contract("block_sparse_attention")


def check_values(q: Tensor, k: Tensor, options: Options) -> None:
    """Raise ``ValueError`` for the first value that names no key, page or length; nothing of what no row reads."""
    if not readable(q):
        return
    for name, values in (("sink", options.sink_heads), ("window", options.window_heads)):
        if values is not None:
            check_not_negative(_CONTRACT, name, values)
    check_lists(_CONTRACT, options.indices, options.counts, -(-options.kv_len // options.block_k))
    lengths = options.cache_seqlens
    if lengths is not None:
        _refuse(
            _CONTRACT, "cache_seqlens", lengths, (lengths < 0) | (lengths > options.kv_len),
            f"has a wrong length; each must be from 0 to the index's kv_len, {options.kv_len}",
        )  # fmt: skip
    if options.block_table is not None and q.shape[2] > 0:
        _check_table(options.block_table, k, q.shape[2], options)


def check_not_negative(contract: Contract, name: str, values: Tensor) -> None:
    """Check sinks or windows of heads."""
    _refuse(contract, name, values, values < 0, "has negative values; it must be at least 0")


def check_lists(contract: Contract, indices: Tensor, counts: Tensor, blocks: int, *, strict: bool = False) -> None:
    """Check the entries ``indices [B, Hm, Mq, S]`` that ``counts [B, Hm, Mq]`` says are valid, of ``blocks`` blocks.

    Args:
        strict: each must exist and be higher than the one before it. Otherwise numbers that no block has stand for
            nothing, and blocks may come in any order, but once.
    """
    capacity = indices.shape[3]
    if counts.numel() == 0:
        return
    _refuse(
        contract, "counts", counts, (counts < -1) | (counts > capacity),
        f"has values outside -1 to {capacity}, the length of the lists",
    )  # fmt: skip
    ids = indices[..., : max(int(counts.max()), 0)]
    listed = torch.arange(ids.shape[3], device=ids.device) < counts[..., None]
    falls = (ids[..., 1:] <= ids[..., :-1]).logical_and_(listed[..., 1:])
    if strict:
        _refuse(
            contract, "indices", ids, ((ids < 0) | (ids >= blocks)).logical_and_(listed),
            f"lists blocks outside 0 to {blocks - 1}, the key blocks that there are",
        )  # fmt: skip
        _refuse(contract, "indices", ids[..., 1:], falls, "has a list that does not ascend, or names a block twice", 1)
    elif falls.any():
        exists = listed & (ids >= 0) & (ids < blocks)
        order = torch.where(exists, ids, blocks).sort(dim=-1, stable=True)
        again = (order.values[..., 1:] == order.values[..., :-1]) & (order.values[..., 1:] < blocks)
        twice = torch.zeros_like(listed).scatter_(-1, order.indices[..., 1:], again)
        _refuse(contract, "indices", ids, twice, "has a list that names a block twice")


def _check_table(table: Tensor, k: Tensor, q_len: int, options: Options) -> None:
    """Check the entries of pages that hold a key which some row attends to."""
    pages, page = k.shape[0], k.shape[2]
    needed = -(-options.kv_len // max(page, 1))
    table = table[:, :needed]
    wrong = (table < 0) | (table >= pages)
    if wrong.any():
        wrong &= _attended(q_len, page, needed, table.shape[0], options)
    _refuse(_CONTRACT, "block_table", table, wrong, f"names pages outside 0 to {pages - 1}, the pages that there are")


def _attended(q_len: int, page: int, needed: int, batch: int, options: Options) -> Tensor:
    """bool ``[B, needed]``: the pages that hold a key which some row attends to, as the difference of how many ranges
    of keys begin and end at each."""
    counts = options.counts.long()
    query_blocks = counts.shape[2]
    rows = q_len if query_blocks == 1 else options.block_q
    lengths = torch.full((batch,), options.kv_len) if options.cache_seqlens is None else options.cache_seqlens.long()
    edges = torch.zeros(batch, needed + 1, dtype=torch.int64)

    def add(first: Tensor, stop: Tensor) -> None:
        exists = (first >= 0) & (first < stop)
        for key, sign in ((first // page, 1), ((stop - 1) // page + 1, -1)):
            at = torch.where(exists, key, needed).reshape(batch, -1)
            edges.scatter_add_(1, at, torch.full_like(at, sign))

    stop = lengths[:, None, None]
    if options.causal:
        last = ((torch.arange(query_blocks) + 1) * rows).clamp(max=q_len)
        stop = torch.minimum(stop, last + stop - q_len).clamp(min=0)
    stop = stop.expand(batch, 1, query_blocks)
    add(torch.zeros_like(counts), torch.where(counts < 0, stop, 0))
    listed = torch.arange(options.indices.shape[3]) < counts[..., None]
    first = torch.where(listed, options.indices.long(), 0) * options.block_k
    add(first, torch.where(listed, torch.minimum(first + options.block_k, stop[..., None]), 0))
    sink, window = (
        number if heads is None else int(heads.max())
        for number, heads in ((options.sink, options.sink_heads), (options.window, options.window_heads))
    )
    add(torch.zeros_like(lengths), lengths.clamp(max=sink))
    if window > 0:
        add((lengths - q_len - window + 1).clamp(min=0), lengths)
    return edges.cumsum(1)[:, :needed] > 0


def _refuse(contract: Contract, name: str, values: Tensor, wrong: Tensor, why: str, skipped: int = 0) -> None:
    """Raise for the first value that is ``wrong``; ``skipped`` of the last dimension stand before ``values``."""
    if not wrong.any():
        return
    *front, last = wrong.nonzero()[0].tolist()
    where = ", ".join(map(str, (*front, last + skipped)))
    raise ValueError(f"{contract.operator}: {name} {why}: {name}[{where}] is {int(values[(*front, last)])}")
