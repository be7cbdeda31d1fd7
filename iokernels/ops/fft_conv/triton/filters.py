"""Filters as the Triton kernels want them, frequencies in their order, and the way back, by ``torch.fft``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from iokernels.ops.fft_conv.options import Options, one_period, one_period_adjoint, unplaced

from .tuning import Blocks, Through


@cache
def roots_of_unity(device: torch.device, dtype: torch.dtype, order: int) -> Tensor:
    """``exp(-2 pi i j / order)``, parts ``[2, order]``, rounded from float64. Made once a device."""
    angle = torch.arange(order).double() * (-2.0 * torch.pi / order)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype).to(device)


@cache
def real_transform(device: torch.device, dtype: torch.dtype, order: int, back: bool) -> Tensor:
    """The matrix ``[order, order]`` that makes real numbers frequencies, rounded from float64; made once a device.

    Frequencies 0 to order / 2 - 1: first their real parts, then their imaginary parts, and for that of frequency 0,
    which is none, the frequency order / 2. ``back``: of ``2 / order`` times the result the way back.
    """
    half = order // 2
    angle = (torch.arange(half)[:, None] * torch.arange(order) % order).double() * (-2.0 * torch.pi / order)
    real, imag = angle.cos(), angle.sin()
    imag[0] = 1.0 - 2.0 * (torch.arange(order) % 2)
    if back:
        real[0] *= 0.5
        imag[0] *= 0.5
    matrix = torch.cat([real, imag])
    return (matrix.T if back else matrix).to(dtype).contiguous().to(device)


def planes_of(k: Tensor, n: int, cover: Blocks | Through, dtype: torch.dtype, options: Options) -> list[Tensor]:
    """The filter's frequencies in the kernels' order, planes of ``dtype``, and what they were divided by, float32
    ``[H]``, a power of two. On chip the planes are ``[H, 2, N1, N2]``, that is, ``[N2, N1]`` transposed; through memory
    ``[H, N0 / 2 + 1, 2, N1, N2]``, those of every row."""
    outer, n1, n2 = cover.outer, cover.n1, cover.n2
    period = one_period(k.float(), n, outer * n1 * n2, options)
    natural = torch.view_as_real(torch.fft.fft(period)).view(-1, n2, n1, outer, 2)
    planes = natural[:, :, :, : outer // 2 + 1].permute(0, 3, 4, 2, 1)
    return normalized(planes[:, 0] if outer == 1 else planes, dtype)


def normalized(planes: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Planes divided by a power of two a head, so that the largest element is below 1."""
    over = tuple(range(1, planes.dim()))
    largest = planes.abs().amax(over) if planes.shape[0] else planes.new_empty(0)
    _, exponent = torch.frexp(largest)
    exponent = exponent.clamp(-125, 126)  # so that its power and the reciprocal are normal numbers
    scaled = torch.ldexp(planes, -_over_all(exponent, planes))
    return [scaled.to(dtype).contiguous(), torch.ldexp(torch.ones_like(largest), exponent)]


def with_skip(transformed: list[Tensor], skip: Tensor) -> list[Tensor]:
    """The filter with ``skip`` added to its tap of lag 0, which adds it to every frequency."""
    planes = transformed[0].float() * _over_all(transformed[1], transformed[0])
    real = planes.select(-3, 0)
    real += _over_all(skip.float(), real)
    return normalized(planes, transformed[0].dtype)


def _over_all(a_head: Tensor, planes: Tensor) -> Tensor:
    """Numbers ``[H]`` in the shape that broadcasts over planes ``[H, ...]``."""
    return a_head.view(-1, *[1] * (planes.dim() - 1))


def taps_gradient(sums: Tensor, taps: int, n: int, cover: Blocks | Through, options: Options) -> tuple[Tensor, Tensor]:
    """The gradients of the taps ``[H, Nk]`` and of skip ``[H]`` from the kernel's sums ``[parts, H, 2, N1, COLS]``,
    through memory ``[parts, H, N0 / 2 + 1, 2, N1, COLS]``."""
    total = sums.sum(0)
    outer, n1, n2, columns = cover.outer, cover.n1, cover.n2, total.shape[-1]
    if columns < n2:
        gap = total.new_zeros(*total.shape[:-1], n2 - columns)
        total = torch.cat([total[..., : columns // 2], gap, total[..., columns // 2 :]], dim=-1)
    planes = total.view(total.shape[0], -1, 2, n1, n2)
    natural = torch.view_as_complex(planes.permute(0, 4, 3, 1, 2).contiguous()).flatten(1, 2)  # [H, M, rows]
    if outer > 1:
        mirrored = natural[:, :, 1 : outer // 2].flip(1, 2).conj_physical()
        natural = torch.cat([natural, mirrored], dim=2)
    period = torch.fft.ifft(natural.flatten(1)).real
    return unplaced(one_period_adjoint(period, n, options), taps, n, options), period[:, 0]
