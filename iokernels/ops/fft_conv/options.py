"""What the backends of this room agree on: the function, its arguments, and what a backward pass returns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .real_fft import irfft, rfft

CAUSAL, CIRCULAR, TWO_SIDED = "causal", "circular", "two_sided"


class Options(NamedTuple):
    """Everything but u ``[B, H, N]`` and k ``[H, Nk]``, after validation.

    With ``v = pre_gate * u``, and ``v_t`` for t < 0 read from ``initial_state`` (0 without one),

        w_t = sum_j k_j v_(t-j)                 causal
        w_t = sum_j k_j v_((t-j) mod N)         circular, Nk <= N
        w_t = sum_j k_j v_(t-j+N-1)             two_sided, Nk = 2 N - 1, v is 0 outside of [0, N)
        y   = post_gate * (w + skip * v)

    ``keep`` below 1 first limits the filter to low frequencies (:func:`kept_bins`, :func:`band_length`).
    """

    # Tensors, in the order of the operators' schemas.
    pre_gate: Tensor | None = None  # [B, H, N], dtype of u
    post_gate: Tensor | None = None  # [B, H, N], dtype of u
    skip: Tensor | None = None  # [H], any floating dtype
    initial_state: Tensor | None = None  # state_dtype(u) [B, H, Nk - 1]: v_(1-Nk) ... v_(-1); causal only
    # The rest.
    mode: str = CAUSAL
    keep: float = 1.0
    batch_invariant: bool = False


def without_empty_state(options: Options) -> Options:
    """The options of a backend, to which the state of a filter of one tap, of no steps, is none."""
    past = options.initial_state
    return options._replace(initial_state=None) if past is not None and past.shape[2] == 0 else options


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    u: bool
    k: bool
    pre_gate: bool = False
    post_gate: bool = False
    skip: bool = False
    initial_state: bool = False


class Gradients(NamedTuple):
    """What a backward pass returns, each of the shape and dtype of its tensor; None where not needed."""

    u: Tensor | None = None
    k: Tensor | None = None
    pre_gate: Tensor | None = None
    post_gate: Tensor | None = None
    skip: Tensor | None = None
    initial_state: Tensor | None = None

    def put_filter(self, taps: Tensor, skip: Tensor, heads: slice = slice(None)) -> None:
        """Write the gradients of the taps and of skip of some heads, as far as they are wanted."""
        for grad, value in ((self.k, taps), (self.skip, skip)):
            if grad is not None:
                grad[heads] = value


class KernelSpectrum(NamedTuple):
    """A filter with its transform, made by :func:`~iokernels.ops.fft_conv.kernel_spectrum`; accepted as ``k``.

    It serves calls of length ``n`` on ``backend`` with the same mode and ``freq_keep``. ``transform`` is the backend's
    own: on ``torch`` one complex tensor, on ``triton`` the permuted planes and their scale. It holds the taps that
    reach an output, of which an initial state makes more: ``with_state`` serves those calls, and is the same where
    Nk <= n.
    """

    taps: Tensor  # [H, Nk], detached
    transform: list[Tensor]
    with_state: list[Tensor]
    n: int
    causal: bool
    keep: float
    dtype: torch.dtype  # of the u that it serves
    backend: str


def empty_gradients(u: Tensor, k: Tensor, options: Options, needs: Needs, zeros: bool = False) -> Gradients:
    """Contiguous gradients of those that ``needs`` names: uninitialised, or zeros where asked for or where u has no
    element and no kernel runs."""
    sources = (u, k, options.pre_gate, options.post_gate, options.skip, options.initial_state)
    make = torch.zeros_like if zeros or u.numel() == 0 else torch.empty_like
    return Gradients(
        *(
            make(x, memory_format=torch.contiguous_format) if need and x is not None else None
            for x, need in zip(sources, needs, strict=True)
        )
    )


def effective_taps(n: Any, taps: Any, options: Options) -> Any:
    """How many taps of a filter reach an output: a causal one without a past has no use for more than n."""
    return min(n, taps) if options.mode == CAUSAL and options.initial_state is None else taps


def reach(n: Any, taps: Any, mode: str, keep: float, state: bool) -> tuple[str, Any]:
    """The mode and the effective taps of the filter that is left after ``keep``, which spreads over all lags."""
    if keep < 1.0:
        return (CIRCULAR, n) if mode == CIRCULAR else (TWO_SIDED, 2 * n - 1)
    return mode, min(n, taps) if mode == CAUSAL and not state else taps


def band_length(n: int, mode: str) -> int:
    """The length F of the transform in which frequencies are kept: n if circular, else the power of two from 2 n on.

    It is part of the function, not of how it is computed, so that every backend keeps the same frequencies.
    """
    return n if mode == CIRCULAR else 1 << max(2 * n - 1, 1).bit_length()


def kept_bins(keep: float, length: int) -> int:
    """How many of the ``length // 2 + 1`` frequencies of a real transform are kept, from 0 on; the others become 0."""
    return max(1, math.ceil(keep * (length // 2 + 1) - 1e-9))


def placed(k: Tensor, length: int, n: int, options: Options) -> Tensor:
    """One period of the filter: the tap of lag l at index ``l mod length``, [H, length]."""
    if options.mode == TWO_SIDED:
        gap = k.new_zeros(k.shape[0], length - k.shape[1])
        return torch.cat([k[:, n - 1 :], gap, k[:, : n - 1]], dim=1)
    there = effective_taps(n, k.shape[1], options)
    return torch.nn.functional.pad(k[:, :there], (0, length - there))


def unplaced(x: Tensor, taps: int, n: int, options: Options) -> Tensor:
    """The adjoint of :func:`placed`: [H, taps] out of [H, length]."""
    if options.mode == TWO_SIDED:
        return torch.cat([x[:, x.shape[1] - (n - 1) :], x[:, :n]], dim=1)
    there = effective_taps(n, taps, options)
    return torch.nn.functional.pad(x[:, :there], (0, taps - there))


def band_limited(period: Tensor, keep: float) -> Tensor:
    """One period of a filter without its upper frequencies. Linear and its own adjoint."""
    length = period.shape[-1]
    return irfft(rfft(period)[..., : kept_bins(keep, length)], n=length)


def one_period(k: Tensor, n: int, length: int, options: Options) -> Tensor:
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


def one_period_adjoint(period: Tensor, n: int, options: Options) -> Tensor:
    """The gradient of one period, of :func:`one_period`'s length, as that of what was placed before ``keep``."""
    if options.keep == 1.0:
        return period
    own, length = band_length(n, options.mode), period.shape[1]
    if own != length and options.mode == CIRCULAR:
        period = period[:, :n]
    elif own != length:
        gap = period.new_zeros(period.shape[0], own - (2 * n - 1))
        period = torch.cat([period[:, :n], gap, period[:, length - (n - 1) :]], dim=1)
    return band_limited(period, options.keep)
