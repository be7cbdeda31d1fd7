"""What the backends of ``flash_rnn`` agree on: the arguments after gates, recurrent and bias, and what is kept for the
backward pass.

Inputs are ``gates [B, N, G, H, D]``, ``recurrent [G, H, D, D]`` (gate, head, out, in) and ``bias [G, H, D]`` or None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype

from .cells import CELLS, Cell


class Options(NamedTuple):
    """Everything beside gates, recurrent and bias, after validation.

    At step t a head computes ``s_g = R_g h + b_g``, with h rounded to the dtype of the inputs, and its cell makes the
    next states of ``gates[:, t]``, s and the states, in float32. A sequence b stops after ``lengths[b]`` steps: its
    states stay as they are, and its rows of h are 0.

    The gradient of h that comes back through the product, ``sum_g R_g^T ds_g``, is clamped to ``recurrent_clip`` in
    magnitude where that is above 0, and dropped with ``recurrent_cut``.
    """

    # Tensors, in the order of the operators' schemas.
    initial_state: Tensor | None = None  # float32 (float64 for float64 inputs) [S, B, H, D]
    lengths: Tensor | None = None  # int32 [B]
    # The others.
    cell: str = "lstm"
    recurrent_clip: float = 0.0
    recurrent_cut: bool = False
    recompute_gates: bool = False

    def kind(self) -> Cell:
        """The cell."""
        return CELLS[self.cell]


class Forward(NamedTuple):
    """What a forward pass returns.

    ``out [B, N, H, D]``; ``state [S, B, H, D]`` after the last step; and, where a gradient will be taken, ``values
    [B, N, A, H, D]`` (see :mod:`.cells`) in the dtype of the inputs, or of the states for a cell that is ``exact``,
    empty where they are recomputed, and ``history [B, N, S - 1, H, D]``, the states after h behind every step, of the
    states' dtype. The last two lie in memory as ``[N, H, B, A, D]`` and ``[S - 1, N, H, B, D]``, so that what a step of
    a head touches is in one place; on the backend ``torch``, which works on all heads of a gate at once, the values lie
    as ``[N, A, H, B, D]``.
    """

    out: Tensor
    state: Tensor
    values: Tensor
    history: Tensor


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    gates: bool
    recurrent: bool
    bias: bool = False
    initial_state: bool = False


class Gradients(NamedTuple):
    """What a backward pass returns, each of the shape and dtype of its input; None where not needed."""

    gates: Tensor | None
    recurrent: Tensor | None
    bias: Tensor | None = None
    initial_state: Tensor | None = None


def empty_out(gates: Tensor) -> Tensor:
    """An uninitialised h [B, N, H, D]: time outside the batch if gates have it so."""
    batch, length, _, heads, width = gates.shape
    if gates.stride(1) > gates.stride(0):
        # Not the view of another tensor, which autograd would not let be changed in place.
        row = heads * width
        return gates.new_empty_strided((batch, length, heads, width), (row, batch * row, width, 1))
    return gates.new_empty((batch, length, heads, width))


def empty_gates(out: Tensor, cell: Cell) -> Tensor:
    """An uninitialised gradient of the gates [B, N, G, H, D], with the time where ``out`` has it."""
    batch, length, heads, width = out.shape
    if out.stride(1) > out.stride(0):
        return out.new_empty((length, batch, cell.gates, heads, width)).transpose(0, 1)
    return out.new_empty((batch, length, cell.gates, heads, width))


def empty_state(gates: Tensor, cell: Cell) -> Tensor:
    """Uninitialised states [S, B, H, D]."""
    batch, _, _, heads, width = gates.shape
    return gates.new_empty((len(cell.states), batch, heads, width), dtype=state_dtype(gates.dtype))


def empty_values(gates: Tensor, cell: Cell, kept: bool = True, gates_outside: bool = False) -> Tensor:
    """Uninitialised values [B, N, A, H, D] of every step; of no step unless ``kept``."""
    batch, length, _, heads, width = gates.shape
    length = length if kept else 0
    dtype = state_dtype(gates.dtype) if cell.exact else gates.dtype
    if gates_outside:
        return gates.new_empty((length, cell.values, heads, batch, width), dtype=dtype).permute(3, 0, 1, 2, 4)
    return gates.new_empty((length, heads, batch, cell.values, width), dtype=dtype).permute(2, 0, 3, 1, 4)


def empty_history(gates: Tensor, cell: Cell, kept: bool = True) -> Tensor:
    """Uninitialised states after h behind every step, [B, N, S - 1, H, D]; of no step unless ``kept``."""
    batch, length, _, heads, width = gates.shape
    size = (len(cell.states) - 1, length if kept else 0, heads, batch, width)
    return gates.new_empty(size, dtype=state_dtype(gates.dtype)).permute(3, 1, 0, 2, 4)


def empty_forward(gates: Tensor, keep: bool, options: Options) -> tuple[Forward, Tensor | None, Tensor | None]:
    """What the kernels of a forward pass write, and of it the values and the history where they are kept, else None.

    Uninitialised, but that rows of h are 0 where sequences may end early: a block stops with its longest one.
    """
    cell = options.kind()
    keeps_values, keeps_history = keep and not options.recompute_gates, keep and len(cell.states) > 1
    result = Forward(
        empty_out(gates),
        empty_state(gates, cell),
        empty_values(gates, cell, keeps_values),
        empty_history(gates, cell, keep),
    )
    if options.lengths is not None:
        result.out.zero_()
    return result, result.values if keeps_values else None, result.history if keeps_history else None


class StepGradients(NamedTuple):
    """What the kernels of a backward pass write.

    ``gates [B, N, G, H, D]``; ``apart [B, N, APART, H, D]``, the gradients of s where they are not those of a gate, or
    None; and ``initial_state``, or None where it is not needed.
    """

    gates: Tensor
    apart: Tensor | None
    initial_state: Tensor | None


def empty_gradients(out: Tensor, options: Options, needs: Needs) -> StepGradients:
    """Uninitialised, but that those of steps are 0 where sequences may end early."""
    cell = options.kind()
    batch, length, heads, width = out.shape
    gates = empty_gates(out, cell)
    apart = out.new_empty((batch, length, cell.apart, heads, width)) if cell.apart else None
    if options.lengths is not None:
        for grad in (gates, apart):
            if grad is not None:
                grad.zero_()
    return StepGradients(gates, apart, empty_state(gates, cell) if needs.initial_state else None)


def initial_states(gates: Tensor, options: Options) -> Tensor:
    """The states before the first step, [S, B, H, D]."""
    if options.initial_state is not None:
        return options.initial_state
    return empty_state(gates, options.kind()).zero_()


def valid_steps(gates: Any, lengths: Tensor) -> Tensor:
    """Which steps belong to their sequence: bool [B, N]."""
    return torch.arange(gates.shape[1], device=gates.device)[None, :] < lengths[:, None]
