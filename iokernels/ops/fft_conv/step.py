"""One token of a causal filter at a time: generation.

Two ways, exact both. A window ``[B, H, Nk - 1]`` of past inputs, as ``fft_conv(return_state=True)`` returns it: a token
costs a sum over Nk products and moves the window on. And :class:`LazyState`, which knows the filter and the most tokens
that will come: a relaxed (online) convolution (Fischer & Stockmeyer, 1974; van der Hoeven, 2002; for language models
Oncescu et al., 2024, arXiv:2410.12982). After token i (counted from 1), let U be the largest power of two that divides
i. The last U inputs are convolved with the lags 1 to 2 U - 1 and added to the next U outputs, by transforms of length
2 U. Every pair of an input and a later output falls into exactly one such square, so L tokens cost O(L log^2 L) a
channel instead of O(L Nk), and a token costs O(log^2 L) on average; one in L waits for the transform of length L.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.ops.shared.sizes import check_own_memory, kind, whole
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.registration.autocast import autocast

from .api import fft_conv
from .real_fft import irfft, rfft

STEP = Contract(
    "fft_conv_step",
    u=Spec("B H", FLOATS),
    k=Spec("H Nk", FLOATS),
    state=Spec("B H Past", (torch.float32, torch.float64)),
    pre_gate=Spec("B H", same_dtype_as="u", optional=True),
    post_gate=Spec("B H", same_dtype_as="u", optional=True),
    skip=Spec("H", FLOATS, optional=True),
)
LAZY = Contract("lazy_state", k=Spec("H Nk", FLOATS), initial_state=Spec("B H Past", FLOATS, optional=True))

_DIRECT = 32
"""Squares up to this side are summed directly: a transform of so few numbers is all overhead."""


class LazyState:
    """The past of a relaxed convolution, made by :func:`lazy_state` and changed by :func:`fft_conv_step`.

    ``position`` counts the tokens seen, ``length`` is the most that it can take.
    """

    def __init__(self, k: Tensor, batch: int, length: int, dtype: torch.dtype) -> None:
        heads = k.shape[0]
        self.k = torch.zeros(heads, max(2 * length, 1), dtype=dtype, device=k.device)
        there = min(k.shape[1], length)
        self.k[:, :there] = k.detach()[:, :there]
        self.inputs = torch.zeros(batch, heads, length, dtype=dtype, device=k.device)
        self.sums = torch.zeros(batch, heads, length, dtype=dtype, device=k.device)
        self.length = length
        self.position = 0
        self._spectra: dict[int, Tensor] = {}

    def step(self, v: Tensor) -> Tensor:
        """``w [B, H]`` of the next gated input."""
        at = self.position
        self.inputs[:, :, at] = v
        w = self.sums[:, :, at] + self.k[:, 0] * self.inputs[:, :, at]
        self.position = done = at + 1
        side = done & -done
        ahead = min(side, self.length - done)
        if ahead > 0:
            self.sums[:, :, done : done + ahead] += self._square(self.inputs[:, :, done - side : done], side)[
                ..., :ahead
            ]
        return w

    def _square(self, v: Tensor, side: int) -> Tensor:
        """What ``side`` inputs add to as many outputs right after them."""
        if side <= _DIRECT:
            now = torch.arange(side, device=v.device)
            return torch.einsum("bhs,hts->bht", v, self.k[:, side + now[:, None] - now])
        spectrum = self._spectra.get(side)
        if spectrum is None:
            spectrum = self._spectra[side] = rfft(self.k[:, : 2 * side])
        return irfft(rfft(v, n=2 * side).mul_(spectrum), n=2 * side)[..., side:]


# It is read by torch.load's default, which makes nothing of a class that it was not told of.
torch.serialization.add_safe_globals([LazyState])


def lazy_state(
    k: Tensor, batch: int, length: int, *, dtype: torch.dtype | None = None, initial_state: Tensor | None = None
) -> LazyState:
    """A state for :func:`fft_conv_step` that makes up to ``length`` tokens in O(log^2 length) each, on average.

    Args:
        k: ``[H, Nk]``, a causal filter. It is copied.
        batch: sequences, B.
        length: the most tokens that will be made, at least 1. Memory: ``4 B H length`` numbers.
        dtype: of the tokens; that of k if None. Sums are float32, float64 for float64.
        initial_state: ``[B, H, Nk - 1]``, the gated inputs before the first, as ``fft_conv(return_state=True)`` gives.

    Returns:
        A state that shares no memory with the arguments. ``torch.save`` writes it and ``torch.load`` reads it by their
        defaults, once iokernels is imported.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    batch, length = whole(LAZY, "batch", batch, least=0), whole(LAZY, "length", length, least=1)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"lazy_state: dtype is {dtype!r}; it must be None or {' or '.join(map(short, FLOATS))}")
    sizes = LAZY.check(k=k, initial_state=initial_state)
    LAZY.require(sizes["Nk"] >= 1, "k has no taps; it must have at least one")
    sums = state_dtype(k.dtype if dtype is None else dtype)
    state = LazyState(k, batch, length, sums)
    if initial_state is not None:
        past = initial_state.detach().to(sums)
        wanted = (batch, k.shape[0], k.shape[1] - 1)
        LAZY.require(past.shape == wanted, f"initial_state has shape {list(past.shape)}; it must have {list(wanted)}")
        if past.shape[2]:
            nothing = past.new_zeros(batch, k.shape[0], length)
            with torch.no_grad(), _without_autocast(k):
                state.sums.copy_(fft_conv(nothing, k.detach().to(sums), initial_state=past))
    return state


