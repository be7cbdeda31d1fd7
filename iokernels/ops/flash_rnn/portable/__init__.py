"""The backend ``torch``: a loop over time with one batched product a step, and a backward pass of its own.

A step is one product of all heads, ``s = R h + b``, one addition that brings it, gate by gate, to what the inputs gave,
and the cell's pointwise equations, whose results go straight to where they are kept. The backward
pass is :mod:`.backward`.

Memory beyond what :class:`.options.Forward` keeps is that of a step. All of it is float32, float64 for float64 inputs.
Values that are kept in that dtype are kept after their activations; others before, where rounding them costs less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iokernels.ops.flash_rnn.cells import ANYWHERE, Cell, States
from iokernels.ops.flash_rnn.options import Forward, Options, empty_history, empty_out, empty_state, empty_values
from iokernels.ops.shared.layout import state_dtype

from .backward import backward
from .steps import by_gate, initial_of, offset_of, product, step_major, valid_of, weights_of

__all__ = ["backward", "forward"]


def forward(gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, options: Options) -> Forward:
    """Run all steps. See :class:`.options.Forward` for what is returned; ``keep`` asks for its last two."""
    cell, kind = options.kind(), state_dtype(gates.dtype)
    keeps_values, same = keep and not options.recompute_gates, gates.dtype == kind
    as_they_are = keeps_values and (same or cell.exact)
    result = Forward(
        empty_out(gates),
        empty_state(gates, cell),
        empty_values(gates, cell, keeps_values, gates_outside=True),
        empty_history(gates, cell, keep),
    )
    batch, length, _, heads, width = gates.shape
    weights, offset = weights_of(recurrent).transpose(1, 2).contiguous(), offset_of(bias, batch, kind)
    raw = gates.new_empty((heads, batch, cell.gates * width), dtype=kind)
    s, valid = by_gate(raw, cell), valid_of(gates, options)
    inputs, outs = step_major(gates), step_major(result.out).unbind(0)
    values = step_major(result.values)
    if as_they_are:
        work = _steps(values, cell)
    else:
        work = _steps(gates.new_empty((1, cell.values, heads, batch, width), dtype=kind), cell) * length
    x_joined, x_apart = inputs[:, : cell.joined].unbind(0), inputs[:, cell.joined :].unbind(0)
    s_joined, s_apart = s[: cell.joined], s[cell.joined :]
    history = [step_major(x).unbind(0) for x in result.history.unbind(2)] if keep else []
    initial = initial_of(gates, options)
    states = cell.start(initial)
    for step in range(length):
        h = states[0] if same else states[0].to(gates.dtype).to(kind)
        product(h, weights, offset, raw)
        now = work[step]
        torch.add(x_joined[step], s_joined, out=now.joined)
        if cell.apart:
            now.of_h.copy_(s_apart)
            now.of_x.copy_(x_apart[step])
        if keeps_values and not as_they_are:
            values[step].copy_(now.all)
        for part, in_place in now.active:
            in_place(part)
        # h is read by the next product, which is faster where h is in one place.
        into = (None, *(kept[step] for kept in history)) if valid is None and keep else ANYWHERE
        following = cell.forward(now.values, states, into)
        if valid is None:
            states = following
            outs[step].copy_(states[0])
            continue
        states = tuple(torch.where(valid[step], new, old) for new, old in zip(following, states, strict=True))
        outs[step].copy_(states[0].masked_fill(~valid[step], 0.0))
        for kept, state in zip(history, states[1:], strict=False):
            kept[step].copy_(state)
    if options.lengths is not None:
        # A sequence without a step ends with the states that were given, not with what the first step makes of them.
        begun = (options.lengths > 0)[None, :, None]
        states = tuple(torch.where(begun, new, old) for new, old in zip(states, initial, strict=True))
    for index, state in enumerate(states if length else initial):
        result.state[index] = state.transpose(0, 1)
    return result


class _Step(NamedTuple):
    """Views of the values ``[A, H, B, D]`` of a step."""

    all: Tensor
    joined: Tensor  # gates whose two parts are added
    of_h: Tensor  # of the gates apart, if there are any, what h gives,
    of_x: Tensor  # and what the inputs give
    active: tuple[tuple[Tensor, Callable[[Tensor], Tensor]], ...]  # with the activation of each part
    values: States  # one by one


def _steps(values: Tensor, cell: Cell) -> list[_Step]:
    """The views of every step of ``values [N, A, H, B, D]``.

    A view costs as much as a small operation; all of one kind at once are cheap.
    """
    everything = values.unbind(0)
    views = [everything] * 4
    if cell.apart:
        some = slice(cell.joined), slice(cell.joined, cell.gates), slice(cell.gates, None)
        views = [everything, *(values[:, each].unbind(0) for each in some)]
    active = [[(x, activation.in_place) for x in values[:, each].unbind(0)] for each, activation in cell.runs()]
    active = list(zip(*active, strict=True)) or [()] * len(values)
    separate = zip(*(x.unbind(0) for x in values.unbind(1)), strict=True)
    return [_Step(*each) for each in zip(*views, active, separate, strict=True)]
