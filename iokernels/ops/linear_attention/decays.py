"""Decays in use, by name, because conventions differ: slopes m_h >= 0 of the heads, with ``log_decay = -m_h`` a token.

Every function returns a float32 tensor ``[heads]`` that is computed on ``device``. Call it once, when a model is built.
Counts are ints, NumPy's too; others raise TypeError, and those out of range ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.runtime.contracts.plain import count, place


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi (Press et al., 2022, arXiv:2108.12409), which Lightning Attention-2 takes as decays.

    ``2 ** (-8 (h + 1) / heads)`` for a power of two. Other numbers take those of the largest power of two below, P, and
    then every other one of 2P's, as ALiBi's authors do.
    """
    heads, device = count("alibi_slopes", "heads", heads), place("alibi_slopes", device)
    power = 1 << (heads.bit_length() - 1)
    index = torch.arange(heads, dtype=torch.float32, device=device)
    # The heads past P are the first, third, ... of 2P.
    return torch.exp2(-8.0 * torch.where(index < power, (index + 1) / power, (2 * (index - power) + 1) / (2 * power)))


def retention_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """Those of RetNet (Sun et al., 2023, arXiv:2307.08621): head h keeps ``1 - 2 ** (-5 - h)`` a token."""
    heads, device = count("retention_slopes", "heads", heads), place("retention_slopes", device)
    return -torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float32, device=device)))


def minimax_slopes(heads: int, layer: int, layers: int, *, device: torch.device | str | None = None) -> Tensor:
    """Those of MiniMax-01 (2025, arXiv:2501.08313) in layer ``layer`` of ``layers``, counted from 0: ALiBi's, times
    ``1 - layer / (layers - 1) + 1e-5``, so that deeper layers forget more slowly."""
    heads, layers = count("minimax_slopes", "heads", heads), count("minimax_slopes", "layers", layers)
    layer, device = count("minimax_slopes", "layer", layer, 0), place("minimax_slopes", device)
    if layer >= layers:
        raise ValueError(f"minimax_slopes: layer is {layer}; it must be at least 0 and below layers, {layers}")
    return alibi_slopes(heads, device=device) * (1.0 - layer / max(layers - 1, 1) + 1e-5)
