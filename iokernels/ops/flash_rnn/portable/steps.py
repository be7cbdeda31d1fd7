"""What the forward and the backward loop of the backend ``torch`` share: views of a step, and its product.

A step works on tensors ``[H, B, D]``, and ``[A, H, B, D]`` for values, gate by gate, so that a gate is in one place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.flash_rnn.cells import Cell, States
from iokernels.ops.flash_rnn.options import Options, initial_states, valid_steps
from iokernels.ops.shared.layout import state_dtype


def step_major(x: Tensor) -> Tensor:
    """[B, N, H, D] as [N, H, B, D], and [B, N, A, H, D] as [N, A, H, B, D]."""
    return x.permute(1, 2, 0, 3) if x.dim() == 4 else x.permute(1, 2, 3, 0, 4)


def by_gate(s: Tensor, cell: Cell) -> Tensor:
    """What a product made, [H, ..., G D], as [G, H, ..., D]."""
    return s.unflatten(-1, (cell.gates, -1)).movedim(-2, 0)


def weights_of(recurrent: Tensor) -> Tensor:
    """R as one matrix a head, [H, G D, D] (out, in), in the dtype of the states."""
    return recurrent.to(state_dtype(recurrent.dtype)).transpose(0, 1).flatten(1, 2).contiguous()


def initial_of(gates: Tensor, options: Options) -> States:
    """The states before the first step."""
    return tuple(x.transpose(0, 1).contiguous() for x in initial_states(gates, options).unbind(0))


def valid_of(x: Tensor, options: Options) -> Tensor | None:
    """Which steps belong to their sequence, [N, 1, B, 1]; None where all do."""
    return None if options.lengths is None else valid_steps(x, options.lengths).t()[:, None, :, None]


def offset_of(bias: Tensor | None, rows: int, kind: torch.dtype) -> Tensor | None:
    """b as what a product of so many rows adds up to, [H, rows, G D]."""
    return None if bias is None else bias.to(kind).transpose(0, 1).flatten(1)[:, None].expand(-1, rows, -1)


def product(h: Tensor, weights: Tensor, offset: Tensor | None, out: Tensor) -> None:
    """``s = R h + b``; ``weights`` are [H, D, G D]."""
    if offset is None:
        torch.bmm(h, weights, out=out)
    else:
        torch.baddbmm(offset, h, weights, out=out)


def join(values: Tensor, x: Tensor, s: Tensor, cell: Cell) -> None:
    """Fill ``values [A, ...]`` from the two parts of the gates, x and s ``[G, ...]``."""
    if not cell.apart:
        torch.add(x, s, out=values)
        return
    torch.add(x[: cell.joined], s[: cell.joined], out=values[: cell.joined])
    values[cell.joined : cell.gates].copy_(s[cell.joined :])
    values[cell.gates :].copy_(x[cell.joined :])
