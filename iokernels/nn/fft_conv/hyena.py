"""The Hyena operator (Poli et al., 2023, arXiv:2302.10866): gates and long convolutions in turn, with filters that a
small network writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.fft_conv.api import fft_conv
from iokernels.ops.fft_conv.step import LazyState, fft_conv_step, lazy_state
from iokernels.ops.shared.sizes import MOST, kind, whole
from iokernels.runtime.contracts import Contract

from . import ShortConv1d

_FILTER, _CONTRACT = Contract("ImplicitFilter"), Contract("HyenaOperator")


class _WideLinear(nn.Linear):
    """A linear layer that multiplies in float32 at least, whatever its parameters are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class ImplicitFilter(nn.Module):
    """Filters ``[channels, N]`` as a function of position: a network with sine activations, times a decaying window.

    With t from 0 to 1 over ``length``, the features of a position are t and the sines and cosines of its first
    ``bands`` frequencies; the network ends in a value for every channel, which is multiplied by ``exp(-rate t)``. Rates
    run from slow to fast over the channels, and each window is scaled to unit energy over ``length``.

    Taps are float32 (float64 for float64 parameters), also where parameters are stored in 16 bits and under autocast:
    the frequencies would not survive a rounding of their phases. Features and windows follow from the arguments and are
    computed with the taps, so that there is nothing beside the parameters to load, cast or move.

    Args:
        channels: filters to write.
        length: the positions that t spans; more can be asked for by none.
        hidden: width of the network's two hidden layers.
        bands: frequencies among the features.
        omega: initial frequency of the sine activations, learned for each unit.
        slow: exponent by which the slowest window has decayed at the end.
        fast: that of the fastest.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError, ValueError: sizes that are no ints, or below 1; exponents that are no numbers.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        hidden: int = 64,
        bands: int = 8,
        omega: float = 10.0,
        slow: float = 3.0,
        fast: float = 15.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = whole(_FILTER, "channels", channels, least=1)
        self.length = whole(_FILTER, "length", length, least=1)
        hidden = whole(_FILTER, "hidden", hidden, least=1)
        self.bands = whole(_FILTER, "bands", bands, least=1)
        self.initial_omega = _FILTER.number("omega", omega)
        self.slow, self.fast = _FILTER.number("slow", slow), _FILTER.number("fast", fast)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            [_WideLinear(2 * self.bands + 1, hidden, **made), _WideLinear(hidden, hidden, **made)]
        )  # fmt: skip
        self.omega = nn.Parameter(torch.empty(hidden, **made))
        self.head = _WideLinear(hidden, self.channels, bias=False, **made)
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        nn.init.constant_(self.omega, self.initial_omega)
        # Sines have variance one half: values then start with variance one, and filters with unit energy.
        nn.init.normal_(self.head.weight, std=(2.0 / self.head.in_features) ** 0.5)

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        for layer in (*self.layers, self.head):
            layer.reset_parameters()  # pyright: ignore[reportCallIssue]
        self._reset_own_parameters()

    @property
    def features(self) -> Tensor:
        """The features of every position, ``[length, 2 bands + 1]``."""
        return self._features(self.length)

    @property
    def window(self) -> Tensor:
        """The window of every channel, ``[channels, length]``."""
        return self._window(self.length)

    def forward(self, n: int) -> Tensor:
        """The first ``n`` taps, ``[channels, n]``."""
        if n > self.length:  # not require(): torch.compile cannot format a symbol
            raise ValueError(f"ImplicitFilter: n is {n}; the filter was made for {self.length} positions")
        with _without_autocast(self.omega.device.type):
            x = self._features(n)
            for layer in self.layers:
                x = torch.sin(self.omega.to(x.dtype) * layer(x))
            return self.head(x).t() * self._window(n)

    def _positions(self, n: int) -> Tensor:
        """t of the first n positions, float64 where the device has it."""
        device = self.omega.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.arange(n, device=device, dtype=dtype) / max(self.length - 1, 1)

    def _features(self, n: int) -> Tensor:
        t = self._positions(n)[:, None]
        angles = 2 * math.pi * t * torch.arange(1, self.bands + 1, device=t.device)
        return torch.cat([t, angles.sin(), angles.cos()], dim=1).to(self._dtype)

    def _window(self, n: int) -> Tensor:
        """``exp(-rate t)``, over the root of its sum of squares: a geometric series of ``length`` terms."""
        t = self._positions(n)
        rates = torch.linspace(self.slow, self.fast, self.channels, device=t.device, dtype=t.dtype)[:, None]
        step = 2.0 / max(self.length - 1, 1) * rates
        energy = torch.where(rates == 0.0, self.length, torch.expm1(-self.length * step) / torch.expm1(-step))
        return torch.exp((-rates).to(self._dtype) * t.to(self._dtype)) * energy.rsqrt().to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.omega.dtype, torch.float32)


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """Where it is on; else nothing, which leaves less in a traced graph."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


