"""Checks of arguments that are no tensors, and of tensors that are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.contracts import Contract, plain
from iokernels.runtime.contracts.memory import overlaps_itself

MOST = 2**48
"""No tensor has more elements along a dimension."""


def whole(contract: Contract, name: str, value: Any, *, least: int) -> Any:
    """:func:`.plain.whole`, of a size of a tensor."""
    return plain.whole(contract.operator, name, value, least=least, most=MOST)


def kind(value: Any) -> str:
    """What ``value`` is, for a message: NumPy calls its types as Python does."""
    made = type(value)
    return made.__name__ if made.__module__ in ("builtins", "torch") else f"{made.__module__}.{made.__name__}"


def places(x: Any) -> tuple[int, ...] | None:
    """The strides of a tensor that is written, by which the outcome of :func:`check_own_memory` is remembered; None
    where every element has a place of its own already."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_contiguous():
        return None
    return x.stride()


def check_own_memory(contract: Contract, name: str, x: Tensor) -> None:
    """Refuse a tensor of which two elements are one place of memory: what is written to one of them would be lost."""
    if overlaps_itself(x):
        raise ValueError(
            f"{contract.operator}: {name} has shape {list(x.shape)} and strides {list(x.stride())}, so that elements "
            f"share memory, and it is written; pass a copy, {name}.clone()"
        )
