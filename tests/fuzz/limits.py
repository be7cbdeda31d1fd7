"""How far a result may be from the oracle, said once for all operators.

An exact result of slightly different inputs is a right result. So what is allowed comes from the inputs: the oracle is
evaluated again with every tensor moved at random by one rounding of its dtype, and once in float32, in which all
operators compute statistics and sums. How far these stray from the oracle is what rounding may do; a kernel may do
``ROUNDINGS`` times as much, because it rounds intermediate values (weights, states, gradients of scores) too.

    limit of a row = ROUNDINGS max(stray of the row, stray of the tensor / SHARE) + HALF_ULPS u |expected| + floor

with u the unit roundoff of the result's dtype, and as floor the smallest number of the dtype of computation: what is
smaller is flushed. The share of the tensor is there because a stray of few elements may be small by chance.

Where an operator's page promises a relative root mean square instead (convolutions, recurrences), results of at least
``SHORT`` elements are held to that promise, plus twice the stray of inputs that are moved by roundings of float32, with
those intermediate values rounded of which the page says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = {torch.float16: 12.0, torch.bfloat16: 12.0, torch.float32: 32.0, torch.float64: 4096.0}
"""By the dtype of computation. In float32 the order of a sum shows, which half precision hides. Of float64 no more is
asked than eleven digits: what is wrong there is wrong in the first ones."""
SHARE = 16.0
SHORT = 16
FAST_EXPONENTIAL = 2.0**-13
"""Allowed to a log-sum-exp of half-precision inputs, absolute: PyTorch's own kernel takes an exponential of 20 bits."""
HALF_ULPS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 16.0, torch.float64: 2.0**16}
"""Of the largest in a row. Sums of equal terms stray in one direction: 1e-6 of a float32 result are always allowed."""

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""The unit roundoff of each dtype: half of the gap behind 1."""

SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float64: 2.0**-126}
"""The least number that is not flushed; float16 is never flushed, and rounds to multiples of its own."""


@dataclass
class Verdict:
    """The worst element of a result: how many times the allowed error it has, where, and what stands there."""

    ratio: float
    index: tuple[int, ...]
    got: float
    expected: float
    limit: float

    def __str__(self) -> str:
        return (
            f"worst index {self.index}: got {self.got:.9g}, expected {self.expected:.9g}, limit {self.limit:.3g} "
            f"({self.ratio:.3g} times)"
        )


def judge(
    got: Tensor, expected: Tensor, strays: list[Tensor], work: torch.dtype, *, rms: float | None = None,
    whole: bool = False, least: float = 0.0, slack: float = 1.0, passed: Tensor | None = None,
) -> Verdict:  # fmt: skip
    """Compare ``got`` with ``expected`` float64, which ``strays`` float64 show the condition of.

    ``work`` is the dtype of computation. With ``rms``, rows along the last dimension, or the ``whole`` tensor, have
    that relative root mean square as their limit beside the strays. ``least`` is an error that is allowed everywhere,
    ``slack`` a factor of what the strays allow. NaN and infinities of ``expected`` must be met. An element of
    ``passed`` may also be infinite or NaN, because it or a term of it passes the range of the dtype; if it is a number,
    it must be the right one.
    """
    got, expected = got.detach().double(), expected.detach()
    if not expected.numel():
        return Verdict(0.0, (), 0.0, 0.0, 0.0)
    finite = expected.isfinite()
    clean = torch.where(finite, expected, 0.0)
    stray = torch.zeros_like(expected)
    for other in strays:
        moved = torch.where(finite & other.isfinite(), other - clean, 0.0)
        stray = torch.maximum(stray, moved.abs())
    rows = tuple(range(expected.dim())) if whole else (-1,) if expected.dim() else ()
    roundings = 2.0 if rms is not None and work.itemsize == 2 else ROUNDINGS[work]
    limit = slack * roundings * torch.maximum(_most(stray, rows), stray.max() / SHARE)
    limit = limit + HALF_ULPS[work] * UNIT[work] * _most(clean.abs(), rows) + SMALLEST[work] + least
    gone = torch.zeros_like(finite) if passed is None else passed & ~got.isfinite()
    error = each = torch.where(finite & ~gone, (got - clean).abs(), 0.0)
    if rms is not None:
        limit = limit + rms * _root_mean_square(clean, rows)
        error = _root_mean_square(each, rows)
    limit = limit.expand(expected.shape)
    ratio = torch.where(error == 0.0, 0.0, error / limit)
    same = (got == expected) | (got.isnan() & expected.isnan())
    ratio = torch.where(finite, ratio, torch.where(same, 0.0, float("inf"))).nan_to_num(nan=float("inf"))
    candidates = torch.where(ratio == ratio.max(), each.nan_to_num(nan=float("inf")), -1.0)
    worst = tuple(int(i) for i in torch.unravel_index(candidates.argmax(), ratio.shape))
    return Verdict(ratio[worst].item(), worst, got[worst].item(), expected[worst].item(), limit[worst].item())


def _most(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.amax(dims, keepdim=True) if dims else x


def _root_mean_square(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.square().mean(dims, keepdim=True).sqrt() if dims else x.abs()
