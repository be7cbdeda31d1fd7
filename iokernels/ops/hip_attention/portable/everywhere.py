"""The search of the first HiP paper in PyTorch (Lee et al., 2024, arXiv:2406.09827, algorithm 1): a fixed number of
branches over all keys, halved together.

The candidates of a block of queries, in units of ``branch`` keys, are divided into M equal branches. In each step every
branch is cut in half, the centre unit of each of the 2 M halves is scored, and the best M of all go on, until each is
one unit: ``log2(N / (M branch))`` steps with a choice among 2 M between them. The best units found are then listed as
blocks of ``block_k`` keys, which score what their best unit does.

FLOPs: ``4 M R D branch`` a step and block of queries; memory as in :mod:`iokernels.ops.hip_attention.portable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.hip_attention.options import Region, empty_lists, most_chunks, searched_heads

from . import Keys, Slab, choose, highest, row_count, slabs

STRIDE_Q = 2
"""Queries enter as means of two neighbours."""


def global_search(
    q: Tensor, k: Tensor, region: Region, branch: int, branches: int, block_k: int, slots: int
) -> tuple[Tensor, Tensor]:
    """The best ``slots`` blocks of ``block_k`` keys that the search comes across: ``(ids, counts)``, ascending."""
    out_ids, out_counts = empty_lists(q, k.shape[1], slots, region)
    heads = searched_heads(region.heads, q.shape[1], k.shape[1])
    blocks = most_chunks(q.shape[2], k.shape[2], block_k, region)
    number = torch.arange(blocks, device=q.device)
    keys = Keys(q, k, heads)
    wide = 2 * branches * branch * max(q.shape[3], row_count(q, k, region, STRIDE_Q)) + blocks
    for slab in slabs(q, k, region, STRIDE_Q, q.shape[0] * heads * wide):
        first, scores = search_units(slab, keys, region, branch, branches)
        found = scores.new_full((*scores.shape[:3], blocks + 1), float("-inf"))
        # A column past the last takes what is not worth selecting.
        target = (first * branch // block_k).clamp(max=blocks - 1).masked_fill(scores == float("-inf"), blocks)
        found = found.scatter_reduce(3, target, scores, "amax")[..., :blocks]
        alive = found > float("-inf")
        choose(found, alive, number, region, out_ids[:, :, slab.blocks], out_counts[:, :, slab.blocks])
    return out_ids, out_counts


def search_units(slab: Slab, keys: Keys, region: Region, branch: int, branches: int) -> tuple[Tensor, Tensor]:
    """``(units, scores) [B, H, blocks, M]``: the units that remain, and the best logit of each."""
    lowest = region.sink // branch
    units = ((slab.ends + branch - 1) // branch - lowest).clamp(min=0)[:, None]
    cuts = torch.arange(branches + 1, device=slab.ends.device)
    edges = lowest + cuts * units // branches
    shape = (*slab.rows.shape[:3], branches)
    first, last = (x.expand(shape) for x in (edges[:, :-1], edges[:, 1:]))
    total = -(-keys.length // branch)
    longest = -(-total // branches)
    for _ in range(max(longest - 1, 0).bit_length()):
        centre = (first + last + 1) // 2
        first, last = torch.cat([first, centre], dim=-1), torch.cat([centre, last], dim=-1)
        scores = _score(slab, keys, region, branch, first, last)
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :branches]
        first, last = first.gather(-1, best), last.gather(-1, best)
    return first, _score(slab, keys, region, branch, first, last)


def _score(slab: Slab, keys: Keys, region: Region, branch: int, first: Tensor, last: Tensor) -> Tensor:
    """The best logit of the centre unit of each branch [first, last); -inf of an empty one."""
    centre = (first + last) // 2
    best = None
    for key in range(branch):
        number = centre * branch + key
        hidden = (number[..., None, :] > slab.limits[..., None]) | (number < region.sink)[..., None, :]
        logits = highest(slab.rows @ keys.gather(number), hidden)
        best = logits if best is None else torch.maximum(best, logits)
    assert best is not None
    return best.masked_fill(first >= last, float("-inf"))
