"""Checks of the arguments that are no tensors, for every function of the room."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

UNBOUNDED = 2**40
"""More keys than there are: what a longer sink, window or budget is taken for, so that sums of them are 64-bit."""


def whole(where: str, name: str, value: Any, *, least: int = 0) -> Any:
    """Return ``value`` as an int of at least ``least`` (a traced one stays symbolic), or raise for the argument
    ``name`` of the function ``where``. NumPy's integers are integers; bools, floats and tensors are not."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, (bool, Tensor)):
            raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be an int")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be an int") from None
    if value < least:
        raise ValueError(f"{where}: {name} is {value}; it must be at least {least}")
    return value


def keys(where: str, name: str, value: Any, *, least: int = 0) -> Any:
    """:func:`whole`, of a number of keys: all that are more than there can be are alike."""
    value = whole(where, name, value, least=least)
    return UNBOUNDED if value > UNBOUNDED else value


def one_of(where: str, name: str, value: Any, allowed: Collection[int]) -> int:
    """:func:`whole`, of one of a few sizes."""
    value = whole(where, name, value, least=-UNBOUNDED)
    if value not in allowed:
        raise ValueError(f"{where}: {name} is {value}; it must be one of {', '.join(map(str, allowed))}")
    return value


def switch(where: str, name: str, value: Any) -> bool:
    """Return ``value``, which must be a bool."""
    if not isinstance(value, bool):
        kind = type(value)
        said = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{where}: {name} is {said}; it must be a bool")
    return value


def pair_of_tensors(where: str, name: str, value: Any) -> tuple[Tensor, Tensor]:
    """Return the two tensors of ``value``, a :class:`.api.PageBounds` or a tuple like it."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be PageBounds, the tensors kmin and kmax")
    return value[0], value[1]
