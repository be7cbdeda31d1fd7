"""What a :class:`KVCache` holds as plain tensors and lists, and back: the keys of its lengths, nothing of what is free.

``lengths`` is a list; ``k``, ``v`` and the scales are tensors whose fourth dimension ends with the longest sequence. Of
a paged cache the second one counts the pages in use, which ``tables`` numbers anew from 0 for every sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.caches import as_bytes
from iokernels.ops.shared.integers import integers
from iokernels.runtime.contracts import Contract, short

from .pages import Pages

CONTRACT = Contract("KVCache")

Memory = Sequence[tuple[str, Tensor]]
"""The tensors of a cache by name: k, v and scales, which have two dimensions if they are those of heads."""


def saved(memory: Memory, lengths: Sequence[int], pages: Pages | None) -> dict[str, Any]:
    """The state, in memory of its own."""
    state: dict[str, Any] = {"lengths": list(lengths)}
    used: list[int] = []
    if pages is not None:
        used = sorted({page for table in pages.tables for page in table})
        number = {page: at for at, page in enumerate(used)}
        state["tables"] = [[number[page] for page in table] for table in pages.tables]
    for name, x in memory:
        held = x
        if x.dim() > 2:
            held = as_bytes(x)
            rows = torch.tensor(used, dtype=torch.int64, device=x.device)
            held = held[:, :, :, : max(lengths)] if pages is None else held[:, rows]
        state[name] = held.clone(memory_format=torch.contiguous_format).view(x.dtype)
    return state


def checked(state: Mapping[str, Any], memory: Memory, batch: int, capacity: int, pages: Pages | None) -> list[int]:
    """The lengths of a state that fits into a cache; others are refused before anything is written."""
    names = {"lengths", *(name for name, _ in memory), *(["tables"] if pages is not None else [])}
    CONTRACT.require(set(state) == names, f"state has {sorted(state)}; it must have {sorted(names)}")
    lengths = integers(CONTRACT, "state['lengths']", state["lengths"])
    CONTRACT.require(
        len(lengths) == batch and min(lengths) >= 0 and max(lengths) <= capacity,
        f"state has the lengths {lengths}; it must have {batch}, of 0 to {capacity}",
    )
    count = max(lengths)
    if pages is not None:
        tables = [integers(CONTRACT, "state['tables']", table) for table in state["tables"]]
        count = len({page for table in tables for page in table})
        CONTRACT.require(count <= pages.count, f"state has {count} pages; there are {pages.count}")
        CONTRACT.require(
            [len(table) for table in tables] == [-(-length // pages.size) for length in lengths]
            and all(0 <= page < count for table in tables for page in table),
            f"state['tables'] is {tables}; it must number the pages of {lengths} keys, {pages.size} to a page, from 0",
        )
    for name, x in memory:
        given = state[name]
        if not isinstance(given, Tensor) or given.dtype != x.dtype:
            got = short(given.dtype) if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"KVCache: state['{name}'] is {got}; it must be a tensor of {short(x.dtype)}")
        expected = list(x.shape)
        if x.dim() > 2:
            expected[3 if pages is None else 1] = count
        CONTRACT.require(
            list(given.shape) == expected, f"state['{name}'] has shape {list(given.shape)}; it must be {expected}"
        )
    return lengths


def restore(state: Mapping[str, Any], memory: Memory, pages: Pages | None) -> None:
    """Write a state that was :func:`checked`."""
    for name, x in memory:
        target, given = x, state[name]
        if x.dim() > 2:
            target, given = as_bytes(x), as_bytes(given)
            target = target[:, :, :, : given.shape[3]] if pages is None else target[:, : given.shape[1]]
        target.copy_(given)
    if pages is not None:
        pages.hold(state["tables"])
