"""fft_conv, its step and the filters of fewer frequencies from docs/ops/fft_conv.md: sums over taps, no transforms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def convolved(a: dict[str, Any]) -> dict[str, Tensor]:
    """y ``[B, H, N]`` and, where it is asked for, the state."""
    u, k = a["u"], a["k"].to(a["u"].dtype)
    n, taps = u.shape[2], k.shape[1]
    v = u if a.get("pre_gate") is None else u * a["pre_gate"]
    causal, keep = a.get("causal", True), a.get("freq_keep")
    two_sided = not causal and taps == 2 * n - 1
    past = a.get("initial_state")
    past = v.new_zeros(*v.shape[:2], taps - 1) if past is None else past.to(v.dtype)
    if keep is not None and keep < 1:
        w = _with_part_of_the_frequencies(v, k, causal, two_sided, keep)
    elif causal:
        w = _sum_of_taps(a["jitter"].transformed(torch.cat([past, v], dim=2)), k, n)
    elif two_sided:
        around = v.new_zeros(*v.shape[:2], n - 1)
        w = _sum_of_taps(torch.cat([around, v, around], dim=2), k, n)
    else:
        w = _sum_of_taps(torch.cat([v, v], dim=2)[:, :, n - taps + 1 :], k, n) if n else v
    if a.get("skip") is not None:
        w = w + a["skip"].to(v.dtype)[:, None] * v
    y = w if a.get("post_gate") is None else w * a["post_gate"]
    last = torch.cat([past, v], dim=2)
    return {"y": y, "state": last[:, :, last.shape[2] - (taps - 1) :]}


def _sum_of_taps(x: Tensor, k: Tensor, n: int) -> Tensor:
    """``w_t = sum_j k_j x_(t + Nk - 1 - j)`` for the n first t."""
    w = x.new_zeros(*x.shape[:2], n)
    taps = k.shape[1]
    for j in range(taps):
        w = w + k[:, j, None] * x[:, :, taps - 1 - j : taps - 1 - j + n]
    return w


def _with_part_of_the_frequencies(v: Tensor, k: Tensor, causal: bool, two_sided: bool, keep: float) -> Tensor:
    """The sum over lags of a filter of which only the lowest frequencies of a period are left."""
    n = v.shape[2]
    circular = not causal and not two_sided
    period = n if circular else 1 << max(math.ceil(math.log2(max(2 * n, 1))), 0)
    frequencies = torch.arange(math.ceil(keep * (period // 2 + 1)))
    twice = torch.where((frequencies == 0) | (2 * frequencies == period), 1.0, 2.0).double()
    lag = torch.arange(period).double()
    angle = 2 * math.pi / period * (lag[:, None] - lag[None, :])
    kept = torch.einsum("f,fij->ij", twice, torch.cos(frequencies.double()[:, None, None] * angle)) / period
    placed = v.new_zeros(k.shape[0], period)
    at = (torch.arange(k.shape[1]) - (n - 1 if two_sided else 0)) % period
    placed = placed.index_add(1, at, k)
    low = placed @ kept.to(v.dtype)
    w = v.new_zeros(v.shape)
    for t in range(n):
        w[:, :, t] = torch.einsum("hs,bhs->bh", low[:, (t - torch.arange(n)) % period], v)
    return w
