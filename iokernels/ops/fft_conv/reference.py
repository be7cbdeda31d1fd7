"""The oracle: the convolution as a direct sum, one Toeplitz matrix a head.

Computes in float32, in float64 for float64 inputs (use that to judge others), on any device, and is differentiable to
any order.
"""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor

from iokernels.runtime.registration.precision import lifted

from .options import CAUSAL, CIRCULAR, TWO_SIDED, Options, band_length, kept_bins


def convolve(u: Tensor, k: Tensor, options: Options) -> Tensor:
    """``y [B, H, N]`` as :class:`Options` defines it, in the dtype of u."""
    return _convolve(*lifted((u, k, options))).to(u.dtype)


def _convolve(u: Tensor, k: Tensor, options: Options) -> Tensor:
    n = u.shape[2]
    k = k.to(u.dtype)
    v = u if options.pre_gate is None else options.pre_gate * u
    if n == 0:
        past = options.initial_state
        nothing = v * k[:, :1] if past is None else v * k[:, :1] + past.to(u.dtype).sum(2, keepdim=True)
        return _finished(nothing, v, options)
    first_lag = 1 - n if options.mode == TWO_SIDED else 0
    if options.keep < 1.0:
        k, first_lag = _band_limited(k, n, options)
    lag = torch.arange(n, device=u.device)[:, None] - torch.arange(n, device=u.device)
    if options.mode == CIRCULAR:
        lag = lag % n
    w = einsum(_toeplitz(k, lag - first_lag), v, "h t s, b h s -> b h t")
    if options.initial_state is not None:
        past = options.initial_state.to(u.dtype)
        lag = torch.arange(n, device=u.device)[:, None] + torch.arange(past.shape[2], 0, -1, device=u.device)
        w = w + einsum(_toeplitz(k, lag), past, "h t s, b h s -> b h t")
    return _finished(w, v, options)


def _finished(w: Tensor, v: Tensor, options: Options) -> Tensor:
    if options.skip is not None:
        w = w + options.skip.to(v.dtype)[:, None] * v
    return w if options.post_gate is None else options.post_gate * w


def _toeplitz(k: Tensor, tap: Tensor) -> Tensor:
    """``k[h, tap[t, s]]``, 0 where there is no such tap: [H, T, S]."""
    there = (tap >= 0) & (tap < k.shape[1])
    return k[:, tap.clamp(0, k.shape[1] - 1)] * there


def _band_limited(k: Tensor, n: int, options: Options) -> tuple[Tensor, int]:
    """The filter convolved with a Dirichlet kernel, which has only the kept frequencies: (taps, lag of the first)."""
    length = band_length(n, options.mode)
    bins = kept_bins(options.keep, length)
    shift = torch.arange(length, device=k.device, dtype=torch.float64)
    if bins == length // 2 + 1:
        dirichlet = (shift == 0).to(k.dtype)
    else:
        angle = (math.pi / length) * shift
        ratio = torch.sin((2 * bins - 1) * angle) / torch.sin(angle).where(shift > 0, torch.ones_like(angle))
        dirichlet = (ratio.where(shift > 0, torch.full_like(angle, 2 * bins - 1)) / length).to(k.dtype)
    linear = options.mode != CIRCULAR
    lags = torch.arange(1 - n if linear else 0, n, device=k.device)
    first = 1 - n if options.mode == TWO_SIDED else 0
    taps = torch.arange(first, first + k.shape[1], device=k.device)
    inside = (taps < n) if options.mode == CAUSAL else torch.ones_like(taps, dtype=torch.bool)
    spread = dirichlet[(lags[:, None] - taps) % length]
    return einsum(k * inside, spread, "h j, l j -> h l"), int(lags[0])
