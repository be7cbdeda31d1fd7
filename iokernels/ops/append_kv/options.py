"""What the backends of ``append_kv`` agree on: the arguments after the new keys and values and the caches."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor


class Append(NamedTuple):
    """Where new keys go and what becomes of them, after validation.

    Row i of ``k_new [B, Hkv, Nnew, D]`` is written at the position ``p = cache_seqlens[b] + i`` of sequence b, if
    ``i < new_seqlens[b]`` and p lies inside the capacity. Before that, with ``rot = 2 cos.shape[1]`` and the angle's
    row ``r = positions[b] + i``, each pair (x, y) of its first rot elements is rotated:

        x' = x cos[r, j] - y sin[r, j]      y' = y cos[r, j] + x sin[r, j]

    where the pair j is the elements (j, j + rot/2), or (2 j, 2 j + 1) if interleaved. Then it is divided by its scale:
    that of its head, or its own, ``max(amax, SMALLEST) / top``, which is written too; and rounded to the dtype of the
    cache, ties to even, saturating if that is quantised. Values are not rotated, else alike.
    """

    cache_seqlens: Tensor  # int32 [B], before the append
    block_table: Tensor | None = None  # int32 [B, most pages]
    new_seqlens: Tensor | None = None  # int32 [B]
    positions: Tensor | None = None  # int32 [B]; cache_seqlens if None
    cos: Tensor | None = None  # any floating dtype, [P, rot / 2]
    sin: Tensor | None = None
    interleaved: bool = False
    k_scale: Tensor | None = None  # float32 [Hkv], read
    v_scale: Tensor | None = None
    k_key_scale: Annotated[Tensor | None, "Tensor(c!)?"] = None  # float32 [B, Hkv, N] or [pages, Hkv, page], written
    v_key_scale: Annotated[Tensor | None, "Tensor(d!)?"] = None


TOP = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest number of a quantised dtype that has its negative."""

SMALLEST = 2.0**-100
"""A row whose elements are all smaller has the scale of one with this: zero too has a scale, and none is subnormal."""


def room(cache: Tensor, block_table: Tensor | None) -> Any:
    """How many keys a sequence can have at most."""
    return cache.shape[2] if block_table is None else cache.shape[2] * block_table.shape[1]
