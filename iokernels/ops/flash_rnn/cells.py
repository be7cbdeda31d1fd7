"""The recurrent cells: their equations forward and backward, once, for the backends in PyTorch.

A cell sees one time step of one head. ``x`` is its slice of the input gates, ``s_g = R_g h + b_g`` the recurrent part.
Everything that follows is pointwise and works on the ``values``, a tensor ``[..., A, D]`` that holds

    x_g + s_g  for the first G - apart gates,  then  s_g  and then  x_g  of the last ``apart`` gates

so A = G + apart. Only a cell that does not simply add the two parts of a gate (GRU) has gates apart.

The backward pass through time is linear in the gradient that comes back, and its coefficients do not depend on it. So a
cell states them in two functions: ``factors`` computes the coefficients, for many steps at once, and ``backward``
applies those of one step. A new cell is a :class:`Cell` in this file, and its two functions in ``triton_cells``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# ``g s (1 - s)`` and ``g (1 - t^2)`` in one pass.
_through_sigmoid, _through_tanh = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.tanh_backward.default

States = tuple[Tensor, ...]
"""One tensor ``[..., D]`` for every state of a cell, h first."""


class Cell(NamedTuple):
    """One kind of cell.

    ``forward(values, states)`` returns the next states. ``factors(values, previous, states)`` returns tensors whose
    leading dimensions are those of ``values``; ``backward(factors, dstates, dvalues)`` takes those of one step and the
    gradients of the states after it, fills ``dvalues [..., A, D]``, and returns the gradients of the states before it
    as far as they do not come through R: None where there is no such path.
    """

    gates: int
    states: tuple[str, ...]
    forward: Callable[[Tensor, States], States]
    factors: Callable[[Tensor, States, States], States]
    backward: Callable[[States, States, Tensor], tuple[Tensor | None, ...]]
    apart: int = 0
    reads_h: bool = False  # whether ``factors`` looks at h of the step before

    @property
    def values(self) -> int:
        """A: how many values a unit has at a step."""
        return self.gates + self.apart

    @property
    def joined(self) -> int:
        """How many gates add their two parts."""
        return self.gates - self.apart


def _lstm(values: Tensor, states: States) -> States:
    i, f, _, o = values.sigmoid().unbind(-2)
    c = torch.addcmul(f * states[1], i, values[..., 2, :].tanh())
    return o * c.tanh(), c


def _lstm_factors(values: Tensor, previous: States, states: States) -> States:
    i, f, _, o = values.sigmoid().unbind(-2)
    z, t = values[..., 2, :].tanh(), states[1].tanh()
    into_c = torch.stack([_through_sigmoid(z, i), _through_sigmoid(previous[1], f), _through_tanh(i, z)], -2)
    return _through_tanh(o, t), into_c, _through_sigmoid(t, o), f


def _lstm_backward(factors: States, dstates: States, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    h_of_c, into_c, into_o, f = factors
    dh, dc = dstates
    dc = torch.addcmul(dc, dh, h_of_c)
    torch.mul(dc.unsqueeze(-2), into_c, out=dvalues[..., :3, :])
    torch.mul(dh, into_o, out=dvalues[..., 3, :])
    return None, dc * f


def _gru(values: Tensor, states: States) -> States:
    r, z = values[..., :2, :].sigmoid().unbind(-2)
    n = torch.addcmul(values[..., 3, :], r, values[..., 2, :]).tanh()
    return (torch.addcmul(n, z, states[0] - n),)


def _gru_factors(values: Tensor, previous: States, states: States) -> States:
    r, z = values[..., :2, :].sigmoid().unbind(-2)
    s = values[..., 2, :]
    n = torch.addcmul(values[..., 3, :], r, s).tanh()
    into_n = _through_tanh(1 - z, n)
    into = torch.stack([_through_sigmoid(into_n * s, r), _through_sigmoid(previous[0] - n, z), into_n * r, into_n], -2)
    return into, z


def _gru_backward(factors: States, dstates: States, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    into, z = factors
    torch.mul(dstates[0].unsqueeze(-2), into, out=dvalues)
    return (dstates[0] * z,)


def _elman(values: Tensor, states: States) -> States:
    return (values[..., 0, :].tanh(),)


def _elman_factors(values: Tensor, previous: States, states: States) -> States:
    h = values.tanh()
    return (1 - h * h,)


def _elman_backward(factors: States, dstates: States, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    torch.mul(dstates[0].unsqueeze(-2), factors[0], out=dvalues)
    return (None,)


def _slstm_gates(values: Tensor, previous: States, m: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(i', f', m). The exponential gates, relative to the stabiliser m, which counts as a constant."""
    i, f = values[..., 0, :], logsigmoid(values[..., 1, :])
    # Where nothing was stored yet, the stabiliser of the past means nothing.
    past = previous[3].detach().masked_fill(previous[2] == 0, float("-inf"))
    m = torch.maximum(f + past, i).detach() if m is None else m
    return (i - m).exp(), (f + past - m).exp(), m


def _slstm(values: Tensor, states: States) -> States:
    i, f, m = _slstm_gates(values, states, None)
    c = torch.addcmul(f * states[1], i, values[..., 2, :].tanh())
    n = torch.addcmul(i, f, states[2])
    return values[..., 3, :].sigmoid() * c / n, c, n, m


def _slstm_factors(values: Tensor, previous: States, states: States) -> States:
    _, c, n, m = states
    i, f, _ = _slstm_gates(values, previous, m)
    z, o = values[..., 2, :].tanh(), values[..., 3, :].sigmoid()
    kept = f * (-values[..., 1, :]).sigmoid()
    h_of_c = o / n
    h = h_of_c * c
    into_c = torch.stack([i * z, kept * previous[1], _through_tanh(i, z)], -2)
    into_n = torch.stack([i, kept * previous[2]], -2)
    return h_of_c, -h / n, into_c, into_n, h - h * o, f


def _slstm_backward(factors: States, dstates: States, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    h_of_c, h_of_n, into_c, into_n, into_o, f = factors
    dh, dc, dn, _ = dstates
    dc, dn = torch.addcmul(dc, dh, h_of_c), torch.addcmul(dn, dh, h_of_n)
    torch.mul(dc.unsqueeze(-2), into_c, out=dvalues[..., :3, :])
    dvalues[..., :2, :].addcmul_(dn.unsqueeze(-2), into_n)
    torch.mul(dh, into_o, out=dvalues[..., 3, :])
    return None, dc * f, dn * f, None


CELLS: dict[str, Cell] = {
    # i, f, z, o.  c = sigmoid(f) c + sigmoid(i) tanh(z);  h = sigmoid(o) tanh(c).
    "lstm": Cell(4, ("h", "c"), _lstm, _lstm_factors, _lstm_backward),
    # r, z, n.  n = tanh(x_n + sigmoid(r) s_n);  h = sigmoid(z) h + (1 - sigmoid(z)) n.
    "gru": Cell(3, ("h",), _gru, _gru_factors, _gru_backward, apart=1, reads_h=True),
    # h = tanh(x + s).
    "elman": Cell(1, ("h",), _elman, _elman_factors, _elman_backward),
    # i, f, z, o.  m' = max(log sigmoid(f) + m, i);  c = F c + I tanh(z), n = F n + I with I = exp(i - m') and
    # F = exp(log sigmoid(f) + m - m');  h = sigmoid(o) c / n.  xLSTM (Beck et al., 2024, arXiv:2405.04517).
    "slstm": Cell(4, ("h", "c", "n", "m"), _slstm, _slstm_factors, _slstm_backward),
}
"""Every cell by name, with the order of its gates."""
