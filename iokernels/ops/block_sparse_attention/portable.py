"""Block-sparse attention in PyTorch: the backend ``torch``, for any device.

The keys of an item (a query block of the heads that share its list) are gathered side by side, those of the list, the
sink and the window, and several items make one batch of ordinary matrix products: memory and work are O(N * budget).
Items of dense rows take all keys, a few rows at a time. Sums are float32 (float64 for float64 inputs), and keys that
several items share add their gradients in a fixed order.

How long the lists are is read from the tensors, to gather no more than that: on a device, that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import empty_in_order_of, state_dtype

from .options import Gradients, Options, packed_heads

_MOST_ELEMENTS = 1 << 23
"""Numbers that the gathered keys and the scores of a batch of items may have."""


class Batch(NamedTuple):
    """Some items: n of them, with the r rows of a query block in each of their heads (R together) and L keys."""

    rows: Tensor  # int64 [n, R], indices into [B * Hq * Nq]; rows past the last are those of no row and weigh nothing
    exists: Tensor  # bool [n, R]
    keys: Tensor  # int64 [n, L], indices into keys as :func:`_flat_keys` lays them out
    shown: Tensor  # bool [n, r, L]: what each row sees, in all of its heads


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Returns (out, lse). See :class:`Options` for the arguments."""
    dtype = state_dtype(q.dtype)
    # What is returned is no view: autograd forbids to write to a view that a function returns.
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    flat_out, flat_lse = out.view(lse.numel(), v.shape[3]), lse.view(lse.numel())
    flat_q, flat_k, flat_v = (x.reshape(-1, x.shape[3]) for x in (q, k, v))
    for batch in _batches(q, k, v, options):
        queries, keys, values = _operands(flat_q, flat_k, flat_v, batch, dtype)
        scores = _scores(queries, keys, batch, options.scale)
        highest = scores.amax(-1, keepdim=True)
        highest.masked_fill_(highest == float("-inf"), 0.0)  # a row without keys
        weights = torch.exp_(scores.sub_(highest))
        denominator = weights.sum(-1, keepdim=True)
        empty = denominator == 0.0
        denominator.masked_fill_(empty, 1.0)
        result = torch.bmm(weights, values).div_(denominator)
        statistics = (highest + torch.log(denominator)).masked_fill_(empty, float("-inf")).squeeze(-1)
        flat_out.index_copy_(0, batch.rows[batch.exists], result[batch.exists].to(out.dtype))
        flat_lse.index_copy_(0, batch.rows[batch.exists], statistics[batch.exists])
    return _in_order_of(q, out), lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: Options, needs: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    """Returns the gradients that ``needs`` asks for. ``dlse`` is None where nobody used the LSE."""
    dtype = state_dtype(q.dtype)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    flat_q, flat_k, flat_v, flat_dout = (x.reshape(-1, x.shape[3]) for x in (q, k, v, dout))
    flat_delta, flat_lse = delta.reshape(-1, 1), lse.reshape(-1, 1)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=x.dtype if x is q else dtype) for x in (q, k, v))
    flat_dq, flat_dk, flat_dv = (x.view(x.shape[0] * x.shape[1] * x.shape[2], x.shape[3]) for x in (dq, dk, dv))
    for batch in _batches(q, k, v, options):
        queries, keys, values = _operands(flat_q, flat_k, flat_v, batch, dtype)
        gradient = flat_dout[batch.rows].to(dtype)
        statistics = flat_lse[batch.rows]
        statistics = statistics.masked_fill(statistics == float("-inf"), float("inf"))
        weights = torch.exp_(_scores(queries, keys, batch, options.scale).sub_(statistics))
        weights.masked_fill_(~batch.exists[..., None], 0.0)
        _add(flat_dv, batch.keys, torch.bmm(weights.mT, gradient))
        dscores = torch.bmm(gradient, values.mT).sub_(flat_delta[batch.rows]).mul_(weights).mul_(options.scale)
        flat_dq.index_copy_(0, batch.rows[batch.exists], torch.bmm(dscores, keys)[batch.exists].to(dq.dtype))
        _add(flat_dk, batch.keys, torch.bmm(dscores.mT, queries))
    found = (_in_order_of(x, grad.to(x.dtype)) for x, grad in ((q, dq), (k, dk), (v, dv)))
    return Gradients(*(grad if need else None for grad, need in zip(found, needs, strict=True)))


