"""What the backends of ``short_conv`` agree on: the arguments after x and weight, and what a backward pass returns.

x is ``[B, H, N]`` and weight ``[H, W]``. Packed sequences reach the backends as a batch of one, ``[1, H, total]``,
with ``cu_seqlens``; states have a row for each sequence, ``[S, H, W - 1]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ShortOptions(NamedTuple):
    """Everything but x and weight, after validation.

    With x extended by the state (or zeros) to the left and by zeros to the right, an output of M = N + left + right -
    (W - 1) rows is

        out[m] = act(bias + sum over w of weight[w] x[m + w - left]),   0 <= m < M,   0 <= left, right <= W - 1

    where ``act`` is silu or nothing. Causal is ``left = W - 1, right = 0``, and the only case with states: the state
    holds the W - 1 inputs before the first, the oldest first. Packed: left + right = W - 1.
    """

    # Tensors, in the order of the operators' schemas.
    bias: Tensor | None = None  # [H], the dtype of x or float32
    initial_state: Tensor | None = None  # [B, H, W - 1], packed [S, H, W - 1], the dtype of x
    cu_seqlens: Tensor | None = None  # int32 [S + 1]
    # Numbers.
    left: int = 0
    right: int = 0
    silu: bool = False
    return_state: bool = False


class ShortNeeds(NamedTuple):
    """Which gradients a backward pass has to compute."""

    x: bool
    weight: bool
    bias: bool = False
    initial_state: bool = False


class ShortGradients(NamedTuple):
    """What a backward pass returns, each like its argument; None where not needed."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    initial_state: Tensor | None = None


def out_length(length: Any, width: int, options: ShortOptions) -> Any:
    """Rows of the output for a sequence of ``length``."""
    return length + options.left + options.right - (width - 1)


def empty_rows(x: Tensor, length: Any) -> Tensor:
    """An uninitialised ``[B, H, length]`` in the memory order of x, so that a ``[B, N, H]`` model gets its layout back
    without a copy."""
    batch, channels, _ = x.shape
    return _empty(x, batch, channels, length)


def empty_state(x: Tensor, width: int, options: ShortOptions) -> Tensor:
    """An uninitialised state ``[B, H, W - 1]`` (packed: a row for each sequence) in the memory order of x, or an empty
    tensor where none is asked for."""
    if not options.return_state:
        return x.new_empty(0)
    rows = x.shape[0] if options.cu_seqlens is None else options.cu_seqlens.shape[0] - 1
    return _empty(x, rows, x.shape[1], width - 1)


def _empty(x: Tensor, batch: Any, channels: Any, length: Any) -> Tensor:
    """Not a transposed view of another tensor: autograd lets nobody change a view that an operator returns."""
    if x.stride(1) < x.stride(2):
        return x.new_empty_strided((batch, channels, length), (length * channels, 1, channels))
    return x.new_empty((batch, channels, length))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where an argument is."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32
