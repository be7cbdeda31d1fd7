"""The roundings of a kernel, played on an oracle: intermediate values that stray by about a unit roundoff."""

from __future__ import annotations

import torch
from torch import Tensor


class Jitter:
    """What an oracle applies to the values that kernels round. With the unit 0 it changes nothing.

    Args:
        unit: roundoff of the dtype in which weights, states and outputs meet a product.
        single: of the dtype in which scores and sums are kept: float32, or float64.
        side: 1 or -1, with which one of two errors of a row counts. An oracle that is evaluated with both shows their
            sum, however the errors fall.
    """

    def __init__(
        self, unit: float = 0.0, single: float = 0.0, generator: torch.Generator | None = None, side: float = 1.0
    ) -> None:
        self.unit, self.single, self.generator, self.side = unit, single, generator, side

    def __call__(self, x: Tensor) -> Tensor:
        """x as it is rounded where it meets a product."""
        return self._by(x, self.unit)

    def sums(self, x: Tensor) -> Tensor:
        """x as it is rounded where it is a sum."""
        return self._by(x, self.single)

    def weighed(self, weights: Tensor, lse: Tensor) -> Tensor:
        """``exp(score - lse)`` as it is rounded, and as it is made again from an lse of many digits."""
        if not self.unit:
            return weights
        size = torch.where(lse.detach().isfinite(), lse.detach().abs(), 0.0)[..., None]
        return self(weights) * (1.0 + self.single * size * self._noise(size.shape))

    def cancelled(self, scores: Tensor, weights: Tensor, out: Tensor, lse: Tensor | None = None) -> Tensor:
        """``out``, and a backward pass whose gradient of the scores carries the roundings of what cancels in it.

        ``dS = P (dP - dO . out)``: the formula's sum over a row is 0, but a backward pass takes out as it was rounded.
        With ``lse``, P is ``exp(s - lse)`` of an lse that is rounded by up to ``u |lse|``. That is a factor
        ``1 + u |lse|`` of every dS of the row, so also of what an incoming gradient of lse contributes to it.
        """
        if not self.unit or not scores.requires_grad or not out.requires_grad:
            return out
        incoming: list[Tensor] = []
        magnitude, weights = out.detach().abs(), weights.detach()
        size = None if lse is None else torch.where(lse.detach().isfinite(), lse.detach().abs(), 0.0)[..., None]

        def astray(gradient: Tensor) -> Tensor:
            # Signs: of one number for a row, a normal one would be near 0 by chance, and the row would not stray.
            sign = self._noise(weights[..., :1].shape).sign()
            if size is not None:
                gradient = gradient * (1.0 + self.single * size * sign)
            if not incoming:
                return gradient
            row = (incoming[0].abs() * magnitude).sum(-1, keepdim=True)
            noise = self.side * sign + 0.5 * self._noise(weights.shape)
            return gradient + self.unit * noise * weights * row

        out.register_hook(incoming.append)
        scores.register_hook(astray)
        return out

    def summed(self, f: Tensor, terms: Tensor) -> Tensor:
        """Zeros, for ``f [H, F]`` times sums ``[H, F, W]``, of whose terms ``terms`` adds the magnitudes.

        A backward pass makes ``g . sum`` from the terms anew and misses it by ``u |g| . terms``, also where the sum
        itself is small. Of a quotient of two sums the forward pass may have lost the same, but not by the same error.
        """
        if not self.single or not f.requires_grad:
            return f.new_zeros(())
        return torch.einsum("hf,hfw->hw", f - f.detach(), self.single * terms * self._noise(terms.shape))

    def active(self, x: Tensor, y: Tensor) -> Tensor:
        """An activation ``y = f(x)``, tanh or sigmoid, and a backward pass that takes its slope from a rounded y.

        Both slopes, ``(1 - y) (1 + y)`` and ``(1 - y) y``, lose ``u |y|`` where 1 - y cancels, however small they are.
        """
        if not self.single or not x.requires_grad:
            return y
        lost = self.single * y.detach().abs() * self._noise(y.shape)
        return y + lost * torch.where(x.isfinite(), x - x.detach(), 0.0)

    def transformed(self, x: Tensor) -> Tensor:
        """x, and a backward pass whose gradient of x comes out of a fast transform along the last dimension.

        Such a transform errs by about ``u sqrt(log2 n)`` of the norm of the row (Higham 2002, section 24.1), spread
        evenly over its points: a point that is small has the error of the others.
        """
        if not self.single or not x.requires_grad:
            return x

        def astray(gradient: Tensor) -> Tensor:
            size = gradient.square().mean(-1, keepdim=True).sqrt()
            return gradient + self.single * size * self._noise(gradient.shape)

        x = x * 1.0  # a hook on a tensor of its own
        x.register_hook(astray)
        return x

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _by(self, x: Tensor, unit: float) -> Tensor:
        return x * (1.0 + unit * self._noise(x.shape)) if unit else x
