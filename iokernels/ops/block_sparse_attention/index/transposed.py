"""The lists of a block index the other way round: which blocks of queries list a block of keys.

A backward pass that owns keys needs them. They are made by a counting sort on the device, which the host does not wait
for; the sort is stable, so that the order of sums, and with it every bit of a gradient, is fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TransposedLists(NamedTuple):
    """Lists of query blocks, in compressed rows. L lists of P heads each were joined: an entry ``l * Mq + i`` is query
    block i of the l-th list."""

    starts: Tensor  # int32 [B, P, T + 1]; tile t of keys has the entries from starts[t] to starts[t + 1]
    entries: Tensor  # int32 [B, P, L * Mq * S]
    listed: Tensor  # int32 [B, P, L * Mq * S]; bit i: the entry lists key block t * ratio + i
    dense: Tensor  # int32 [B, P, L * Mq]; the entries of dense rows, which belong to every tile of keys
    dense_counts: Tensor  # int32 [B, P]; how many of them are valid


def transposed_lists(
    indices: Tensor, counts: Tensor, key_blocks: int, *, ratio: int = 1, joined: int = 1
) -> TransposedLists:
    """The transpose of ``indices [B, Hm, Mq, S]`` and ``counts [B, Hm, Mq]`` over ``key_blocks`` blocks of keys.

    Args:
        ratio: how many neighbouring key blocks make one tile of keys, 1 to 32.
        joined: how many neighbouring heads get one list, L; P is Hm / L.
    """
    batch, heads, query_blocks, room = indices.shape
    lists, entries = heads // joined, joined * query_blocks * room
    tiles = -(-key_blocks // ratio)
    slots = torch.arange(room, device=indices.device, dtype=torch.int32)
    valid = (slots < counts[..., None]) & (indices >= 0) & (indices < key_blocks)
    # One tile past the last takes whatever is no entry.
    tile = torch.where(valid, indices.div(ratio, rounding_mode="floor"), tiles)
    listed = torch.where(valid, torch.ones_like(indices) << (indices % ratio), 0)
    if ratio > 1:
        # The blocks of a tile stand next to each other: the first stands for all, with their bits.
        bits = listed.clone()
        for ahead in range(1, min(ratio, room)):
            same = tile[..., ahead:] == tile[..., :-ahead]
            bits[..., :-ahead] |= torch.where(same, listed[..., ahead:], 0)
        repeated = torch.zeros_like(valid)
        repeated[..., 1:] = tile[..., 1:] == tile[..., :-1]
        tile, listed = torch.where(repeated, tiles, tile), bits
    # Contiguous, whatever the lists' strides are: so is what sorting them returns, and kernels take it for that.
    tile = tile.reshape(batch, lists, entries).contiguous()
    by_tile, order = torch.sort(tile, dim=-1, stable=True)
    bounds = torch.arange(tiles + 1, device=indices.device, dtype=torch.int32)
    starts = torch.searchsorted(by_tile, bounds.expand(batch, lists, -1).contiguous(), out_int32=True)
    of_rows = order.div(max(room, 1), rounding_mode="floor").to(torch.int32)
    listed = listed.reshape(batch, lists, entries).gather(-1, order).contiguous()

    is_dense = (counts < 0).reshape(batch, lists, joined * query_blocks).contiguous()
    dense = torch.sort((~is_dense).to(torch.uint8), dim=-1, stable=True).indices.to(torch.int32)
    return TransposedLists(starts, of_rows, listed, dense, is_dense.sum(-1, dtype=torch.int32))
