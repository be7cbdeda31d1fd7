"""Convolutions along the sequence as modules: short depthwise filters, long ones, and a layer around a long one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iokernels.ops.fft_conv.api import fft_conv
from iokernels.ops.fft_conv.step import LazyState, fft_conv_step, lazy_state
from iokernels.ops.shared.sizes import MOST, kind, whole
from iokernels.ops.short_conv.api import Padding, short_conv, short_conv_step
from iokernels.runtime.contracts import Contract

_SHORT, _LONG, _LAYER = Contract("ShortConv1d"), Contract("FFTConv"), Contract("LongConv")


class ShortConv1d(nn.Module):
    """Replaces a depthwise :class:`torch.nn.Conv1d`, ``Conv1d(H, H, W, groups=H)``: initial parameters and state_dict.

    Args:
        channels: H, given once: every channel is convolved with its own filter.
        kernel_size: W.
        bias: whether there is one.
        padding: as in :func:`iokernels.short_conv`. Causal unless told otherwise: what models write as
            ``Conv1d(..., padding=W - 1)(x)[..., :N]``.
        activation: None or ``"silu"``, applied to the result in the same pass.
        device: where the parameters live.
        dtype: their dtype.
        backend: as in :func:`iokernels.short_conv`.

    Raises:
        TypeError, ValueError: sizes that are no ints, or below 1; a bias that is no bool, as where the number of
            channels is given twice.
    """

    bias: Tensor | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        padding: Padding = "causal",
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bias, bool):
            raise TypeError(
                f"ShortConv1d: bias is {kind(bias)}; it must be a bool. The number of channels is given once: "
                "ShortConv1d(channels, kernel_size, bias)"
            )
        channels = whole(_SHORT, "channels", channels, least=-MOST)
        kernel_size = whole(_SHORT, "kernel_size", kernel_size, least=-MOST)
        _SHORT.require(
            channels > 0 and kernel_size > 0,
            f"channels is {channels} and kernel_size {kernel_size}; both must be at least 1",
        )
        self.channels = channels
        self.kernel_size = kernel_size
        self.padding = padding
        self.activation = activation
        self.backend = backend
        # torch's module draws its parameters from the same generator in the same order.
        drawn = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=bias, device=device, dtype=dtype)
        self.weight = drawn.weight
        self.register_parameter("bias", drawn.bias)  # pyright: ignore[reportArgumentType]

    def reset_parameters(self) -> None:
        """Draw new parameters, as torch's module does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.kernel_size**-0.5), self.kernel_size**-0.5)

    def extra_repr(self) -> str:
        """The options that shape the result."""
        text = f"{self.channels}, kernel_size={self.kernel_size}, padding={self.padding!r}"
        return text + (f", activation={self.activation!r}" if self.activation else "")

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Convolve ``x [B, H, N]`` (packed: ``[total, H]``); arguments and results of :func:`iokernels.short_conv`."""
        return short_conv(
            x, self.weight.squeeze(1), bias=self.bias, activation=self.activation, padding=self.padding,
            initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> Tensor:
        """The state before a sequence, zeros ``[B, H, W - 1]``, for :meth:`step` or as ``initial_state``.

        Of the dtype of the parameters, if none is given; float32 serves steps of 16-bit inputs too.
        """
        batch = whole(_SHORT, "batch", batch, least=0)
        made: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype if dtype is None else dtype}
        return torch.zeros((batch, self.channels, self.kernel_size - 1), **made)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One more row ``x [B, H]`` of a causal convolution, without gradients. Changes ``state`` in place.

        Under autocast x is cast as by :meth:`forward`; the state may be float32 all the same.
        """
        around = self.kernel_size - 1
        _SHORT.require(
            self.padding in ("causal", (around, 0)), f"padding is {self.padding!r}; a step needs causal padding"
        )
        return short_conv_step(
            x, self.weight.squeeze(1), state, bias=self.bias, activation=self.activation, backend=self.backend
        )


