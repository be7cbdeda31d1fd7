"""What tells the tokens of linear mixers apart: heads that turn with the position, and decays that stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def token_positions(x: Tensor, seen: Tensor | None) -> Tensor:
    """The positions of x ``[B, N, E]`` after ``seen [B]`` tokens (None: none): int64 ``[B, N]``, or ``[1, N]``."""
    new = torch.arange(x.shape[1], device=x.device)[None]
    return new if seen is None else seen[:, None] + new


def rotated(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn the pairs (2 j, 2 j + 1) of every head of ``x [B, H, N, D]`` by ``p * base ** (-2 j / D)`` at position p.

    ``positions`` is ``[B, N]`` or ``[1, N]``, and may be as large as int64 is: the angles are computed, not looked up.
    Rotary embedding (Su et al., 2021, arXiv:2104.09864, section 3.4). Returns a tensor like x.
    """
    width = x.shape[-1]
    # In float64: float32 loses a part of the angle at positions in the hundred thousands.
    rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angles = positions[:, None, :, None] * rates
    accurate = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(accurate), angles.sin().to(accurate)
    even, odd = x[..., 0::2].to(accurate), x[..., 1::2].to(accurate)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


class FixedDecay(nn.Module):
    """The log decay of every head, ``[H]``, as a buffer that stays float32 in a module of half precision.

    ``slopes(device=...)`` makes the negative of it; the buffer is no part of a state_dict. Calling the module gives the
    decays on the device of x.
    """

    log_decay: Tensor

    def __init__(self, slopes: Callable[..., Tensor], device: Any = None) -> None:
        super().__init__()
        self.slopes = slopes
        self.register_buffer("log_decay", -slopes(device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The buffer; made where it is still on meta because a state_dict was assigned around it."""
        if self.log_decay.device != x.device:
            self.log_decay = -self.slopes(device=x.device)
        return self.log_decay

    def _apply(self, fn: Any, recurse: bool = True) -> FixedDecay:
        super()._apply(fn, recurse)
        # Computed anew: never rounded to another dtype, and there after to_empty().
        self.log_decay = -self.slopes(device=self.log_decay.device)
        return self