def _in_order_of(x: Tensor, found: Tensor) -> Tensor:
    """The contiguous ``[B, H, N, width]`` in the memory order of x."""
    return empty_in_order_of(x, found.shape[3]).copy_(found) if x.stride(1) < x.stride(2) else found


def _operands(
    flat_q: Tensor, flat_k: Tensor, flat_v: Tensor, batch: Batch, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch of items. Keys that no row sees are zero: memory there may hold anything."""
    unseen = ~batch.shown.any(1)[..., None]
    keys, values = (x[batch.keys].to(dtype).masked_fill_(unseen, 0.0) for x in (flat_k, flat_v))
    return flat_q[batch.rows].to(dtype), keys, values


def _scores(queries: Tensor, keys: Tensor, batch: Batch, scale: float) -> Tensor:
    scores = torch.bmm(queries, keys.mT).mul_(scale)
    items, rows, columns = batch.shown.shape
    by_head = scores.view(items, rows, -1, columns)
    by_head.masked_fill_(~batch.shown[:, :, None], float("-inf"))
    return scores


def _add(total: Tensor, keys: Tensor, gradient: Tensor) -> None:
    """Add the gradients of gathered keys to those of all keys, always in the same order."""
    rows, gradient = keys.flatten(), gradient.flatten(0, 1)
    if total.is_cpu:
        total.index_add_(0, rows, gradient)
    else:
        total.index_put_((rows,), gradient, accumulate=True)  # sorts; index_add_ there adds in any order


class _Items:
    """The items of a call, and which rows and keys are theirs."""

    def __init__(self, q: Tensor, k: Tensor, options: Options) -> None:
        self.q, self.k, self.options = q, k, options
        self.batch, self.heads, self.rows_q, _ = q.shape
        self.kv_heads = k.shape[1]
        lists = options.counts.shape[1]
        self.packed = packed_heads(self.heads, self.kv_heads, lists)
        self.packs = self.heads // self.packed
        self.query_blocks = options.counts.shape[2]
        self.rows = self.rows_q if self.query_blocks == 1 else options.block_q
        self.device = q.device
        self.list_of_pack = torch.arange(self.packs, device=self.device) if lists > 1 else None
        self.sink = _per_list(options.sink_heads, options.sink, lists, self.device)
        self.window = _per_list(options.window_heads, options.window, lists, self.device)

    def at(self, item: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sequence, group of heads, list, query block) of items counted through."""
        block = item % self.query_blocks
        pack = item // self.query_blocks % self.packs
        of_list = pack if self.list_of_pack is not None else pack * 0
        return item // self.query_blocks // self.packs, pack, of_list, block

    def rows_of(self, sequence: Tensor, pack: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(indices into [B * Hq * Nq], which exist) [n, R], heads side by side, and rows of the sequence [n, r]."""
        row = block[:, None] * self.rows + torch.arange(self.rows, device=self.device)
        head = pack[:, None] * self.packed + torch.arange(self.packed, device=self.device)
        exists = (row < self.rows_q)[:, :, None].expand(-1, -1, self.packed)
        row = row.clamp(max=self.rows_q - 1)
        at = (sequence[:, None, None] * self.heads + head[:, None]) * self.rows_q + row[:, :, None]
        return at.flatten(1), exists.flatten(1), row

    def lengths(self, sequence: Tensor) -> Tensor:
        """Keys of each sequence, [n, 1]."""
        seqlens = self.options.cache_seqlens
        if seqlens is None:
            return torch.full_like(sequence, self.options.kv_len)[:, None]
        return seqlens[sequence].long().clamp(0, self.options.kv_len)[:, None]

    def flat_keys(self, sequence: Tensor, pack: Tensor, keys: Tensor) -> Tensor:
        """Indices of keys [n, L] in k flattened to rows, through the page table where there is one."""
        head = (pack * self.packed // (self.heads // self.kv_heads))[:, None]
        table, length = self.options.block_table, self.k.shape[2]
        if table is None:
            return (sequence[:, None] * self.kv_heads + head) * length + keys
        page = table[sequence[:, None], keys // length].long().clamp(0, self.k.shape[0] - 1)
        return (page * self.kv_heads + head) * length + keys % length


def _per_list(heads: Tensor | None, value: int, lists: int, device: torch.device) -> Tensor:
    if heads is not None:
        return heads.long().clamp(min=0)
    return torch.full((lists,), value, dtype=torch.int64, device=device)


def _batches(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Iterator[Batch]:
    """All pairs of a row and a key that see each other, each in one batch."""
    if q.shape[0] * q.shape[1] * q.shape[2] * options.kv_len * k.numel() == 0:
        return
    items = _Items(q, k, options)
    widths = q.shape[3] + v.shape[3]
    yield from _listed(items, widths)
    yield from _dense(items, widths)


def _listed(items: _Items, widths: int) -> Iterator[Batch]:
    """Items with a list, several at a time."""
    options, device = items.options, items.device
    room = min(max(int(options.counts.max()), 0), options.indices.shape[3])
    most_sink = min(int(items.sink.max()), options.kv_len)
    most_window = min(int(items.window.max()), options.kv_len)
    behind = most_window + items.rows - 1 if most_window else 0
    offsets = [torch.arange(size, device=device) for size in (room * options.block_k, most_sink, behind)]
    sizes = [len(x) for x in offsets]
    if sum(sizes) == 0:
        return
    step = max(_MOST_ELEMENTS // (sum(sizes) * (widths + 3 * items.rows * items.packed)), 1)
    total = items.batch * items.packs * items.query_blocks
    for start in range(0, total, step):
        item = torch.arange(start, min(start + step, total), device=device)
        sequence, pack, of_list, block = items.at(item)
        count = options.counts[sequence, of_list, block].long()[:, None]
        length = items.lengths(sequence)
        shift = length - items.rows_q
        ids = options.indices[sequence, of_list, block, :room].long()
        ids = torch.where(torch.arange(room, device=device) < count, ids, -1)
        listed = ids[:, :, None] * options.block_k + torch.arange(options.block_k, device=device)
        first = block[:, None] * items.rows + shift  # position of the first row
        keys = torch.cat(
            (listed.flatten(1), offsets[1].expand(len(item), -1), first - most_window + 1 + offsets[2]), dim=1
        )
        exist = (keys >= 0) & (keys < length) & (count >= 0)
        keys = keys.clamp(0, options.kv_len - 1)

        at, exists, row = items.rows_of(sequence, pack, block)
        position = (row + shift)[:, :, None]
        shown = _counted(keys, exist, position, items.sink[of_list], items.window[of_list], sizes, options.causal)
        yield Batch(at, exists, items.flat_keys(sequence, pack, keys), shown)


def _counted(
    keys: Tensor, exist: Tensor, position: Tensor, sink: Tensor, window: Tensor, sizes: list[int], causal: bool
) -> Tensor:
    """Which of the keys [n, L] of a list, a sink and a window (``sizes``) count for rows at ``position`` [n, r, 1].

    A key that several of them show counts in the sink's, else in the window's, else in the list's.
    """
    in_sink = keys < sink[:, None]
    listed, first, recent = keys.split(sizes, 1)
    in_list, _, in_window = (exist & ~in_sink).split(sizes, 1)
    _, in_first, _ = (exist & in_sink).split(sizes, 1)
    behind = position - window[:, None, None]
    of_list = listed[:, None] <= behind
    of_sink = in_first[:, None].expand(-1, position.shape[1], -1)
    of_window = (recent[:, None] <= position) & (recent[:, None] > behind)
    if causal:
        of_sink = of_sink & (first[:, None] <= position)
    else:
        of_list |= listed[:, None] > position
    return torch.cat((of_list & in_list[:, None], of_sink, of_window & in_window[:, None]), 2)


def _dense(items: _Items, widths: int) -> Iterator[Batch]:
    """Items that see all keys, as many rows at a time as fit."""
    options, device = items.options, items.device
    heads = items.packs // options.counts.shape[1] if items.list_of_pack is None else 1
    dense = (options.counts < 0).repeat_interleave(heads, 1) if heads > 1 else options.counts < 0
    keys = torch.arange(options.kv_len, device=device)[None]
    step = max(_MOST_ELEMENTS // (3 * options.kv_len * items.packed), 1)
    for item in dense.flatten().nonzero():
        sequence, pack, _, block = items.at(item)
        length = items.lengths(sequence)
        at, exists, row = items.rows_of(sequence, pack, block)
        flat = items.flat_keys(sequence, pack, keys)
        for start in range(0, items.rows, step):
            some = row[:, start : start + step]
            shown = (keys < length)[:, None].expand(-1, some.shape[1], -1)
            if options.causal:
                shown = shown & (keys[:, None] <= (some + length - items.rows_q)[:, :, None])
            part = slice(start * items.packed, (start + step) * items.packed)
            yield Batch(at[:, part], exists[:, part], flat, shown)
