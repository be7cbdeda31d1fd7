"""The selectors in vectorised PyTorch: the backend ``torch``, for any device and any floating dtype.

Blocks of query rows are taken in slabs, so that what is alive at once is a few megabytes and the scores that are
chosen from, which is ``Hm N Nq / (chunk block_q)`` numbers. Nothing waits for a device: no size depends on data.

The local search (:func:`stage`) keeps for every chunk an interval that contains its best key as far as it knows, looks
at the centre key of both halves, and goes on with the better half: log2(chunk) steps of two keys each. All keys of a
step are gathered at once, and one batched product scores them for all rows.

Equal scores: the lower chunk comes first (a stable sort), as in every backend. A score that is not a number, of one key
and one row, counts as -inf does: it is no reason to select, and hides no other score.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iokernels.ops.hip_attention.options import (
    Region,
    Stage,
    candidates,
    empty_lists,
    most_chunks,
    query_blocks,
    searched_heads,
)
from iokernels.runtime.registration.precision import at_least_single

_SLAB = 2**21
"""Elements of the largest tensor alive at once: eight megabytes, about what a core's caches hold."""


def stage(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, region: Region, stage: Stage
) -> tuple[Tensor, Tensor]:
    """One stage of the hierarchical search. See :class:`~.select_options.Stage`.

    ``ids [B, Hm, Mq, S]`` and ``counts [B, Hm, Mq]`` are the list of the stage before, or None for the first. Returns
    ``(ids, counts)`` of the best chunks, ascending.
    """
    out_ids, out_counts = empty_lists(q, k.shape[1], stage.slots, region)
    heads = searched_heads(region.heads, q.shape[1], k.shape[1])
    count = candidates(q.shape[2], k.shape[2], ids, stage, region)
    rows = q.shape[0] * heads * count * max(2 * q.shape[3], row_count(q, k, region, stage.stride_q))
    keys = Keys(q, k, heads)
    for slab in slabs(q, k, region, stage.stride_q, rows):
        blocks = slab.limits.shape[0]
        if ids is None or counts is None:
            chunk = torch.arange(count, device=q.device).expand(q.shape[0], 1, blocks, count)
            listed = torch.ones((), dtype=torch.bool, device=q.device)
        else:
            ratio = stage.parent // stage.chunk
            part = torch.arange(ratio, device=q.device)
            within = torch.arange(ids.shape[3], device=q.device) < counts[:, :, slab.blocks, None]
            # Whatever the tail holds, it must not become an address.
            parents = ids[:, :, slab.blocks].long().masked_fill(~within, 0)
            chunk = (parents[..., None] * ratio + part).flatten(3)
            listed = within.repeat_interleave(ratio, dim=3)
        left = (chunk * stage.chunk).clamp(min=region.sink)
        right = torch.minimum((chunk + 1) * stage.chunk, slab.ends[:, None])
        alive = (left < right) & listed
        scores = _search(slab, keys, left, right, stage.chunk)
        choose(scores, alive, chunk, region, out_ids[:, :, slab.blocks], out_counts[:, :, slab.blocks])
    return out_ids, out_counts


def pages(
    q: Tensor, kmin: Tensor, kmax: Tensor, kv_len: int, region: Region, page: int, slots: int
) -> tuple[Tensor, Tensor]:
    """The pages with the highest upper bounds of q . k: ``(ids, counts)``, ascending."""
    out_ids, out_counts = empty_lists(q, kmin.shape[1], slots, region)
    heads = searched_heads(region.heads, q.shape[1], kmin.shape[1])
    count = most_chunks(q.shape[2], kv_len, page, region)
    bounds = (x[:, :, :count].to(at_least_single(q.dtype)) for x in (kmin, kmax))
    low, high = (_of_heads(x, heads).transpose(2, 3)[:, :, None] for x in bounds)
    chunk = torch.arange(count, device=q.device)
    rows = q.shape[0] * heads * count * row_count(q, kmin, region, 1)
    for slab in slabs(q, kmin, region, 1, rows, kv_len):
        bounds = slab.rows.clamp(min=0) @ high + slab.rows.clamp(max=0) @ low
        bounds = highest(bounds, chunk * page > slab.limits[..., None])
        alive = (chunk * page < slab.ends[:, None]) & ((chunk + 1) * page > region.sink)
        choose(bounds, alive, chunk, region, out_ids[:, :, slab.blocks], out_counts[:, :, slab.blocks])
    return out_ids, out_counts


