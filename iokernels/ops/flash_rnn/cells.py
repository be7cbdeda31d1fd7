"""The recurrent cells: their equations forward and backward, once, for the backends in PyTorch.

A cell sees one time step of one head. ``x`` is its slice of the input gates, ``s_g = R_g h + b_g`` the recurrent part.
Everything that follows is pointwise. It starts from A = G + apart values, the tensors

    x_g + s_g  for the first G - apart gates,  then  s_g  and then  x_g  of the last ``apart`` gates

to each of which the cell's activation, if it has one, is applied first. Only a cell that does not simply add the two
parts of a gate (GRU) has gates apart.

The backward pass through time is linear in the gradient that comes back, and its coefficients do not depend on it. So a
cell states them in two functions: ``factors`` computes the coefficients, for many steps at once, and ``backward``
applies those of one step. A new cell is a :class:`Cell` in this file, and its two functions in ``triton/cells``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

States = tuple[Tensor, ...]
"""Tensors of one shape ``[..., D]``: one for every state of a cell, h first, or one for every value."""

ANYWHERE: tuple[None, ...] = (None,) * 4
"""What ``Cell.forward`` takes in place of tensors for its results: it then makes new ones."""


class Activation(NamedTuple):
    """A nonlinearity y(v): as a function, in place, and ``slope(g, y, out)``, which stores ``g y'`` in ``out``."""

    apply: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Any]


_sigmoid_slope, _tanh_slope = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.default

SIGMOID = Activation(torch.sigmoid, torch.sigmoid_, lambda g, y, out: _sigmoid_slope(g, y, grad_input=out))
TANH = Activation(torch.tanh, torch.tanh_, lambda g, y, out: _tanh_slope(g, y, grad_input=out))


class Cell(NamedTuple):
    """One kind of cell.

    ``forward(values, states, into)`` takes the A values after their activations and returns the next states, in the
    tensors of ``into`` where these are not None. It also runs under autograd, with :data:`ANYWHERE`.

    ``factors(values, previous, states)`` returns two tuples of coefficients for any number of steps. The first has one
    for every value: what the caller multiplies with the slope of the value's activation to get the A ``slopes``. The
    second is the cell's own. ``backward(slopes, factors, dstates, dvalues)`` takes both of one step and the gradients
    of the states after it, fills the A ``dvalues`` with the gradients of the values before their activations, and
    returns the gradients of the states before it as far as they do not come through R: None where there is no such
    path.

    ``start(states)`` is what the first step reads in place of the initial states.

    ``exact`` says that the values are kept for a backward pass in the dtype of the states, not in that of the inputs:
    where one is an exponent, rounding it to 16 bits changes what it stands for by as much as the exponent's own error.
    """

    gates: int
    states: tuple[str, ...]
    activations: tuple[Activation | None, ...]
    forward: Callable[[Sequence[Tensor], States, Sequence[Tensor | None]], States]
    factors: Callable[[Sequence[Tensor], States, States], tuple[States, States]]
    backward: Callable[[States, States, States, States], tuple[Tensor | None, ...]]
    apart: int = 0
    reads_h: bool = False  # whether ``factors`` looks at h of the step before
    start: Callable[[States], States] = lambda states: states
    exact: bool = False

    @property
    def values(self) -> int:
        """A: how many values a unit has at a step."""
        return self.gates + self.apart

    @property
    def joined(self) -> int:
        """How many gates add their two parts."""
        return self.gates - self.apart

    def step(self, values: Tensor, states: States) -> States:
        """The next states from the values ``[A, ..., D]`` before their activations, in new tensors."""
        active = [
            value if activation is None else activation.apply(value)
            for value, activation in zip(values.unbind(0), self.activations, strict=True)
        ]
        return self.forward(active, states, ANYWHERE)

    def runs(self) -> list[tuple[slice, Activation]]:
        """The activations, each with the neighbouring values that share it."""
        found: list[tuple[slice, Activation]] = []
        for index, activation in enumerate(self.activations):
            if activation is None:
                continue
            first = index
            if found and found[-1][0].stop == index and found[-1][1] is activation:
                first = found.pop()[0].start
            found.append((slice(first, index + 1), activation))
        return found


def _lstm(values: Sequence[Tensor], states: States, into: Sequence[Tensor | None]) -> States:
    i, f, z, o = values
    c = torch.addcmul(f * states[1], i, z, out=into[1])
    return torch.mul(o, c.tanh(), out=into[0]), c


def _lstm_factors(values: Sequence[Tensor], previous: States, states: States) -> tuple[States, States]:
    i, f, z, o = values
    t = states[1].tanh()
    return (z, previous[1], i, t), (_tanh_backward(o, t), f)


def _lstm_backward(slopes: States, factors: States, dstates: States, dvalues: States) -> tuple[Tensor | None, ...]:
    h_of_c, f = factors
    dh, dc = dstates
    dc = torch.addcmul(dc, dh, h_of_c)
    for gate, target in enumerate((dc, dc, dc, dh)):
        torch.mul(target, slopes[gate], out=dvalues[gate])
    return None, dc * f


