"""What autocast means to an operator: floating-point inputs take the dtype that the region asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast makes of floats on devices of this type; None where it is off."""
    if kind not in ("cuda", "cpu") and not torch.amp.is_autocast_available(kind):
        return None  # meta tensors, say: asking whether it is enabled would raise
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, where it is on for the device of the first; float64 stays what it is.

    Whatever is not a tensor passes through: the argument check that follows says what is wrong with it.
    """
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    # The device's own type is a slow attribute.
    kind = "cuda" if first.is_cuda else "cpu" if first.is_cpu else first.device.type
    dtype = autocast_dtype(kind)
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
