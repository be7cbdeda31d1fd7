"""How far from the truth a kernel may be.

The truth is the formula in float64. A kernel in a low precision is allowed a small multiple of the error that the same
formula makes when PyTorch runs it in that precision, plus the noise of rounding a result once, both for the largest
error and for the root mean square (:func:`check`): the budget follows the inputs and is never a guessed constant. Where
an error grows along the sequence, as in recurrences and long convolutions, each row is held to a relative error instead
(:func:`check_relative_rms`).

A failure names the tensor, the index that is most wrong, what is there, what should be, and the command that repeats it
(:func:`repeated_by`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from iokernels.runtime.scoped import Scoped

FORWARD = 2.0
"""Error allowed to a forward pass, in errors of the eager low-precision formula."""

GRADIENT = 3.0
"""Error allowed to a gradient, in errors of the eager low-precision gradient."""

SINGLE = 2.0
"""Multiplies both for results in float32. There the order of the roundings shows: a kernel rounds a logit once more for
the factor log2 e and once for the log-sum-exp that it subtracts, where the eager formula subtracts an exact maximum. In
half precision such roundings, being in float32 all the same, vanish in the error of the inputs' products."""


_again: Scoped[str] = Scoped("")


@contextmanager
def repeated_by(command: str) -> Iterator[None]:
    """Every failure inside ends with ``command``, which repeats it."""
    with _again.set(command):
        yield


def fail(message: str) -> NoReturn:
    """Raise ``message`` as an AssertionError, with the command that repeats the failure where one is known."""
    raise AssertionError(message + (f"\n  again: {_again.value}" if _again.value else ""))


class Element(NamedTuple):
    """One element of a result: its index, what is there, and what should be."""

    index: tuple[int, ...]
    got: float
    expected: float

    def __str__(self) -> str:
        return f"at {self.index}: got {self.got:.6g}, expected {self.expected:.6g}"


@dataclass(frozen=True)
class Judgement:
    """A result measured against its budget, in float64.

    ``error`` and ``limit`` are the largest absolute error found and allowed, ``rms_error`` and ``rms_limit`` the same
    for the root mean square over the tensor, which sees a small error that is everywhere. ``worst`` is the element with
    the largest error, or None where there is no element.
    """

    error: float
    limit: float
    rms_error: float
    rms_limit: float
    worst: Element | None

    @property
    def ratio(self) -> float:
        """Error over limit, the larger of the two: at most 1 within budget, infinite for a NaN."""
        return max(_ratio(self.error, self.limit), _ratio(self.rms_error, self.rms_limit))

    @property
    def within(self) -> bool:
        """Whether the budget is kept."""
        return self.error <= self.limit and self.rms_error <= self.rms_limit


def judge(actual: Tensor, reference: Tensor, low_precision: Tensor, *, factor: float) -> Judgement:
    """Measure ``actual`` against ``factor`` times the error of ``low_precision``, plus rounding noise.

    ``reference`` is the float64 result, ``low_precision`` the same formula run eagerly in the kernel's dtype, as the
    backend ``reference`` does inside :func:`iokernels.runtime.registration.precision.eagerly`; the three have one
    shape. The noise is what is lost when 0.3 is added to the reference and taken off again in the dtype of
    ``low_precision``, twice over. An infinity in ``reference`` must be the same infinity in ``actual``, and a NaN in
    ``actual`` is an infinite error.

    Raises:
        ValueError: ``reference`` is not float64 or has a NaN, shapes differ, or ``low_precision`` is not finite where
            ``reference`` is, which would allow anything.
    """
    actual, low_precision, reference = (x.detach() for x in (actual, low_precision, reference))
    if reference.dtype != torch.float64:
        raise ValueError(f"reference is {reference.dtype}; it must be float64")
    if not actual.shape == reference.shape == low_precision.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (actual, reference, low_precision))
        raise ValueError(f"actual, reference and low_precision have the shapes {shapes}; they must be equal")
    reference = reference.to(actual.device)
    low_precision = low_precision.to(actual.device)
    if reference.isnan().any():
        raise ValueError("reference has a NaN: there is no right answer to compare with")

    if low_precision.dtype == torch.float32:
        factor *= SINGLE
    finite = reference.isfinite()
    low_error = torch.where(finite, low_precision.double() - reference, 0.0).abs()
    if not low_error.isfinite().all():
        raise ValueError(
            f"the formula overflows in {low_precision.dtype}: scale the inputs down, or any result is right"
        )
    rounded = torch.where(finite, reference, 0.0).to(low_precision.dtype)
    noise = ((rounded + 0.3 - 0.3) - rounded).double().abs()

    same_infinity = ~finite & (actual.double() == reference)
    error = torch.where(same_infinity, 0.0, (actual.double() - reference).abs()).nan_to_num(nan=float("inf"))
    return Judgement(
        error=_largest(error),
        limit=factor * _largest(low_error) + 2.0 * _largest(noise),
        rms_error=_rms(error),
        rms_limit=factor * _rms(low_error) + 2.0 * _rms(noise),
        worst=_element(actual, reference, _where_largest(error)),
    )


