"""Caches of keys and values: what pages a call uses, and 8-bit elements as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_bytes(cache: Tensor) -> Tensor:
    """A cache of e4m3 as the bytes that the kernels decode and write."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


_SMALL_TABLE = 2048
"""Entries of a page table that are read at once: cheaper than what each sequence uses by itself."""


def used_pages(operator: str, block_table: Tensor, pages: int, used: Sequence[range]) -> list[list[int]]:
    """The page numbers in the entries that each sequence uses. The other entries may be anything.

    Raises:
        ValueError: one is of no page; there are ``pages``.
    """
    rows = block_table.tolist() if block_table.numel() <= _SMALL_TABLE else block_table
    found = []
    for sequence, entries in enumerate(used):
        numbers = rows[sequence][entries.start : entries.stop]
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        if numbers and (min(numbers) < 0 or max(numbers) >= pages):
            number = min(numbers) if min(numbers) < 0 else max(numbers)
            entry = entries[numbers.index(number)]
            raise ValueError(
                f"{operator}: block_table[{sequence}] names page {number}; there are {pages} (its entry {entry})"
            )
        found.append(numbers)
    return found
