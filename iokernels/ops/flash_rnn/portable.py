"""The backend ``torch``: a loop over time with one batched product a step, and a backward pass of its own.

A step is one product of all heads, ``s = R h + b``, one addition that brings it, gate by gate, to what the inputs gave,
and the cell's pointwise equations, whose results go straight to where they are kept. The backward pass is
:mod:`.portable_bwd`.

Memory beyond what :class:`.options.Forward` keeps is that of a step. All of it is float32, float64 for float64 inputs.
Where the inputs have that dtype too, the values are kept after their activations; else before, where rounding costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import ANYWHERE
from .options import Forward, Options, empty_history, empty_out, empty_state, empty_values, state_dtype
from .portable_bwd import backward
from .portable_steps import by_gate, initial_of, join, offset_of, product, step_major, valid_of, weights_of

__all__ = ["backward", "forward"]


def forward(gates: Tensor, recurrent: Tensor, bias: Tensor | None, keep: bool, options: Options) -> Forward:
    """Run all steps. See :class:`.options.Forward` for what is returned; ``keep`` asks for its last two."""
    cell, kind = options.kind(), state_dtype(gates.dtype)
    keeps_values, same = keep and not options.recompute_gates, gates.dtype == kind
    result = Forward(
        empty_out(gates),
        empty_state(gates, cell),
        empty_values(gates, cell, keeps_values, gates_outside=True),
        empty_history(gates, cell, keep),
    )
    batch, length, _, heads, width = gates.shape
    weights, offset = weights_of(recurrent).transpose(1, 2), offset_of(bias, batch, kind)
    raw = gates.new_empty((heads, batch, cell.gates * width), dtype=kind)
    s, scratch = by_gate(raw, cell), gates.new_empty((cell.values, heads, batch, width), dtype=kind)
    runs, valid = cell.runs(), valid_of(gates, options)
    inputs, outs = step_major(gates).unbind(0), step_major(result.out).unbind(0)
    values = step_major(result.values).unbind(0)
    history = [step_major(x).unbind(0) for x in result.history.unbind(2)] if keep else []
    initial = initial_of(gates, options)
    states = cell.start(initial)
    for step in range(length):
        h = states[0] if same else states[0].to(gates.dtype).to(kind)
        product(h, weights, offset, raw)
        now = values[step] if keeps_values and same else scratch
        join(now, inputs[step], s, cell)
        if keeps_values and not same:
            values[step].copy_(now)
        for some, activation in runs:
            activation.in_place(now[some])
        into = (outs[step], *(kept[step] for kept in history)) if keep else (outs[step], *ANYWHERE)
        if valid is None and same:
            states = cell.forward(now.unbind(0), states, into)
            continue
        following = cell.forward(now.unbind(0), states, ANYWHERE)
        if valid is None:
            states = following
            outs[step].copy_(states[0])
        else:
            states = tuple(torch.where(valid[step], new, old) for new, old in zip(following, states, strict=True))
            outs[step].copy_(states[0].masked_fill(~valid[step], 0.0))
        for kept, state in zip(into[1:], states[1:], strict=False):
            if kept is not None:
                kept.copy_(state)
    if options.lengths is not None:
        # A sequence without a step ends with the states that were given, not with what the first step makes of them.
        begun = (options.lengths > 0)[None, :, None]
        states = tuple(torch.where(begun, new, old) for new, old in zip(states, initial, strict=True))
    for index, state in enumerate(states if length else initial):
        result.state[index] = state.transpose(0, 1)
    return result