class HyenaState(NamedTuple):
    """What a Hyena operator keeps between two steps: that of the short convolution, and one for each long one."""

    short: Tensor
    long: tuple[LazyState, ...]


# It is read by torch.load's default, which makes nothing of a class that it was not told of.
torch.serialization.add_safe_globals([HyenaState])


class HyenaOperator(nn.Module):
    """Replaces causal self-attention: ``[B, N, E]`` to ``[B, N, E]`` in O(N log N).

    Of the input, a projection and a short convolution make ``order`` gates x_1 ... x_order and a value v. With z = v,

        z = x_1 z,   then for n = 2 ... order:   z = x_n (h_n * z + skip_n z)

    and a projection of z is the result. The filters h_n are written by an :class:`ImplicitFilter`. Each pair of a gate
    and a convolution is one call of :func:`iokernels.fft_conv`, which multiplies on chip.

    Args:
        width: E.
        length: the longest sequence N.
        order: gates, at least 2; there is one long convolution less.
        short_width: taps of the short convolution.
        bias: whether the projections have one.
        dropout: probability of dropping an element before a long convolution, in training.
        filter_options: keyword arguments of :class:`ImplicitFilter`.
        device: where the parameters live.
        dtype: their dtype.
        backend: as in :func:`iokernels.fft_conv`.

    Raises:
        TypeError, ValueError: sizes that are no ints, or out of range.
    """

    def __init__(
        self,
        width: int,
        length: int,
        *,
        order: int = 2,
        short_width: int = 3,
        bias: bool = True,
        dropout: float = 0.0,
        filter_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.width = width = whole(_CONTRACT, "width", width, least=1)
        self.length = length = whole(_CONTRACT, "length", length, least=1)
        self.order = order = whole(_CONTRACT, "order", order, least=2)
        self.dropout = _CONTRACT.number("dropout", dropout, least=0.0, below=1.0)
        self.backend = backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(width, (order + 1) * width, bias=bias, **made)
        self.short_conv = ShortConv1d((order + 1) * width, short_width, backend=backend, **made)
        self.filter = ImplicitFilter((order - 1) * width, length, **(filter_options or {}), **made)
        self.skip = nn.Parameter(torch.ones(((order - 1), width), **made))
        self.out_proj = nn.Linear(width, width, bias=bias, **made)

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        for part in (self.in_proj, self.short_conv, self.filter, self.out_proj):
            part.reset_parameters()
        nn.init.ones_(self.skip)

    def extra_repr(self) -> str:
        """The options that shape the result."""
        return f"{self.width}, length={self.length}, order={self.order}, dropout={self.dropout}"

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, E]`` to ``[B, N, E]``; row i sees the rows up to i. N is at most ``length``."""
        mixed = self.short_conv(self.in_proj(x).transpose(1, 2))
        z, first, *gates = mixed.split(self.width, dim=1)
        taps = self.filter(x.shape[1] or 1).split(self.width)  # a filter has a tap at least
        for n, gate in enumerate(gates):
            pre_gate = first if n == 0 else None
            if self.dropout and self.training:
                z, pre_gate = F.dropout(z if pre_gate is None else z * pre_gate, self.dropout), None
            z = fft_conv(z, taps[n], pre_gate=pre_gate, post_gate=gate, skip=self.skip[n], backend=self.backend)
        return self.out_proj(z.transpose(1, 2))

    @torch.no_grad()
    def init_state(self, batch: int, length: int | None = None) -> HyenaState:
        """The state before a sequence of at most ``length`` steps (that of the module), with today's filters."""
        most: int = self.length if length is None else whole(_CONTRACT, "length", length, least=-MOST)
        _CONTRACT.require(1 <= most <= self.length, f"length is {most}; it must be from 1 to {self.length}")
        taps = self.filter(most).split(self.width)
        batch = whole(_CONTRACT, "batch", batch, least=0)
        return HyenaState(self.short_conv.init_state(batch), tuple(lazy_state(k, batch, most) for k in taps))

    @torch.no_grad()
    def step(self, x: Tensor, state: HyenaState) -> Tensor:
        """One more step, ``[B, E]`` to ``[B, E]``, in O(log^2 N) on average, without gradients. Changes ``state``."""
        if not isinstance(state, tuple) or len(state) != 2 or len(state[1]) != self.order - 1:
            raise TypeError(f"HyenaOperator: state is {kind(state)}; it must be what init_state of this module made")
        mixed = self.short_conv.step(self.in_proj(x), state.short)
        z, first, *gates = mixed.split(self.width, dim=1)
        for n, (gate, long) in enumerate(zip(gates, state.long, strict=True)):
            pre_gate = first if n == 0 else None
            z = fft_conv_step(z, long.k, long, pre_gate=pre_gate, post_gate=gate, skip=self.skip[n])
        return self.out_proj(z)
