"""Log decays, as every operator with a decaying state takes them."""

from __future__ import annotations

import torch

LEAST_LOG_DECAY = -110.0
"""Where float32 has nothing left of exp(x). Smaller decays count as this one, so that sums of them stay exact enough
to be subtracted, and minus infinity is a reset."""


def sums_dtype(device: torch.device) -> torch.dtype:
    """In what log decays are summed and their sums subtracted, before anything is rounded: after a strong decay the sum
    is large, and its float32 rounding would be a relative error of every later weight. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
