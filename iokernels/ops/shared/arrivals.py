"""Counters by which thread blocks say that a partial result is there; kernels of any backend share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels import autotune

ARRIVALS: dict[Any, Tensor] = {}
"""Those that exist, by device and stream. Cleared where a kernel was broken off, which leaves counts behind."""


def arrivals_of(device: torch.device, items: int) -> Tensor:
    """Counters of ``items`` zeros, which every launch leaves at zero.

    Launches of one stream follow each other, so they share the counters of their stream. A CUDA graph may be replayed
    on any stream: it gets counters of its own, which it clears itself.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(items, dtype=torch.int32, device=device)
        key: Any = (device, torch.cuda.current_stream(device).cuda_stream)
    elif device.type == "meta":  # a kernel that is only compiled
        return torch.empty(items, dtype=torch.int32, device=device)
    else:
        key = device
    found = ARRIVALS.get(key)
    if found is None or found.numel() < items:
        found = ARRIVALS[key] = torch.zeros(autotune.bucket(items), dtype=torch.int32, device=device)
    return found
