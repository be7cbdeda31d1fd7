"""Filters as the Triton kernels want them, frequencies in their order, and the way back, by ``torch.fft``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .options import CIRCULAR, Options, band_length, band_limited, placed, unplaced


@cache
def roots_of_unity(device: torch.device, dtype: torch.dtype, order: int) -> Tensor:
    """``exp(-2 pi i j k / order)``, parts ``[2, order, order]``, rounded from float64. Made once a device."""
    angle = (torch.arange(order)[:, None] * torch.arange(order) % order).double() * (-2.0 * torch.pi / order)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype).to(device)


def planes_of(k: Tensor, n: int, n1: int, n2: int, dtype: torch.dtype, options: Options) -> list[Tensor]:
    """The filter's frequencies in the kernels' order, that of ``[N2, N1]`` transposed: planes ``[H, 2, N1, N2]`` of
    ``dtype``, and what they were divided by, float32 ``[H]``, a power of two."""
    period = _one_period(k.float(), n, n1 * n2, options)
    natural = torch.view_as_real(torch.fft.fft(period)).view(-1, n2, n1, 2)
    return normalized(natural.permute(0, 3, 2, 1), dtype)


def normalized(planes: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Planes divided by a power of two a head, so that the largest element is below 1."""
    largest = planes.abs().amax((1, 2, 3)) if planes.shape[0] else planes.new_empty(0)
    _, exponent = torch.frexp(largest)
    exponent = exponent.clamp(-125, 126)  # so that its power and the reciprocal are normal numbers
    scaled = torch.ldexp(planes, -exponent[:, None, None, None])
    return [scaled.to(dtype).contiguous(), torch.ldexp(torch.ones_like(largest), exponent)]


def with_skip(transformed: list[Tensor], skip: Tensor) -> list[Tensor]:
    """The filter with ``skip`` added to its tap of lag 0, which adds it to every frequency."""
    planes = transformed[0].float() * transformed[1][:, None, None, None]
    planes[:, 0] += skip.float()[:, None, None]
    return normalized(planes, transformed[0].dtype)


def taps_gradient(sums: Tensor, taps: int, n: int, n1: int, n2: int, options: Options) -> tuple[Tensor, Tensor]:
    """The gradients of the taps ``[H, Nk]`` and of skip ``[H]`` from the kernel's sums ``[parts, H, 2, N1, COLS]``."""
    total = sums.sum(0)
    columns = total.shape[-1]
    if columns < n2:
        gap = total.new_zeros(*total.shape[:-1], n2 - columns)
        total = torch.cat([total[..., : columns // 2], gap, total[..., columns // 2 :]], dim=-1)
    natural = torch.view_as_complex(total.permute(0, 3, 2, 1).contiguous()).view(-1, n1 * n2)
    period = torch.fft.ifft(natural).real
    return unplaced(_one_period_adjoint(period, n, options), taps, n, options), period[:, 0]


def _one_period(k: Tensor, n: int, length: int, options: Options) -> Tensor:
    """The filter as ``keep`` leaves it, the tap of lag l at ``l mod length``."""
    if options.keep == 1.0:
        return placed(k, length, n, options)
    own = band_length(n, options.mode)
    period = band_limited(placed(k, own, n, options), options.keep)
    if own == length:
        return period
    if options.mode == CIRCULAR:
        return torch.nn.functional.pad(period, (0, length - n))
    gap = period.new_zeros(period.shape[0], length - (2 * n - 1))
    return torch.cat([period[:, :n], gap, period[:, own - (n - 1) :]], dim=1)


def _one_period_adjoint(period: Tensor, n: int, options: Options) -> Tensor:
    """The gradient of one period, of :func:`_one_period`'s length, as that of what was placed before ``keep``."""
    if options.keep == 1.0:
        return period
    own, length = band_length(n, options.mode), period.shape[1]
    if own != length and options.mode == CIRCULAR:
        period = period[:, :n]
    elif own != length:
        gap = period.new_zeros(period.shape[0], own - (2 * n - 1))
        period = torch.cat([period[:, :n], gap, period[:, length - (n - 1) :]], dim=1)
    return band_limited(period, options.keep)


def state_gradient(g: Tensor, k: Tensor) -> Tensor:
    """``sum_s k_(s+m) g_s``, at m = Nk - 1, ..., 1: ``[B, H, Nk - 1]`` of g ``[B, H, up to Nk - 1]``."""
    width = k.shape[1] - 1
    length = 1 << max(g.shape[2] + k.shape[1] - 1, 1).bit_length()
    product = torch.fft.rfft(k, n=length) * torch.fft.rfft(g, n=length).conj_physical()
    return torch.fft.irfft(product, n=length)[..., 1 : width + 1].flip(-1)