def exact(q: Tensor, k: Tensor, region: Region, block_k: int, slots: int) -> tuple[Tensor, Tensor]:
    """The blocks that hold the largest logits, all of which are computed: ``(ids, counts)``, ascending."""
    out_ids, out_counts = empty_lists(q, k.shape[1], slots, region)
    heads = searched_heads(region.heads, q.shape[1], k.shape[1])
    count = most_chunks(q.shape[2], k.shape[2], block_k, region)
    width = count * block_k
    keys = _of_heads(F.pad(k[:, :, :width], (0, 0, 0, max(width - k.shape[2], 0))).to(at_least_single(q.dtype)), heads)
    keys = keys.transpose(2, 3)[:, :, None]
    number, chunk = torch.arange(width, device=q.device), torch.arange(count, device=q.device)
    rows = q.shape[0] * heads * width * row_count(q, k, region, 1)
    for slab in slabs(q, k, region, 1, rows):
        logits = slab.rows @ keys
        hidden = (number > slab.limits[..., None]) | (number < region.sink)
        best = highest(logits, hidden).unflatten(-1, (count, block_k)).amax(-1)
        choose(best, best > float("-inf"), chunk, region, out_ids[:, :, slab.blocks], out_counts[:, :, slab.blocks])
    return out_ids, out_counts


def page_bounds_(k: Tensor, kmin: Tensor, kmax: Tensor, page: int, first_page: int) -> None:
    """Write the bounds of the pages from ``first_page`` on into kmin and kmax ``[B, Hkv, pages, D]``."""
    keys = k[:, :, first_page * page :]
    whole = keys.shape[2] // page
    for bounds, reduce in ((kmin, torch.amin), (kmax, torch.amax)):
        if whole > 0:
            paged = keys[:, :, : whole * page].unflatten(2, (whole, page))
            bounds[:, :, first_page : first_page + whole].copy_(reduce(paged, 3))
        if whole * page < keys.shape[2]:
            bounds[:, :, first_page + whole].copy_(reduce(keys[:, :, whole * page :], 2))


class Slab(NamedTuple):
    """Some blocks of query rows."""

    blocks: slice
    rows: Tensor  # [B, H searched, blocks, R, D] in the dtype that is computed in
    limits: Tensor  # [blocks, R]: the last key that counts for a row
    ends: Tensor  # [blocks]: one past the last key of a block


