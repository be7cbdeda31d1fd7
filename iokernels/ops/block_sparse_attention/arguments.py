"""Checks of the arguments that are no tensors, for every function of the room."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from iokernels.runtime.contracts.plain import whole

UNBOUNDED = 2**40
"""More keys than there are: what a longer sink, window or budget is taken for, so that sums of them are 64-bit."""

MOST_KEYS = 2**29
"""Most keys that the kernels can number."""


def keys(where: str, name: str, value: Any, *, least: int = 0) -> Any:
    """:func:`.plain.whole`, of a number of keys: all that are more than there can be are alike."""
    value = whole(where, name, value, least=least)
    return UNBOUNDED if value > UNBOUNDED else value


def one_of(where: str, name: str, value: Any, allowed: Collection[int]) -> int:
    """:func:`.plain.whole`, of one of a few sizes."""
    value = whole(where, name, value, least=-UNBOUNDED)
    if value not in allowed:
        raise ValueError(f"{where}: {name} is {value}; it must be one of {', '.join(map(str, allowed))}")
    return value


def pair_of_tensors(where: str, name: str, value: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors of ``value``, a :class:`.api.PageBounds` or a tuple like it."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be PageBounds, the tensors kmin and kmax")
    return value[0], value[1]


def too_long(kv_len: Any) -> str | None:
    """Why kernels, which number keys in 32 bits and add windows to the numbers, cannot take so many."""
    return f"it has {kv_len} keys, and its kernels number up to {MOST_KEYS}" if kv_len > MOST_KEYS else None
