"""Filters as the CUDA kernels want them, frequencies in the lanes' order, and the way back, by ``torch.fft``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import Options, one_period, one_period_adjoint, unplaced
from iokernels.ops.fft_conv.real_fft import irfft, rfft

from .tuning import factors


@cache
def order_of(length: int, device: torch.device) -> Tensor:
    """The frequency of each place of a spectrum, ``[length]``: for every k1, for every tile of 16 by 8 of the matrix of
    (k2, k3), for every lane, the four that it holds. Made once a device."""
    n1, r = factors(length)
    row = torch.arange(r // 16)[:, None] * 16 + torch.tensor([0, 8])  # [block, half]
    lane, pair = torch.arange(8), torch.arange(4)
    k2 = row[:, None, None, None, :, None] + lane[:, None, None, None]
    k3 = torch.arange(r // 8)[:, None, None, None, None] * 8 + 2 * pair[:, None, None] + torch.arange(2)
    inner = (k2 + r * k3).flatten()  # [block, tile, lane / 4, lane % 4, half, one of two]
    return (torch.arange(n1)[:, None] + n1 * inner).flatten().to(device)


def spectrum_of(k: Tensor, n: int, length: int, options: Options) -> list[Tensor]:
    """The filter's frequencies, float16 ``[H, length, 2]``, and what they were divided by, float32 ``[H]``, a power of
    two."""
    natural = torch.fft.fft(one_period(k.float(), n, length, options))
    return _normalized(torch.view_as_real(natural[:, order_of(length, k.device)]))


def with_skip(spectrum: list[Tensor], skip: Tensor) -> list[Tensor]:
    """The filter with ``skip`` added to its tap of lag 0, which adds it to every frequency."""
    wide = spectrum[0].float() * spectrum[1][:, None, None]
    wide[:, :, 0] += skip.float()[:, None]
    return _normalized(wide)


def taps_gradient(sums: Tensor, taps: int, n: int, options: Options) -> tuple[Tensor, Tensor]:
    """The gradients of the taps ``[H, Nk]`` and of skip ``[H]`` from the kernel's sums ``[parts, H, length, 2]``."""
    total = torch.view_as_complex(sums.sum(0))
    natural = torch.empty_like(total)
    natural[:, order_of(total.shape[1], total.device)] = total
    period = torch.fft.ifft(natural).real
    return unplaced(one_period_adjoint(period, n, options), taps, n, options), period[:, 0]


def state_gradient(g: Tensor, k: Tensor) -> Tensor:
    """``sum_s k_(s+m) g_s``, at m = Nk - 1, ..., 1: ``[B, H, Nk - 1]`` of g ``[B, H, up to Nk - 1]``."""
    width = k.shape[1] - 1
    length = 1 << max(g.shape[2] + width, 1).bit_length()
    product = rfft(k, n=length) * rfft(g, n=length).conj_physical()
    return irfft(product, n=length)[..., 1 : width + 1].flip(-1)


def _normalized(wide: Tensor) -> list[Tensor]:
    """Divided by a power of two a head, so that the largest part is below 1."""
    largest = wide.abs().amax((1, 2)) if wide.shape[0] else wide.new_empty(0)
    exponent = torch.frexp(largest).exponent.clamp(-125, 126)  # so that its power and the reciprocal are normal numbers
    scaled = torch.ldexp(wide, -exponent[:, None, None])
    return [scaled.half().contiguous(), torch.ldexp(torch.ones_like(largest), exponent)]