def _without_autocast(x: Tensor) -> Any:
    """Sums are as exact within autocast as without, where it would round what they are made of."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@torch.no_grad()
def fft_conv_step(
    u: Tensor,
    k: Tensor,
    state: Tensor | LazyState,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The next output of ``fft_conv(..., causal=True)``, for one more input. Exact, without gradients.

    Args:
        u: ``[B, H]``, the input of this step, in any floating dtype.
        k: ``[H, Nk]``, the filter. With a :class:`LazyState` it is the state's own copy that counts; pass the same.
        state: changed in place. Either the window of past inputs, float32 (float64 for float64 inputs) ``[B, H,
            Nk - 1]``, as ``fft_conv(return_state=True)`` returns it, which costs Nk products a token, each element in
            a place of its own; or what :func:`lazy_state` made, which costs O(log^2 N) a token on average, for filters
            as long as the sequence.
        pre_gate: ``[B, H]``, dtype of u; so is ``post_gate``.
        post_gate: as :func:`fft_conv`.
        skip: ``[H]``, as :func:`fft_conv`.

    Returns:
        ``y [B, H]`` in the dtype of u.

    Raises:
        TypeError, ValueError: the message names the argument. ValueError too when a lazy state is full.

    Under autocast u and the gates are cast to the autocast dtype, as by :func:`fft_conv`; sums stay float32. Runs in
    PyTorch on any device. A step is bound by reading the window, or by the host; there is nothing for a kernel of its
    own to save but launches.
    """
    u, pre_gate, post_gate = autocast(u, pre_gate, post_gate)
    lazy = isinstance(state, LazyState)
    if not lazy and not isinstance(state, Tensor):
        raise TypeError(f"fft_conv_step: state is {kind(state)}; it must be a torch.Tensor or a LazyState")
    window: Any = state.inputs if lazy else state
    sizes = STEP.check(u=u, k=k, state=window, pre_gate=pre_gate, post_gate=post_gate, skip=skip)
    sums = state_dtype(u.dtype)
    if window.dtype != sums:
        raise TypeError(f"fft_conv_step: state is {window.dtype}; it must be {sums} for inputs of {u.dtype}")
    if isinstance(state, LazyState):
        STEP.require(state.position < state.length, f"state is full: it was made for {state.length} tokens")
    else:
        STEP.require(sizes["Nk"] >= 1, "k has no taps; it must have at least one")
        width = sizes["Nk"] - 1
        STEP.require(sizes["Past"] == width, f"state has {sizes['Past']} steps; it must have Nk - 1 = {width}")
        check_own_memory(STEP, "state", state)
    with _without_autocast(u):
        return _step(u, k, state, pre_gate, post_gate, skip, sums)


def _step(
    u: Tensor, k: Tensor, state: Tensor | LazyState, pre_gate: Tensor | None, post_gate: Tensor | None,
    skip: Tensor | None, sums: torch.dtype,
) -> Tensor:  # fmt: skip
    v = u.to(sums) if pre_gate is None else u.to(sums) * pre_gate
    if isinstance(state, LazyState):
        w = state.step(v)
    else:
        taps = k.to(sums)
        w = taps[:, 0] * v
        if taps.shape[1] > 1:
            w = w + torch.linalg.vecdot(taps[:, 1:].flip(1), state)
            state.copy_(torch.cat([state[:, :, 1:], v[:, :, None]], dim=2))
    if skip is not None:
        w = w + skip.to(sums) * v
    return (w if post_gate is None else w * post_gate).to(u.dtype)
