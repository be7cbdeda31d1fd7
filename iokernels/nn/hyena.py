"""The Hyena operator (Poli et al., 2023, arXiv:2302.10866): gates and long convolutions in turn, with filters that a
small network writes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.fft_conv.api import fft_conv
from iokernels.ops.fft_conv.step import LazyState, fft_conv_step, lazy_state
from iokernels.runtime.contracts import Contract

from .fft_conv import ShortConv1d

_FILTER, _CONTRACT = Contract("ImplicitFilter"), Contract("HyenaOperator")


class ImplicitFilter(nn.Module):
    """Filters ``[channels, N]`` as a function of position: a network with sine activations, times a decaying window.

    With t from 0 to 1 over ``length``, the features of a position are t and the sines and cosines of its first
    ``bands`` frequencies; the network ends in a value for every channel, which is multiplied by ``exp(-rate t)``. Rates
    run from slow to fast over the channels, and each window is scaled to unit energy over ``length``.

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
        ValueError: sizes below 1.
    """

    features: Tensor
    window: Tensor

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
        for name, size in (("channels", channels), ("length", length), ("hidden", hidden), ("bands", bands)):
            _FILTER.require(size >= 1, f"{name} is {size}; it must be at least 1")
        self.length = length
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        t = torch.linspace(0.0, 1.0, length, dtype=torch.float64)
        angles = 2 * math.pi * t[:, None] * torch.arange(1, bands + 1)
        features = torch.cat([t[:, None], angles.sin(), angles.cos()], dim=1)
        window = torch.exp(-torch.linspace(slow, fast, channels, dtype=torch.float64)[:, None] * t)
        window = window / window.square().sum(1, keepdim=True).sqrt()
        kind = dtype or torch.get_default_dtype()
        # They follow from the arguments, so a state_dict need not hold them.
        self.register_buffer("features", features.to(device, kind), persistent=False)
        self.register_buffer("window", window.to(device, kind), persistent=False)
        self.layers = nn.ModuleList(
            [nn.Linear(2 * bands + 1, hidden, **made), nn.Linear(hidden, hidden, **made)]
        )  # fmt: skip
        self.omega = nn.Parameter(torch.full((hidden,), omega, **made))
        self.head = nn.Linear(hidden, channels, bias=False, **made)
        # Sines have variance one half: values then start with variance one, and filters with unit energy.
        nn.init.normal_(self.head.weight, std=(2.0 / hidden) ** 0.5)

    def forward(self, n: int) -> Tensor:
        """The first ``n`` taps, ``[channels, n]``."""
        if n > self.length:  # not require(): torch.compile cannot format a symbol
            raise ValueError(f"ImplicitFilter: n is {n}; the filter was made for {self.length} positions")
        x = self.features[:n]
        for layer in self.layers:
            x = torch.sin(self.omega * layer(x))
        return self.head(x).t() * self.window[:, :n]


class HyenaState(NamedTuple):
    """What a Hyena operator keeps between two steps: that of the short convolution, and one for each long one."""

    short: Tensor
    long: tuple[LazyState, ...]


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
        ValueError: sizes or numbers out of range.
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
        _CONTRACT.require(width > 0, f"width is {width}; it must be at least 1")
        _CONTRACT.require(order >= 2, f"order is {order}; it must be at least 2")
        self.width = width
        self.length = length
        self.order = order
        self.dropout = _CONTRACT.number("dropout", dropout, least=0.0, below=1.0)
        self.backend = backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(width, (order + 1) * width, bias=bias, **made)
        self.short_conv = ShortConv1d((order + 1) * width, short_width, backend=backend, **made)
        self.filter = ImplicitFilter((order - 1) * width, length, **(filter_options or {}), **made)
        self.skip = nn.Parameter(torch.ones(((order - 1), width), **made))
        self.out_proj = nn.Linear(width, width, bias=bias, **made)

    def extra_repr(self) -> str:
        """The options that shape the result."""
        return f"{self.width}, length={self.length}, order={self.order}, dropout={self.dropout}"

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, E]`` to ``[B, N, E]``; row i sees the rows up to i. N is at most ``length``."""
        mixed = self.short_conv(self.in_proj(x).transpose(1, 2))
        z, first, *gates = mixed.split(self.width, dim=1)
        taps = self.filter(x.shape[1]).split(self.width)
        for n, gate in enumerate(gates):
            pre_gate = first if n == 0 else None
            if self.dropout and self.training:
                z, pre_gate = F.dropout(z if pre_gate is None else z * pre_gate, self.dropout), None
            z = fft_conv(z, taps[n], pre_gate=pre_gate, post_gate=gate, skip=self.skip[n], backend=self.backend)
        return self.out_proj(z.transpose(1, 2))

    @torch.no_grad()
    def init_state(self, batch: int, length: int | None = None) -> HyenaState:
        """The state before a sequence of at most ``length`` steps (that of the module), with today's filters."""
        length = self.length if length is None else length
        _CONTRACT.require(1 <= length <= self.length, f"length is {length}; it must be from 1 to {self.length}")
        taps = self.filter(length).split(self.width)
        return HyenaState(self.short_conv.init_state(batch), tuple(lazy_state(k, batch, length) for k in taps))

    @torch.no_grad()
    def step(self, x: Tensor, state: HyenaState) -> Tensor:
        """One more step, ``[B, E]`` to ``[B, E]``, in O(log^2 N) on average, without gradients. Changes ``state``."""
        mixed = self.short_conv.step(self.in_proj(x), state.short)
        z, first, *gates = mixed.split(self.width, dim=1)
        for n, (gate, long) in enumerate(zip(gates, state.long, strict=True)):
            pre_gate = first if n == 0 else None
            z = fft_conv_step(z, long.k, long, pre_gate=pre_gate, post_gate=gate, skip=self.skip[n])
        return self.out_proj(z)
