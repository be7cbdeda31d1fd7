"""Caches of keys and values, dense and in pages, for lean_attention, append_kv and block_sparse_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..draw import Draw

QUANTISED = (torch.float8_e4m3fn, torch.int8)


def values(d: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contents of a cache: for int8, integers up to 127."""
    x = d.normal(*shape)
    return (x * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def pages(d: Draw, a: dict[str, Any], batch: int, capacity: int, lengths: list[int]) -> tuple[int, int]:
    """Draw a ``block_table``; (pages there are, keys of a page). Entries that no length reaches are nonsense."""
    page = d.pick((1, 2, 3, 7, 8, 16, 32))
    each = -(-capacity // page)
    used = [-(-length // page) for length in lengths]
    there = max(sum(used) + d.size(3), 1)
    free = list(range(there))
    d.random.shuffle(free)
    table = [[d.pick((-1, there, 10**6, 0)) for _ in range(each)] for _ in range(batch)]
    for row, count in zip(table, used, strict=True):
        row[:count] = [free.pop() for _ in range(count)]
    a["block_table"] = d.laid_out(
        "block_table", torch.tensor(table, dtype=torch.int32).reshape(batch, each), but=("expanded",)
    )
    d.notes["block_table"] += f" {table}" if batch * each <= 40 else ""
    return there, page


def unread(cache: Tensor, table: Tensor | None, lengths: list[int]) -> Tensor:
    """bool ``[B, N]`` or ``[pages, page]``: the places that no length reaches."""
    free = torch.ones(cache.shape[0], cache.shape[2], dtype=torch.bool)
    for b, length in enumerate(lengths):
        for i in range(length if table is not None else 0):
            free[int(table[b, i // cache.shape[2]]), i % cache.shape[2]] = False  # pyright: ignore
        if table is None:
            free[b, :length] = False
    return free


def poisoned(cache: Tensor, free: Tensor) -> Tensor:
    """A copy of a cache ``[B, H, N, ...]`` in which the ``free`` places hold NaN (int8: 127)."""
    value = 127 if cache.dtype == torch.int8 else float("nan")
    hidden = free[:, None].reshape(free.shape[0], 1, free.shape[1], *[1] * (cache.dim() - 3))
    full = torch.full_like(cache.float(), value)
    return torch.where(hidden, full, cache.float() if cache.itemsize < 8 else cache).to(cache.dtype)
