"""What autocast means to an operator: floating-point inputs take the dtype that the region asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, where it is on for the device of the first; float64 stays what it is.

    Whatever is not a tensor passes through: the argument check that follows says what is wrong with it.
    """
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    # The device's own type is a slow attribute.
    kind = "cuda" if first.is_cuda else "cpu" if first.is_cpu else first.device.type
    if kind not in ("cuda", "cpu") and not torch.amp.is_autocast_available(kind):
        return tensors  # meta tensors, say: asking whether it is enabled would raise
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