def _gru(values: Sequence[Tensor], states: States, into: Sequence[Tensor | None]) -> States:
    r, z, s, x = values
    n = torch.addcmul(x, r, s).tanh()
    return (torch.lerp(n, states[0], z, out=into[0]),)


def _gru_factors(values: Sequence[Tensor], previous: States, states: States) -> tuple[States, States]:
    r, z, s, x = values
    n = torch.addcmul(x, r, s).tanh()
    into_n = _tanh_backward(1 - z, n)
    return (into_n * s, previous[0] - n, into_n * r, into_n), (z,)


def _gru_backward(slopes: States, factors: States, dstates: States, dvalues: States) -> tuple[Tensor | None, ...]:
    for slope, dvalue in zip(slopes, dvalues, strict=True):
        torch.mul(dstates[0], slope, out=dvalue)
    return (dstates[0] * factors[0],)


def _elman(values: Sequence[Tensor], states: States, into: Sequence[Tensor | None]) -> States:
    return (torch.tanh(values[0], out=into[0]),)


def _elman_factors(values: Sequence[Tensor], previous: States, states: States) -> tuple[States, States]:
    h = values[0].tanh()
    return (1 - h * h,), ()


def _elman_backward(slopes: States, factors: States, dstates: States, dvalues: States) -> tuple[Tensor | None, ...]:
    torch.mul(dstates[0], slopes[0], out=dvalues[0])
    return (None,)


def _slstm_start(states: States) -> States:
    h, c, n, m = states
    # Where nothing was stored yet, the stabiliser of the past means nothing. After a step n is positive.
    return h, c, n, m.masked_fill(n == 0, float("-inf"))


def _slstm(values: Sequence[Tensor], states: States, into: Sequence[Tensor | None]) -> States:
    i, f, z, o = values
    _, c, n, m = states
    kept = logsigmoid(f) + m.detach()
    m = torch.maximum(kept, i, out=into[3]).detach()  # counts as a constant
    i, f = (i - m).exp_(), kept.sub_(m).exp_()
    c = torch.addcmul(f * c, i, z, out=into[1])
    n = torch.addcmul(i, f, n, out=into[2])
    return torch.div(o * c, n, out=into[0]), c, n, m


def _slstm_factors(values: Sequence[Tensor], previous: States, states: States) -> tuple[States, States]:
    i, f, z, o = values
    _, c, n, m = states
    i, decay = (i - m).exp_(), logsigmoid(f).add_(previous[3]).sub_(m).exp_()
    kept = (-f).sigmoid_().mul_(decay)
    h_of_c, h_of_o = o / n, c / n
    into = i * z, kept * previous[1], i, h_of_o
    return into, (h_of_c, (h_of_c * h_of_o).neg_(), i, kept * previous[2], decay)


def _slstm_backward(slopes: States, factors: States, dstates: States, dvalues: States) -> tuple[Tensor | None, ...]:
    h_of_c, h_of_n, n_of_i, n_of_f, decay = factors
    dh, dc, dn, _ = dstates
    dc, dn = torch.addcmul(dc, dh, h_of_c), torch.addcmul(dn, dh, h_of_n)
    for gate, target in enumerate((dc, dc, dc, dh)):
        torch.mul(target, slopes[gate], out=dvalues[gate])
    dvalues[0].addcmul_(dn, n_of_i)
    dvalues[1].addcmul_(dn, n_of_f)
    return None, dc * decay, dn * decay, None


CELLS: dict[str, Cell] = {
    # i, f, z, o.  c = sigmoid(f) c + sigmoid(i) tanh(z);  h = sigmoid(o) tanh(c).
    "lstm": Cell(4, ("h", "c"), (SIGMOID, SIGMOID, TANH, SIGMOID), _lstm, _lstm_factors, _lstm_backward),
    # r, z, n.  n = tanh(x_n + sigmoid(r) s_n);  h = sigmoid(z) h + (1 - sigmoid(z)) n.
    "gru": Cell(3, ("h",), (SIGMOID, SIGMOID, None, None), _gru, _gru_factors, _gru_backward, apart=1, reads_h=True),
    # h = tanh(x + s).
    "elman": Cell(1, ("h",), (None,), _elman, _elman_factors, _elman_backward),
    # i, f, z, o.  m' = max(log sigmoid(f) + m, i);  c = F c + I tanh(z), n = F n + I with I = exp(i - m') and
    # F = exp(log sigmoid(f) + m - m');  h = sigmoid(o) c / n.  xLSTM (Beck et al., 2024, arXiv:2405.04517).
    "slstm": Cell(
        4,
        ("h", "c", "n", "m"),
        (None, None, TANH, SIGMOID),
        _slstm,
        _slstm_factors,
        _slstm_backward,
        start=_slstm_start,
        exact=True,
    ),
}
"""Every cell by name, with the order of its gates."""