def slabs(
    q: Tensor, k: Tensor, region: Region, stride: int, elements: int, kv_len: int | None = None
) -> Iterator[Slab]:
    """The query blocks, in slabs of which each block takes ``elements`` of the largest tensor."""
    heads = searched_heads(region.heads, q.shape[1], k.shape[1])
    q_len, keys = q.shape[2], k.shape[2] if kv_len is None else kv_len
    total = query_blocks(q_len, region.block_q)
    step = max(_SLAB // max(elements, 1), 1)
    for first in range(0, total, step):
        blocks = slice(first, min(first + step, total))
        yield Slab(blocks, *_pooled(q, heads, region, stride, blocks, keys))


def _pooled(
    q: Tensor, heads: int, region: Region, stride: int, blocks: slice, kv_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(rows, limits, ends)`` of a :class:`Slab`: means of ``stride`` neighbouring rows, of a group's heads."""
    q_len, count = q.shape[2], blocks.stop - blocks.start
    reach = min(region.block_q, q_len)
    means = -(-reach // stride)
    start, stop = blocks.start * region.block_q, min(blocks.stop * region.block_q, q_len)
    part = q[:, :, start:stop].to(at_least_single(q.dtype))
    if count > 1 or means * stride != stop - start:
        each = region.block_q if count > 1 else means * stride
        part = F.pad(part, (0, 0, 0, count * each - (stop - start)))
    part = part.unflatten(2, (count, means, stride)).sum(4)
    block = torch.arange(blocks.start, blocks.stop, device=q.device)[:, None]
    first = block * region.block_q + stride * torch.arange(means, device=q.device)
    after = torch.minimum(first + stride, ((block + 1) * region.block_q).clamp(max=q_len))
    held = (after - first).clamp(min=0)
    part = (part / held.clamp(min=1)[..., None]).to(q.dtype).to(part.dtype)
    shift = kv_len - q_len
    if region.causal:
        limits = torch.where(held > 0, after - 1 + shift - region.window, -1)
        ends = (((block[:, 0] + 1) * region.block_q).clamp(max=q_len) + shift - region.window).clamp(0, kv_len)
    else:
        limits = torch.where(held > 0, kv_len - 1, -1)
        ends = torch.full_like(block[:, 0], kv_len)
    group = q.shape[1] // heads
    # Heads of a group are rows of one product.
    part = part.unflatten(1, (heads, group)).transpose(2, 3).flatten(3, 4)
    return part, limits.repeat(1, group), ends


def row_count(q: Tensor, k: Tensor, region: Region, stride: int) -> int:
    """Rows of a block that a searched head scores."""
    group = q.shape[1] // searched_heads(region.heads, q.shape[1], k.shape[1])
    return group * -(-min(region.block_q, q.shape[2]) // stride)


class Keys:
    """The keys as one table of rows, from which a step's keys are gathered."""

    def __init__(self, q: Tensor, k: Tensor, heads: int) -> None:
        batch, kv_heads, self.length, width = k.shape
        self.table = k.reshape(-1, width)
        self.dtype = at_least_single(q.dtype)
        sequence = torch.arange(batch, device=k.device)[:, None] * kv_heads
        head = torch.arange(heads, device=k.device) * kv_heads // heads
        self.first = ((sequence + head) * self.length)[:, :, None, None]

    def gather(self, numbers: Tensor) -> Tensor:
        """Keys ``numbers [B, H, blocks, C]`` as ``[B, H, blocks, D, C]``; numbers out of range are moved into it."""
        rows = numbers.clamp(0, self.length - 1) + self.first
        found = self.table.index_select(0, rows.flatten()).to(self.dtype)
        return found.view(*rows.shape, -1).transpose(3, 4)


def _search(slab: Slab, keys: Keys, left: Tensor, right: Tensor, chunk: int) -> Tensor:
    """The score of every chunk ``[left, right)``: the best logit that its search came across, [B, H, blocks, C]."""
    best = None
    for _ in range(chunk.bit_length() - 1):
        centre = (left + right) // 2
        halves = torch.cat([(left + centre) // 2, (centre + right) // 2], dim=-1)
        logits = slab.rows @ keys.gather(halves)
        hidden = halves[..., None, :] > slab.limits[..., None]
        first, second = highest(logits, hidden).chunk(2, dim=-1)
        higher = torch.maximum(first, second)
        best = higher if best is None else torch.maximum(best, higher)
        # Where one key is left, both halves are that key, and the second one is the interval again.
        lower = first > second
        left, right = torch.where(lower, left, centre), torch.where(lower, centre, right)
    assert best is not None
    return best


def highest(scores: Tensor, hidden: Tensor) -> Tensor:
    """The highest of ``scores [B, H, blocks, R, C]`` over the rows, of those that are not hidden and are numbers. The
    scores are overwritten."""
    return scores.masked_fill_(hidden, float("-inf")).nan_to_num_(nan=-inf, posinf=inf, neginf=-inf).amax(3)


def choose(scores: Tensor, alive: Tensor, chunk: Tensor, region: Region, ids: Tensor, counts: Tensor) -> None:
    """Write the best chunks of ``scores [B, H, blocks, C]`` into ``ids [B, Hm, blocks, slots]``, ascending, and how
    many there are into ``counts``."""
    scores = scores.masked_fill(~alive, float("-inf"))
    if region.heads == "all":
        scores = scores.amax(1, keepdim=True)
    slots = min(ids.shape[3], scores.shape[3])
    best, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    found = best[..., :slots] > float("-inf")
    chosen = chunk.expand(scores.shape).gather(-1, order[..., :slots])
    # Entries past the count sort to the end.
    chosen = chosen.masked_fill(~found, torch.iinfo(torch.int32).max).sort(dim=-1).values
    ids[..., :slots].copy_(chosen)
    counts.copy_(found.sum(-1))


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """``x [B, Hkv, N, D]`` with one entry for each head that is searched."""
    return x.repeat_interleave(heads // x.shape[1], dim=1) if heads != x.shape[1] else x
