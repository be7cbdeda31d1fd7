"""Results before they are written: memory orders, and the dtypes of states and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States, sums and statistics (the LSE) are float32, but for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_in_order_of(x: Tensor, width: Any) -> Tensor:
    """An uninitialised tensor [B, H, N, width] of x's dtype and device: heads inside the sequence if x has them so.

    No view of another tensor: what an autograd function returns can be changed in place only if it is none.
    """
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        row = heads * width
        return x.new_empty_strided((batch, heads, length, width), (length * row, width, row, 1))
    return x.new_empty((batch, heads, length, width))


def _in_order_of(name: str) -> Callable[[Any], Tensor]:
    return lambda given: empty_in_order_of(getattr(given, name), getattr(given, name).shape[3])


EMPTY_IN_ORDER = {name: _in_order_of(name) for name in "qkv"}
"""For :func:`.differentiable`: uninitialised gradients of q, k and v in their memory orders."""


def in_place(run: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """``run(state)``, which changes its argument; also where ``state`` stands for the negative of its memory, which the
    dispatcher cannot pass to an operator that writes it."""
    if torch.compiler.is_compiling() or not state.is_neg():
        return run(state)
    held = state.resolve_neg()
    out = run(held)
    state.copy_(held)
    return out