def error_ratio(actual: Tensor, reference: Tensor, low_precision: Tensor, *, factor: float) -> float:
    """The error of ``actual`` over the error allowed: at most 1 within budget. Arguments as :func:`judge`."""
    return judge(actual, reference, low_precision, factor=factor).ratio


def check(
    actual: Tensor,
    reference: Tensor,
    low_precision: Tensor,
    *,
    factor: float,
    what: str,
    may_vanish: bool = False,
) -> None:
    """Raise unless ``actual`` is within budget. Arguments as :func:`judge`; ``what`` names the tensor in the message.

    ``may_vanish`` admits a reference so small that zeros are within budget: right only where the formula gives zero, or
    cancels to it, such as the gradient of attention to a single key.

    Raises:
        AssertionError: the budget is exceeded; the message says what, where, the error and the limit.
        ValueError: as :func:`judge`, or zeros would pass and ``may_vanish`` is not set.
    """
    judgement = judge(actual, reference, low_precision, factor=factor)
    largest = _largest(torch.where(reference.isfinite(), reference.detach(), 0.0).abs())
    if 0.0 < largest <= judgement.limit and not may_vanish:
        raise ValueError(
            f"{what}: an error of {judgement.limit:.3g} is allowed and no element is larger than {largest:.3g}, so "
            "zeros would pass. Take larger inputs."
        )
    if not judgement.within:
        fail(
            f"{what}: error {judgement.error:.3g} (limit {judgement.limit:.3g}) {judgement.worst}; "
            f"RMS error {judgement.rms_error:.3g} (limit {judgement.rms_limit:.3g})"
        )


def relative_rms(actual: Tensor, reference: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Root mean square of the error over that of the reference, along ``dim``: float64, of the shape without ``dim``.

    A row of zeros gives 1, one without elements 0. A NaN gives infinity, and so does any error in a row whose reference
    is all zero.
    """
    actual, reference = actual.detach().double(), reference.detach().double().to(actual.device)
    error = (actual - reference).square().mean(dim).sqrt()
    ratio = error / reference.square().mean(dim).sqrt()
    if not actual.numel():
        return torch.zeros_like(ratio)  # the mean of nothing is a NaN
    return torch.where(error == 0.0, 0.0, ratio).nan_to_num(nan=float("inf"), posinf=float("inf"))


def check_relative_rms(
    actual: Tensor, reference: Tensor, *, limit: float, what: str, dim: int | tuple[int, ...] = -1
) -> None:
    """Raise unless every row of ``actual`` along ``dim`` has a relative RMS error (a fraction) of at most ``limit``.

    Raises:
        AssertionError: a row exceeds the limit; the message says which.
        ValueError: shapes differ, or ``limit`` is 1 or more, so that zeros would pass.
    """
    if not 0.0 < limit < 1.0:
        raise ValueError(f"limit is {limit}; it must lie between 0 and 1, where zeros would pass")
    if actual.shape != reference.shape:
        raise ValueError(f"actual has the shape {tuple(actual.shape)} and reference {tuple(reference.shape)}")
    ratios = relative_rms(actual, reference, dim)
    if not bool((ratios <= limit).all()):
        fail(
            f"{what}: relative RMS error {_largest(ratios):.3g} exceeds the limit {limit:.3g} in row "
            f"{_where_largest(ratios)}, most {worst_of_rows(actual, reference, dim)}"
        )


def worst_of_rows(actual: Tensor, reference: Tensor, dim: int | tuple[int, ...] = -1) -> Element | None:
    """The element with the largest error in the row along ``dim`` with the largest relative RMS error."""
    actual, reference = actual.detach().double(), reference.detach().double().to(actual.device)
    ratios = relative_rms(actual, reference, dim)
    kept = list(ratios.shape)
    for over in sorted(each % actual.dim() for each in ((dim,) if isinstance(dim, int) else dim)):
        kept.insert(over, 1)
    # Of the other rows nothing counts, and of this one a NaN most.
    errors = (actual - reference).abs().nan_to_num(nan=float("inf")) + 1.0
    in_worst = (ratios == _largest(ratios)).reshape(kept)
    return _element(actual, reference, _where_largest(torch.where(in_worst, errors, 0.0)))


def _ratio(error: float, limit: float) -> float:
    if error == 0.0:
        return 0.0
    return error / limit if limit > 0.0 else float("inf")


def _rms(x: Tensor) -> float:
    # Scaled by the largest, so that no square overflows or vanishes.
    largest = _largest(x)
    if largest in (0.0, float("inf")):
        return largest
    return largest * (x / largest).square().mean().sqrt().item()


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def _element(actual: Tensor, reference: Tensor, index: tuple[int, ...] | None) -> Element | None:
    return None if index is None else Element(index, actual[index].item(), reference[index].item())


def _where_largest(x: Tensor) -> tuple[int, ...] | None:
    if not x.numel():
        return None
    return tuple(int(i) for i in torch.unravel_index(x.argmax(), x.shape))