class FFTConv(nn.Module):
    """A long filter for every channel, ``post_gate * (k * v + skip * v)`` with ``v = pre_gate * u``.

    The filter is a parameter, or given with each call. A filter that is learned directly overfits; Fu et al. (2023,
    arXiv:2302.06646, "Simple Hardware-Efficient Long Convolutions for Sequence Modeling") found that squashing its taps
    toward zero and smoothing it is enough to train it as well as a state space model.

    Args:
        channels: H.
        length: the longest sequence N. Parameter ``k [H, length]``, or ``[H, 2 length - 1]`` (lags from ``1 - length``
            on) unless causal. None: no parameter, :meth:`forward` gets a filter.
        causal: outputs see earlier inputs only.
        skip: adds a parameter ``skip [H]``.
        squash: soft threshold: taps become ``sign(k) max(|k| - squash, 0)``; 0 leaves them.
        smooth: every tap becomes the mean of ``2 smooth + 1`` neighbours, before the threshold; 0 leaves them.
        device: where the parameters live.
        dtype: their dtype.
        backend: as in :func:`iokernels.fft_conv`.

    Channels start with random filters that decay at rates from a few steps to the whole length, scaled to keep the
    variance of white noise.

    Raises:
        ValueError: sizes or numbers out of range.
    """

    k: Tensor | None
    skip: Tensor | None

    def __init__(
        self,
        channels: int,
        length: int | None = None,
        *,
        causal: bool = True,
        skip: bool = True,
        squash: float = 0.0,
        smooth: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        channels = whole(_LONG, "channels", channels, least=1)
        length = None if length is None else whole(_LONG, "length", length, least=1)
        smooth = whole(_LONG, "smooth", smooth, least=0)
        self.channels = channels
        self.length = length
        self.causal = _LONG.flag("causal", causal)
        self.squash = _LONG.number("squash", squash, least=0.0)
        self.smooth = smooth
        self.backend = backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if length is None:
            self.register_parameter("k", None)
        else:
            self.k = nn.Parameter(torch.empty((channels, length if causal else 2 * length - 1), **made))
        if _LONG.flag("skip", skip):
            self.skip = nn.Parameter(torch.empty(channels, **made))
        else:
            self.register_parameter("skip", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        if self.k is not None and self.length is not None:
            lags = torch.arange(self.k.shape[1], device=self.k.device, dtype=torch.float32)
            lags = lags if self.causal else (lags - (self.length - 1)).abs()
            reach = torch.logspace(0.0, 1.0, self.channels, base=max(self.length, 2) / 2.0, device=self.k.device)
            decay = torch.exp(-lags / reach[:, None])
            decay = decay / decay.square().sum(1, keepdim=True).sqrt()
            with torch.no_grad():
                self.k.copy_(torch.randn_like(decay) * decay)
        if self.skip is not None:
            nn.init.normal_(self.skip)

    def extra_repr(self) -> str:
        """The options that shape the result."""
        said = {"causal": True, "squash": 0.0, "smooth": 0}
        text = f"{self.channels}, length={self.length}, skip={self.skip is not None}"
        return text + "".join(f", {n}={getattr(self, n)!r}" for n, usual in said.items() if getattr(self, n) != usual)

    def taps(self, k: Tensor | None = None) -> Tensor:
        """The filter that is used: ``k``, or the parameter, smoothed and squashed."""
        k = self.k if k is None else k
        if k is None:
            raise ValueError("FFTConv: k is None, and the module was made without a length; pass a filter")
        if self.smooth:
            k = F.avg_pool1d(k.unsqueeze(0), 2 * self.smooth + 1, stride=1, padding=self.smooth).squeeze(0)
        return F.softshrink(k, self.squash) if self.squash else k

    def forward(
        self,
        u: Tensor,
        k: Tensor | None = None,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
    ) -> Tensor:
        """Convolve ``u [B, H, N]``, N at most ``length``, with the parameter, or with ``k`` as in
        :func:`iokernels.fft_conv`."""
        taps = self.taps(k)
        if k is None and self.length is not None:
            n = u.shape[-1]
            if n > self.length:  # not require(): torch.compile cannot format a symbol
                raise ValueError(f"FFTConv: u has {n} steps; the filter was made for {self.length}")
            if n == 0:
                taps = taps[:, :1]  # of which any number serves no steps
            else:
                taps = taps[:, :n] if self.causal else taps[:, self.length - n : self.length + n - 1]
        return fft_conv(
            u, taps, causal=self.causal, pre_gate=pre_gate, post_gate=post_gate, skip=self.skip, backend=self.backend
        )  # fmt: skip

    @torch.no_grad()
    def init_state(self, batch: int, length: int | None = None, k: Tensor | None = None) -> LazyState:
        """The state before a sequence of at most ``length`` steps (that of the module), with today's filter."""
        _LONG.require(self.causal, "causal is False; only a causal filter makes one output after the other")
        taps = self.taps(k)
        length = taps.shape[1] if length is None else length
        return lazy_state(taps, batch, length, dtype=taps.dtype)

    def step(
        self, u: Tensor, state: LazyState, *, pre_gate: Tensor | None = None, post_gate: Tensor | None = None
    ) -> Tensor:
        """One more output ``[B, H]`` for ``u [B, H]``, without gradients. Changes ``state``."""
        if not isinstance(state, LazyState):
            raise TypeError(f"FFTConv: state is {kind(state)}; it must be what init_state made")
        return fft_conv_step(u, state.k, state, pre_gate=pre_gate, post_gate=post_gate, skip=self.skip)


class LongConv(nn.Module):
    """A sequence layer of one long convolution (Fu et al., 2023, arXiv:2302.06646): mixes along the sequence in every
    channel, then across channels. ``y = gelu(conv(u)) W + b``.

    Args:
        width: E.
        length: the longest sequence N.
        causal, squash, smooth: as in :class:`FFTConv`.
        bias: whether the projection has one.
        device: where the parameters live.
        dtype: their dtype.
        backend: as in :func:`iokernels.fft_conv`.
    """

    def __init__(
        self,
        width: int,
        length: int,
        *,
        causal: bool = True,
        squash: float = 0.0,
        smooth: int = 0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width, length = whole(_LAYER, "width", width, least=1), whole(_LAYER, "length", length, least=1)
        self.conv = FFTConv(width, length, causal=causal, squash=squash, smooth=smooth, backend=backend, **made)
        self.out_proj = nn.Linear(width, width, bias=bias, **made)

    def forward(self, u: Tensor) -> Tensor:
        """``[B, N, E]`` to ``[B, N, E]``."""
        return self.out_proj(F.gelu(self.conv(u.transpose(1, 2))).transpose(1, 2))

    def init_state(self, batch: int, length: int | None = None) -> LazyState:
        """The state before a sequence of at most ``length`` steps, for :meth:`step`; causal layers only."""
        return self.conv.init_state(batch, length)

    @torch.no_grad()
    def step(self, u: Tensor, state: LazyState) -> Tensor:
        """One more step, ``[B, E]`` to ``[B, E]``, without gradients. Changes ``state``."""
        return self.out_proj(F.gelu(self.conv.step(u, state)))
